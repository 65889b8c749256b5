"""The driver: stages in the order of their worth, each in processes of its own with a box of seconds, until
the budget is used up.

    python -m benchmarks.gpu.drive FOLDER [--budget SECONDS] [--stages STAGE[+STAGE],...] [--resume FILE]
    [--rehearse]

FOLDER gets results.jsonl (log.py), report.md, log.txt (what the processes said besides) and ncu's files. What
has an outcome is not done
again: the same call with the same folder, or with --resume and its results.jsonl, goes on where it was. A
    process that hangs, faults or raises costs the case that it was at; another one goes on with the next.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from . import report
from .log import LOST, Log, suspects
from .paths import ROOT, python_path

LEAST = 8  # seconds that a step is begun with: a process imports torch in 5


@dataclass(frozen=True)
class Step:
    """Stages that run side by side, each (or each chain "a+b") in `processes` processes that divide its
    cases; their seconds."""

    stages: tuple[str, ...]
    seconds: float
    processes: int = 1

    def __str__(self) -> str:
        return f"{' '.join(self.stages)}" + (f" in {self.processes}" if self.processes > 1 else "")


HERE = Step(("here+copy",), 45)
# importing torch takes seconds: stages that do not endanger each other share a process
TIMES = (
    Step(("time:triton+graph:triton",), 60),
    Step(("time:cuda+graph:cuda",), 60),
    Step(("time:simple+time:eager+time:liger",), 75),
    Step(("time:compile",), 75),
)
SUSPECTS = Step(("sanitize:wrong",), 150, 4)
AFTER = (
    Step(("shapes",), 100),
    Step(("tune:triton+tune:cuda",), 100),
    Step(("tests",), 150),
    Step(("train",), 120),
    Step(("ncu:triton",), 100),
    Step(("ncu:cuda",), 100),
    Step(("sanitize:cuda",), 150, 4),
    Step(("linear",), 150),
    Step(("sanitize:triton",), 150, 4),
)
PLANTED = tuple(Step((f"planted:{x}",), 20) for x in ("raise", "crash", "hang"))


def right(processes: int) -> Step:
    return Step(("right:triton", "right:cuda"), 75, processes)


def course(log: Log) -> Iterator[Step]:
    """What to do next, by what was found: a wrong result is looked into before any time is measured."""
    yield HERE
    if "here" not in log.outcomes():  # no GPU, or none that answers
        return
    # with a cache that fits nothing is compiled; without, eight processes compile beside each other
    yield right(2 if log.outcomes().get("here", {}).get("cache_fits") else 8)
    if suspects(log):
        yield SUSPECTS
    yield from TIMES
    yield from AFTER


def rehearsal(log: Log) -> Iterator[Step]:
    """Every stage, on a CPU with two cores: as few processes as can be, with seconds enough for a busy
    machine."""
    yield replace(HERE, seconds=400)
    yield replace(right(1), seconds=400)
    stages = [x for step in (*TIMES, *AFTER) for stage in step.stages for x in stage.split("+")]
    yield Step(("+".join(stages[::2]), "+".join([*stages[1::2], "launches"])), 900)
    yield from (replace(x, seconds=200) for x in PLANTED)


def named(text: str) -> list[Step]:
    """Steps of these names, "a+b,c": with the seconds that they have in the course, or 120."""
    known = {
        x: step
        for step in (HERE, right(8), *TIMES, SUSPECTS, *AFTER, *PLANTED)
        for stage in step.stages
        for x in (stage, *stage.split("+"))
    }
    return [
        Step((x,), *((known[x].seconds, known[x].processes) if x in known else (120,)))
        for x in text.split(",")
    ]


class Driver:
    def __init__(self, folder: Path, budget: float, rehearse: bool):
        self.folder, self.rehearse = folder, rehearse
        self.log = Log(folder / "results.jsonl")
        self.end = time.time() + budget

    def run(self, steps: Iterator[Step] | list[Step]) -> None:
        for step in steps:
            if self.log.outcomes().get(f"step {step}", {}).get("finished"):
                continue
            left = self.end - time.time()
            if left < LEAST:
                self.log.write("stopped", before=str(step))
                break
            self.take(step, min(step.seconds, left))

    def take(self, step: Step, seconds: float) -> None:
        start, before = time.time(), cached()
        jobs = [(stage, f"{i}/{step.processes}") for stage in step.stages for i in range(step.processes)]
        with ThreadPoolExecutor(len(jobs)) as pool:
            ends = list(pool.map(lambda job: self.share(*job, start + seconds), jobs))
        found = {
            "finished": all(x == "finished" for x in ends),
            "seconds": round(time.time() - start, 1),
            "compiled": cached() - before,
        }
        self.log.write(f"step {step}", **found, ends=sorted(set(ends)))

    def share(self, stage: str, share: str, end: float) -> str:
        """Processes of a stage and a share of its cases, one after another, until one gets to the end of
        them; how it ended."""
        by = f"{stage} {share}"
        while True:
            status = self.process(stage, share, end)
            open_cases = self.log.unfinished(by)
            if status is None:
                for key in open_cases:
                    self.log.write(key, cut=True)
                return "cut"
            for key in open_cases:
                self.log.write(
                    key,
                    error=f"no outcome: its process ended with status {status}, as after a hang or a fault",
                )
            if status == 0:
                return "finished"
            if not open_cases and status != LOST:  # it died of what is no case: another would as well
                return f"status {status}"

    def process(self, stage: str, share: str, end: float) -> int | None:
        """The exit status of a process; None where it was ended for want of time."""
        command = [
            sys.executable,
            "-u",
            "-m",
            "benchmarks.gpu.stages",
            str(self.log.path),
            stage,
            "--share",
            share,
        ]
        environment = {"PYTHONPATH": python_path(), "TRITON_INTERPRET": "1" if self.rehearse else "0"}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if self.rehearse else {}
        with open(self.folder / "log.txt", "ab") as said:
            child = subprocess.Popen(
                command + ["--rehearse"] * self.rehearse,
                cwd=ROOT,
                env=os.environ | environment,
                stderr=said,
                start_new_session=True,
            )
            try:
                return child.wait(max(0.1, end - time.time()))
            except subprocess.TimeoutExpired:
                return None
            finally:
                end_session(child.pid)
                child.wait()


def end_session(session: int) -> None:
    """Kill what a process has begun and left, and itself: pytest's workers, a program under
    compute-sanitizer."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session:
                os.kill(int(stat.parent.name), signal.SIGKILL)
        except (OSError, IndexError):
            continue


def cached() -> int:
    """Entries of Triton's cache: what is compiled adds to them."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget", type=float, default=540, help="seconds in all, default %(default)s")
    parser.add_argument("--stages", help="these alone")
    parser.add_argument("--resume", type=Path, help="results of an earlier call to go on from")
    parser.add_argument("--rehearse", action="store_true", help="every stage on the CPU, with small shapes")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    driver = Driver(args.folder, args.budget if not args.rehearse else 3600, args.rehearse)
    if args.resume and args.resume.exists() and not driver.log.path.exists():
        shutil.copy(args.resume, driver.log.path)
    driver.run(
        named(args.stages) if args.stages else rehearsal(driver.log) if args.rehearse else course(driver.log)
    )
    tables = report.text(driver.log.lines())
    (args.folder / "report.md").write_text(tables)
    print(tables)


if __name__ == "__main__":
    main()
