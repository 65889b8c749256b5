"""T = inf: (1/2) Var(z - v) and its gradient, or |z - v|^2 / (2 V), logit matching, which is not centred.

Two sweeps in fp32: the mean of o - b, in two parts, and then what is left, where nothing cancels. The sums of
the hard term and of statistics, one sweep more, are in fp64 (double.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import INF, wide
from .double import ONLY_B, ONLY_O, has, nan_if_broken, seen, sums_of, tell64, tops_of, unseen
from .gradient import total
from .hard import hard_of, with_hard
from .records import Numbers, Reference
from .rows import pair, store, student_of, sweep
from .sums import difference, sample


@triton.jit
def without(b, o, reference, numbers, spec: tl.constexpr):
    """o - b less the reference, 0 where a class is masked."""
    return tl.where((b > -INF) & (o > -INF), difference(b, o, reference, numbers, spec), 0.0)


@triton.jit
def mean_tile(at, state, row, numbers, K, spec: tl.constexpr):
    """The lanes' tops and marks, counts of common classes, and sums of o - b - K as rounded and of
    what rounding has taken from o - b."""
    tops, common, moved, rest = state
    b, o, _, _ = pair(row, at, "evict_last", spec)
    both = (b > -INF) & (o > -INF)
    y = tl.where(both, (o - b) - K, 0.0).to(tl.float64)  # whose sum, of equal masks, is exact
    lost = without(b, o, Reference(o - b, 0.0, 0.0, 0.0), numbers, spec)
    return (
        seen(tops, b, o), common + tl.sum(tl.where(both, 1.0, 0.0), 1), moved + tl.sum(y, 1),
        rest + tl.sum(lost, 1).to(tl.float64),
    )  # fmt: skip


@triton.jit
def matching_tile(at, squares, row, numbers, more, spec: tl.constexpr):
    """The lanes' sums of squares; writes the gradient."""
    reference, scale, hard = more
    b, o, slope_b, slope_o = pair(row, at, "evict_first", spec)
    x = without(b, o, reference, numbers, spec)
    if spec.grad:
        z, slope = student_of(b, o, slope_b, slope_o, spec)
        g = x * (-scale if spec.student_base else scale)
        if spec.hard:
            g, z = g.to(tl.float64), z.to(tl.float64)
        g = with_hard(g, z, slope, at, row, hard, spec)
        store(row.G, at, row.edge, row.vocab, g.to(tl.float32), spec)
    x = x.to(tl.float64)  # a mask's square is beyond a float
    return squares + tl.sum(x * x, 1)


@triton.jit
def matching_row(row, label_logit, to, numbers, scales, spec: tl.constexpr):
    """The operator's contract for a row at T = inf; numbers.tilt: 0 where the limit is 0 or +inf, else 1."""
    LANES: tl.constexpr = spec.lanes
    zero64, none = tl.zeros([LANES], tl.float64), tl.full([], 0.0, tl.float32)
    one = Numbers(none, none + 1.0, none, none, none, none)
    K = sample(row, one, spec)[2] if spec.centered else none
    lanes, common, moved, rest = sweep(
        mean_tile, (unseen(spec), tl.zeros([LANES], tl.float32), zero64, zero64), row, one, K, False, spec
    )
    count, marks = tl.maximum(total(common), 1.0), lanes[2]
    reference = Reference(none, none, none, none)
    if spec.centered:
        mean = K + total(moved) / count
        high = mean.to(tl.float32)
        reference = Reference(high, ((mean - high) + total(rest) / count).to(tl.float32), none, none)
    # at a temperature at which all classes count alike, but masked ones
    flat = Numbers(none, wide(1e-300), none, none, none, none)
    sums, lost = tops_of(lanes), nan_if_broken(marks)
    if spec.hard or spec.stats:
        sums = sums_of(row, lanes, flat, spec)
    hard = hard_of(sums, label_logit, scales, spec)
    scale = numbers.tilt * scales.grad / count + lost
    more = reference, scale.to(tl.float32), hard
    squares = sweep(matching_tile, zero64, row, one, more, True, spec)
    value = 0.5 * numbers.tilt * total(squares) / count
    infinite = has(marks, ONLY_O) | (has(marks, ONLY_B) & (numbers.tilt != 0.0))
    tell64(to, tl.where(infinite, INF, value), lost, sums, hard, flat, scales, spec)
