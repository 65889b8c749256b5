"""Losses as TRL and Liger call them: functions of logits and of hidden states, and a module."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..divergence import JSD
from ..functional import fused_kd_loss
from ..linear import fused_linear_kd_loss
from ..options import options
from ..transforms import LogitTransform

IGNORED = -100  # a label of TRL's that does not count
REDUCTIONS = ("batchmean", "sum", "mean", "none")


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
    *,
    inplace: bool = False,
) -> Tensor:
    """TRL's function of the same name, from `fused_kd_loss`: JSD(beta) of softmaxes at `temperature`, without
    T^2.

    Args:
        student_logits, teacher_logits: (batch, tokens, V) or (rows, V).
        labels: (batch, tokens), already shifted; rows of label -100 do not count. Nothing else is read of
            them.
        reduction: "batchmean", the sum over the counted rows divided by their number, or, without labels, by
            the size of the first dimension, whatever the second is; "sum"; "mean", the sum divided by counted
            rows times V, as TRL has it; "none", one number a counted row, where TRL has one a class.
        num_items_in_batch: replaces the reduction by the sum divided by it.
        inplace: the gradient takes the memory of the student's logits: see `fused_kd_loss`.

    Raises ValueError for a beta outside [0, 1], a reduction that is not one of these, and what
    `fused_kd_loss` refuses.
    """
    counts = None if labels is None else labels != IGNORED
    reduced = reduction_of(student_logits.shape, counts, reduction, num_items_in_batch)
    loss = fused_kd_loss(
        student_logits,
        teacher_logits.detach(),
        divergence=JSD(float(beta)),
        temperature=temperature,
        token_weight=counts,
        inplace=inplace,
        **reduced,
    )
    return loss if loss.dim() == 0 or counts is None else loss[counts]


def reduction_of(
    shape: tuple[int, ...], counts: Tensor | None, reduction: str, num_items: int | Tensor | None
) -> dict[str, Any]:
    """TRL's reduction of (..., V) logits in our words: the options `reduction` and `num_items`."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if num_items is not None:
        return {"reduction": "mean", "num_items": num_items}
    if reduction == "batchmean":
        return {"reduction": "mean", "num_items": None if counts is not None else max(shape[0], 1)}
    if reduction == "mean":
        rows = shape[:-1].numel() if counts is None else counts.sum()
        return {"reduction": "mean", "num_items": rows * shape[-1]}
    return {"reduction": reduction}


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: int | Tensor | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """DistillationTrainer's `_chunked_divergence_loss`, from `fused_linear_kd_loss`.

    Args:
        student_hidden_states, teacher_hidden_states: (batch, tokens, H) and (batch, tokens, H').
        student_lm_head_weight, teacher_lm_head_weight: (V, H) and (V, H'), the biases (V).
        completion_mask: (batch, tokens), not 0 where a token counts.
        num_items_in_batch: what the sum is divided by; None for the number of tokens that count.
        chunk_size: taken for the sake of older versions; the chunks are `fused_linear_kd_loss`'s own.

    Returns:
        (loss, sum of the student's entropies in nats over the tokens that count, their number); the entropy
        is that of the softmax at `temperature`.
    """
    loss, stats = loss_of_heads(
        student_hidden_states,
        (student_lm_head_weight, student_lm_head_bias),
        teacher_hidden_states,
        (teacher_lm_head_weight, teacher_lm_head_bias),
        beta=beta,
        temperature=temperature,
        token_weight=completion_mask != 0,
        num_items=num_items_in_batch,
        student_transform=LogitTransform(student_logit_scale, student_final_logit_softcapping),
        teacher_transform=LogitTransform(teacher_logit_scale, teacher_final_logit_softcapping),
        return_stats=True,
    )
    return loss, torch.where(stats.mask, stats.student_entropy, 0.0).sum(), stats.counted


Head = tuple[Tensor, Tensor | None]  # weight and bias


