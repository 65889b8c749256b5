"""Stages that run other programs: the tests that need a GPU, compute-sanitizer, ncu."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .cases import Case, covering
from .log import suspects
from .paths import ROOT, python_path
from .setting import Setting

ONE = [sys.executable, "-m", "benchmarks.gpu.one"]
TESTS = [
    "-m",
    "gpu",
    "--tb=line",
    "-q",
    "-s",
    "-p",
    "benchmarks.gpu.pytest_lines",
    "-p",
    "no:cacheprovider",
    "tests/test_gpu.py",
]
TEST_SECONDS = 60
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED_VOCABS = (31, 1003, 9001, 40007)
SANITIZER_SECONDS = 45
# ncu's names -> ours
METRICS = {
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "smsp__inst_executed.sum": "warp_instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__inst_executed_pipe_xu.sum": "special_functions",
    "lts__t_sector_hit_rate.pct": "l2_hit_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "grid",
    "launch__block_size": "threads",
}


def run(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """(exit status, output) of a program, which is ended with all its children after so many seconds: -9."""
    env = os.environ | {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"} | environment
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    try:
        text, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        text, _ = child.communicate()
    return child.returncode, text


def tests(setting: Setting) -> None:
    """Each test is a line as soon as it is over, and the failed ones are printed (pytest_lines.py); what has
    a line already is left out."""
    processes = ["-n", "2" if setting.rehearsal else "12"] if importlib.util.find_spec("xdist") else []
    # a test that hangs is ended with its process, which pytest-xdist replaces
    limits = (
        ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
        if importlib.util.find_spec("pytest_timeout")
        else []
    )
    command = [sys.executable, "-m", "pytest", *TESTS, *processes, *limits]
    lines = {"KD_TEST_LINES": str(setting.log.path.resolve()), "KD_TEST_SINCE": f"{time.time():.1f}"}
    environment = (
        os.environ
        | lines
        | {"PYTHONPATH": python_path(), "TRITON_INTERPRET": "1" if setting.rehearsal else "0"}
    )
    status = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL).returncode
    counts: dict[str, int] = {}
    for key, x in setting.log.outcomes().items():
        if key.startswith("test "):
            counts[x["outcome"]] = counts.get(x["outcome"], 0) + 1
    setting.log.write("tests", status=status, **counts)


def sanitize(setting: Setting, which: str) -> None:
    """Tools of compute-sanitizer over kernels of the loss, a line for a tool, a backend and a vocabulary,
    with all calls of cases.py.

    which: "cuda", "triton", or "wrong": memcheck and racecheck over the first case of each backend that was
        wrong, CUDA's first.
    """
    if which == "wrong":
        first = {backend: case for backend, case in reversed(suspects(setting.log))}
        jobs = [
            (tool, backend, case, [case])
            for backend, case in sorted(first.items())
            for tool in SANITIZERS[:2]
        ]  # "cuda" before "triton"
    else:
        vocabs, tools = (
            (SANITIZED_VOCABS[:1], SANITIZERS[:1]) if setting.rehearsal else (SANITIZED_VOCABS, SANITIZERS)
        )
        small = {vocab: [str(x) for x in covering(((3, vocab, "bfloat16"),))] for vocab in vocabs}
        jobs = [(tool, which, f"3x{vocab}", small[vocab]) for tool in tools for vocab in vocabs]
    for tool, backend, name, cases in setting.own(jobs):
        key = f"sanitize {tool} {backend} {name}"
        setting.once(
            key, lambda job=(tool, backend, cases): _sanitized(setting, *job), SANITIZER_SECONDS + 15
        )


def _sanitized(setting: Setting, tool: str, backend: str, cases: list[str]) -> dict:
    command = [*ONE, setting.device, setting.backend(backend), *cases]
    if not setting.rehearsal:
        if not shutil.which("compute-sanitizer"):
            return {"error": "compute-sanitizer is not on PATH"}
        command = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            "--print-limit",
            "5",
            *command,
        ]
    # each tensor an allocation of its own, or an access beyond one would be in another's
    status, text = run(command, SANITIZER_SECONDS * setting.patience, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    complaints = [
        x.strip("= ")
        for x in text.splitlines()
        if x.startswith("=========") and re.search(r"rror|azard|ninit|nvalid|at .*\+", x)
    ]
    begun = [x for x in text.splitlines() if x.startswith("case ")]
    bad = {} if status == 0 else {"error": "; ".join(complaints[:6])[:500] or text[-300:]}
    return {
        "status": status,
        "finished": text.count("done "),
        "of": len(cases),
        "last": begun[-1] if begun else "",
    } | bad


def profile(setting: Setting, backend: str) -> None:
    """One launch of the loss under ncu: bytes, instructions, registers. All of ncu's figures go to ncu.csv
    beside the results."""
    for divergence in ("kl", "renyi(0.5)"):
        case = Case(divergence, rows=8, vocab=1000) if setting.rehearsal else Case(divergence)
        setting.once(f"ncu {backend} {case}", lambda case=case: _profiled(setting, backend, case), 90)


def _profiled(setting: Setting, backend: str, case: Case) -> dict:
    command = [*ONE, setting.device, setting.backend(backend), str(case)]
    if setting.rehearsal:
        status, text = run(command, 60 * setting.patience)
        return {"status": status}
    if not shutil.which("ncu"):
        return {"error": "ncu is not on PATH"}
    options = (
        "--clock-control none -k regex:loss -c 1 --set full --csv --page raw --print-units base --log-file"
    ).split()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ncu.csv"
        status, text = run(["ncu", *options, str(file), *command], 80)
        raw = file.read_text() if file.exists() else ""
    with open(setting.folder / "ncu.csv", "a") as all_of_them:  # one file, which is easily brought back
        all_of_them.write(f"{backend} {case}\n{raw}\n")
    return {"status": status} | (figures(raw) or {"error": text[-300:]})


def figures(text: str) -> dict:
    """What METRICS names of ncu's raw page: its head, its units, and a launch to a line."""
    table = [row for row in csv.reader(x for x in text.splitlines() if x.startswith('"'))]
    if len(table) < 3:
        return {}
    found = dict(zip(table[0], table[2], strict=False))
    numbers = {ours: float(found[name].replace(",", "")) for name, ours in METRICS.items() if found.get(name)}
    return {"kernel": found.get("Kernel Name", "")[:60]} | numbers
