"""The gradients in a model's hidden states and head, chunk after chunk of tokens."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .linear_call import At, Model, Setup, Sizes
from .products import product, shaped, sum_rows

LARGEST_FITTED = 2.0**14  # of a chunk's gradient that is measured before it is rounded to fp16


class Gradients:
    """In a model's hidden states, weight and bias, of those that need one."""

    def __init__(self, model: Model, needs, dtype: torch.dtype, sizes: Sizes, device, fitted: bool):
        self.in_hidden, self.like, self.device = needs[0], model.hidden, device
        self.wanted, self.dtype, self.fitted = any(needs), dtype, fitted
        self.unit: Tensor | None = None  # what the sums so far are multiplied with, a power of 2; None for 1
        if self.in_hidden:
            fresh = torch.zeros if sizes.gathered else torch.empty
            of_hidden = Setup.of_gradient(self.like.dtype, dtype)
            self.hidden = fresh((sizes.tokens, self.like.shape[-1]), dtype=of_hidden, device=device)
        single = sizes.chunk >= sizes.count
        self.weight, self.bias = (
            Accumulator(x, Setup.of_gradient(x.dtype, dtype), sizes.vocab, single) if need else None
            for x, need in zip(model[1:], needs[1:], strict=True)
        )

    def fit(self, dz: Tensor, buffer: Tensor) -> Tensor:
        """A chunk's gradient in the logits as the products take it: in fp32 it is multiplied so that fp16
        holds it, and the sums so far as well, which are fp32."""
        if not self.fitted:
            return dz
        unit = torch.exp2(torch.floor(torch.log2(LARGEST_FITTED / dz.abs().amax()))).clamp_max(2.0**60)
        if self.unit is not None:
            unit = torch.minimum(unit, self.unit)
            for sums in (self.weight, self.bias):
                if sums is not None:
                    sums.total.mul_(unit / self.unit)
        self.unit = unit
        dz.mul_(unit)
        return dz if dz.dtype == self.dtype else shaped(buffer, dz.shape, self.dtype).copy_(dz)

    def add(self, dz: Tensor, x: Tensor, weight: Tensor, at: At, more: bool) -> None:
        """Of a chunk: the logits' gradient, the hidden states, and the head's weight; more: it is not the
        first."""
        if self.in_hidden:
            into = self.hidden[at] if isinstance(at, slice) else self.hidden.new_empty(x.shape)
            product(dz, weight, into)
            if self.unit is not None:
                into /= self.unit
            if not isinstance(at, slice):
                self.hidden[at] = into
        if self.weight is not None:
            product(dz.t(), x, self.weight.total, add=more)
        if self.bias is not None:
            sum_rows(dz, self.bias.total, add=more)

    def finish(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of all `count` tokens; an empty tensor for each that needs none."""
        nothing = functools.partial(torch.empty, 0, dtype=torch.float32, device=self.device)
        for sums in (self.weight, self.bias):
            if sums is not None and self.unit is not None:
                sums.total /= self.unit
        dh = self.hidden.view(self.like.shape) if self.in_hidden else nothing()
        return dh, *(nothing() if x is None else x.finish(count) for x in (self.weight, self.bias))


class Accumulator:
    """The gradient in a parameter, of whose first `vocab` rows `total` is the sum over the chunks."""

    def __init__(self, like: Tensor, dtype: torch.dtype, vocab: int, single: bool):
        self.dtype = dtype
        self.whole = torch.empty(
            like.shape,
            dtype=self.dtype if single else torch.promote_types(self.dtype, torch.float32),
            device=like.device,
        )
        self.total, self.rest = self.whole[:vocab], self.whole[vocab:]

    def finish(self, count: int) -> Tensor:
        self.rest.zero_()
        return (self.whole if count else self.whole.zero_()).to(self.dtype)
