"""Rows out of a float's range, and what has no sum of terms: the textbook's order of operations, in fp64. The
twin of csrc/careful.

    tops_tile -> sums_of -> closed_of (orders 0 and inf: limit_of) -> tell64 -> write_tile

The first two are in double.py, orders 0 and inf in limits.py. T = inf, of the same kernel, is matching.py.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import (
    INF,
    expm164,
    kl_terms,
    log1p64,
    long,
    magnitude,
    mixture_slope,
    mixture_term,
    power_terms,
    ratio_series,
    select,
    wide,
)
from .close import alpha_gain, value_of_order
from .double import (
    BOTH,
    ONLY_B,
    ONLY_O,
    has,
    nan_if_broken,
    near_expm1,
    pair64,
    softmaxes,
    sums_of,
    tell64,
    tilted,
    tops_tile,
    unseen,
)
from .gradient import total
from .hard import hard_of, with_hard
from .kernels import NUMBERS, ROWS_DATA, is_lost, row_of, scales_of
from .limits import limit_gradient, limit_of
from .matching import matching_row
from .records import ALPHA, ENTROPY, MIXED_KL, MOMENTS, SKEWED, SUPPORT, TVD, Numbers
from .rows import row_at, store, sweep, write_zeros
from .statistics import COLUMNS

REACH64 = tl.constexpr(700.0)


class Closed(NamedTuple):
    """What the gradient takes: log R (orders), the mean of xi (mixtures, reverse KL), a factor, and whether D
    is infinite."""

    log_r: tl.tensor
    moved: tl.tensor
    gain: tl.tensor
    infinite: tl.tensor


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROWS_DATA)
def careful_rows(
    Z, V, G, LABELS, WEIGHTS, TEMPERATURES, LOSS, STATS, STATE, COUNT,
    rows, inner, z_outer, z_inner, v_outer, v_inner, g_outer, g_inner, vocab, width, parts,
    k, tilt, base_share, other_share, value_scale, value_unit, grad_scale, hard_scale, hard_grad_scale,
    smoothing, z_loss, z_scale, z_softcap, z_steepness, v_scale, v_softcap, v_steepness, factor,
    SPEC: tl.constexpr, EVERY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The operator's contract for every row or for those whose loss is lost; ROWS to a program.
    And COUNT to zero, where `loss_rows` has left it (counters.py)."""
    spec: tl.constexpr = SPEC
    first = tl.program_id(0) * ROWS
    some = tl.full([], 1, tl.int32)
    if not EVERY:
        several = first + tl.arange(0, ROWS)
        losses = tl.load(LOSS + several, mask=several < rows, other=0.0)
        some = tl.max(is_lost(losses).to(tl.int32), 0)
        if parts > 1:
            tl.store(COUNT + several, wide(0.0), mask=several < rows)
    if some > 0:
        for index in tl.range(first, tl.minimum(first + ROWS, rows)):
            row = long(index)
            weight = tl.load(WEIGHTS + row) if spec.weighted else wide(1.0)
            lost = tl.full([], 1, tl.int32)
            if not EVERY:
                lost = is_lost(tl.load(LOSS + row)).to(tl.int32)
            g_at, edge = row_at(row, inner, g_outer, g_inner, spec)
            if EVERY and spec.grad:
                write_zeros(G + g_at, edge + tl.where(weight == 0.0, 0, vocab), edge + width, spec.tile)
            if weight == 0.0:
                tl.store(LOSS + row, weight)
            elif lost > 0:
                here, label_logit = row_of(
                    (Z, V, G, LABELS), row, (inner, z_outer, z_inner, v_outer, v_inner, g_outer, g_inner),
                    (z_scale, z_softcap, z_steepness, v_scale, v_softcap, v_steepness), vocab, spec,
                )  # fmt: skip
                given = (
                    value_scale, value_unit, grad_scale, hard_scale, hard_grad_scale, wide(smoothing),
                    wide(z_loss), factor,
                )  # fmt: skip
                own_c, own_k, scales = scales_of(row, weight, TEMPERATURES, 0.0, k, given, spec)
                numbers = Numbers(
                    own_c, wide(own_k), wide(tilt), 1.0 / wide(tilt), wide(base_share), wide(other_share)
                )
                to = LOSS + row, STATS + row * COLUMNS
                if spec.family == MOMENTS:
                    matching_row(here, label_logit, to, numbers, scales, spec)
                else:
                    careful_row(here, label_logit, to, numbers, scales, spec)


