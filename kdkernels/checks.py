"""The checks of the tensors that a call is given, and how they go with its options."""

from __future__ import annotations

import torch
from torch import Tensor

from . import inputs
from .call import Rows, regular
from .options import Options

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# of a token_weight, besides
MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# what belongs to the rows, in the order of `Rows`: the argument, and its dtypes
ROW_NAMES = "labels", "token_weight", "temperature"
ROW_KINDS = (
    ("an int64 tensor", lambda dtype: dtype == torch.int64),
    (
        "a floating-point, integer or bool tensor",
        lambda dtype: dtype.is_floating_point or dtype in MASK_DTYPES,
    ),
    ("a number or a floating-point tensor", lambda dtype: dtype.is_floating_point),
)


def check_tensors(student: Tensor, teacher: Tensor, rows: Rows, o: Options, by_autograd: bool) -> int:
    """Raise for tensors that do not fit together or with the options; the number of classes that count.

    by_autograd: the rows' temperatures may have a gradient.
    """
    for name, x in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: must be a tensor, got {type(x).__name__}")
        inputs.check_dense(name, x)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: must be bfloat16, float16, float32 or float64, got {x.dtype}")
    if student.dim() == 0 or student.shape[:-1] != teacher.shape[:-1] or teacher.dim() == 0:
        raise ValueError(
            "student_logits and teacher_logits: must be (..., V) with the same leading shape, got "
            f"{tuple(student.shape)} "
            f"and {tuple(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher_logits: must be on the student's device {student.device}, got {teacher.device}"
        )
    vocab = common_vocab(student.shape[-1], teacher.shape[-1], o)
    check_rows(rows, student, o, "logits", by_autograd)
    if inputs.differentiated(teacher) and not o.teacher_grad:
        raise ValueError(
            "teacher_logits: receive a gradient only with teacher_grad=True; pass that, or "
            "teacher_logits.detach()"
        )
    if o.inplace:
        check_in_place(student, (("teacher_logits", teacher), *zip(ROW_NAMES, rows, strict=True)))
    return vocab


def check_in_place(student: Tensor, others: tuple[tuple[str, Tensor | None], ...]) -> None:
    """Raise where the gradient cannot take the student's memory."""
    if student.requires_grad and student.is_leaf:
        raise ValueError("inplace: student_logits is a leaf that requires grad; its values would be lost")
    if student.numel() == 0:
        return
    if inputs.rows_overlap(student):
        raise ValueError("inplace: student_logits is expanded; its rows share storage")
    if not regular(student):
        raise ValueError(
            "inplace: student_logits would be copied first; its last dimension must be contiguous and "
            "its rows regular"
        )
    if torch.compiler.is_compiling():  # it keeps what is read apart from what is written
        return
    for name, x in others:
        if x is not None and inputs.overlap(student, x):
            raise ValueError(
                f"inplace: {name} shares memory with student_logits, which the gradient is written over"
            )


def common_vocab(student: int, teacher: int, o: Options) -> int:
    """The number of classes that count, of vocabularies of these sizes."""
    if o.vocab_size is None:
        if teacher != student:
            raise ValueError(
                f"vocab_size: required when the vocabularies differ; the student's is {student}, the "
                f"teacher's {teacher}"
            )
        if student == 0:
            raise ValueError("student_logits: the last dimension, the vocabulary, is empty")
        return student
    if o.vocab_size > min(student, teacher):
        raise ValueError(
            f"vocab_size: {o.vocab_size} is more than the student's {student} or the teacher's "
            f"{teacher} classes"
        )
    return o.vocab_size


def check_rows(rows: Rows, student: Tensor, o: Options, of: str, by_autograd: bool = False) -> None:
    """What belongs to the rows of `student`, which the caller knows as `of`."""
    if rows.labels is None and o.hard_weight:
        raise ValueError(f"hard_weight: {o.hard_weight} needs labels")
    if rows.labels is rows.weight is rows.temperature is None:
        return
    for name, x, (kind, is_kind) in zip(ROW_NAMES, rows, ROW_KINDS, strict=True):
        if x is not None:
            if not isinstance(x, Tensor) or not is_kind(x.dtype):
                raise TypeError(f"{name}: must be {kind}, got {getattr(x, 'dtype', type(x).__name__)}")
            _check_per_row(name, x, student, of)
    if rows.weight is not None and inputs.differentiated(rows.weight):
        raise ValueError("token_weight: receives no gradient; pass token_weight.detach()")
    if rows.temperature is not None and inputs.differentiated(rows.temperature) and not by_autograd:
        raise ValueError(
            'temperature: receives a gradient from fused_kd_loss with backend="eager" alone, not compiled '
            "and not in place; take that, or pass temperature.detach()"
        )


def _check_per_row(name: str, x: Tensor, student: Tensor, of: str) -> None:
    inputs.check_dense(name, x)
    if x.shape != student.shape[:-1]:
        raise ValueError(
            f"{name}: must be {tuple(student.shape[:-1])}, the {of}' leading shape; got {tuple(x.shape)}"
        )
    if x.device != student.device:
        raise ValueError(f"{name}: must be on the {of}' device {student.device}, got {x.device}")


def checked_items(num_items: float | Tensor | None, o: Options) -> float | Tensor | None:
    """What mean's sum is divided by in place of the counted rows, checked: a number, or a 0-d tensor, in
    which 0 stands for 1."""
    if num_items is None:
        return None
    if o.reduction != "mean":
        raise ValueError(
            f'num_items: replaces the denominator of reduction="mean"; reduction is {o.reduction!r}'
        )
    if not isinstance(num_items, Tensor):
        _check_items(n := inputs.number("num_items", num_items))
        return n if n else 1
    inputs.check_dense("num_items", num_items)
    if num_items.numel() != 1:
        raise ValueError(
            f"num_items: must be a number or a tensor of one element, got shape {tuple(num_items.shape)}"
        )
    if num_items.dtype == torch.bool or num_items.is_complex():
        raise TypeError(f"num_items: must be a number, got a tensor of {num_items.dtype}")
    num_items = num_items.detach().reshape(())
    if not torch.compiler.is_compiling() and inputs.readable(num_items):
        _check_items(num_items.item())
    return num_items


def _check_items(n: float) -> None:
    if not 0 <= n <= inputs.LARGEST:
        raise ValueError(f"num_items: must be finite and not negative, got {inputs.shown(n)}")
