"""nn.Module twins of the functions: options given once, checked at construction, shown by repr."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from . import functional, inputs, linear
from .options import NUMBERS
from .options import options as checked
from .stats import KDStats

OPTIONS = tuple(inspect.signature(checked).parameters)
LINEAR_OPTIONS = (
    *(x for x in OPTIONS if x != "inplace"),
    *inspect.signature(linear.check_chunking).parameters,
)


class KDLoss(nn.Module):
    """`fused_kd_loss` with its options fixed; token_weight, num_items and temperatures of the rows are given
    with each call.

    Args:
        **options: divergence, temperature, t_squared, soft_weight, hard_weight, ignore_index, reduction,
            vocab_size, inplace, teacher_grad, student_transform, teacher_transform, label_smoothing, z_loss,
            return_stats, backend as in `fused_kd_loss`, checked here: the same errors, at construction.

    Example:
        >>> loss = KDLoss(divergence="renyi(0.5)", temperature=2.0, t_squared=True)
    """

    def __init__(self, **options):
        super().__init__()
        inputs.check_names("KDLoss", options, OPTIONS)
        self._keep(options)

    def _keep(self, options: dict) -> None:
        """Check options, and keep those that were given, numbers as plain ones."""
        self.options = checked(**options)
        numbers = *NUMBERS, "ignore_index", "vocab_size"
        self._given = options | {name: getattr(self.options, name) for name in numbers if name in options}

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
        temperature: Tensor | float | None = None,
    ) -> Tensor | tuple[Tensor, KDStats]:
        """(..., V) logits of both, (...) labels -> a scalar, or (...) for reduction="none"; with return_stats
        a `KDStats` after it. temperature: that of this call, or (...) of its rows; None for the option's."""
        given = self._with(temperature, token_weight=token_weight, num_items=num_items)
        return functional.fused_kd_loss(student_logits, teacher_logits, labels, **given)

    def _with(self, temperature: Tensor | float | None, **more) -> dict:
        """The arguments of a call besides its logits."""
        own = {} if temperature is None else dict(temperature=temperature)
        return self._given | more | own

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._given.items())


class LinearKDLoss(KDLoss):
    """`fused_linear_kd_loss` with its options fixed; tensors, num_items, num_counted and temperatures of the
    rows are given with each call.

    Args:
        **options: those of `KDLoss` but inplace, and logits_dtype and memory_budget: the same errors, at
        construction.

    Example:
        >>> loss = LinearKDLoss(temperature=2.0, t_squared=True, memory_budget=512 << 20)
    """

    def __init__(
        self, *, logits_dtype: torch.dtype | None = torch.float32, memory_budget: int | None = None, **options
    ):
        if "inplace" in options:
            raise TypeError(
                "inplace: of fused_kd_loss alone; here a chunk's gradient always takes its logits' place"
            )
        nn.Module.__init__(self)
        inputs.check_names("LinearKDLoss", options, LINEAR_OPTIONS)
        self._keep(options)
        self._given |= dict(
            logits_dtype=logits_dtype, memory_budget=linear.check_chunking(logits_dtype, memory_budget)
        )

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        teacher_logits: linear.TeacherLogits | None = None,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
        num_counted: int | None = None,
        temperature: Tensor | float | None = None,
    ) -> Tensor | tuple[Tensor, KDStats]:
        """(..., H) and (V, H) of both, (...) labels -> a scalar, or (...) for reduction="none"; with
        return_stats a `KDStats` after it. temperature: as in `KDLoss`."""
        models = student_hidden, student_weight, teacher_hidden, teacher_weight
        more = dict(student_bias=student_bias, teacher_bias=teacher_bias, teacher_logits=teacher_logits)
        more |= dict(token_weight=token_weight, num_items=num_items, num_counted=num_counted)
        return linear.fused_linear_kd_loss(*models, labels, **self._with(temperature, **more))
