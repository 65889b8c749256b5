"""The teacher's logits of a chunk of tokens, wherever they come from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import inputs
from .call import addressable
from .checks import DTYPES
from .linear_call import At, Given, Setup, head_of
from .products import project, shaped


class Teacher:
    """The teacher's logits of a chunk, wherever they come from."""

    def __init__(self, given: Given, setup: Setup, vocab: int, gathered: bool):
        self.hidden, self.source, self.vocab, self.setup = given.teacher.hidden, given.logits, vocab, setup
        self.device = given.student.hidden.device
        # bytes a class: of a chunk, whoever makes it, and of the buffer that it is made in
        self.itemsize = self.buffered = 0
        if self.hidden is not None:
            self.hidden = self.hidden.reshape(math.prod(self.hidden.shape[:-1]), self.hidden.shape[-1])
            self.head = head_of(given.teacher, vocab, setup.teacher_dtype)
            self.itemsize = self.buffered = setup.of_logits(setup.teacher_dtype).itemsize
        elif callable(self.source):
            self.itemsize = setup.of_logits(setup.dtype).itemsize
        else:
            self.source = logits = given.logits if given.logits.dim() > 1 else given.logits[None]
            self.flat = flat(logits)
            if self.flat is None or gathered:
                self.itemsize = logits.element_size()
            if self.flat is not None and gathered:
                self.buffered = self.itemsize

    def logits(self, at: At, buffer: Tensor) -> Tensor:
        """(chunk, vocab or more)."""
        if self.hidden is not None:
            x = self.inputs(at)
            out = shaped(buffer, (len(x), self.vocab), self.setup.of_logits(x.dtype))
            return project(x, *self.head, out)
        if callable(self.source):
            return self._called(at.start, at.stop)
        if self.flat is None:
            ids = torch.arange(at.start, at.stop, device=self.source.device) if isinstance(at, slice) else at
            return self.source[torch.unravel_index(ids, self.source.shape[:-1])].contiguous()
        if isinstance(at, slice):
            return self.flat[at]
        out = shaped(buffer, (len(at), self.vocab), self.flat.dtype)
        return torch.index_select(self.flat[:, : self.vocab], 0, at, out=out)

    def inputs(self, at: At) -> Tensor:
        """The hidden states as the products take them."""
        return self.hidden[at].to(self.setup.teacher_dtype)

    def _called(self, start: int, stop: int) -> Tensor:
        v = self.source(start, stop)
        if not isinstance(v, Tensor) or v.dtype not in DTYPES:
            got = getattr(v, "dtype", type(v).__name__)
            raise TypeError(
                f"teacher_logits: must return bfloat16, float16, float32 or float64 logits, got {got}"
            )
        inputs.check_dense("what teacher_logits returns", v)
        if v.dim() != 2 or len(v) != stop - start or v.shape[1] < self.vocab:
            raise ValueError(
                f"teacher_logits: must return ({stop - start}, {self.vocab} or more) logits, got "
                f"{tuple(v.shape)}"
            )
        return addressable(v.detach().to(self.device))


def flat(x: Tensor) -> Tensor | None:
    """(tokens, V) without a copy; None where the layout does not allow that."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return None
