"""What models and recipes do to logits before a softmax: scale, softcap, standardisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import inputs

# What models do to what their heads give, by the fields of a Hugging Face config that say so. A softcap means
# the same wherever it stands:
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# A scale does not. By field and model type the power of it that multiplies the logits; 0 where none does, as
# where the model divides its hidden states by it.
SCALES: dict[str, dict[str, int]] = {
    "logit_scale": {"cohere": 1, "cohere2": 1, "cohere2_moe": 1, "cohere_compass_text": 1, "mpt": 0},
    "logits_scaling": {
        "granite": -1,
        "granite_swa": -1,
        "granitemoe": -1,
        "granitemoe_swa": -1,
        "granitemoehybrid": -1,
        "granitemoeshared": -1,
        "granite_docling_text": -1,
        "granite4_vision_text": -1,
        "hyperclovax": 1,
        "minicpm3": 0,
    },
    "lm_head_multiplier": {"falcon_h1": 1},
    "output_multiplier": {"muse_glimmer_text": 1, "muse_spark_text": 1},
}
# what no scale and no softcap says
OTHERS = {
    "chameleon": "sets the logits of image tokens to a constant",
    "dory": "has a scale of its own for each class",
}


@dataclass(frozen=True)
class LogitTransform:
    """softcap * tanh(scale * x / softcap), or scale * x without a softcap: from a head's output x to the
    logits of its model.

    The scale is Cohere's `logit_scale` (or one over Granite's `logits_scaling`), the softcap Gemma 2's
    `final_logit_softcapping`; `from_config` reads them. The transform comes first, then the
    division by T; the hard term takes the transformed logits as well. Logits at -inf or +inf stay there: a
    masked class, and a broken row.

    Raises ValueError for a scale or softcap that is not positive and finite.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("softcap", self.softcap)):
            if name == "softcap" and value is None:
                continue
            if (value := inputs.number(f"LogitTransform: {name}", value)) is not getattr(self, name):
                object.__setattr__(self, name, value)
            if not 0 < value <= inputs.LARGEST:
                raise ValueError(
                    f"LogitTransform: {name} must be positive and finite, got {inputs.shown(value)}"
                )

    @classmethod
    def from_config(cls, config: Any) -> LogitTransform:
        """The transform from what a Hugging Face model's head gives to the model's logits, from its config,
        of which the text part counts; the identity for Llama, Qwen and most others, which have none.

        Known softcaps are the fields final_logit_softcapping (Gemma 2, 3, 3n and 4, VaultGemma, T5Gemma,
        NanoChat and others), logits_soft_cap (RecurrentGemma) and output_logit_soft_cap (xLSTM). Known scales
        are logit_scale (Cohere), logits_scaling (Granite divides by it, HyperCLOVA X multiplies with it),
        lm_head_multiplier (Falcon-H1) and output_multiplier (Muse). What a model does to its hidden states
        before the head is no part of it, nor a vocabulary that it cuts off behind the head, as Inkling does.

        Raises ValueError for a model that is not known to use a scale which its config has, and for one that
        does something else (Chameleon, Dory): give it `LogitTransform(scale, softcap)`, or its logits.

        Example:
            >>> from types import SimpleNamespace
            >>> LogitTransform.from_config(SimpleNamespace(model_type="granite", logits_scaling=8.0))
            LogitTransform(scale=0.125, softcap=None)
        """
        text = getattr(config, "get_text_config", None)
        config = config if text is None else text(decoder=True)
        model = getattr(config, "model_type", None)
        if model in OTHERS:
            raise ValueError(f"LogitTransform.from_config: {model} {OTHERS[model]}; take the model's logits")
        scale = 1.0
        for field, powers in SCALES.items():
            value = getattr(config, field, None)
            if value is None or value == 1 or powers.get(model) == 0:
                continue
            if model not in powers:
                raise ValueError(
                    f"LogitTransform.from_config: {field} is {value!r}, and what {model} does with it is not "
                    "known; give LogitTransform(scale=...), or LogitTransform() where it does nothing"
                )
            scale *= float(value) ** powers[model]
        caps = (getattr(config, field, None) for field in SOFTCAPS)
        return cls(scale, next((cap for cap in caps if cap), None))

    def __call__(self, logits: Tensor) -> Tensor:
        """The transformed logits, by PyTorch: fp32 for 16-bit ones, whose rounding they would otherwise bring
        along."""
        if self.softcap is None and self.scale == 1:
            return logits
        x = wide(logits)
        if self.softcap is None:
            return x * self.scale
        infinite = x.abs() == math.inf
        return torch.where(
            infinite, x, (torch.where(infinite, 0.0, x) * (self.scale / self.softcap)).tanh() * self.softcap
        )

    def slope(self, transformed: Tensor) -> Tensor:
        """The derivative, from what the transform has given: scale * (1 - (y / softcap)^2)."""
        if self.softcap is None:
            return torch.full_like(transformed, self.scale)
        share = torch.where(transformed.abs() == math.inf, 1.0, transformed / self.softcap)
        return self.scale * ((1 - share) * (1 + share))


