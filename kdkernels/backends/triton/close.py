"""Between the sweeps: what the sums of a row say, as fp64 scalars.

Plain: log-sum-exps in base 2, the value, and two factors of the gradient. Exact: what the reference K lacks,
h = log sum o - log sum b - K, so that the second sweep has y = log(o / b).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import (
    INF,
    LN2,
    LOG2E,
    MOST,
    exp2_64,
    expm164,
    finite,
    log1p64,
    log2_64,
    power_closed,
    select,
    wide,
)
from .records import ALPHA, ENTROPY, MIXED_KL, Reference
from .sums import exponents_of, reference_at


class Plain(NamedTuple):
    """n_b, n_o: integers near the log-sum-exps in base 2; the second sweep's exponents are relative to them.

    With a and a_o a class's exponents relative to them, a tile's gradient is C (A 2^{a_o} - 2^a) for KL and
    the cross entropy, C (A w - q) for orders, C 2^a ((a - a_o) - A) for reverse KL, A being a mean; mixed KL
    has both, and KL's A for B.
    """

    n_b: tl.tensor
    n_o: tl.tensor
    A: tl.tensor
    C: tl.tensor
    B: tl.tensor


class Exact(NamedTuple):
    """The exact form's reference, which is log sum o - log sum b to all digits, and M_b.

    A tile's gradient is A em + P et + C e, with eu for et where `direct`; see `sums.py`.
    """

    reference: tl.tuple
    M_b: tl.tensor
    A: tl.tensor
    P: tl.tensor
    C: tl.tensor
    direct: tl.tensor


@triton.jit
def settled(sums, reference, log_r, numbers, spec: tl.constexpr):
    """Whether the sums of the first sweep are numbers that the rest can be made of; `careful.py` takes the
    other rows. An R of 40 nats, and what is relative to it, is within a float's range."""
    ok = finite(sums.f) & finite(sums.others + sums.exponents) & (sums.s > 0.0) & (sums.so > 0.0)
    ok = ok & finite(sums.s) & finite(sums.so)
    M_b, M_o = exponents_of(sums.top_b, sums.top_o, reference, numbers, spec)
    ok = ok & (tl.abs(M_b) < MOST) & (tl.abs(M_o) < MOST)
    if spec.family == MIXED_KL:
        ok = ok & finite(sums.p)
    if spec.power:
        ok = ok & ((sums.u if spec.exact else sums.f) > 0.0) & (tl.abs(log_r) < 40.0)
    return ok


# ---------------------------------------------------------------- the plain form


@triton.jit
def log2_sums(sums, numbers):
    """log2 of both rows' sums of exponentials, in logits' own scale."""
    M_b, M_o = wide(tl.ceil(sums.top_b * numbers.c)), wide(tl.ceil(sums.top_o * numbers.c))
    return M_b + log2_64(sums.s), M_o + log2_64(sums.so), M_b, M_o


@triton.jit
def log2_ratio(sums, numbers):
    """log2 sum p^a q^{1 - a} of the two softmaxes (orders), and log2 of the sum as it stands."""
    log_b, log_o, M_b, M_o = log2_sums(sums, numbers)
    log_w = log2_64(sums.f) + (M_b + numbers.tilt * (M_o - M_b))
    return log_w - log_b - numbers.tilt * (log_o - log_b), log_w


@triton.jit
def signed(value, numbers, spec: tl.constexpr):
    """D of an order, which rounding may have taken past 0: of a negative order its factor is negative."""
    if spec.student_base and spec.family != ALPHA:
        return tl.where(numbers.tilt < 0.0, tl.minimum(value, 0.0), tl.maximum(value, 0.0))
    else:
        return tl.maximum(value, 0.0)


@triton.jit
def of_order(log_r, numbers, spec: tl.constexpr):
    """D from log R."""
    b = wide(numbers.tilt)
    if spec.family == ALPHA:
        return expm164(log_r) / (b * (b - 1.0))
    else:
        return log_r / (b - 1.0 if spec.student_base else -b)


@triton.jit
def alpha_gain(log_r, numbers, spec: tl.constexpr):
    """What an alpha's gradient has before q - w: R over its order."""
    return tl.exp(log_r) / (numbers.tilt if spec.student_base else 1.0 - wide(numbers.tilt))


