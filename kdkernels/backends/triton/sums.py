"""The first sweep: the log-sum-exps of both rows, and the sums that a divergence is made of.

Both rows' exponentials are relative to integers M_b, M_o near the largest logit so far times c, so that sums
go from one reference to another by powers of 2. With a_b = b c - M_b and a_o alike, each one fused
multiply-add, so that an offset of the logits costs no digits:

    s = sum 2^{a_b}    so = sum 2^{a_o}
    KL          f = sum 2^{a_b} (a_b - a_o)          log2(b / o) under b, up to what s and so say
    mixed KL    the same, and p = sum 2^{a_o} (a_o - a_b)
    ENTROPY     f = -sum 2^{a_b} a_o                 the cross entropy: -log2 o under b
    orders      f = sum 2^{a_b + tilt (a_o - a_b)}   b^{1 - tilt} o^tilt
    mixtures    nothing: their terms are no sums of these

That is the plain form, for gradients of 16 bits. The exact form (`Spec.exact`) compares o with b at once,
with e = 2^{a_b} and y = (o - b) k - K, K a reference near log sum o - log sum b:

    f = sum e (e^y - 1)    p = sum e y (reverse and mixed KL), sum e (e^{tilt y} - 1) (orders)
    u = sum e e^{tilt y}

each difference to its own digits (terms.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import (
    BIG,
    INF,
    LOG2E,
    LOG2E_SINGLE,
    LOW,
    MOST,
    kl_terms,
    magnitude,
    power_terms,
    ratio_short,
    select,
    wide,
)
from .records import ENTROPY, MIXED_KL, SMOOTHED, STUDENT, Reference, Sums
from .rows import columns, pair, student_of, sweep, transformed

LEAST = tl.constexpr(-1e20)  # no rounding of a difference of logits that count is below it
NOWHERE = tl.constexpr(1 << 30)  # a class or a tile beyond all


@triton.jit
def exponent_shift(K, K_low, numbers):
    """(N, w): the integer nearest to K + K_low in base 2, and w = 2^N e^{-(K + K_low)}. The scale of logits
    is c, so that is what K is brought to."""
    x = (wide(K) + K_low) / numbers.k * numbers.c
    N = tl.floor(x + 0.5)
    return N.to(tl.float32), tl.exp((N - x) / LOG2E).to(tl.float32)


@triton.jit
def reference_at(K, K_low, numbers):
    N, w = exponent_shift(K, K_low, numbers)
    return Reference(K, K_low, N, w)


@triton.jit
def sample(row, numbers, spec: tl.constexpr):
    """(the largest b, the largest o, K) of 16 runs of 32 classes: K is the mean of (o - b) k under b."""
    cols = tl.arange(0, 16)[:, None] * (row.vocab // 16) + tl.arange(0, 32)[None, :]
    b = tl.load(row.base.X + row.edge + cols, mask=cols < row.vocab, other=-INF).to(tl.float32)
    o = tl.load(row.other.X + row.edge + cols, mask=cols < row.vocab, other=-INF).to(tl.float32)
    b = transformed(b, row.base, ratio_short, spec.transform)[0]
    o = transformed(o, row.other, ratio_short, spec.transform)[0]
    top = tl.maximum(tl.max(tl.max(b, 1), 0), LOW)
    y = (o - b) * numbers.k
    there = tl.abs(y) < MOST  # masks are no classes, -inf or not
    e = tl.where(there, tl.math.exp2((b - top) * numbers.c), 0.0)
    s = tl.sum(tl.sum(e, 1), 0)
    K = tl.sum(tl.sum(tl.where(there, e * y, 0.0), 1), 0) / tl.where(s > 0.0, s, 1.0)
    return top, tl.maximum(tl.max(tl.max(o, 1), 0), LOW), K


@triton.jit
def difference(b, o, reference, numbers, spec: tl.constexpr):
    """y = (o - b) k - K; fp32 logits carry the rounding of o - b, which a common offset would make larger
    than what is left. K_low counts then, and where the gradient is not linear in what y lacks."""
    hi = o - b
    if spec.carry:
        back = hi - o
        lo = (o - (hi - back)) - (b + back)
        y = tl.fma(hi, numbers.k, -reference.K) - reference.K_low
        # lo is nan where hi is infinite or nan, which y remains
        return tl.fma(tl.maximum(lo, LEAST), numbers.k, y)
    elif spec.splits:
        return tl.fma(hi, numbers.k, -reference.K) - reference.K_low
    else:
        return tl.fma(hi, numbers.k, -reference.K)


@triton.jit
def exact_terms(b, o, powers, reference, numbers, WHOLE: tl.constexpr, spec: tl.constexpr):
    """(e^y - 1, e^{tilt y} - 1, e^{tilt y}, the term of F), each times e, of a tile; of reverse KL e y is the
    second. powers: (the exponent of e in base 2, e, o's e^y). WHOLE: whether the term is asked for."""
    a, e, eo = powers
    y = difference(b, o, reference, numbers, spec)
    if WHOLE or spec.power or spec.reverse_kl:
        # +inf, and the nan of a class that neither has; e is 0 there
        y = tl.minimum(y, BIG)
    if spec.power:
        eu = tl.math.exp2(tl.fma(y, numbers.tilt * LOG2E, a))
        tilts = numbers.tilt, numbers.inverse_tilt
        em, et, term = power_terms(
            (e, eo, eu, y), tilts, ratio_short, magnitude, select, spec.base == STUDENT
        )
        return em, et, eu, term
    else:
        em, term = kl_terms(e, eo, y, ratio_short, magnitude, select)
        if spec.family == MIXED_KL:
            # eo psi(-y); where |y| is small, of what is e psi(y) already
            back = tl.where(tl.abs(y) < 0.5, em * y - term, eo * y - em)
            term = numbers.base_share * term + numbers.other_share * back
            # a class that the base masks has no number for y
            return em, tl.where((y >= BIG) & (o > -INF), INF, e * y), e, term
        return em, e * y if spec.reverse_kl else em, e, term


@triton.jit
def plain_term(e, a, a_o, numbers, spec: tl.constexpr):
    """The term of f, plain. A class that the base has not adds nothing; one that only the base has makes KL
    infinite, or nan where its e is 0 in fp32, and then `careful_rows` finds it."""
    if spec.power:
        # a difference of infinities becomes finite, and 2^{-inf} is 0 all the same
        y = tl.minimum(tl.maximum(a_o - a, -BIG), BIG)
        return tl.math.exp2(tl.fma(y, numbers.tilt, a))
    elif spec.family == ENTROPY:
        return e * tl.where(a > -INF, -a_o, 0.0)
    else:
        return e * tl.where(a > -INF, a - a_o, 0.0)


@triton.jit
def rebased(f, s, fall_b, fall_o, unit, numbers, spec: tl.constexpr):
    """f, with references that are now fall_b, fall_o (<= 0, in base 2) further up; unit = 2^fall_b."""
    if spec.exact or spec.mixes:
        return f * unit
    elif spec.power:
        # a lane whose base is masked has nothing, whatever its other's reference does
        grows = tl.math.exp2(tl.fma(fall_o - fall_b, numbers.tilt, fall_b).to(tl.float32))
        return tl.where(f == 0.0, 0.0, f * grows)
    elif spec.family == ENTROPY:
        return unit * (f - s * fall_o)
    else:
        return unit * (f + s * (fall_b - fall_o))


@triton.jit
def exponents_of(top_b, top_o, reference, numbers, spec: tl.constexpr):
    """(M_b, M_o), which both rows' exponents in base 2 are relative to; in the exact form o's follows b's."""
    M_b = tl.ceil(top_b * numbers.c)
    if spec.exact:
        return M_b, M_b + reference.N
    else:
        return M_b, tl.ceil(top_o * numbers.c)


@triton.jit
def first_tile(at, lanes, row, numbers, reference, spec: tl.constexpr):
    """The lanes' sums with the tile at `at` added."""
    sums, M_b0, M_o0, M_h0 = lanes
    b, o, slope_b, slope_o = pair(row, at, "evict_last", spec)
    top_b, top_o = tl.maximum(sums.top_b, tl.max(b, 1)), sums.top_o
    if not spec.exact or spec.hard or spec.stats:
        top_o = tl.maximum(top_o, tl.max(o, 1))
    M_b, M_o = exponents_of(top_b, top_o, reference, numbers, spec)
    fall_b = M_b0 - M_b
    fall_o = fall_b if spec.exact else M_o0 - M_o
    unit_b, unit_o = tl.math.exp2(fall_b), tl.math.exp2(fall_o)
    a, a_o = tl.fma(b, numbers.c, -M_b[:, None]), tl.fma(o, numbers.c, -M_o[:, None])
    e, eo = tl.math.exp2(a), tl.math.exp2(a_o)
    s, so = sums.s * unit_b + tl.sum(e, 1), sums.so * unit_o + tl.sum(eo, 1)
    f, p, u = rebased(sums.f, sums.s, fall_b, fall_o, unit_b, numbers, spec), sums.p, sums.u
    if spec.exact:
        em, et, eu, _ = exact_terms(b, o, (a, e, eo * reference.w), reference, numbers, False, spec)
        f += tl.sum(em, 1)
        if spec.power or spec.reverse_kl:
            p = p * unit_b + tl.sum(et, 1)
        if spec.power:
            u = u * unit_b + tl.sum(eu, 1)
    elif not spec.mixes:
        f += tl.sum(plain_term(e, a, a_o, numbers, spec), 1)
        if spec.family == MIXED_KL:
            p = rebased(p, sums.so, fall_o, fall_b, unit_o, numbers, spec)
            p += tl.sum(plain_term(eo, a_o, a, numbers, spec), 1)
    others, exponents, classes = sums.others, sums.exponents, sums.classes
    M_h = M_h0
    if spec.hard:
        z = student_of(b, o, slope_b, slope_o, spec)[0]
        M_h = tl.ceil((top_b if spec.student_base else top_o) * LOG2E_SINGLE)
        x = tl.fma(z, LOG2E_SINGLE, -M_h[:, None])
        here = tl.where(columns(at, spec) == row.edge + row.label, 0.0, tl.math.exp2(x))
        others = others * tl.math.exp2(M_h0 - M_h) + tl.sum(here, 1)
        if spec.hard == SMOOTHED:
            there = z > -INF
            exponents += (M_h0 - M_h) * classes + tl.sum(tl.where(there, x, 0.0), 1)
            classes += tl.sum(tl.where(there, 1.0, 0.0), 1)
    moved_b, moved_o, place_b, place_o = sums.moved_b, sums.moved_o, sums.place_b, sums.place_o
    if spec.stats:
        moved_b = unit_b * (moved_b + fall_b * sums.s) + tl.sum(e * tl.maximum(a, -BIG), 1)
        moved_o = unit_o * (moved_o + fall_o * sums.so) + tl.sum(eo * tl.maximum(a_o, -BIG), 1)
        place_b = first_largest(place_b, sums.top_b, b, at)
        place_o = first_largest(place_o, sums.top_o, o, at)
    return (
        Sums(
            top_b, top_o, s, so, f, others, p, u, sums.peak, exponents, classes, moved_b, moved_o, place_b,
            place_o,
        ),
        M_b, M_o, M_h,
    )  # fmt: skip


@triton.jit
def first_largest(run, best, x, at):
    """The first tile that has each lane's largest logit; tiles come in any order."""
    new = tl.max(x, 1)
    return tl.where((new > best) | ((new == best) & (at < run)), at, run)


@triton.jit
def first_class(side, top, place, row, spec: tl.constexpr):
    """The first class with the largest logit: of the first run that has it, which is read again."""
    LANES: tl.constexpr = spec.lanes
    R: tl.constexpr = spec.run
    runs = tl.where(top == tl.max(top, 0), place + tl.arange(0, LANES) * R, NOWHERE)
    cols = tl.min(runs, 0) + tl.arange(0, R)
    there = (cols >= row.edge) & (cols < row.edge + row.vocab)
    x = tl.load(side.X + cols, mask=there, other=-INF).to(tl.float32)
    x = transformed(x, side, ratio_short, spec.transform)[0]
    return wide(tl.min(tl.where(x == tl.max(x, 0), cols, NOWHERE), 0) - row.edge)


@triton.jit
def first_sweep(row, numbers, reference, top_b, top_o, spec: tl.constexpr):
    """`Sums` of a program's part."""
    LANES: tl.constexpr = spec.lanes
    zero = tl.zeros([LANES], tl.float32)
    nowhere = tl.full([LANES], NOWHERE, tl.int32)
    top_b, top_o = zero + top_b, zero + top_o
    nothing = Sums(
        top_b, top_o, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, nowhere, nowhere
    )  # fmt: skip
    M_h = tl.ceil((top_b if spec.student_base else top_o) * LOG2E_SINGLE)
    M_b, M_o = exponents_of(top_b, top_o, reference, numbers, spec)
    lanes = nothing, M_b, M_o, M_h
    sums, _, _, _ = sweep(first_tile, lanes, row, numbers, reference, False, spec)
    place_b, place_o = wide(0.0), wide(0.0)
    if spec.stats:
        place_b = first_class(row.base, sums.top_b, sums.place_b, row, spec)
        place_o = first_class(row.other, sums.top_o, sums.place_o, row, spec)
    return merged(sums, sums.so, place_b, place_o, numbers, spec)


@triton.jit
def merged(x, peaks, place_b, place_o, numbers, spec: tl.constexpr):
    """The sums of all lanes, or of all parts of a row, relative to the largest of their tops."""
    top_b, top_o = tl.max(x.top_b, 0), tl.max(x.top_o, 0)
    fall_b = tl.ceil(x.top_b * numbers.c) - tl.ceil(top_b * numbers.c)
    fall_o = fall_b
    if not spec.exact:
        fall_o = tl.ceil(x.top_o * numbers.c) - tl.ceil(top_o * numbers.c)
    unit_b, unit_o = tl.math.exp2(fall_b).to(tl.float64), tl.math.exp2(fall_o).to(tl.float64)
    s, so = x.s.to(tl.float64), x.so.to(tl.float64)
    f = tl.sum(rebased(x.f.to(tl.float64), s, fall_b, fall_o, unit_b, numbers, spec), 0)
    p, u = wide(0.0), wide(0.0)
    others, exponents, classes, moved_b, moved_o = p, p, p, p, p
    if spec.exact and (spec.power or spec.reverse_kl):
        p = tl.sum(x.p * unit_b, 0)
    elif spec.family == MIXED_KL:
        p = tl.sum(rebased(x.p.to(tl.float64), so, fall_o, fall_b, unit_o, numbers, spec), 0)
    if spec.exact and spec.power:
        u = tl.sum(x.u * unit_b, 0)
    if spec.hard:
        tops = x.top_b if spec.student_base else x.top_o
        fall_h = tl.ceil(tops * LOG2E_SINGLE) - tl.ceil(tl.max(tops, 0) * LOG2E_SINGLE)
        others = tl.sum(x.others.to(tl.float64) * tl.math.exp2(fall_h), 0)
        if spec.hard == SMOOTHED:
            exponents = tl.sum(x.exponents.to(tl.float64) + fall_h * x.classes, 0)
            classes = tl.sum(x.classes.to(tl.float64), 0)
    if spec.stats:
        moved_b = tl.sum(unit_b * (x.moved_b + fall_b * s), 0)
        moved_o = tl.sum(unit_o * (x.moved_o + fall_o * so), 0)
    peak = tl.max(peaks * unit_o, 0)
    s, so = tl.sum(s * unit_b, 0), tl.sum(so * unit_o, 0)
    return Sums(
        top_b, top_o, s, so, f, others, p, u, peak, exponents, classes, moved_b, moved_o, place_b, place_o
    )  # fmt: skip
