"""Results as JSON lines: each is on disk before the next is measured, so that whatever ends a process leaves
what it has found.

A case has a key. A line {"key", "begun"} says that a process has begun it, a line {"key", ...} what came of
it: numbers, or "error". A case that has an outcome is not done again; "cut" marks one that was ended for want
of time, which a later run may try again, once.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

# exit status of a process whose device is of no use any more: its case has an outcome, a new process does the
# others
LOST = 70
TRIES = 2  # of a case that was begun and has no outcome


class Log:
    """A file of results, to which several processes append. context: what every line of this process says
    besides."""

    def __init__(self, path: str | Path, **context: object):
        self.path, self.context, self.stream = Path(path), context, sys.stdout
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def lines(self) -> list[dict]:
        """All lines so far; one that a killed process left half-written is passed over."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def outcomes(self) -> dict[str, dict]:
        """key -> what came of it, the latest."""
        return {x["key"]: x for x in self.lines() if not x.get("begun") and not x.get("cut")}

    def unfinished(self, by: str) -> list[str]:
        """Keys of the cases that processes named `by` have begun and that have neither an outcome nor were
        cut."""
        begun: dict[str, bool] = {}
        for x in self.lines():
            begun[x["key"]] = bool(x.get("begun")) and x.get("by") == by
        return [key for key, is_open in begun.items() if is_open]

    def write(self, key: str, **found: object) -> None:
        line = json.dumps({"key": key, "at": round(time.time(), 1), **self.context, **found})
        # one write to a file that is open for appending: lines of several processes do not mix
        with open(self.path, "ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if self.stream and not found.get("begun"):
            print(_short(key, found), file=self.stream, flush=True)

    def once(
        self, key: str, measure: Callable[[], dict], seconds: float, lost: Callable[[], bool] = lambda: False
    ) -> None:
        """Write what measure() finds, unless the case has an outcome. An exception is one; more than
        `seconds` end the process.

        lost: whether the device is of no use after an exception; the process then ends, for another to go on.
        """
        tried = Counter(x["key"] for x in self.lines() if x.get("begun"))[key]
        if key in self.outcomes() or tried >= TRIES:
            return
        self.write(key, begun=True)
        # from a thread of C: also where a kernel never ends
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
        try:
            found = measure()
        except (Exception, SystemExit) as error:
            found = {"error": f"{type(error).__name__}: {error}"[:400]}
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.write(key, **found)
        if "error" in found and lost():
            sys.stdout.flush()
            os._exit(LOST)  # destructors of a lost device raise, or wait


def _short(key: str, found: dict) -> str:
    """A line for a person, most of whom read the end of a long output."""
    texts = (
        f"{x}={y:.4g}" if isinstance(y, float) else f"{x}={y}"
        for x, y in found.items()
        if not isinstance(y, (dict, list))
    )
    return f"{key}: {' '.join(texts)}"[:240]


def wrong_cases(log: Log) -> list[tuple[str, str]]:
    """(backend, case) of each result that was wrong, or was none, in the order they were found."""
    found = []
    for key, x in log.outcomes().items():
        if key.startswith("right ") and not x.get("right"):
            _, backend, case = key.split(" ", 2)
            found.append((backend, case))
    return found


def suspects(log: Log) -> list[tuple[str, str]]:
    """Those of them that a sanitizer may explain: wrong numbers, a fault, a hang; not what was refused or did
    not compile."""
    outcomes = log.outcomes()
    errors = {x: outcomes[f"right {x[0]} {x[1]}"].get("error", "") for x in wrong_cases(log)}
    return [x for x, error in errors.items() if not error or "no outcome" in error or "CUDA" in error]