@triton.jit
def careful_row(row, label_logit, to, numbers, scales, spec: tl.constexpr):
    lanes = sweep(tops_tile, unseen(spec), row, numbers, 0, False, spec)
    sums, lost = sums_of(row, lanes, numbers, spec), nan_if_broken(lanes[2])
    infinite = infinite_at(lanes[2], numbers, spec)
    limit = 0
    if spec.is_limit:
        value, limit = limit_of(row, sums, numbers, spec)
        value = tl.where(infinite, INF, value)
        closed = Closed(value, value, wide(1.0), infinite)
    else:
        value, closed = closed_of(row, sums, infinite, numbers, spec)
    hard = hard_of(sums, label_logit, scales, spec)
    tell64(to, value, lost, sums, hard, numbers, scales, spec)
    if spec.grad:
        more = sums, closed, limit, hard, scales.grad + lost
        sweep(write_tile, wide(0.0), row, numbers, more, False, spec)


@triton.jit
def infinite_at(marks, numbers, spec: tl.constexpr):
    """Whether D is infinite, or, of alpha between 0 and 1, as large as can be."""
    only_b, disjoint = has(marks, ONLY_B), has(marks, BOTH) == 0
    if spec.power:
        return tl.where(numbers.tilt < 0.0, only_b, disjoint)
    elif spec.mixes:
        return only_b & False
    elif spec.family == MIXED_KL:
        return only_b | has(marks, ONLY_O)
    else:
        return disjoint if spec.family == SUPPORT else only_b


# ---------------------------------------------------------------- the terms of D


@triton.jit
def weight_of(b, o, both, sums, numbers, spec: tl.constexpr):
    """w of a tile, proportional to b^{1 - tilt} o^tilt."""
    if spec.power:
        return tl.exp(tilted(b, o, both, sums, numbers) - sums.p) / sums.u
    else:
        return b


@triton.jit
def class_terms(p_b, p_o, x, wr, both, numbers, spec: tl.constexpr):
    """(the term of D, xi) of a tile, xi of mixtures and of reverse KL; wr: w R, of orders."""
    if spec.power:
        tilt = numbers.tilt
        powers, tilts = (p_b, p_o, wr, x), (tilt, numbers.inverse_tilt)
        _, _, term = power_terms(powers, tilts, ratio_series, magnitude, select, False)
        # p_o is 0 where b alone has the class
        term = tl.where(both, term / (1.0 - tilt), p_b / tilt + p_o / (1.0 - tilt))
        return term, term
    elif spec.family == TVD:
        near = both & (tl.abs(x) < 0.5)
        gap = tl.where(near, near_expm1(p_b, tl.where(near, x, 0.0)), p_o - p_b)
        return 0.5 * tl.abs(gap), tl.where(gap > 0.0, 0.5, tl.where(gap < 0.0, -0.5, 0.0))
    elif spec.mixes:
        mix = numbers.tilt
        alone = tl.where(p_o > 0.0, REACH64, -REACH64)
        x = tl.where(both, tl.minimum(tl.maximum(x, -REACH64), REACH64), alone)
        m1 = expm164(x)
        u = log1p64(mix * m1)
        psi_u = tl.where(tl.abs(u) < 0.5, u * ratio_series(u), mix * m1 - u)
        SHARES: tl.constexpr = spec.family == SKEWED
        logs = x, m1, x * ratio_series(x), u, psi_u, x - u  # terms.MixtureLogs
        weights = mix, numbers.base_share, numbers.other_share
        term = mixture_term(p_b, p_o, logs, weights, magnitude, select, SHARES)
        return term, mixture_slope(logs, weights, spec.student_base, SHARES)
    else:
        _, term = kl_terms(p_b, p_o, x, ratio_series, magnitude, select)
        term = tl.where(both, term, p_o)
        if spec.family == MIXED_KL:
            _, back = kl_terms(p_o, p_b, -x, ratio_series, magnitude, select)
            term = tl.where(both, numbers.base_share * term + numbers.other_share * back, 0.0)
        return term, tl.where(both, -x, 0.0)


