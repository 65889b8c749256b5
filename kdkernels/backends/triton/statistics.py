"""The statistics of a row (stats.py): D, the cross entropy, and of both sides the log-sum-exp, the entropy
and the class with the largest logit, from what the first sweep has summed."""

from __future__ import annotations

import triton
import triton.language as tl

from ... import stats
from .arithmetic import LN2, log2_64, wide
from .sums import exponents_of

COLUMNS = tl.constexpr(stats.COLUMNS)


@triton.jit
def tell_side(STATS, log_sum, entropy, place):
    """Of one side; the two sides' columns alternate."""
    tl.store(STATS, log_sum)
    tl.store(STATS + 2, entropy)
    tl.store(STATS + 4, place)


@triton.jit
def tell_summed(STATS, M, s, moved, place):
    """moved: sum of e a, e = 2^a relative to the integer M."""
    log_sum = log2_64(s)
    tell_side(
        STATS, (wide(M) + log_sum) * LN2, tl.maximum((log_sum - moved / s) * LN2, 0.0), place
    )  # fmt: skip


@triton.jit
def tell_sides(STATS, sums, reference, numbers, spec: tl.constexpr):
    base = 0 if spec.student_base else 1
    M_b, M_o = exponents_of(sums.top_b, sums.top_o, reference, numbers, spec)
    tell_summed(STATS + 2 + base, M_b, sums.s, sums.moved_b, sums.place_b)
    tell_summed(STATS + 3 - base, M_o, sums.so, sums.moved_o, sums.place_o)


@triton.jit
def tell_terms(STATS, value, cross_entropy, factor, HARD: tl.constexpr):
    """D and the cross entropy of a row."""
    tl.store(STATS, value * factor)
    if HARD:
        tl.store(STATS + 1, cross_entropy)
