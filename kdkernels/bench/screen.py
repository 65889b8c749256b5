"""What the bench prints: whole lines of at most 80 columns, flushed, with no control characters where stdout
is not a terminal. Tables and progress are rich's where it is installed."""

from __future__ import annotations

import functools
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TypeVar

try:
    import rich.console
    import rich.progress
    import rich.table
    import rich.text
except ImportError:
    rich = None

WIDTH = 80
GAP = 2  # between columns
Item = TypeVar("Item")


@functools.cache
def _console():
    """rich's, of the stdout that is there when something is printed."""
    return rich.console.Console(width=WIDTH, force_terminal=sys.stdout.isatty(), highlight=False)


def say(text: str = "") -> None:
    """A text of any length; its own line breaks stay."""
    filled = "\n".join(textwrap.fill(line, WIDTH) for line in text.splitlines())
    if rich is None:
        print(filled, flush=True)
    else:
        _console().print(filled, markup=False)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Names to the left, which break where they are long, and figures to the right."""
    if rich is None:
        print(plain([head, *rows]), flush=True)
        return
    grid = rich.table.Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    for i, name in enumerate(head):
        grid.add_column(name, justify="right" if i else "left", no_wrap=bool(i))
    for row in rows:
        grid.add_row(*(rich.text.Text(cell) for cell in row))
    _console().print(grid)


def plain(rows: Sequence[Sequence[str]]) -> str:
    """The same without rich."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - GAP * len(widths[1:]))
    lines = []
    for name, *cells in rows:
        first, *rest = textwrap.wrap(name, widths[0]) or [""]
        figures = (cell.rjust(GAP + width) for cell, width in zip(cells, widths[1:], strict=True))
        lines += [first.ljust(widths[0]) + "".join(figures), *rest]
    return "\n".join(lines)


def track(items: Sequence[Item]) -> Iterable[Item]:
    """The items one by one, with a bar and the time that is left on a terminal."""
    if rich is None or not sys.stdout.isatty():
        return items
    return rich.progress.track(
        items, "measuring", console=_console(), transient=True, refresh_per_second=1, show_speed=False
    )
