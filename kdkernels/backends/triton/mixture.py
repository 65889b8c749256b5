"""The mixture family and TVD, whose terms are no sums of the first sweep's: with both log-sum-exps, or h, a
sweep sums D and the mean of xi, and another writes the gradient q (xi - its mean).

With m = (1 - l) b + l o: D = base_share KL(b, m) + other_share KL(o, m). TVD is what one of the two has more,
or the other. xi (terms.py): log(q / m) times its share, and for skews a part (o - b) / m.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import (
    LN2,
    LOG2E,
    REACH,
    kl_terms,
    log1p_psi,
    log2_1p,
    magnitude,
    mixture_slope,
    mixture_term,
    ratio_short,
    select,
    wide,
)
from .gradient import exponents, total
from .hard import with_hard
from .records import SKEWED, TVD
from .rows import pair, store, student_of, sweep
from .sums import difference


class MixedSums(NamedTuple):
    """Of the terms of D, of q, and of q xi. TVD, exact: of what o has more, of what b has more, of b where o
    has more, and of q where o has more, where b has, and where neither."""

    f: tl.tensor
    lack: tl.tensor
    less: tl.tensor
    mass: tl.tensor
    moved: tl.tensor
    level: tl.tensor


class Mixed(NamedTuple):
    """A row, closed: `close.Plain` or `close.Exact`, and a tile's gradient q (A xi + C); TVD, exact: q times
    A, C, or B where o has more, where b has, or neither."""

    closed: tl.tuple
    A: tl.tensor
    C: tl.tensor
    B: tl.tensor


@triton.jit
def ratio_terms(a, a_o, closed, numbers, spec: tl.constexpr):
    """(log2(m / b), log2(o / m), (o - b) / m) of a tile. Beyond a ratio of 2^{+-30} m is all of one of the
    two."""
    x = tl.minimum(tl.maximum(a_o - a, -30.0), 30.0)
    less = tl.fma(tl.math.exp2(x), closed.A, -1.0)  # o / b - 1
    u = log2_1p(numbers.tilt * less, spec.fast_log2)
    share = less
    if spec.family == SKEWED:
        share = less * tl.math.exp2(-u)
    return u, x + tl.log2(closed.A) - u, share


@triton.jit
def plain_middle(b, o, closed, numbers, spec: tl.constexpr):
    """What a tile adds in the plain form, over b's unit; closed.A has what o's exponent lacks to b's. TVD,
    whose base is the teacher: what o has more, and q with the sign of q - p. Others: b log2(m / b),
    o log2(o / m), q (o - b) / m."""
    a, a_o = exponents(b, o, closed, numbers)
    e, eo = tl.math.exp2(a), tl.math.exp2(a_o) * closed.A
    if spec.family == TVD:
        gap = eo - e
        return tl.maximum(gap, 0.0), tl.where(gap > 0.0, eo, tl.where(gap < 0.0, -eo, 0.0)), e
    else:
        u, ahead, share = ratio_terms(a, a_o, closed, numbers, spec)
        return e * u, eo * ahead, (e if spec.student_base else eo) * share


@triton.jit
def share_weight(numbers, spec: tl.constexpr):
    """Of (o - b) / m in xi (terms.mixture_slope)."""
    keep = 1.0 - numbers.tilt
    weight = numbers.base_share * numbers.tilt - numbers.other_share * keep
    return weight * (keep if spec.student_base else numbers.tilt)


@triton.jit
def plain_sums(x, numbers, spec: tl.constexpr):
    """`MixedSums` from those of `plain_middle`; that of q is known."""
    first, second, third = total(x.f), total(x.lack), total(x.less)
    if spec.family == TVD:
        return MixedSums(first, first, first, first, 0.5 * second, first)
    else:
        base, other = numbers.base_share * LN2 * first, numbers.other_share * LN2 * second
        moved = -base if spec.student_base else other
        if spec.family == SKEWED:
            moved += share_weight(numbers, spec) * third
        return MixedSums(other - base, other, other, other, moved, other)


@triton.jit
def plain_slope(b, o, closed, numbers, spec: tl.constexpr):
    """(q, xi) of a tile, in the plain form."""
    a, a_o = exponents(b, o, closed, numbers)
    if spec.family == TVD:
        e, eo = tl.math.exp2(a), tl.math.exp2(a_o) * closed.A
        gap = eo - e
        return eo, tl.where(gap > 0.0, 0.5, tl.where(gap < 0.0, -0.5, 0.0))
    else:
        u, ahead, share = ratio_terms(a, a_o, closed, numbers, spec)
        q = tl.math.exp2(a) if spec.student_base else tl.math.exp2(a_o) * closed.A
        xi = -numbers.base_share * LN2 * u if spec.student_base else numbers.other_share * LN2 * ahead
        if spec.family == SKEWED:
            xi += share_weight(numbers, spec) * share
        return q, xi


@triton.jit
def exact_terms(b, o, closed, numbers, SUMS: tl.constexpr, spec: tl.constexpr):
    """(q, xi, the terms of D, of TVD also what b has more, and b) of a tile, to their own digits; the terms
    only where they are asked for. y is cut off where e^y would be beyond reach: e and eo hold the rest, also
    of a class that only one has, and are 0 for one that neither has."""
    reference = closed.reference
    y = difference(b, o, reference, numbers, spec)
    e, eo = b, o
    if SUMS or spec.student_base:
        e = tl.math.exp2(tl.fma(b, numbers.c, -closed.M_b))
    if SUMS or not spec.student_base:
        eo = tl.math.exp2(tl.fma(o, numbers.c, -(closed.M_b + reference.N))) * reference.w
    q = e if spec.student_base else eo
    if spec.family == TVD:
        xi = tl.where(y > 0.0, 0.5, tl.where(y < 0.0, -0.5, 0.0))
        gap = eo
        if SUMS:
            gap, _ = kl_terms(e, eo, y, ratio_short, magnitude, select)
        more = tl.maximum(gap, 0.0)
        return q, xi, more, more - gap, e
    else:
        SHARES: tl.constexpr = spec.family == SKEWED
        mix = numbers.tilt
        x = tl.minimum(tl.maximum(y, -REACH), REACH)
        s = x * ratio_short(x)
        m1 = tl.where(tl.abs(x) < 0.5, x + s, tl.math.exp2(x * LOG2E) - 1.0)
        u, psi_u = log1p_psi(mix * m1)
        # where o has nearly all of m, log(o / m) is the difference of large numbers
        most = -tl.log(tl.full([], 0.0, tl.float32) + mix)
        ahead = tl.where(x > most + 17.0, most, x - u)
        # `terms.MixtureLogs`, and the weights
        logs, weights = (x, m1, s, u, psi_u, ahead), (mix, numbers.base_share, numbers.other_share)
        xi = mixture_slope(logs, weights, spec.student_base, SHARES)
        term = u
        if SUMS:
            term = mixture_term(e, eo, logs, weights, magnitude, select, SHARES)
        return q, xi, term, term, e


@triton.jit
def middle_tile(at, sums, row, numbers, closed, spec: tl.constexpr):
    """The lanes' sums with the tile at `at` added: `plain_middle`'s, or `MixedSums`."""
    b, o, _, _ = pair(row, at, "evict_last", spec)
    lacks, less, mass, moved, level = sums.lack, sums.less, sums.mass, sums.moved, sums.level
    if not spec.exact:
        f, lack, third = plain_middle(b, o, closed, numbers, spec)
        lacks += tl.sum(lack, 1)
        if spec.family == SKEWED:
            less += tl.sum(third, 1)
    else:
        q, xi, f, lack, e = exact_terms(b, o, closed, numbers, True, spec)
        if spec.family == TVD:
            lacks += tl.sum(lack, 1)
            less += tl.sum(tl.where(f > 0.0, e, 0.0), 1)
            mass += tl.sum(tl.where(xi > 0.0, q, 0.0), 1)
            moved += tl.sum(tl.where(xi < 0.0, q, 0.0), 1)
            level += tl.sum(tl.where(xi == 0.0, q, 0.0), 1)
        else:
            mass += tl.sum(q, 1)
            moved += tl.sum(q * xi, 1)
    return MixedSums(sums.f + tl.sum(f, 1), lacks, less, mass, moved, level)


@triton.jit
def middle_sweep(row, closed, numbers, spec: tl.constexpr):
    """`MixedSums` of a part."""
    LANES: tl.constexpr = spec.lanes
    zero = tl.zeros([LANES], tl.float32)
    nothing = MixedSums(zero, zero, zero, zero, zero, zero)
    x = sweep(middle_tile, nothing, row, numbers, closed, True, spec)
    if spec.exact:
        return MixedSums(
            total(x.f), total(x.lack), total(x.less), total(x.mass), total(x.moved), total(x.level)
        )  # fmt: skip
    else:
        return plain_sums(x, numbers, spec)


@triton.jit
def mixed_value(s, sums, spec: tl.constexpr):
    """D. TVD is what one of the two has more, or the other; exact, of the two sums the one over less of o, by
    whose weight it is in error. s: what b's softmax is over."""
    f = sums.f
    if spec.family == TVD and spec.exact:
        f = tl.where(sums.less + f > 0.5 * s, sums.lack, f)
    return tl.maximum(f, 0.0) / s


