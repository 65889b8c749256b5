"""Test rows as models and accidents make them: close and distant students, common offsets, dominant classes,
outliers."""

from __future__ import annotations

import torch

# triton: its kernels under the interpreter; float64 is not for them
BACKENDS = ("cpu", "eager", "triton")
DOUBLE_BACKENDS = ("cpu", "eager")
KINDS = (
    "plain",
    "independent",
    "close",
    "offset",
    "offset_teacher",
    "dominant",
    "outlier",
    "outlier_student",
    "peaked_teacher",
)


def make_rows(
    kind: str,
    rows: int,
    vocab: int,
    student: torch.dtype = torch.float32,
    teacher: torch.dtype | None = None,
    seed: int = 0,
):
    """(student, teacher) logits of shape (rows, vocab), exact in their dtypes."""
    g = torch.Generator().manual_seed(1000 * seed + KINDS.index(kind))
    noise = lambda scale: torch.randn(rows, vocab, generator=g) * scale  # noqa: E731
    v = noise(3)
    z = v + noise(0.5)
    if kind == "independent":
        z = noise(3)
    elif kind == "close":
        z = v + noise(0.01)
    elif kind == "offset":
        z = z + 1000
    elif kind == "offset_teacher":
        v = v + 1000
    elif kind == "dominant":
        z[:, vocab // 3] += 30
        v[:, vocab // 3] += 30
    elif kind == "outlier":
        v[:, vocab // 2] += 300
    elif kind == "outlier_student":
        z[:, vocab // 2] += 300
    elif kind == "peaked_teacher":
        z = noise(0.1)
        v[:, vocab // 2] += 20
    return z.to(student), v.to(teacher or student)


def with_masks(z: torch.Tensor, v: torch.Tensor, where: str):
    """The rows with every third class masked (-inf) in "student", "teacher" or "both"."""
    z, v = z.clone(), v.clone()
    if where != "teacher":
        z[:, 1::3] = -torch.inf
    if where != "student":
        v[:, 1::3] = -torch.inf
    return z, v