def loss_of_heads(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor | None = None,
    *,
    beta: float,
    **more,
):
    """`fused_linear_kd_loss` of JSD(beta), with a teacher that gets no gradient.

    Tokens that do not count, a prompt's for one, are counted and left out, as TRL does: on a GPU that waits
    for it once.
    """
    if (mask := more.get("token_weight")) is not None:
        more["num_counted"] = int(mask.count_nonzero())
    weight, bias = _cast(student_head, student_hidden)
    frozen = [x if x is None else x.detach() for x in teacher_head]
    teacher_weight, teacher_bias = _cast(frozen, teacher_hidden)
    return fused_linear_kd_loss(
        student_hidden,
        weight,
        teacher_hidden.detach(),
        teacher_weight,
        labels,
        student_bias=bias,
        teacher_bias=teacher_bias,
        divergence=JSD(float(beta)),
        **more,
    )


def _cast(head: Head, hidden: Tensor) -> Iterator[Tensor | None]:
    """The head in the dtype of the hidden states, which one that is kept in fp32 may not have. Under autocast
    as it is: its gradient is fp32 then."""
    if torch.is_autocast_enabled(hidden.device.type):
        return iter(head)
    return (x if x is None else x.to(hidden.dtype) for x in head)


class FusedLinearJSDLoss(torch.nn.Module):
    """Liger-Kernel's `LigerFusedLinearJSDLoss` and TRL's `FusedLinearJSDLoss`, from `fused_linear_kd_loss`.

        loss = weight_hard_loss * CE(label, q at T = 1) + weight_soft_loss * JSD(beta)(p, q at T)

    divided by the number of labels that are not ignore_index, 0 where there are none. There is no T^2 in it.

    Args:
        weight_hard_loss, weight_soft_loss: of the cross entropy and of the divergence.
        beta: 0 is KL(teacher, student), 1 KL(student, teacher).
        ignore_index: the label of tokens that do not count.
        temperature: of the divergence's softmaxes.
        compiled, chunk_size: taken and not used: nothing is compiled, and a chunk has the size of
            `fused_linear_kd_loss`'s budget.
        return_soft_hard_loss: return (loss, divergence, cross entropy), the last two without their weights
            and without a gradient.

    The forward takes student_input (..., H), student_weight (V, H), teacher_input (..., H'), teacher_weight
    (V', H'), true_labels (...) and optionally student_bias (V), teacher_bias (V'). Where the vocabularies
    differ, as one that is padded does, the first min(V, V') classes are compared; Liger gives the student
    logits of 0 for the others.

    Raises ValueError for a temperature, beta or weight out of range, when the module is made.

    Example:
        >>> import torch
        >>> from kdkernels.integrations.trl import FusedLinearJSDLoss
        >>> criterion = FusedLinearJSDLoss(weight_hard_loss=0.1, weight_soft_loss=0.9, beta=0.5,
        temperature=2.0) >>> student, teacher = torch.randn(8, 64, requires_grad=True), torch.randn(8, 128)
        >>> heads = torch.randn(32000, 64, requires_grad=True), torch.randn(32000, 128)
        >>> labels = torch.randint(32000, (8,))
        >>> criterion(student, heads[0], teacher, heads[1], labels).backward()
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        options(JSD(float(beta)), temperature, False, weight_soft_loss, weight_hard_loss, ignore_index)
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.ignore_index, self.temperature = beta, ignore_index, temperature
        self.compiled, self.chunk_size = compiled, chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        loss_of = functools.partial(
            loss_of_heads,
            student_input,
            (student_weight, student_bias),
            teacher_input,
            (teacher_weight, teacher_bias),
            true_labels.reshape(student_input.shape[:-1]),
            beta=self.beta,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            vocab_size=min(len(student_weight), len(teacher_weight)),
        )
        weights = {"soft_weight": self.weight_soft_loss, "hard_weight": self.weight_hard_loss}
        if not self.return_soft_hard_loss:
            return loss_of(**weights)
        loss, stats = loss_of(**weights, return_stats=True)
        if not (self.weight_soft_loss and self.weight_hard_loss):
            # of a term of weight 0 there are no figures: once more, without a gradient
            with torch.no_grad():
                _, stats = loss_of(soft_weight=1.0, hard_weight=1.0, return_stats=True)
        counted = stats.counted.clamp_min(1)
        terms = (
            torch.where(stats.mask, x, 0.0).sum() / counted for x in (stats.divergence, stats.cross_entropy)
        )
        return loss, *terms
