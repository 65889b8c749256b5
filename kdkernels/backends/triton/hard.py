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
def hard_of(sums, label_logit, scales, spec: tl.constexpr):
    """`Hard` of a row; the first sweep has summed what the classes but the label have: e^{z - reference}, and
    for smoothing z - reference and how many they are. What the label lacks to 1 comes from the others alone.
    """
    if spec.hard:
        M = tl.ceil((sums.top_b if spec.student_base else sums.top_o) * LOG2E_SINGLE)
        others, reference, depth = sums.others, wide(M) / LOG2E_SINGLE, wide(label_logit) * LOG2E_SINGLE - M
        depth /= LOG2E
        own = tl.exp(depth)
        there = own > 1e-200
        nearly = log1p64(others / tl.where(there, own, 1.0))
        entropy = tl.where(there, nearly, tl.log(others) - depth)
        entropy = tl.where(own == own, entropy, own)
        value, log_sum, smoothing = entropy, tl.log(own + others), scales.smoothing
        each = scales.hard_grad * 0.0
        if spec.hard == SMOOTHED:
            value = (1.0 - smoothing) * value + smoothing * (log_sum - sums.exponents / LOG2E / sums.classes)
            each = scales.hard_grad * smoothing / sums.classes
        log_sum += reference
        gain, unit = 2.0 * scales.z_loss * log_sum, scales.hard_grad / (own + others)
        at_label = unit * (own * (smoothing + gain) - others * (1.0 - smoothing))
        at_label -= tl.where(label_logit == -INF, 0.0, each)
        return Hard(
            value + scales.z_loss * log_sum * log_sum, entropy, M, (unit * (1.0 + gain)).to(tl.float32),
            at_label.to(tl.float32), each.to(tl.float32),
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