@triton.jit
def terms_tile(at, state, row, numbers, more, spec: tl.constexpr):
    """The lanes' sums of the terms of D, of q xi, and of the base's entropy."""
    sums, R = more
    f, moved, own = state
    b, o, both, _ = pair64(row, at, spec)
    p_b, p_o, x = softmaxes(b, o, both, sums, numbers)
    wr = weight_of(b, o, both, sums, numbers, spec) * R
    term, xi = class_terms(p_b, p_o, x, wr, both, numbers, spec)
    if spec.mixes or spec.reverse_kl:
        moved += tl.sum((p_b if spec.student_base else p_o) * xi, 1)
    if spec.family == ENTROPY:
        depth = (b - sums.top_b) * numbers.k
        own += tl.sum(tl.where(p_b > 0.0, p_b * (tl.log(sums.s) - depth), 0.0), 1)
    return f + tl.sum(term, 1), moved, own


@triton.jit
def closed_of(row, sums, infinite, numbers, spec: tl.constexpr):
    """(D, `Closed`)."""
    LANES: tl.constexpr = spec.lanes
    zero = tl.zeros([LANES], tl.float64)
    tilt, gain, most, log_r = numbers.tilt, wide(1.0), wide(INF), wide(0.0)
    if spec.power:
        log_r = tl.where(infinite, 0.0, sums.p + tl.log(sums.u) - tl.log(sums.s) - tilt * sums.f)
    f, moved, own = sweep(
        terms_tile, (zero, zero, zero), row, numbers, (sums, tl.exp(log_r)), False, spec
    )  # fmt: skip
    value = tl.maximum(total(f), 0.0)
    if spec.power:
        value, log_r = value_of_order(value, log_r, numbers, spec)
        if spec.family == ALPHA:
            within = (tilt > 0.0) & (tilt < 1.0)
            most = tl.where(within, 1.0 / (tilt * (1.0 - tilt)), INF)
            gain = tl.where(infinite, tl.where(within, 0.0, float("nan")), alpha_gain(log_r, numbers, spec))
        elif spec.student_base:  # the factor of a negative order is negative
            most = tl.where(tilt < 0.0, -INF, INF)
    elif spec.reverse_kl:
        gain = tl.where(infinite, float("nan"), 1.0)
    value = tl.where(infinite, most, value + total(own))
    return value, Closed(log_r, total(moved), gain, infinite)


# ---------------------------------------------------------------- the gradient


@triton.jit
def class_gradient(p_b, p_o, x, w, both, closed, numbers, spec: tl.constexpr):
    """T dD/dz of a tile: q (xi - its mean), or q - w, from log(w / p_b) where that is small."""
    if spec.mixes or spec.reverse_kl:
        _, xi = class_terms(p_b, p_o, x, w, both, numbers, spec)
        g = (p_b if spec.student_base else p_o) * (xi - closed.moved)
        if spec.family == MIXED_KL:
            gap = tl.where(both & (tl.abs(x) < 0.5), near_expm1(p_b, x), p_o - p_b)
            g = tl.where(both, numbers.base_share * g - numbers.other_share * gap, 0.0)
        return g
    elif spec.power and spec.student_base:
        a = numbers.tilt * x - closed.log_r
        # of a large x little is left in a
        alike = both & (tl.abs(a) < 0.5) & (tl.abs(numbers.tilt * x) < 8.0) & (closed.infinite == 0)
        return tl.where(alike, -near_expm1(p_b, a), p_b - tl.where(closed.infinite, p_o, w))
    elif spec.power:
        a = tl.where(closed.infinite, 0.0, numbers.tilt * x - closed.log_r)
        alike = both & (tl.abs(x) < 0.5) & (tl.abs(a) < 0.5)
        w = tl.where(closed.infinite, p_b, w)
        return tl.where(alike, near_expm1(p_b, x) - near_expm1(p_b, a), p_o - w)
    else:
        return tl.where(both & (tl.abs(x) < 0.5), near_expm1(p_b, x), p_o - p_b)


@triton.jit
def write_tile(at, state, row, numbers, more, spec: tl.constexpr):
    sums, closed, limit, hard, scale = more
    b, o, both, slope = pair64(row, at, spec)
    z = b if spec.student_base else o
    if spec.is_limit:
        g = limit_gradient(b, o, both, sums, limit, numbers, spec)
    else:
        p_b, p_o, x = softmaxes(b, o, both, sums, numbers)
        w = weight_of(b, o, both, sums, numbers, spec)
        g = class_gradient(p_b, p_o, x, w, both, closed, numbers, spec)
    g = scale * tl.where(z == -INF, 0.0, closed.gain * g)
    g = with_hard(g, z, slope, at, row, hard, spec)
    store(row.G, at, row.edge, row.vocab, g.to(tl.float32), spec)
    return state
