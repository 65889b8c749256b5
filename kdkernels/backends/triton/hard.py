"""The hard term: (1 - smoothing) CE + smoothing (lse - mean z) + z_loss lse^2 of a row, and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import INF, LOG2E, LOG2E_SINGLE, log1p64, wide
from .records import CAPPED, SMOOTHED
from .rows import columns


class Hard(NamedTuple):
    """The term of a row, the cross entropy alone, and the gradient: factor 2^{z log2(e) - M} - each at a
    class, at_label at the label."""

    value: tl.tensor
    cross_entropy: tl.tensor
    M: tl.tensor
    factor: tl.tensor
    at_label: tl.tensor
    each: tl.tensor


@triton.jit
def joined(
    value, own, others, depths, classes, reference, label_logit, scale, smoothing, z_loss, HARD: tl.constexpr
):
    """(1 - smoothing) CE + smoothing (lse - mean z) + z_loss lse^2 from CE, e^{z - reference} of the label
    and of all others together, and the sum of z - reference over so many classes; and its gradient, times
    `scale`: (factor of e^{z - reference}, that at the label, less so much at each class). What the label
    lacks to 1 comes from the others alone.
    """
    log_sum = tl.log(own + others)
    each = scale * 0.0
    if HARD == SMOOTHED:
        value = (1.0 - smoothing) * value + smoothing * (log_sum - depths / classes)
        each = scale * smoothing / classes
    log_sum += reference
    gain, unit = 2.0 * z_loss * log_sum, scale / (own + others)
    at_label = unit * (own * (smoothing + gain) - others * (1.0 - smoothing)) - tl.where(
        label_logit == -INF, 0.0, each
    )
    return value + z_loss * log_sum * log_sum, unit * (1.0 + gain), at_label, each


@triton.jit
def hard_of(sums, label_logit, scales, spec: tl.constexpr):
    """`Hard` of a row; the first sweep has summed what the classes but the label have."""
    if spec.hard:
        M = tl.ceil((sums.top_b if spec.student_base else sums.top_o) * LOG2E_SINGLE)
        depth = (wide(label_logit) * LOG2E_SINGLE - M) / LOG2E
        own = tl.exp(depth)
        there = own > 1e-200
        nearly = log1p64(sums.others / tl.where(there, own, 1.0))
        entropy = tl.where(there, nearly, tl.log(sums.others) - depth)
        entropy = tl.where(own == own, entropy, own)
        value, factor, at_label, each = joined(
            entropy, own, sums.others, sums.exponents / LOG2E, sums.classes, wide(M) / LOG2E_SINGLE,
            label_logit, scales.hard_grad, scales.smoothing, scales.z_loss, spec.hard,
        )  # fmt: skip
        return Hard(
            value, entropy, M, factor.to(tl.float32), at_label.to(tl.float32), each.to(tl.float32)
        )  # fmt: skip
    else:
        return Hard(sums.s, sums.s, 0.0, 0.0, 0.0, 0.0)


@triton.jit
def with_hard(g, z, slope, at, row, hard, spec: tl.constexpr):
    """The gradient of a tile in the transformed logits z, with the hard term's, as one in the logits."""
    if spec.hard:
        if z.dtype == tl.float64:
            x = hard.factor * tl.exp((z * LOG2E_SINGLE - hard.M) / LOG2E)
        else:
            x = hard.factor * tl.math.exp2(tl.fma(z, LOG2E_SINGLE, -hard.M))
        if spec.hard == SMOOTHED:
            x = tl.where(z > -INF, x - hard.each, 0.0)
        g += tl.where(columns(at, spec) == row.edge + row.label, hard.at_label, x)
    if spec.transform == CAPPED:
        g *= slope
    return g
