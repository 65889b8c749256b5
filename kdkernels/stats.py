"""What a pass over the logits tells of each row besides the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# the columns of a backend's statistics, as csrc/api.h has them
COLUMNS = 8
CHUNK_BYTES = 64 << 20  # of a temporary in `by_torch`


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
    numbers = [x.reshape(leading) for x in columns.unbind(-1)]
    tops = [torch.where(x.isnan(), -1.0, x).long() for x in numbers[6:]]
    counted = (weight != 0).sum() if weight is not None else torch.full((), math.prod(leading), dtype=torch.int64, device=columns.device)
    floats = [x.to(dtype) for x in numbers[:6]]
    floats[1] = floats[1] if hard else None
    return KDStats(*floats, *tops, None if labels is None else tops[0] == labels, counted)


def by_torch(loss, student, teacher, labels, weight, divergence: str, temperature: float, vocab: int) -> Tensor:
    """The columns by PyTorch and a backend's `loss`, for backends that do not have them from their own sweeps: reads the logits again."""
    rows = math.prod(student.shape[:-1])
    flat = student.reshape(rows, -1)[:, :vocab], teacher.reshape(rows, -1)[:, :vocab]
    out = torch.full((rows, COLUMNS), math.nan, dtype=torch.float64, device=student.device)
    ones = None if weight is None else (weight != 0).double()
    out[:, 0] = loss(student, teacher, None, ones, None, divergence, temperature, 1.0, 0.0, 0.0, 0.0, vocab)
    if labels is not None:
        out[:, 1] = loss(student, teacher, labels, ones, None, divergence, temperature, 0.0, 0.0, 1.0, 0.0, vocab)
    step = max(1, CHUNK_BYTES // (4 * max(vocab, 1)))
    for at in range(0, rows, step):
        for i, x in enumerate(flat):
            x = x[at : at + step]
            wide = x.double() if x.dtype == torch.float64 else x.float()
            scaled = wide / temperature if math.isfinite(temperature) else torch.where(wide > -math.inf, wide * 0, wide)
            log_sum = scaled.logsumexp(-1)
            softmax = (scaled - log_sum.unsqueeze(-1)).exp()
            out[at : at + step, 2 + i] = log_sum
            out[at : at + step, 4 + i] = log_sum - torch.where(softmax > 0, softmax * scaled, 0.0).sum(-1)
            out[at : at + step, 6 + i] = wide.argmax(-1).double()
    lost = ~(out[:, 2] + out[:, 3]).isfinite()  # a broken row
    out[:, 2:] = torch.where(lost.unsqueeze(-1), math.nan, out[:, 2:])
    return out if weight is None else torch.where((weight.reshape(-1) != 0).unsqueeze(-1), out, math.nan)
