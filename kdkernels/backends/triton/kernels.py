"""The kernel of the loss: a row, or a part of one, from its logits to its loss and gradient.

    plain      first_sweep (row_sums adds up the parts) -> plain_value, plain_close -> write_plain
    exact      first_sweep -> h (first_sweep again where h is poor) -> write_exact -> exact_value
    mixtures   first_sweep -> (h) -> middle_sweep -> mixed_value, mixed_close -> write_mixed

The other files are named after these stages. What the first sweep finds out of a float's range is left to
`careful.py`: its loss is `lost_row()`, and its gradient is not written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import LN2, LOG2E, LOW, exp2_64, long, ratio_short, wide
from .close import (
    entropy,
    exact_close,
    exact_value,
    log2_ratio,
    log2_sums,
    log_power_sum,
    missing,
    plain_close,
    plain_value,
    poor,
    settled,
    shifted,
)
from .exchange import Exchange, counts_at, row_sums, second_of_parts, second_sums
from .gradient import write_exact, write_plain
from .hard import hard_of
from .mixture import MixedSums, middle_sweep, mixed_close, mixed_value, write_mixed
from .records import (
    AGAIN,
    ALL,
    ENTROPY,
    FIRST,
    HOT,
    KEPT,
    LAST,
    MIDDLE,
    SQUARED,
    TVD,
    Ending,
    Numbers,
    Row,
    Scales,
    Side,
)
from .rows import label_of, row_at, transformed, write_zeros
from .statistics import COLUMNS, tell_sides, tell_terms
from .sums import reference_at, sample

LOST = tl.constexpr(0x7FF8_10_57_0000_0000)
# compiled for any value
NUMBERS = [
    "inner", "z_outer", "z_inner", "v_outer", "v_inner", "g_outer", "g_inner", "vocab", "width", "rows",
    "parts", "size",
]  # fmt: skip
# a number of each: where they begin, as of labels[1:], makes no other kernel
ROWS_DATA = ["LABELS", "WEIGHTS", "TEMPERATURES", "LOSS", "STATS"]


@triton.jit
def lost_row():
    """The loss of a row that `careful_rows` is to compute: a nan that arithmetic does not make."""
    return tl.full([], LOST, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def is_lost(loss):
    return loss.to(tl.int64, bitcast=True) == LOST


@triton.jit
def weighted(value, hard_value, scales, hard: tl.constexpr):
    """The loss of a row."""
    scale = wide(scales.value) * scales.value_unit
    loss = tl.where(scale == 0.0, 0.0, scale * value)
    if hard:
        loss += tl.where(scales.hard == 0.0, 0.0, scales.hard * hard_value)
    return scales.weight * loss


@triton.jit
def tell(end, value, sums, numbers, spec: tl.constexpr):
    """Writes a row's loss and statistics; value: D."""
    tl.store(end.LOSS, weighted(value, end.hard.value, end.scales, spec.hard))
    if spec.stats:
        tell_sides(end.STATS, sums, end.reference, numbers, spec)
        tell_terms(end.STATS, value, end.hard.cross_entropy, end.scales.factor, spec.hard)


@triton.jit
def once(x, read, slot: tl.constexpr, spec: tl.constexpr):
    """What a program reads of its logits before the first exchange: in later launches under the interpreter
    the gradient may have taken their place."""
    if spec.phase == ALL:
        return read
    else:
        SLOT = x.STATE + x.part * spec.state + slot
        if spec.phase == FIRST:
            tl.store(SLOT, wide(read))
        return tl.load(SLOT).to(tl.float32)


@triton.jit
def plain_row(row, x, label_logit, to, numbers, scales, spec: tl.constexpr):
    LOSS, STATS = to
    reference = reference_at(0.0, 0.0, numbers)
    sums = row_sums(row, x, numbers, reference, LOW, LOW, 0, spec)
    if spec.phase > AGAIN:
        log_r = wide(0.0)
        if spec.power:
            log_r = log2_ratio(sums, numbers)[0] * LN2
        if settled(sums, reference, log_r, numbers, spec):
            end = Ending(LOSS, STATS, hard_of(sums, label_logit, scales, spec), scales, reference)
            value = sums.s
            if not spec.mixes:
                value = plain_value(sums, numbers, spec)
            closed = plain_close(sums, value, scales.grad, numbers, spec)
            if spec.mixes:
                s = exp2_64(log2_sums(sums, numbers)[0] - closed.n_b)
                mixed_row(row, x, s, closed, sums, end, numbers, spec)
            else:
                if spec.grad:
                    write_plain(row, closed, end.hard, numbers, spec)
                if x.part == 0:
                    tell(end, value, sums, numbers, spec)
        else:
            tl.store(LOSS, lost_row())


