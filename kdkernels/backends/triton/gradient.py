"""The second sweep: T dD/dz of a row, tile by tile, in the dtype of the gradient.

With p the teacher's softmax and q the student's:

    KL, cross entropy   q - p                 reverse KL   q (log(q / p) - D)
    mixed KL            both, each with its weight
    orders              q - w, w proportional to p^a q^{1 - a}

times a scale. Plain, each of q, p, w is 2^{exponent relative to an integer} times a factor of the row
(`close.Plain`), and they are subtracted as they stand. Exact, their difference is taken before it is rounded,
and the terms of D, all of one sign, are summed as well (`sums.exact_terms`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import BIG, INF, LOG2E, wide
from .hard import with_hard
from .records import ENTROPY, MIXED_KL
from .rows import pair, store, student_of, sweep
from .sums import exact_terms


@triton.jit
def exponents(b, o, closed, numbers):
    """Of a tile's base and other in base 2, relative to the integers of `close.Plain`."""
    return tl.fma(b, numbers.c, -closed.n_b), tl.fma(o, numbers.c, -closed.n_o)


@triton.jit
def plain_gradient(b, o, closed, numbers, spec: tl.constexpr):
    """A tile's T dD/dz, scaled: `close.Plain` has the formulas."""
    a, a_o = exponents(b, o, closed, numbers)
    e = tl.math.exp2(a)
    if spec.power:
        y = tl.minimum(tl.maximum(a_o - a, -BIG), BIG)
        w = tl.math.exp2(tl.fma(y, numbers.tilt, a))
        q = e if spec.student_base else tl.math.exp2(a_o)
        return tl.fma(w, closed.A, -q) * closed.C
    elif spec.reverse_kl:
        y = tl.where(e > 0.0, a - a_o, 0.0)
        if spec.family == MIXED_KL:
            gap = tl.fma(tl.math.exp2(a_o), -closed.B, e) * (numbers.other_share * LOG2E)
            return closed.C * (numbers.base_share * (e * (y - closed.A)) + gap)
        return e * closed.C * (y - closed.A)
    else:
        return tl.fma(tl.math.exp2(a_o), closed.A, -e) * closed.C


@triton.jit
def plain_tile(at, state, row, numbers, more, spec: tl.constexpr):
    closed, hard = more
    b, o, slope_b, slope_o = pair(row, at, "evict_first", spec)
    z, slope = student_of(b, o, slope_b, slope_o, spec)
    g = with_hard(plain_gradient(b, o, closed, numbers, spec), z, slope, at, row, hard, spec)
    store(row.G, at, row.edge, row.vocab, g, spec)
    return state


@triton.jit
def exact_gradient(b, o, e, em, et, eu, closed, spec: tl.constexpr):
    """A tile's T dD/dz, scaled, from its terms."""
    if spec.power:
        g = closed.P * tl.where(closed.direct, eu, et) + closed.C * e
        if not spec.student_base:
            g = tl.where(o == -INF, 0.0, g + closed.A * em)
        return g
    elif spec.reverse_kl:
        g = closed.P * et + closed.C * e
        if spec.family == MIXED_KL:
            g += closed.A * em
        return tl.where(b == -INF, 0.0, g)
    else:
        return tl.where(o == -INF, 0.0, closed.A * em)


@triton.jit
def exact_tile(at, state, row, numbers, more, spec: tl.constexpr):
    """The lanes' sums with the tile at `at` added: of the terms of F, of em, and, for the base's entropy, of
    e but the largest, how many are largest, and -e log2(e / the largest). Writes the gradient."""
    f, d, others, ties, own = state
    closed, hard, top = more
    reference = closed.reference
    b, o, slope_b, slope_o = pair(row, at, "evict_first", spec)
    a = tl.fma(b, numbers.c, -closed.M_b)
    e = tl.math.exp2(a)
    eo = tl.math.exp2(tl.fma(o, numbers.c, -(closed.M_b + reference.N))) * reference.w
    em, et, eu, term = exact_terms(b, o, (a, e, eo), reference, numbers, True, spec)
    f += tl.sum(term, 1)
    d += tl.sum(em, 1)
    if spec.family == ENTROPY:
        others += tl.sum(tl.where(b == top, 0.0, e), 1)
        ties += tl.sum(tl.where(b == top, 1.0, 0.0), 1)
        own -= tl.sum(tl.where(e > 0.0, e * ((b - top) * numbers.c), 0.0), 1)
    if spec.grad:
        z, slope = student_of(b, o, slope_b, slope_o, spec)
        g = exact_gradient(b, o, e, em, et, eu, closed, spec)
        store(row.G, at, row.edge, row.vocab, with_hard(g, z, slope, at, row, hard, spec), spec)
    return f, d, others, ties, own


@triton.jit
def total(lanes):
    return tl.sum(lanes.to(tl.float64), 0)


@triton.jit
def write_plain(row, closed, hard, numbers, spec: tl.constexpr):
    sweep(plain_tile, wide(0.0), row, numbers, (closed, hard), True, spec)


@triton.jit
def write_exact(row, closed, hard, top, numbers, spec: tl.constexpr):
    """The sums of `exact_tile` over a part; writes the gradient."""
    LANES: tl.constexpr = spec.lanes
    zero = tl.zeros([LANES], tl.float32)
    f, d, others, ties, own = sweep(
        exact_tile, (zero, zero, zero, zero, zero), row, numbers, (closed, hard, top), True, spec
    )
    nothing = wide(0.0)
    if spec.family == ENTROPY:
        return total(f), total(d), total(others), total(ties), total(own), nothing
    else:
        return total(f), total(d), nothing, nothing, nothing, nothing
