"""A row in fp64, in the textbook's order: its tops, then its `Sums` relative to them.

For careful.py, limits.py and matching.py. As in the fast path a row is seen from its base b; o is the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import INF, LOG2E, LOG2E_SINGLE, log1p64, ratio_series, wide
from .gradient import total
from .kernels import weighted
from .records import SMOOTHED, Sums
from .rows import columns, pair, student_of, sweep
from .statistics import tell_side, tell_terms
from .sums import NOWHERE

FARTHEST = tl.constexpr(1e15)
NOTHING = tl.constexpr(-1e300)  # an exponent below all that logits make
# what a row has: a class of b alone, of o alone, of both, nan or +inf
ONLY_B, ONLY_O, BOTH, BROKEN = (tl.constexpr(1 << i) for i in range(4))


@triton.jit
def pair64(row, at, spec: tl.constexpr):
    """(b, o, whether both have the class, the slope of the student's transform) of a tile."""
    b, o, slope_b, slope_o = pair(row, at, "evict_last", spec)
    _, slope = student_of(b, o, slope_b, slope_o, spec)
    return b.to(tl.float64), o.to(tl.float64), (b > -INF) & (o > -INF), slope


# ---------------------------------------------------------------- tops


@triton.jit
def seen(state, b, o):
    """The lanes' largest logits, and what each place has seen, with a tile added."""
    top_b, top_o, marks = state
    of_b = tl.where(o > -INF, BOTH, ONLY_B)
    marks |= tl.where(b > -INF, of_b, tl.where(o > -INF, ONLY_O, 0))
    marks |= tl.where((b < INF) & (o < INF), 0, BROKEN)
    return tl.maximum(top_b, tl.max(b, 1)), tl.maximum(top_o, tl.max(o, 1)), marks


@triton.jit
def unseen(spec: tl.constexpr):
    LANES: tl.constexpr = spec.lanes
    R: tl.constexpr = spec.run
    top = tl.full([LANES], -INF, tl.float32)
    return top, top, tl.zeros([LANES, R], tl.int32)


@triton.jit
def has(marks, MARK: tl.constexpr):
    return tl.max(tl.max(marks & MARK, 1), 0) > 0


@triton.jit
def nan_if_broken(marks):
    """nan of a row with nan or +inf, or one of whose sides has no class; else 0."""
    whole = has(marks, ONLY_B + BOTH) & has(marks, ONLY_O + BOTH)
    return tl.where(has(marks, BROKEN) | (whole == 0), float("nan"), wide(0.0))


@triton.jit
def tops_tile(at, state, row, numbers, more, spec: tl.constexpr):
    b, o, _, _ = pair(row, at, "evict_last", spec)
    return seen(state, b, o)


@triton.jit
def tops_of(lanes):
    """`Sums` of which softmaxes without a denominator are made."""
    none, one = wide(0.0), wide(1.0)
    top_b, top_o = wide(tl.max(lanes[0], 0)), wide(tl.max(lanes[1], 0))
    return Sums(top_b, top_o, one, one, none, none, none, none, none, none, none, none, none, none, none)


# ---------------------------------------------------------------- sums


@triton.jit
def apart(b, o, both, sums):
    """(o - top_o) - (b - top_b), 0 where a class has only one of the two: from o - b, whose digits are those
    of the logits, but where the rows lie so far apart that it has none of theirs."""
    gap = sums.top_o - sums.top_b
    t = tl.where(tl.abs(gap) > FARTHEST, (o - sums.top_o) - (b - sums.top_b), (o - b) - gap)
    return tl.where(both, t, 0.0)


@triton.jit
def near_expm1(p, x):
    """p (e^x - 1) for |x| < 1/2."""
    return p * (x + x * ratio_series(x))


@triton.jit
def softmaxes(b, o, both, sums, numbers):
    """(p_b, p_o, log(p_o / p_b)) of a tile."""
    p_b, p_o = tl.exp((b - sums.top_b) * numbers.k) / sums.s, tl.exp((o - sums.top_o) * numbers.k) / sums.so
    return p_b, p_o, apart(b, o, both, sums) * numbers.k - sums.f


@triton.jit
def tilted(b, o, both, sums, numbers):
    """The exponent of b^{1 - tilt} o^tilt, up to what is the row's."""
    return tl.where(both, ((b - sums.top_b) + numbers.tilt * apart(b, o, both, sums)) * numbers.k, -INF)


@triton.jit
def sums_tile(at, x, row, numbers, tops, spec: tl.constexpr):
    """The lanes' sums with a tile added. f: what o has more than b; orders: w relative to e^p is u."""
    b, o, both, _ = pair64(row, at, spec)
    e_b, e_o, y = softmaxes(b, o, both, tops, numbers)
    f = x.f + tl.sum(tl.where(both & (tl.abs(y) < 0.5), near_expm1(e_b, y), e_o - e_b), 1)
    p, u, others, exponents, classes = x.p, x.u, x.others, x.exponents, x.classes
    if spec.power:
        w = tilted(b, o, both, tops, numbers)
        p = tl.maximum(p, tl.max(w, 1))
        u = u * tl.exp(x.p - p) + tl.sum(tl.exp(w - p[:, None]), 1)
    if spec.hard:
        z, top = (b, tops.top_b) if spec.student_base else (o, tops.top_o)
        a = z * LOG2E_SINGLE - tl.ceil(top * LOG2E_SINGLE)
        here = columns(at, spec) == row.edge + row.label
        others += tl.sum(tl.where(here, 0.0, tl.exp(a / LOG2E)), 1)
        if spec.hard == SMOOTHED:
            exponents += tl.sum(tl.where(z > -INF, a, 0.0), 1)
            classes += tl.sum(tl.where(z > -INF, 1.0, 0.0), 1)
    moved_b, moved_o, place_b, place_o = x.moved_b, x.moved_o, x.place_b, x.place_o
    if spec.stats:
        moved_b += tl.sum(tl.where(e_b > 0.0, e_b * (b - tops.top_b), 0.0), 1)
        moved_o += tl.sum(tl.where(e_o > 0.0, e_o * (o - tops.top_o), 0.0), 1)
        cols = columns(at, spec)
        place_b = tl.minimum(place_b, tl.min(tl.where(b == tops.top_b, cols, NOWHERE), 1))
        place_o = tl.minimum(place_o, tl.min(tl.where(o == tops.top_o, cols, NOWHERE), 1))
    s, so = x.s + tl.sum(e_b, 1), x.so + tl.sum(e_o, 1)
    return Sums(
        x.top_b, x.top_o, s, so, f, others, p, u, x.peak, exponents, classes, moved_b, moved_o, place_b,
        place_o,
    )  # fmt: skip


@triton.jit
def sums_of(row, lanes, numbers, spec: tl.constexpr):
    """`Sums` of a row, relative to its largest logits; f is log s_o - log s_b. Those of the hard term are as
    hard.py has them."""
    LANES: tl.constexpr = spec.lanes
    zero, nowhere = tl.zeros([LANES], tl.float64), tl.full([LANES], NOWHERE, tl.int32)
    tops = tops_of(lanes)
    nothing = Sums(
        zero, zero, zero, zero, zero, zero, zero + NOTHING, zero, zero, zero, zero, zero, zero, nowhere,
        nowhere,
    )  # fmt: skip
    x = sweep(sums_tile, nothing, row, numbers, tops, False, spec)
    s, so, rest, p = total(x.s), total(x.so), total(x.f), tl.max(x.p, 0)
    near = tl.abs(rest) < 0.5 * s
    shift = tl.where(near, log1p64(tl.where(near, rest / s, 0.0)), tl.log(so / s))
    return Sums(
        tops.top_b, tops.top_o, s, so, shift, total(x.others), p, total(x.u * tl.exp(x.p - p)), so,
        total(x.exponents), total(x.classes), total(x.moved_b), total(x.moved_o),
        wide(tl.min(x.place_b, 0) - row.edge), wide(tl.min(x.place_o, 0) - row.edge),
    )  # fmt: skip


# ---------------------------------------------------------------- what a row is told as


@triton.jit
def tell_sum(STATS, top, s, moved, place, k):
    tell_side(STATS, tl.log(s) + top * k, tl.log(s) - moved * k / s, place)


@triton.jit
def tell64(to, value, lost, sums, hard, numbers, scales, spec: tl.constexpr):
    """Writes loss and statistics, to = (LOSS, STATS); lost: nan where the row is broken, else 0."""
    LOSS, STATS = to
    tl.store(LOSS, weighted(value, hard.value, scales, spec.hard) + lost)
    if spec.stats:
        side = 0 if spec.student_base else 1
        tell_sum(STATS + 2 + side, sums.top_b, sums.s, sums.moved_b, sums.place_b + lost, numbers.k + lost)
        tell_sum(STATS + 3 - side, sums.top_o, sums.so, sums.moved_o, sums.place_o + lost, numbers.k + lost)
        tell_terms(STATS, value + lost, hard.cross_entropy, scales.factor, spec.hard)
