"""Rows out of a float's range, and what has no sum of terms: the textbook's order of operations, in fp64. The
twin of csrc/careful.h."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import (
    INF,
    expm164,
    finite,
    kl_terms,
    log1p64,
    long,
    magnitude,
    mixture_slope,
    mixture_term,
    power_terms,
    psi_series,
    select,
    wide,
)
from .hard import joined
from .kernels import NUMBERS, ROWS_DATA, is_lost, weighted
from .records import (
    ALPHA,
    CAPPED,
    ENTROPY,
    EXTREME,
    KL,
    MIXTURE,
    MOMENTS,
    POWER,
    SKEWED,
    SMOOTHED,
    SUPPORT,
    TVD,
    Scales,
    Side,
)
from .rows import label_of, transformed, write_zeros
from .statistics import COLUMNS, tell_terms
from .sums import NOWHERE

REACH64 = tl.constexpr(700.0)
FARTHEST = tl.constexpr(1e15)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROWS_DATA)
def careful_rows(
    Z, V, G, LABELS, WEIGHTS, LOSS, STATS,
    rows, inner, z_outer, z_inner, v_outer, v_inner, g_outer, g_inner, vocab, width,
    k, tilt, base_share, other_share, value_scale, value_unit, grad_scale, hard_scale, hard_grad_scale,
    smoothing, z_loss, z_scale, z_softcap, z_steepness, v_scale, v_softcap, v_steepness, factor,
    SPEC: tl.constexpr, EVERY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The operator's contract in the textbook's order and fp64, for every row or for those whose loss is
    lost; ROWS to a program."""
    spec: tl.constexpr = SPEC
    first = tl.program_id(0) * ROWS
    some = tl.full([], 1, tl.int32)
    if not EVERY:
        several = first + tl.arange(0, ROWS)
        losses = tl.load(LOSS + several, mask=several < rows, other=0.0)
        some = tl.max(is_lost(losses).to(tl.int32), 0)
    if some > 0:
        for index in tl.range(first, tl.minimum(first + ROWS, rows)):
            row = long(index)
            weight = tl.load(WEIGHTS + row) if spec.weighted else wide(1.0)
            lost = tl.full([], 1, tl.int32)
            if not EVERY:
                lost = is_lost(tl.load(LOSS + row)).to(tl.int32)
            g_at = row // inner * g_outer + row % inner * g_inner
            if EVERY and spec.grad:
                write_zeros(G + g_at, tl.where(weight == 0.0, 0, vocab), width, BLOCK)
            if weight == 0.0:
                tl.store(LOSS + row, weight)
            elif lost > 0:
                z = Side(
                    Z + (row // inner * z_outer + row % inner * z_inner), z_scale, z_softcap, z_steepness
                )
                v = Side(
                    V + (row // inner * v_outer + row % inner * v_inner), v_scale, v_softcap, v_steepness
                )
                scales = Scales(
                    weight, value_scale, value_unit, weight * grad_scale, hard_scale,
                    weight * hard_grad_scale, wide(smoothing), wide(z_loss), factor,
                )  # fmt: skip
                careful_row(
                    z, v, G + g_at, LABELS, LOSS, STATS + row * COLUMNS, row, vocab, wide(k), wide(tilt),
                    wide(base_share), wide(other_share), scales,
                    spec.family, spec.student_base, spec.centered, spec.hard, spec.grad, spec.stats,
                    spec.transform, BLOCK,
                )  # fmt: skip


@triton.jit
def block64(Z, V, at, vocab, TRANSFORM: tl.constexpr, BLOCK: tl.constexpr):
    """(z, v, class, the slope of z's transform) of a block, -inf beyond the row."""
    cols = at + tl.arange(0, BLOCK)
    z = tl.load(Z.X + cols, mask=cols < vocab, other=-INF).to(tl.float64)
    v = tl.load(V.X + cols, mask=cols < vocab, other=-INF).to(tl.float64)
    z, slope = transformed(z, Z, psi_series, TRANSFORM)
    return z, transformed(v, V, psi_series, TRANSFORM)[0], cols, slope


@triton.jit
def apart(z, v, mz, mv):
    """(z - mz) - (v - mv), 0 where a class has only one of the two: from z - v, whose digits are those of the
    logits, but where the rows lie so far apart that it has none of theirs."""
    gap = mz - mv
    t = tl.where(tl.abs(gap) > FARTHEST, (z - mz) - (v - mv), (z - v) - gap)
    return tl.where((z > -INF) & (v > -INF), t, 0.0)


@triton.jit
def near_expm1(p, x):
    """p (e^x - 1) for |x| < 1/2."""
    return p * (x + psi_series(x))


@triton.jit
def chosen_classes(z, v, mz, mv, least, FAMILY: tl.constexpr, REVERSE: tl.constexpr):
    """The classes that w is q restricted to: p's support (reversed: q's), or where d is least (greatest), as
    the logits are given."""
    if FAMILY == SUPPORT:
        return z > -INF if REVERSE else v > -INF
    else:
        t = apart(z, v, mz, mv)
        return ((-t if REVERSE else t) == least) & (z > -INF) & (v > -INF)


@triton.jit
def mixed64(p, q, d, both, mix, base, other, FAMILY: tl.constexpr, BASE_Z: tl.constexpr):
    """(the term of D, xi) of the mixture family; see mixture.py."""
    b, o, x = p, q, d
    if BASE_Z:
        b, o, x = q, p, -d
    if FAMILY == TVD:
        near = both & (tl.abs(d) < 0.5)
        gap = tl.where(near, near_expm1(p, tl.where(near, d, 0.0)), q - p)
        return 0.5 * tl.abs(gap), tl.where(gap > 0.0, 0.5, tl.where(gap < 0.0, -0.5, 0.0))
    else:
        x = tl.where(both, tl.minimum(tl.maximum(x, -REACH64), REACH64), tl.where(o > 0.0, REACH64, -REACH64))
        m1 = expm164(x)
        u = log1p64(mix * m1)
        psi_u = tl.where(tl.abs(u) < 0.5, psi_series(u), mix * m1 - u)
        term = mixture_term(
            b, o, x, m1, psi_series(x), u, psi_u, x - u, mix, base, other, magnitude, select, FAMILY == SKEWED
        )
        return term, mixture_slope(m1, u, psi_u, x - u, mix, base, other, BASE_Z, FAMILY == SKEWED)


@triton.jit
def tell_side(
    STATS, X, top, broken, k, vocab, FAMILY: tl.constexpr, TRANSFORM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes the log-sum-exp, entropy and top-1 class of one side, two columns apart; at T = inf its classes
    count alike."""
    k = 0.0 if FAMILY == MOMENTS else k
    s = tl.zeros([BLOCK], tl.float64)
    moved, best, place = s, s - INF, tl.full([BLOCK], NOWHERE, tl.int32)
    for at in tl.range(0, vocab, BLOCK):
        x, _, cols, _ = block64(X, X, at, vocab, TRANSFORM, BLOCK)
        depth = tl.where(x > -INF, (x - top) * k, 0.0)
        e = tl.where(x > -INF, tl.exp(depth), 0.0)
        s += e
        moved += e * depth
        place = tl.where(x > best, cols, place)
        best = tl.maximum(best, x)
    every = tl.sum(s, 0)
    log_sum = tl.log(every)
    place = tl.min(tl.where(best == tl.max(best, 0), place, NOWHERE), 0)
    tl.store(STATS, tl.where(broken, float("nan"), log_sum + top * k))
    tl.store(STATS + 2, tl.where(broken, float("nan"), log_sum - tl.sum(moved, 0) / every))
    tl.store(STATS + 4, tl.where(broken, float("nan"), place.to(tl.float64)))


@triton.jit
def careful_row(
    Z, V, G, LABELS, LOSS, STATS, row, vocab, k, tilt, base_share, other_share, scales,
    FAMILY: tl.constexpr, BASE_Z: tl.constexpr, CENTERED: tl.constexpr, HARD: tl.constexpr,
    GRAD: tl.constexpr, TELL: tl.constexpr, TRANSFORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = 1.0 - tilt if BASE_Z else tilt
    order = tilt if BASE_Z else 1.0 - tilt
    zero = tl.zeros([BLOCK], tl.float64)
    top_z, top_v = zero - INF, zero - INF
    bad_z = tl.zeros([BLOCK], tl.int32)
    bad_v, lone_p, lone_q, differs = bad_z, bad_z, bad_z, bad_z
    for at in tl.range(0, vocab, BLOCK):
        z, v, _, _ = block64(Z, V, at, vocab, TRANSFORM, BLOCK)
        top_z, top_v = tl.maximum(top_z, z), tl.maximum(top_v, v)
        bad_z |= (z != z).to(tl.int32)
        bad_v |= (v != v).to(tl.int32)
        lone_p |= ((z == -INF) & (v > -INF)).to(tl.int32)
        lone_q |= ((v == -INF) & (z > -INF)).to(tl.int32)
    mz, mv = tl.max(top_z, 0), tl.max(top_v, 0)
    broken_z = (tl.max(bad_z, 0) > 0) | (finite(mz) == 0)
    broken = broken_z | (tl.max(bad_v, 0) > 0) | (finite(mv) == 0)
    has_lone_p, has_lone_q = tl.max(lone_p, 0) > 0, tl.max(lone_q, 0) > 0
    mz, mv = tl.where(broken_z, 0.0, mz), tl.where(broken, 0.0, mv)
    least = zero + INF
    if FAMILY == EXTREME:
        for at in tl.range(0, vocab, BLOCK):
            z, v, _, _ = block64(Z, V, at, vocab, TRANSFORM, BLOCK)
            t = apart(z, v, mz, mv)
            both = (z > -INF) & (v > -INF)
            here = tl.where(both, -t if BASE_Z else t, -INF)  # no class is chosen where D is infinite
            least = tl.minimum(least, tl.where((z if BASE_Z else v) > -INF, here, INF))
    least = tl.min(least, 0)

    # sums relative to both maxima
    sz, sv, sd, rest, top_u, top_set = zero, zero, zero, zero, zero - INF, zero - INF
    for at in tl.range(0, vocab, BLOCK):
        z, v, _, _ = block64(Z, V, at, vocab, TRANSFORM, BLOCK)
        both = (z > -INF) & (v > -INF)
        t = apart(z, v, mz, mv)
        if FAMILY == MOMENTS:
            sv += both.to(tl.float64)
            sd += t
        else:
            ez, ev, y = tl.exp((z - mz) * k), tl.exp((v - mv) * k), t * k
            sz += ez
            sv += ev
            sd += tl.where(both & (tl.abs(y) < 0.5), near_expm1(ev, y), ez - ev)
            if FAMILY == POWER or FAMILY == ALPHA:
                top_u = tl.maximum(top_u, tl.where(both, (v - mv) * k + b * y, -INF))
            if FAMILY >= SUPPORT:
                chosen = chosen_classes(z, v, mz, mv, least, FAMILY, BASE_Z)
                differs |= (((v if BASE_Z else z) > -INF) & (chosen == 0)).to(tl.int32)
                rest += tl.where(chosen, 0.0, ev if FAMILY == SUPPORT and BASE_Z else ez)
                top_set = tl.maximum(
                    top_set, tl.where(chosen, v if FAMILY == SUPPORT and BASE_Z else z, -INF)
                )
    sum_z, sum_v, sum_d = tl.sum(sz, 0), tl.sum(sv, 0), tl.sum(sd, 0)
    if FAMILY == MOMENTS:
        count = tl.maximum(sum_v, 1.0)
        shift = sum_d / count if CENTERED else mv - mz  # of what `apart` gives
    else:
        near = tl.abs(sum_d) < 0.5 * sum_v
        shift = tl.where(near, log1p64(tl.where(near, sum_d / sum_v, 0.0)), tl.log(sum_z / sum_v))

    infinite = has_lone_q if FAMILY == KL and BASE_Z else has_lone_p
    most = wide(INF)  # what an infinite value is; the factor of a negative order's is negative
    log_r, mu, sum_u, set_top, sum_set, outside = (
        shift * 0.0,
        shift * 0.0,
        shift * 0.0 + 1.0,
        mz,
        shift * 0.0,
        shift * 0.0,
    )
    moved, gain = shift * 0.0, shift * 0.0 + 1.0
    if FAMILY == POWER or FAMILY == ALPHA:
        mu = tl.max(top_u, 0)
        disjoint = mu == -INF
        infinite = tl.where(order > 1.0, has_lone_p, tl.where(order < 0.0, has_lone_q, disjoint))
        mu = tl.where(disjoint, 0.0, mu)
        su = zero
        for at in tl.range(0, vocab, BLOCK):
            z, v, _, _ = block64(Z, V, at, vocab, TRANSFORM, BLOCK)
            both = (z > -INF) & (v > -INF)
            t = apart(z, v, mz, mv)
            su += tl.where(both, tl.exp((v - mv) * k + b * (t * k) - mu), 0.0)
        sum_u = tl.where(infinite, 1.0, tl.sum(su, 0))
        log_r = tl.where(infinite, 0.0, mu + tl.log(sum_u) - tl.log(sum_v) - b * shift)
    if FAMILY >= SUPPORT:
        outside, set_top = tl.sum(rest, 0), tl.max(top_set, 0)
        empty = set_top == -INF
        set_top = tl.where(empty, 0.0, set_top)
        inside = zero
        for at in tl.range(0, vocab, BLOCK):
            z, v, _, _ = block64(Z, V, at, vocab, TRANSFORM, BLOCK)
            own = v if FAMILY == SUPPORT and BASE_Z else z
            inside += tl.where(
                chosen_classes(z, v, mz, mv, least, FAMILY, BASE_Z), tl.exp((own - set_top) * k), 0.0
            )
        sum_set = tl.where(empty, 1.0, tl.sum(inside, 0))
        if FAMILY == SUPPORT:
            infinite = empty
            value = log1p64(outside / (sum_set * tl.exp((set_top - (mv if BASE_Z else mz)) * k)))
        else:
            infinite = has_lone_q if BASE_Z else has_lone_p
            value = (-shift if BASE_Z else shift) - least * k
            value = tl.where(tl.max(differs, 0) > 0, tl.maximum(value, 0.0), 0.0)  # 0: p = q
        outside = tl.where(infinite, 0.0, outside)
    else:
        value = shift * 0.0
        f, own, slopes = zero, zero, zero
        R = tl.exp(log_r)
        for at in tl.range(0, vocab, BLOCK):
            z, v, _, _ = block64(Z, V, at, vocab, TRANSFORM, BLOCK)
            both = (z > -INF) & (v > -INF)
            t = apart(z, v, mz, mv)
            if FAMILY == MOMENTS:
                x = tl.where(both, t - shift, 0.0)
                f += 0.5 * x * x
            else:
                p, q, d = tl.exp((v - mv) * k) / sum_v, tl.exp((z - mz) * k) / sum_z, t * k - shift
                if FAMILY >= POWER:
                    w = tl.where(both, tl.exp((v - mv) * k + b * (t * k) - mu), 0.0) / sum_u
                    if BASE_Z:
                        _, _, term = power_terms(
                            q, p, w * R, -d, tilt, 1.0 / tilt, psi_series, magnitude, select, False
                        )
                    else:
                        _, _, term = power_terms(
                            p, q, w * R, d, tilt, 1.0 / tilt, psi_series, magnitude, select, False
                        )
                    term = tl.where(both, term / (1.0 - tilt), tl.where(v == -INF, q / order, p / b))
                elif MIXTURE <= FAMILY and FAMILY <= TVD:
                    term, xi = mixed64(p, q, d, both, tilt, base_share, other_share, FAMILY, BASE_Z)
                    slopes += q * xi
                elif FAMILY == KL and BASE_Z:
                    slopes += tl.where(both, q * d, 0.0)
                    _, term = kl_terms(q, p, -d, psi_series, magnitude, select)
                    term = tl.where(both, term, p)
                else:
                    _, term = kl_terms(p, q, d, psi_series, magnitude, select)
                    term = tl.where(both, term, q)
                f += term
                own += tl.where(p > 0.0, p * (tl.log(sum_v) - (v - mv) * k), 0.0)
        F = tl.maximum(tl.sum(f, 0), 0.0)
        moved = tl.sum(slopes, 0)
        if FAMILY == KL and BASE_Z:
            gain = tl.where(infinite, float("nan"), gain)
        if FAMILY == MOMENTS:
            infinite = tl.where(tilt == 0.0, has_lone_p if BASE_Z else has_lone_q, has_lone_p | has_lone_q)
            value = tilt * F / count
        elif FAMILY >= POWER:
            near = tl.abs(log_r) < 0.4
            log_r = tl.where(near, log1p64(tl.where(near, -b * order * F, 0.0)), log_r)
            if FAMILY == ALPHA:
                value = tl.where(near, F, expm164(log_r) / (-b * order))
                between = (order > 0.0) & (order < 1.0)
                value = tl.where(infinite & between, 1.0 / (b * order), value)
                gain = tl.where(infinite, tl.where(between, 0.0, float("nan")), tl.exp(log_r) / order)
                most = tl.where(infinite & between, value, most)
            else:
                value = -log_r / b
                most = tl.where(order < 0.0, -INF, most)
        else:
            value = F
            if MIXTURE <= FAMILY and FAMILY <= TVD:
                infinite = broken
            if FAMILY == ENTROPY:
                value += tl.sum(own, 0)
    value = tl.where(broken, float("nan"), tl.where(infinite, most, value))

    if TELL:  # of both sides; what this leaves of a row that is broken is nan
        tell_terms(STATS, value, value, scales.factor, False)
        tell_side(STATS + 2, Z, mz, broken, k, vocab, FAMILY, TRANSFORM, BLOCK)
        tell_side(STATS + 3, V, mv, broken, k, vocab, FAMILY, TRANSFORM, BLOCK)
    hard_value, hard_factor, hard_label, each, label = value * 0.0, value * 0.0, value * 0.0, value * 0.0, -1
    if HARD:
        label, label_logit = label_of(LABELS, Z, row, 0, vocab)
        label_logit = transformed(wide(label_logit), Z, psi_series, TRANSFORM)[0]
        others, depths, classes = zero, zero, zero
        for at in tl.range(0, vocab, BLOCK):
            z, _, cols, _ = block64(Z, V, at, vocab, TRANSFORM, BLOCK)
            others += tl.where(cols == label, 0.0, tl.exp(z - mz))
            if HARD == SMOOTHED:
                depths += tl.where(z > -INF, z - mz, 0.0)
                classes += (z > -INF).to(tl.float64)
        hard = tl.sum(others, 0)
        own_share = tl.exp(label_logit - mz)
        hard_value = tl.where(own_share == 1.0, log1p64(hard), tl.log(own_share + hard) + (mz - label_logit))
        if TELL:
            tl.store(STATS + 1, tl.where(broken_z, float("nan"), hard_value))
        hard_value, hard_factor, hard_label, each = joined(
            hard_value, own_share, hard, tl.sum(depths, 0), tl.maximum(tl.sum(classes, 0), 1.0), mz,
            label_logit, scales.hard_grad, scales.smoothing, scales.z_loss, HARD,
        )  # fmt: skip
        hard_value = tl.where(broken_z, float("nan"), hard_value)
    if GRAD:
        soft = tl.where(broken, float("nan"), scales.grad)
        for at in tl.range(0, vocab, BLOCK):
            z, v, cols, slope = block64(Z, V, at, vocab, TRANSFORM, BLOCK)
            both = (z > -INF) & (v > -INF)
            t = apart(z, v, mz, mv)
            if FAMILY == MOMENTS:
                g = tl.where(both, t - shift, 0.0) * (tilt / count)
            else:
                q = tl.exp((z - mz) * k) / sum_z
                if FAMILY >= SUPPORT:
                    in_set = tl.exp((z - set_top) * k) * (outside / sum_z / sum_set)
                    g = tl.where(chosen_classes(z, v, mz, mv, least, FAMILY, BASE_Z), -in_set, q)
                    if BASE_Z:
                        g = zero if FAMILY == SUPPORT else -g
                else:
                    p, d = tl.exp((v - mv) * k) / sum_v, t * k - shift
                    if MIXTURE <= FAMILY and FAMILY <= TVD:
                        _, xi = mixed64(p, q, d, both, tilt, base_share, other_share, FAMILY, BASE_Z)
                        g = q * (xi - moved)
                    elif FAMILY == KL and BASE_Z:
                        g = q * (d - moved)
                    else:
                        x, w = zero, p
                        if FAMILY >= POWER:
                            x = tl.where(infinite, 0.0, b * d - log_r)
                            w = tl.where(
                                infinite,
                                p,
                                tl.where(both, tl.exp((v - mv) * k + b * (t * k) - mu), 0.0) / sum_u,
                            )
                        # w is nearer to q, and q itself as the order goes to 0
                        if FAMILY >= POWER and BASE_Z:
                            x = tl.where(infinite, INF, -order * d - log_r)
                            alike = (
                                both & (tl.abs(x) < 0.5) & (tl.abs(order * d) < 8.0)
                            )  # of a large d little is left in x
                            g = tl.where(alike, -near_expm1(q, x), q - w)
                        else:
                            alike = both & (tl.abs(d) < 0.5) & (tl.abs(x) < 0.5)
                            g = tl.where(alike, near_expm1(p, d) - near_expm1(p, x), q - w)
                g = tl.where(z == -INF, 0.0, gain * g)
            g = soft * g
            if HARD:
                g += tl.where(
                    cols == label, hard_label, tl.where(z > -INF, hard_factor * tl.exp(z - mz) - each, 0.0)
                )
            if TRANSFORM == CAPPED:
                g *= slope
            tl.store(G + cols, g.to(tl.float32).to(G.dtype.element_ty), mask=cols < vocab)
    loss = weighted(value, hard_value, scales, HARD)
    tl.store(LOSS + row, tl.where(broken, float("nan"), loss))