@triton.jit
def exact_row(row, x, label_logit, to, numbers, scales, spec: tl.constexpr):
    LOSS, STATS = to
    top_b, top_o, K = sample(row, numbers, spec)
    K = once(x, K, KEPT + 1, spec) if not spec.alone else K
    reference = reference_at(K, K * 0.0, numbers)
    sums = row_sums(row, x, numbers, reference, top_b, top_o, 0, spec)
    if spec.phase > FIRST:
        h = missing(sums, reference, numbers)
        log_r = log_power_sum(sums, h, numbers, spec)
        ok = settled(sums, reference, log_r, numbers, spec)
        if ok & poor(sums, h, log_r, numbers, spec):
            reference = shifted(reference, h, numbers)
            sums = row_sums(row, x, numbers, reference, sums.top_b, sums.top_o, 1, spec)
            if spec.phase > AGAIN:
                h = missing(sums, reference, numbers)
                log_r = log_power_sum(sums, h, numbers, spec)
                ok = settled(sums, reference, log_r, numbers, spec)
        if spec.phase > AGAIN:
            if ok:
                end = Ending(LOSS, STATS, hard_of(sums, label_logit, scales, spec), scales, reference)
                closed = exact_close(sums, reference, h, log_r, scales.grad, numbers, spec)
                exact_rest(row, x, sums, closed, log_r, end, numbers, spec)
            else:
                tl.store(LOSS, lost_row())


@triton.jit
def exact_rest(row, x, sums, closed, log_r, end, numbers, spec: tl.constexpr):
    """The sweeps after the first, of a row that is closed."""
    if spec.mixes:
        mixed_row(row, x, sums.s, closed, sums, end, numbers, spec)
    elif spec.phase != MIDDLE:
        mine = write_exact(row, closed, end.hard, sums.top_b, numbers, spec)
        found, last = second_sums(mine, x, False, spec)
        if last:
            f, d, others, ties, own, _ = found
            value = exact_value(sums, f, d, log_r, numbers, spec)
            if spec.family == ENTROPY:
                value += entropy(others, ties, own, sums.top_b, numbers)
            tell(end, value, sums, numbers, spec)


@triton.jit
def mixed_row(row, x, s, closed, sums, end, numbers, spec: tl.constexpr):
    """The other two sweeps of a mixture; s: what b's softmax is over."""
    if spec.phase == LAST and not spec.alone:
        middle, last = second_of_parts(x, spec), x.part == 0
    else:
        middle, last = second_sums(middle_sweep(row, closed, numbers, spec), x, spec.grad, spec)
        if spec.grad and not spec.alone:
            last = x.part == 0
    if spec.phase != MIDDLE:
        middle = MixedSums(middle[0], middle[1], middle[2], middle[3], middle[4], middle[5])
        if spec.grad:
            write_mixed(row, mixed_close(s, middle, closed, end.scales.grad, spec), end.hard, numbers, spec)
        if last:
            tell(end, mixed_value(s, middle, spec), sums, numbers, spec)


@triton.jit
def row_of(tensors, row, layout, transforms, vocab, spec: tl.constexpr):
    """(`Row`, as a whole; its label's logit, transformed)."""
    Z, V, G, LABELS = tensors
    inner, z_outer, z_inner, v_outer, v_inner, g_outer, g_inner = layout
    z_scale, z_softcap, z_steepness, v_scale, v_softcap, v_steepness = transforms
    z_at, edge = row_at(row, inner, z_outer, z_inner, spec)
    v_at, _ = row_at(row, inner, v_outer, v_inner, spec)
    g_at, _ = row_at(row, inner, g_outer, g_inner, spec)
    student = Side(Z + z_at, z_scale, z_softcap, z_steepness)
    teacher = Side(V + v_at, v_scale, v_softcap, v_steepness)
    label, label_logit = -1, wide(0.0)
    if spec.hard:
        label, logit = label_of(LABELS, student, row, edge, vocab)
        label_logit = wide(transformed(logit, student, ratio_short, spec.transform)[0])
    base, other = teacher, student
    if spec.student_base:
        base, other = student, teacher
    return Row(base, other, G + g_at, edge, 0, edge + vocab, vocab, label), label_logit