@triton.jit
def mixed_close(s, sums, closed, scale, spec: tl.constexpr):
    """`Mixed`: scale T dD/dz = q (A xi + C), q summing to s, or to what is near s.

    TVD's xi - mean is a sum of q where xi is another: it keeps its digits where one class has nearly all of
    q.
    """
    unit = scale / s
    A, C, B = unit, -unit * (sums.moved / s), unit
    if spec.exact and spec.family == TVD:
        up, down, level = sums.mass, sums.moved, sums.level
        unit = unit / (up + down + level)
        A, C, B = unit * (down + 0.5 * level), -unit * (up + 0.5 * level), unit * 0.5 * (down - up)
    elif spec.exact:
        C = -unit * (sums.moved / sums.mass)
    return Mixed(closed, A.to(tl.float32), C.to(tl.float32), B.to(tl.float32))


@triton.jit
def gradient_tile(at, state, row, numbers, more, spec: tl.constexpr):
    mixed, hard = more
    b, o, slope_b, slope_o = pair(row, at, "evict_first", spec)
    if spec.exact:
        q, xi, _, _, _ = exact_terms(b, o, mixed.closed, numbers, False, spec)
    else:
        q, xi = plain_slope(b, o, mixed.closed, numbers, spec)
    if spec.exact and spec.family == TVD:
        g = q * tl.where(xi > 0.0, mixed.A, tl.where(xi < 0.0, mixed.C, mixed.B))
    else:
        g = q * tl.fma(xi, mixed.A, mixed.C)
    z, slope = student_of(b, o, slope_b, slope_o, spec)
    g = with_hard(g, z, slope, at, row, hard, spec)
    store(row.G, at, row.edge, row.vocab, g, spec)
    return state


@triton.jit
def write_mixed(row, mixed, hard, numbers, spec: tl.constexpr):
    sweep(gradient_tile, wide(0.0), row, numbers, (mixed, hard), False, spec)
