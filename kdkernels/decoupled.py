"""Decoupled knowledge distillation: the target's and the other classes' share of the soft term, each with its
own weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import functional, inputs
from .call import Rows
from .checks import checked_items
from .folding import counted_rows
from .log_softmax import tempered_log_softmax
from .options import options
from .transforms import wide


@inputs.names_checked
def decoupled_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
    temperature: float = 4.0,
    t_squared: bool = True,
    hard_weight: float = 1.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Decoupled KD: T^2 (target_weight TCKD + non_target_weight NCKD) + hard_weight CE. Zhao et al. (2022),
    eq. 7 to 9.

    TCKD is the KL divergence between (p_t, 1 - p_t) and (q_t, 1 - q_t), p and q at the label t; NCKD that
    between p and q over the other classes, each normalised there. Both weights 1 and 1 - p_t give KL (eq. 6),
    so that

        target_weight TCKD + non_target_weight NCKD = target_weight KL + (non_target_weight - target_weight (1
        - p_t)) NCKD

    which is what is computed: two fused passes, the second over copies with the label masked. The defaults
    are the paper's for CIFAR-100. It is made for large vocabularies: at V <= 100 it takes as long as the same
    in plain PyTorch. Arguments, result and errors are otherwise those of `fused_kd_loss`; labels are
    required.
    """
    common = dict(t_squared=t_squared, vocab_size=vocab_size, backend=backend)
    o = options(
        temperature=temperature,
        hard_weight=hard_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        **common,
    )
    common["temperature"] = o.temperature
    target_weight, non_target_weight = (
        inputs.number("target_weight", target_weight),
        inputs.number("non_target_weight", non_target_weight),
    )
    for name, value in (("target_weight", target_weight), ("non_target_weight", non_target_weight)):
        inputs.check_finite(name, value)
    if labels is None or o.temperature == math.inf:
        raise ValueError("decoupled_kd_loss: needs labels and a finite temperature")
    if student_logits.dtype == torch.float16:
        # the two gradients are added before they are rounded, and may be larger than their sum
        student_logits = student_logits.float()
    whole = functional.fused_kd_loss(
        student_logits,
        teacher_logits,
        labels,
        soft_weight=target_weight,
        hard_weight=hard_weight,
        ignore_index=ignore_index,
        token_weight=token_weight,
        reduction=reduction,
        num_items=num_items,
        **common,
    )
    vocab = o.vocab_size or teacher_logits.shape[-1]
    num_items = checked_items(num_items, o)
    rows, denominator = counted_rows(Rows(labels, token_weight), student_logits, vocab, o, num_items)
    weight = rows.weight
    # ignore_index is a class of no vocabulary; a wrong label beside it has had its error, or on a device has
    # a row that is nan
    at = torch.where((labels >= 0) & (labels < vocab), labels, 0).unsqueeze(-1)
    with torch.no_grad():
        log_p = tempered_log_softmax(wide(teacher_logits[..., :vocab]), o.temperature, backend=backend)
        rest = -torch.expm1(log_p.gather(-1, at).squeeze(-1).to(weight.dtype))  # 1 - p_t
        # a broken row that does not count
        weight = torch.where(weight != 0, weight * (non_target_weight - target_weight * rest), 0.0)
    others = functional.fused_kd_loss(
        student_logits.scatter(-1, at, -math.inf),
        teacher_logits.scatter(-1, at, -math.inf),
        token_weight=weight,
        reduction="none" if reduction == "none" else "sum",
        **common,
    )
    return whole + (others if reduction == "none" else (others / denominator).to(others.dtype))
