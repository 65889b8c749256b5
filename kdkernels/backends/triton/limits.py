"""Orders 0 and inf, which have no sum of terms: log of a probability, and a largest ratio.

Order 0 is -log of what o has of b's classes, order inf -least log(o / b). The gradient is the student's q
less q restricted to the classes that are chosen: b's, or those where o / b is least.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import INF, log1p64
from .double import NOTHING, apart, pair64, softmaxes
from .gradient import total
from .records import EXTREME, SUPPORT
from .rows import sweep


class Limit(NamedTuple):
    """The least of `apart`; q restricted to the chosen classes is share e^{(z - top) k}."""

    least: tl.tensor
    top: tl.tensor
    share: tl.tensor


@triton.jit
def chosen(b, o, both, least, sums, spec: tl.constexpr):
    """The classes that w is q restricted to: as the logits are given, not as they are rounded."""
    if spec.family == SUPPORT:
        return b > -INF
    else:
        return both & (apart(b, o, both, sums) == least)


@triton.jit
def least_tile(at, least, row, numbers, sums, spec: tl.constexpr):
    b, o, both, _ = pair64(row, at, spec)
    # no class is chosen where D is infinite
    t = tl.where(both, apart(b, o, both, sums), tl.where(b > -INF, -INF, INF))
    return tl.minimum(least, tl.min(t, 1))


@triton.jit
def limit_tile(at, state, row, numbers, more, spec: tl.constexpr):
    """The lanes' top among the chosen classes, their sum relative to it, the probability of the others, and
    how many of o's classes are not chosen."""
    sums, least = more
    top, inside, outside, others = state
    b, o, both, _ = pair64(row, at, spec)
    p_b, p_o, _ = softmaxes(b, o, both, sums, numbers)
    x, p = (b, p_b) if spec.family == EXTREME and spec.student_base else (o, p_o)
    here = chosen(b, o, both, least, sums, spec)
    before, top = top, tl.maximum(top, tl.max(tl.where(here, x, NOTHING), 1))
    e = tl.where(here, tl.exp((x - top[:, None]) * numbers.k), 0.0)
    inside = inside * tl.exp((before - top) * numbers.k) + tl.sum(e, 1)
    others += tl.sum(tl.where((o > -INF) & (here == 0), 1.0, 0.0), 1)
    return top, inside, outside + tl.sum(tl.where(here, 0.0, p), 1), others


@triton.jit
def limit_of(row, sums, numbers, spec: tl.constexpr):
    """(D where it is finite, `Limit`)."""
    LANES: tl.constexpr = spec.lanes
    zero = tl.zeros([LANES], tl.float64)
    least = tl.min(zero, 0)
    if spec.family == EXTREME:
        least = tl.min(sweep(least_tile, zero + INF, row, numbers, sums, False, spec), 0)
    tops, inside, outside, others = sweep(
        limit_tile, (zero + NOTHING, zero, zero, zero), row, numbers, (sums, least), False, spec
    )
    top = tl.max(tops, 0)
    inside, rest = total(inside * tl.exp((tops - top) * numbers.k)), total(outside)
    if spec.family == SUPPORT:
        value = log1p64(rest * sums.so / (inside * tl.exp((top - sums.top_o) * numbers.k)))
    else:  # where all classes are chosen p = q
        value = tl.where(total(others) > 0.0, tl.maximum(sums.f - least * numbers.k, 0.0), 0.0)
    return value, Limit(least, top, rest / inside)


@triton.jit
def limit_gradient(b, o, both, sums, limit, numbers, spec: tl.constexpr):
    """T dD/dz of a tile."""
    p_b, p_o, _ = softmaxes(b, o, both, sums, numbers)
    z, q = (b, p_b) if spec.student_base else (o, p_o)
    if spec.family == SUPPORT and spec.student_base:
        return q * 0.0
    else:
        own = tl.exp((z - limit.top) * numbers.k) * limit.share
        g = tl.where(chosen(b, o, both, limit.least, sums, spec), -own, q)
        return -g if spec.student_base else g