@triton.jit
def of_base(sums):
    """KL(b, o), plain."""
    return tl.maximum((sums.f / sums.s - log2_64(sums.s) + log2_64(sums.so)) * LN2, 0.0)


@triton.jit
def plain_value(sums, numbers, spec: tl.constexpr):
    """D of a row; mixtures sum it later."""
    if spec.power:
        return signed(of_order(log2_ratio(sums, numbers)[0] * LN2, numbers, spec), numbers, spec)
    elif spec.family == ENTROPY:
        return (sums.f / sums.s + log2_64(sums.so)) * LN2
    elif spec.family == MIXED_KL:
        back = tl.maximum((sums.p / sums.so - log2_64(sums.so) + log2_64(sums.s)) * LN2, 0.0)
        return numbers.base_share * of_base(sums) + numbers.other_share * back
    else:
        return of_base(sums)


@triton.jit
def plain_close(sums, value, scale, numbers, spec: tl.constexpr):
    """`Plain` of a row, for a gradient times `scale`.

    The factors have what the integers lack, made in fp64: no digit is lost to a log-sum-exp rounded to fp32,
    and where z = v the gradient is exactly 0.
    """
    log_b, log_o, M_b, M_o = log2_sums(sums, numbers)
    n_b, n_o = tl.floor(log_b + 0.5), tl.floor(log_o + 0.5)
    b_unit, o_unit = exp2_64(n_b - log_b), exp2_64(n_o - log_o)
    A, C = o_unit / b_unit, scale * b_unit
    B = A
    if spec.power:
        log_r, log_w = log2_ratio(sums, numbers)
        if spec.family == ALPHA:
            scale *= alpha_gain(log_r * LN2, numbers, spec)
        q_unit = b_unit if spec.student_base else o_unit
        A, C = exp2_64(n_b + numbers.tilt * (n_o - n_b) - log_w) / q_unit, -scale * q_unit
    elif spec.reverse_kl:
        mean = of_base(sums) if spec.family == MIXED_KL else value
        A, C = mean / LN2 - ((n_b - log_b) - (n_o - log_o)), C * LN2
    return Plain(n_b.to(tl.float32), n_o.to(tl.float32), A.to(tl.float32), C.to(tl.float32), B.to(tl.float32))


# ---------------------------------------------------------------- the exact form


@triton.jit
def base_2(reference, numbers):
    """K + K_low in base 2, at the scale of logits, which is c."""
    return (wide(reference.K) + reference.K_low) / numbers.k * numbers.c


@triton.jit
def missing(sums, reference, numbers):
    """h: what the reference lacks of log sum o - log sum b, in nats."""
    near = tl.abs(sums.f) < 0.5 * sums.s
    small = log1p64(tl.where(near, sums.f / sums.s, 0.0))
    rest = tl.log(sums.so / sums.s) + (reference.N - base_2(reference, numbers)) / LOG2E
    return tl.where(near, small, rest)


@triton.jit
def log_power_sum(sums, h, numbers, spec: tl.constexpr):
    """log R, from sums that hold their digits where R is not near 1; near 1 it comes from F."""
    if spec.power:
        near = tl.abs(sums.p) < 0.5 * sums.s
        near_1 = log1p64(tl.where(near, sums.p / sums.s, 0.0))
        return tl.where(near, near_1, tl.log(sums.u / sums.s)) - numbers.tilt * h
    else:
        return h * 0.0


@triton.jit
def poor(sums, h, log_r, numbers, spec: tl.constexpr):
    """Whether the first sweep should be repeated with K + h for its reference.

    Where |h| is large, h is a logarithm of rounded exponentials, 1e-7 of each, and so are q and w. That shows
    where both distributions are a few classes: then one lane has a quarter of so. Elsewhere the gradient is
    large, or errors average. Where log R is large, so are the exponents of w: with the references of the
    second sweep, a dominant class of w has the same error, bit for bit, in its sum and in the gradient.
    """
    far = tl.abs(sums.f) >= 0.5 * sums.s
    again = far & (sums.s < 4.0) & (sums.so < 4.0 * sums.peak) | (tl.abs(log_r) > 3.0)
    if spec.mixes:
        largest = tl.math.exp2(tl.fma(sums.top_b, numbers.c, -tl.ceil(sums.top_b * numbers.c)))
        again = again | (sums.s - largest < 1e-5 * sums.s) & (h != 0.0)
    if spec.reverse_kl:
        again = again | far
    return again


