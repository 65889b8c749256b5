"""What a loss from hidden states is given and asked for, as records."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .call import Rows

TeacherLogits = Tensor | Callable[[int, int], Tensor]


At = slice | Tensor  # the tokens of a chunk


class Model(NamedTuple):
    """What logits are made of: hidden states (..., H), and the head's weight (V, H) and bias (V)."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Given(NamedTuple):
    """The tensors of a loss from hidden states; `logits` stand in place of the teacher's three."""

    student: Model
    teacher: Model
    logits: TeacherLogits | None
    rows: Rows
    upstream: Tensor | None  # of `row_dtype`: one more factor of the rows

    @staticmethod
    def of(tensors: tuple, rows: tuple, upstream: Tensor | None = None) -> Given:
        """Of both models' tensors and the teacher's logits, laid out flat, and those of the rows."""
        models = Model(*tensors[:3]), Model(*tensors[3:6])
        return Given(*models, tensors[6], Rows(*rows), upstream)


class Setup(NamedTuple):
    """What a pass over the chunks is told besides its tensors and the loss's own arguments."""

    needs: tuple[bool, ...]  # gradients in hidden states, weight and bias of the student, then of the teacher
    dtype: torch.dtype  # of the student's products
    teacher_dtype: torch.dtype
    logits_dtype: torch.dtype | None  # None: that of the products
    memory_budget: int
    num_counted: int | None
    stats: bool
    # no bound holds a gradient within fp16: each chunk's is measured before it is rounded
    fitted: bool = False

    def of_logits(self, dtype: torch.dtype) -> torch.dtype:
        """What products in `dtype` are rounded to."""
        return (
            dtype
            if self.logits_dtype is None or dtype.itemsize > self.logits_dtype.itemsize
            else self.logits_dtype
        )

    def of_logits_gradient(self, dtype: torch.dtype) -> torch.dtype:
        """Of the gradient in logits: that of the products that take it, or fp32 until it is fitted to
        fp16."""
        return self.of_logits(dtype) if self.fitted else dtype

    @property
    def models(self) -> tuple[tuple[tuple[bool, ...], torch.dtype], ...]:
        """What each model needs, and the dtype of its products."""
        return (self.needs[:3], self.dtype), (self.needs[3:], self.teacher_dtype)

    @staticmethod
    def of_gradient(dtype: torch.dtype, of_products: torch.dtype) -> torch.dtype:
        """Of the gradient in a parameter of `dtype` until its last factor is known, before which it would
        underflow in fp16."""
        return dtype if dtype == of_products != torch.float16 else torch.float32


class Sizes(NamedTuple):
    """Of a pass: tokens in all and those that count, classes, tokens of a chunk; gathered: the tokens that
    count are taken out of all."""

    tokens: int
    count: int
    vocab: int
    chunk: int
    gathered: bool


def head_of(model: Model, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of the classes that count, as the products take them."""
    return model.weight[:vocab].to(dtype), None if model.bias is None else model.bias[:vocab].to(dtype)
