"""Several programs to a row: each publishes what it has summed, waits for the others, and adds all up, so
that all of them go on with the same numbers, in the same order of addition.

Programs begin in the order of their numbers, so that those which one waits for have begun before it, or are
the next to begin. Under the interpreter, where programs run one after another, each exchange ends a launch.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import INF, LOW, wide
from .records import ALL, KEPT, MOST_PARTS, Sums
from .sums import first_sweep, merged


class Exchange(NamedTuple):
    """Of a row: STATE, `Spec.state` numbers to a part, and COUNT, two zeros (counters.py): how many parts
    have published a first sweep, and a second one."""

    STATE: tl.tensor
    COUNT: tl.tensor
    part: tl.tensor
    parts: tl.tensor


@triton.jit
def counts_at(COUNT):
    """`Exchange.COUNT` of a row, two int32 in the place of an fp64 number."""
    return COUNT.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def published(SLOT, numbers, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(SLOT + i, wide(numbers[i]))


@triton.jit
def wait(COUNT, many):
    """Returns when so many programs have come here."""
    tl.debug_barrier()
    arrived = tl.atomic_add(COUNT, 1, sem="acq_rel") + 1
    while arrived < many:
        arrived = tl.atomic_add(COUNT, 0, sem="acquire")


@triton.jit
def of_parts(x, slot: tl.constexpr, nothing, spec: tl.constexpr):
    """A number of all parts; past the first-level cache, which another program's stores do not reach."""
    i = tl.arange(0, MOST_PARTS)
    return tl.load(x.STATE + slot + i * spec.state, mask=i < x.parts, other=nothing, cache_modifier=".cg")


@triton.jit
def sums_of_parts(x, turn: tl.constexpr, numbers, spec: tl.constexpr):
    """`Sums` of a row."""
    at: tl.constexpr = turn * spec.slots
    zero = tl.zeros([MOST_PARTS], tl.float64)
    top_b = of_parts(x, at, LOW, spec).to(tl.float32)
    top_o = of_parts(x, at + 1, LOW, spec).to(tl.float32)
    s, so, f = of_parts(x, at + 2, 0.0, spec), of_parts(x, at + 3, 0.0, spec), of_parts(x, at + 4, 0.0, spec)
    others, p, u, peak, exponents, classes, moved_b, moved_o = zero, zero, zero, zero, zero, zero, zero, zero
    place_b, place_o = wide(0.0), wide(0.0)
    if spec.slots > 5:
        others = of_parts(x, at + 5, 0.0, spec)
    if spec.slots > 6:
        p, u = of_parts(x, at + 6, 0.0, spec), of_parts(x, at + 7, 0.0, spec)
    if spec.slots > 8:
        peak = of_parts(x, at + 8, 0.0, spec)
    if spec.slots > 9:
        exponents, classes = of_parts(x, at + 9, 0.0, spec), of_parts(x, at + 10, 0.0, spec)
        moved_b, moved_o = of_parts(x, at + 11, 0.0, spec), of_parts(x, at + 12, 0.0, spec)
        place_b, place_o = of_parts(x, at + 13, INF, spec), of_parts(x, at + 14, INF, spec)
        place_b = tl.min(tl.where(top_b == tl.max(top_b, 0), place_b, INF), 0)
        place_o = tl.min(tl.where(top_o == tl.max(top_o, 0), place_o, INF), 0)
    parts = Sums(
        top_b, top_o, s, so, f, others, p, u, peak, exponents, classes, moved_b, moved_o, place_b, place_o
    )  # fmt: skip
    return merged(parts, peak, place_b, place_o, numbers, spec)


@triton.jit
def row_sums(row, x, numbers, reference, top_b, top_o, turn: tl.constexpr, spec: tl.constexpr):
    """`Sums` of the whole row: of this program's sweep, and of those of the other programs."""
    if spec.alone:
        return first_sweep(row, numbers, reference, top_b, top_o, spec)
    else:
        if spec.phase == ALL or spec.phase == turn:
            mine = first_sweep(row, numbers, reference, top_b, top_o, spec)
            SLOT = x.STATE + x.part * spec.state + turn * spec.slots
            published(SLOT, mine, spec.slots if spec.phase == ALL else KEPT)
        if spec.phase == ALL:
            wait(x.COUNT, (turn + 1) * x.parts)
        return sums_of_parts(x, turn, numbers, spec)


@triton.jit
def second_sums(mine, x, everybody, spec: tl.constexpr):
    """(the second sweep's numbers, of the whole row; whether this program has them): every program, after
    waiting for the others, where everybody is to have them, else the last."""
    if spec.alone:
        return mine, True
    else:
        SLOT = x.STATE + (spec.state - spec.second)
        published(SLOT + x.part * spec.state, mine, len(mine))
        if spec.phase == ALL and everybody:
            wait(x.COUNT + 1, x.parts)
            last = True
        else:
            tl.debug_barrier()
            last = tl.atomic_add(x.COUNT + 1, 1, sem="acq_rel") == x.parts - 1
        return second_of_parts(x, spec), last


@triton.jit
def second_of_parts(x, spec: tl.constexpr):
    at: tl.constexpr = spec.state - spec.second
    return (
        tl.sum(of_parts(x, at, 0.0, spec), 0), tl.sum(of_parts(x, at + 1, 0.0, spec), 0),
        tl.sum(of_parts(x, at + 2, 0.0, spec), 0), tl.sum(of_parts(x, at + 3, 0.0, spec), 0),
        tl.sum(of_parts(x, at + 4, 0.0, spec), 0), tl.sum(of_parts(x, at + 5, 0.0, spec), 0),
    )  # fmt: skip
