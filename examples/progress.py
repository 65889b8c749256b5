"""How far an example is: a bar on a terminal, and lines where the output goes to a file or a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
LINES = 10  # of a whole run


class Progress:
    """The items of a run, one after the other, of which `done` are done already.

    Where stdout is no terminal, about ten lines say how many there were, how long they took and what the last
    note said: "students: 15 of 120 steps, 7 s, KL: 3.214".
    """

    def __init__(self, items: Sequence[Item], name: str, unit: str = "step", done: int = 0):
        self.items, self.name, self.unit, self.done = items, name, unit, done
        self.total, self.said, self.start = done + len(items), "", time.perf_counter()
        self.bar = None
        if sys.stdout.isatty():
            self.bar = tqdm(desc=name, unit=unit, total=self.total, initial=done, leave=False)

    def note(self, text: str) -> None:
        """What to show beside the count."""
        self.said = text
        if self.bar is not None:
            self.bar.set_postfix_str(text)

    def __iter__(self) -> Iterator[Item]:
        try:
            for item in self.items:
                yield item
                self._count()
        finally:
            if self.bar is not None:
                self.bar.close()

    def _count(self) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        elif self.done * LINES // self.total > (self.done - 1) * LINES // self.total:
            self._line()

    def _line(self) -> None:
        count = f"{self.done} of {self.total} {self.unit}s"
        parts = [count, f"{time.perf_counter() - self.start:.0f} s", *([self.said] if self.said else [])]
        print(f"{self.name}: {', '.join(parts)}", flush=True)