class Modifiers(NamedTuple):
    """What is done to the logits before all else, and what joins the cross entropy.

    CE is with them (1 - label_smoothing) CE + label_smoothing (lse - mean z) + z_loss lse^2, lse and the mean
    over the classes not at -inf.
    """

    student_scale: float = 1.0
    student_softcap: float = 0.0  # 0: none
    teacher_scale: float = 1.0
    teacher_softcap: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @staticmethod
    def of(
        student: LogitTransform, teacher: LogitTransform, label_smoothing: float, z_loss: float
    ) -> Modifiers:
        transforms = student.scale, student.softcap or 0.0, teacher.scale, teacher.softcap or 0.0
        found = Modifiers(*(float(x) for x in (*transforms, label_smoothing, z_loss)))
        return PLAIN if found == PLAIN else found

    @property
    def transforms(self) -> tuple[LogitTransform, LogitTransform]:
        student, teacher = (
            (self.student_scale, self.student_softcap),
            (self.teacher_scale, self.teacher_softcap),
        )
        return tuple(LogitTransform(scale, softcap or None) for scale, softcap in (student, teacher))


PLAIN = Modifiers()


def wide(x: Tensor) -> Tensor:
    """fp32 for what is narrower."""
    return x if x.dtype == torch.float64 else x.float()


def standardize_logits(logits: Tensor, eps: float = 1e-7) -> Tensor:
    r"""(x - mean) / (std + eps) over the last dimension, classes at -inf left out: a temperature for each
    row, std * T.

    Sun et al., Logit Standardization in Knowledge Distillation (2024), algorithm 1, where both student and
    teacher are standardised for the soft term alone. Plain PyTorch, differentiable to any order; (..., V) in
    the logits' dtype, fp32 for 16-bit logits.

    Example:
        >>> import torch
        >>> from kdkernels import fused_kd_loss, standardize_logits
        >>> student, teacher = torch.randn(4, 100, requires_grad=True), torch.randn(4, 100)
        >>> loss = fused_kd_loss(standardize_logits(student), standardize_logits(teacher), temperature=2.0)
    """
    inputs.check_dense("logits", logits)
    x = wide(logits)
    masked = x == -math.inf
    count = (~masked).sum(-1, keepdim=True).clamp_min(1)
    x = torch.where(masked, 0.0, x)
    # masks of -1e30, or finfo.min, whose squares and sums leave fp32: all of it in a unit, which leaves the
    # function what it is
    largest = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones(())
    unit = torch.where((largest > 1e15) & (largest < math.inf), largest, 1.0)
    x, eps = x / unit, eps / unit
    centred = torch.where(masked, 0.0, x - x.sum(-1, keepdim=True) / count)
    square = (centred * centred).sum(-1, keepdim=True) / count
    std = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
    return torch.where(masked, -math.inf, centred / (std + eps))
