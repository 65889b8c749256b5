"""The Triton kernels compiled for GPUs that are not here: no spills, registers within the plan's residency,
16-byte accesses."""

import csv
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "aot.py"


def compile_for(*targets: str, more: tuple[str, ...] = ()) -> str:
    """In a process of its own: here the kernels belong to the interpreter."""
    command = [sys.executable, str(SCRIPT), "--check", "--targets", *targets, *more]
    found = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def differences(lines: list[str]) -> tuple[list[str], int]:
    """(what is not as in results/triton_aot.csv, kernels compared) of the compiler's version that the table
    is of."""
    with open(ROOT / "benchmarks" / "results" / "triton_aot.csv", newline="") as file:
        head, *rows = csv.reader(file)
    known, found = {tuple(row[:3]): row for row in rows}, []
    compared = [cells for x in lines if tuple((cells := x.split(" | "))[:3]) in known]
    for cells in compared:
        row = known[tuple(cells[:3])]
        found += [
            f"{cells[:3]}: {a} {c}, where it was {b}"
            for a, b, c in zip(head, row, cells, strict=False)
            if b != c
        ]
    return found, len(compared)


def test_covering_set():
    """Within their limits, and instructions, registers and accesses as the committed table says."""
    lines = compile_for("sm_90", more=("--brief",)).splitlines()
    assert all(any(kernel in x for x in lines) for kernel in ("loss_rows", "careful_rows"))
    if f"triton=={importlib.metadata.version('triton')}" in (ROOT / "constraints.txt").read_text().split():
        changed, compared = differences(lines)
        assert compared > 25 and changed == [], "where that is on purpose: python benchmarks/aot.py"


def test_a_difference_is_found():
    with open(ROOT / "benchmarks" / "results" / "triton_aot.csv", newline="") as file:
        row = list(csv.reader(file))[1]
    assert differences([" | ".join(row), "no kernel"]) == ([], 1)
    changed, compared = differences([" | ".join([*row[:4], "1", *row[5:]])])
    assert compared == 1 and "registers 1, where it was" in changed[0]


@pytest.mark.slow
def test_few_for_the_others():
    assert "12 kernels, 0 with faults" in compile_for("sm_100", "gfx942", more=("--few",))


@pytest.mark.slow
def test_few_for_all_others():
    assert "18 kernels, 0 with faults" in compile_for("sm_80", "sm_120", "gfx950", more=("--few",))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_covering_set_of_the_others(target):
    compile_for(target)


def test_faults_are_found(tmp_path):
    """A kernel that is given too few registers spills, and says so."""
    code = f"""
import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})
import dataclasses, aot
from kdkernels.backends import triton
case, target = aot.Case(vocab=4096), aot.TARGETS["sm_90"]
launches = case.launches(target.device)
tight = [dataclasses.replace(x, registers=32) for x in launches]
aot.Case.launches = lambda *_: tight[:1]
(found,) = aot.compile_for(case, target)
assert found.spills > 0 and found.registers <= 32 and "spills" in aot.faults(found)[0], found
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "0"}, check=True)
