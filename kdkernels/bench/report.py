"""What is said before and after the tables, and the JSON file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..divergence import parse
from . import forecast, linear, logits, measure, packages, paper, screen
from .contenders import spellings


@dataclass(frozen=True)
class Claim:
    """A line of the README's table of speed."""

    divergence: str
    rows: int
    vocab: int
    dtype: str
    temperature: float
    speed_up: float  # over the best eager spelling
    machine: str


# tests/test_readme.py compares it with the README and with the results that it is from
README = Claim("kl", 256, 128256, "bf16", 2.0, 15.3, "EPYC Zen 5")


LOGITS = (
    "speed-up: of kdkernels over the line. copy: 3 N V b bytes over the time, as a fraction of copy speed. "
    "memory: peak beyond the inputs, in gradients. err: relative error, against extended precision."
)
HIDDEN = (
    "from hidden states: of floor: over the time of the projections and of the fused loss alone. MiB: peak "
    "memory beyond the inputs. err: relative error, against fp64."
)


def introduce(bench: measure.Bench, jobs: list[forecast.Job]) -> None:
    """The machine, what the columns mean, how long it will take, and whether other programs disturb it."""
    machine, modules = bench.machine, {module for module, _ in jobs}
    clock = f" ({machine['clock']})" if "clock" in machine else ""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    screen.say(
        f"{machine['device']}, {threads}{clock}; kdkernels {machine['kdkernels']} "
        f"({machine['cpu_library']}), torch {machine['torch']}"
    )
    if bench.peers and packages.missing():
        screen.say(f"not installed, and left out: {', '.join(packages.missing())}")
    if logits in modules:
        screen.say(LOGITS)
    if linear in modules:
        screen.say(HIDDEN)
        if not bench.peers:
            paper.show()
    with measure.Watch() as watch:
        seconds = forecast.seconds(bench, jobs)
    screen.say(f"{len(jobs)} cases: {forecast.words(seconds)}")
    if line := measure.disturbed(watch.cores):
        screen.say(line)


def compared(cases: list[dict], claim: Claim = README) -> str:
    """This machine's speed-up beside the README's, where its case was measured on a CPU; else empty."""
    wanted = {key: getattr(claim, key) for key in ("divergence", "rows", "vocab", "dtype", "temperature")}
    eager = spellings(parse(claim.divergence), claim.temperature)
    for case in cases:
        if case["device"].startswith("cpu") and wanted.items() <= case.items():
            found = min(case["contenders"][name]["speed_up"] for name in eager)
            return (
                f"KL, {claim.rows} x {claim.vocab} {claim.dtype}: {found:.1f} x as fast as eager; "
                f"README: {claim.speed_up} x ({claim.machine})"
            )
    return ""


def check_json(path: str) -> None:
    """A file that could not be written is an error before the measuring, not after; a device or a pipe would
    be replaced by a file."""
    file = Path(path)
    if not file.parent.is_dir() or (file.exists() and not file.is_file()):
        raise SystemExit(f"--json: a file in a folder that is there, got {path!r}")


def write_json(results: dict, path: str) -> None:
    """In one step, so that a run that is ended keeps what it had; where the path is a link, to what it
    names."""
    file = os.path.realpath(path)
    new = Path(f"{file}.new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, file)
