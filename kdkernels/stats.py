"""What a pass over the logits tells of each row besides the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# the columns of a backend's statistics, as csrc/api.h has them
COLUMNS = 8
# the fields that have a mean over rows
MEANS = (
    "divergence",
    "cross_entropy",
    "student_logsumexp",
    "teacher_logsumexp",
    "student_entropy",
    "teacher_entropy",
    "agree",
    "correct",
)


@dataclass(frozen=True)
class KDStats:
    """Per row, detached, in the logits' leading shape, float32 (float64 for float64 logits); nan, or -1, for
    a row that counts for nothing.

    student and teacher are the softmaxes at the loss's temperature; at T = inf uniform ones. Ties go to the
    first class. For a logger take `mean()`: a mean of a field itself is nan as soon as one row is ignored.
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
    mask: Tensor  # bool: the row counts, as its label is not ignore_index and its token_weight not 0
    counted: Tensor  # 0-d int64: rows that count

    @property
    def agree(self) -> Tensor:
        """bool: student and teacher have the same top-1."""
        return (self.student_top1 == self.teacher_top1) & (self.student_top1 >= 0)

    def masked(self) -> dict[str, Tensor]:
        """By name the figures that have a mean, per row, 0 for a row that does not count, and counted, 1 for
        one that does: what to sum over batches and processes before one is divided by the other. Waits for
        nothing."""
        fields = {name: getattr(self, name) for name in MEANS if getattr(self, name) is not None}
        fields["counted"] = self.mask
        return {name: torch.where(self.mask, x.to(self.divergence.dtype), 0.0) for name, x in fields.items()}

    def mean(self) -> dict[str, float]:
        """Means over the rows that count, each with the same weight, as plain numbers by name; waits for the
        device, once.

        divergence, cross_entropy, student_logsumexp, teacher_logsumexp, student_entropy, teacher_entropy;
        agree and correct, as fractions of the rows; counted, how many rows these are means of. cross_entropy
        and correct only where the call had them. All nan where no row counts; nan too where a row that counts
        has no finite figure, so that a broken row shows.
        """
        rows = self.masked()
        sums = torch.stack(list(rows.values())).flatten(1).sum(1)
        numbers = torch.cat([sums[:-1] / self.counted, self.counted.to(sums.dtype)[None]]).tolist()
        return dict(zip(rows, numbers, strict=True))


def from_columns(
    columns: Tensor, leading: tuple[int, ...], labels: Tensor | None, hard: bool, weight: Tensor | None, dtype
) -> KDStats:
    """KDStats of a backend's (rows, COLUMNS) numbers; weight: what each row counts for, None for 1."""
    by_field = columns.T
    floats = list(by_field[:6].to(dtype, memory_format=torch.contiguous_format).view(6, *leading).unbind())
    tops = by_field[6:].nan_to_num(nan=-1.0).long().reshape(2, *leading).unbind()
    mask = (
        torch.ones(leading, dtype=torch.bool, device=columns.device)
        if weight is None
        else weight.view(leading) != 0
    )
    floats[1] = floats[1] if hard else None
    return KDStats(*floats, *tops, None if labels is None else (tops[0] == labels) & mask, mask, mask.sum())