@triton.jit
def scales_of(row, weight, TEMPERATURES, c, k, given, spec: tl.constexpr):
    """(log2(e) / T, 1 / T, `Scales`) of a row; given: those of the call, where c and k are not the row's
    own."""
    value, unit, grad, hard, hard_grad, smoothing, z_loss, factor = given
    grad = weight * grad
    if spec.own:
        T = tl.load(TEMPERATURES + row).to(tl.float64)  # nan for one out of range
        square = T * T if spec.own == SQUARED else T / T
        k = (1.0 / T).to(tl.float32)
        c = (wide(k) * LOG2E).to(tl.float32)
        lacks = wide(1.0)  # as `numbers.numbers` has it
        if not spec.is_limit and spec.family != TVD:
            lacks = tl.where(T >= HOT, 1.0 / (wide(k) * T), 1.0)
        unit = unit * (square * lacks * lacks)
        grad *= square / T * lacks
        factor = factor * (lacks * lacks)
    return c, k, Scales(weight, value, unit, grad, hard, weight * hard_grad, smoothing, z_loss, factor)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=ROWS_DATA)
def loss_rows(
    Z, V, G, LABELS, WEIGHTS, TEMPERATURES, LOSS, STATS, STATE, COUNT,
    inner, z_outer, z_inner, v_outer, v_inner, g_outer, g_inner, vocab, width, parts, size,
    c, k, tilt, inverse_tilt, base_share, other_share, value_scale, value_unit, grad_scale, hard_scale,
    hard_grad_scale, smoothing, z_loss, z_scale, z_softcap, z_steepness, v_scale, v_softcap, v_steepness,
    factor, SPEC: tl.constexpr,
):  # fmt: skip
    """The operator's contract (ops.py), `parts` programs to a row, `size` places of its window to each."""
    spec: tl.constexpr = SPEC
    part = 0 if spec.alone else tl.program_id(0) % parts
    row = long(tl.program_id(0) if spec.alone else tl.program_id(0) // parts)
    weight = tl.load(WEIGHTS + row) if spec.weighted else wide(1.0)
    g_at, edge = row_at(row, inner, g_outer, g_inner, spec)
    TILE: tl.constexpr = spec.tile
    first = 0 if spec.alone else tl.multiple_of(part * size, TILE)
    last = tl.minimum(first + size, edge + vocab)
    if spec.grad and spec.phase >= LAST:
        if part == 0:
            write_zeros(G + g_at, edge + vocab, edge + width, spec.tile)
    if weight == 0.0:
        if spec.grad:
            write_zeros(G + g_at, tl.maximum(first, edge), last, spec.tile)
        tl.store(LOSS + row, weight)
    else:
        whole, label_logit = row_of(
            (Z, V, G, LABELS), row, (inner, z_outer, z_inner, v_outer, v_inner, g_outer, g_inner),
            (z_scale, z_softcap, z_steepness, v_scale, v_softcap, v_steepness), vocab, spec,
        )  # fmt: skip
        here = Row(whole.base, whole.other, whole.G, edge, first, last, vocab, whole.label)
        x = Exchange(STATE + row * parts * spec.state, counts_at(COUNT + row), part, parts)
        if spec.hard and not spec.alone:
            label_logit = wide(once(x, label_logit.to(tl.float32), KEPT, spec))
        given = value_scale, value_unit, grad_scale, hard_scale, hard_grad_scale, smoothing, z_loss, factor
        own_c, own_k, scales = scales_of(row, weight, TEMPERATURES, c, k, given, spec)
        numbers = Numbers(own_c, own_k, tilt, inverse_tilt, base_share, other_share)
        to = LOSS + row, STATS + row * COLUMNS
        if spec.exact:
            exact_row(here, x, label_logit, to, numbers, scales, spec)
        else:
            plain_row(here, x, label_logit, to, numbers, scales, spec)