@triton.jit
def shifted(reference, h, numbers):
    """The reference with h added. h is in c's scale, which k is a rounding away from."""
    exact = wide(reference.K) + reference.K_low + h * (wide(numbers.k) * LOG2E / numbers.c)
    high = exact.to(tl.float32)
    return reference_at(high, (exact - high).to(tl.float32), numbers)


@triton.jit
def far_from_1(log_r):
    """Whether R is so far from 1 that q - w is subtracted as it stands, and D is a logarithm."""
    return tl.abs(log_r) > 1.0


@triton.jit
def exact_close(sums, reference, h, log_r, scale, numbers, spec: tl.constexpr):
    """`Exact` of a row, for a gradient times `scale`."""
    after = shifted(reference, h, numbers)
    unit, direct = scale / sums.s, far_from_1(log_r)
    A, P, C = unit, unit * 0.0, unit * 0.0
    if spec.power:
        # as it is in the first sweep, where w is made of a few classes: their rounding is that of its sum
        after = Reference(
            tl.where(direct, reference.K, after.K), tl.where(direct, reference.K_low, after.K_low),
            tl.where(direct, reference.N, after.N), tl.where(direct, reference.w, after.w),
        )  # fmt: skip
        left = tl.where(direct, h, 0.0)  # of what y lacks
        if spec.family == ALPHA:
            unit *= alpha_gain(log_r, numbers, spec)
        A, P = unit * tl.exp(-left), -unit * tl.exp(-numbers.tilt * left - log_r)
        C = tl.where(direct, unit if spec.student_base else A, -unit * expm164(-log_r))
    elif spec.reverse_kl:
        # the mean of y under b, seen from the new reference
        mean = sums.p / sums.s + (wide(reference.K) - after.K) + (wide(reference.K_low) - after.K_low)
        unit = tl.where(finite(mean), unit, float("nan"))  # where D is infinite
        P, C = -unit, unit * mean
        if spec.family == MIXED_KL:
            A, P, C = -numbers.other_share * unit, numbers.base_share * P, numbers.base_share * C
    M_b = tl.ceil(sums.top_b * numbers.c)
    return Exact(after, M_b, A.to(tl.float32), P.to(tl.float32), C.to(tl.float32), direct)


@triton.jit
def exact_value(sums, f, d, log_r, numbers, spec: tl.constexpr):
    """D from what the second sweep has summed: f, the terms of F, and d, of e (e^y - 1).

    d is what y still lacks, as sum q = sum p: with it F is F' - (d / s)^2 / 2, up to a third order, F' as it
    was summed. A row of one class has F = 0 by that alone.
    """
    F = tl.where(finite(f), f / sums.s, INF)
    rest = tl.where(tl.abs(d) < 1e-3 * sums.s, d / sums.s, 0.0)
    if spec.power:
        F = tl.maximum(F / (1.0 - wide(numbers.tilt)) - 0.5 * rest * rest, 0.0)
        return value_of_order(F, log_r, numbers, spec)[0]
    else:
        return tl.maximum(F - 0.5 * rest * rest, 0.0)


@triton.jit
def value_of_order(F, log_r, numbers, spec: tl.constexpr):
    """(D of an order, log R) from F, or, where R is not near 1, from log R."""
    b = wide(numbers.tilt)
    near = tl.abs(log_r) < 0.4
    log_r, F = power_closed(F, log_r, -b * (1.0 - b), near, log1p64, expm164, select)
    return F if spec.family == ALPHA else of_order(log_r, numbers, spec), log_r


@triton.jit
def entropy(others, ties, own, top, numbers):
    """sum p (log sum e - log e), the sum without its largest term, which would swamp the others. The sums are
    over 2^M of top."""
    unit = tl.exp((wide(top) * numbers.c - tl.ceil(top * numbers.c)) / LOG2E)
    rest = others / unit + (ties - 1.0)
    return own / unit / LOG2E / (1.0 + rest) + log1p64(rest)
