"""What a pass over the logits tells of each row besides the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# the columns of a backend's statistics, as csrc/api.h has them
COLUMNS = 8


@dataclass(frozen=True)
class KDStats:
    """Per row, detached, in the logits' leading shape, float32 (float64 for float64 logits); nan, or -1, for a row that counts for nothing.

    student and teacher are the softmaxes at the loss's temperature; at T = inf uniform ones. Ties go to the first class.
    """

    divergence: Tensor  # D without weights and T^2; the limit of T^2 D at T = inf
    cross_entropy: Tensor | None  # of the labels, at T = 1; None without a hard term
    student_logsumexp: Tensor  # of z / T
    teacher_logsumexp: Tensor
    student_entropy: Tensor  # nats
    teacher_entropy: Tensor
    student_top1: Tensor  # int64: the class with the largest logit
    teacher_top1: Tensor
    correct: Tensor | None  # bool: the student's top-1 is the label; None without labels
    counted: Tensor  # 0-d int64: rows that count

    @property
    def agree(self) -> Tensor:
        """bool: student and teacher have the same top-1."""
        return (self.student_top1 == self.teacher_top1) & (self.student_top1 >= 0)


def from_columns(columns: Tensor, leading: tuple[int, ...], labels: Tensor | None, hard: bool, weight: Tensor | None, dtype) -> KDStats:
    """KDStats of a backend's (rows, COLUMNS) numbers."""
    by_field = columns.T
    floats = list(by_field[:6].to(dtype, memory_format=torch.contiguous_format).view(6, *leading).unbind())
    tops = by_field[6:].nan_to_num(nan=-1.0).long().reshape(2, *leading).unbind()
    counted = (weight != 0).sum() if weight is not None else torch.full((), math.prod(leading), dtype=torch.int64, device=columns.device)
    floats[1] = floats[1] if hard else None
    return KDStats(*floats, *tops, None if labels is None else tops[0] == labels, counted)
