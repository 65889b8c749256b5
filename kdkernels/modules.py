"""nn.Module twins of the functions: options given once, checked at construction, shown by repr."""

from __future__ import annotations

from torch import Tensor, nn

from . import functional


class KDLoss(nn.Module):
    """`fused_kd_loss` with its options fixed; token_weight and num_items are given with each call.

    Args:
        **options: divergence, temperature, t_squared, soft_weight, hard_weight, ignore_index, reduction, vocab_size, inplace,
            teacher_grad, student_transform, teacher_transform, label_smoothing, z_loss, return_stats, backend as in `fused_kd_loss`,
            checked here: the same errors, at construction.

    Example:
        >>> loss = KDLoss(divergence="renyi(0.5)", temperature=2.0, t_squared=True)
    """

    def __init__(self, **options):
        super().__init__()
        self.options = functional.options(**options)
        self._given = options

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        """(..., V) logits of both, (...) labels -> a scalar, or (...) for reduction="none"."""
        return functional.fused_kd_loss(
            student_logits, teacher_logits, labels, token_weight=token_weight, num_items=num_items, **self._given
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._given.items())
