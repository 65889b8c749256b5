"""Distillation from hidden states, a chunk of tokens at a time: projection, loss and gradient.

A chunk's logits lie in two buffers, the student's and the teacher's, which all chunks take in turn. The
operator of ops.py writes the gradient over the student's logits where its dtype is theirs, and the teacher's,
where it has one, to a third; what remains of each are products with the weight and the hidden states, and the
sum of its rows.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import inputs, ops
from .call import Asked, Rows, addressable, exchanged, row_dtype
from .options import DTYPES
from .products import ROUND, product, project, shaped, sum_rows
from .stats import COLUMNS

LARGEST_FITTED = 2.0**14  # of a chunk's gradient that is measured before it is rounded to fp16

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


def chunk_tokens(tokens: int, vocab: int, class_bytes: int, memory_budget: int) -> int:
    """Tokens of a chunk: as many as the budget has room for at class_bytes a token and class, in equal
    chunks; at least one."""
    most = max(1, memory_budget // (vocab * class_bytes))
    most -= most % ROUND if most > ROUND else 0
    if most >= tokens:
        return max(1, tokens)
    even = -(-tokens // -(-tokens // most))
    return min(most, -(-even // ROUND) * ROUND)


class Buffers:
    """Memory of a chunk, by class and token: the student's logits, the teacher's, which an unfitted gradient
    takes afterwards, the teacher's gradient, and the student's where its logits' place is too wide."""

    def __init__(self, setup: Setup, teacher: Teacher, count: int, vocab: int):
        own, others = (any(needs) for needs, _ in setup.models)
        self.logits_dtype = setup.of_logits(setup.dtype)
        self.own_dtype = setup.of_logits_gradient(setup.dtype)
        self.turned_dtype = setup.of_logits_gradient(setup.teacher_dtype)
        self.in_place = self.own_dtype == self.logits_dtype
        fitted = max(x.itemsize for x in (setup.dtype, setup.teacher_dtype)) if setup.fitted else 0
        first = self.logits_dtype.itemsize
        gradients = (
            self.turned_dtype.itemsize if others else 0,
            self.own_dtype.itemsize if own and not self.in_place else 0,
        )
        of_class = first + max(teacher.itemsize, fitted) + sum(gradients)
        self.chunk = chunk_tokens(count, vocab, of_class, setup.memory_budget)
        self.first, self.second, self.third, self.fourth = (
            torch.empty(self.chunk * vocab * x, dtype=torch.uint8, device=teacher.device)
            for x in (first, max(teacher.buffered, fitted), *gradients)
        )

    def logits(self, rows: int, vocab: int) -> Tensor:
        """For the student's logits."""
        return shaped(self.first, (rows, vocab), self.logits_dtype)

    def own(self, z: Tensor) -> Tensor:
        """For the gradient in the student's logits z."""
        return z if self.in_place else shaped(self.fourth, z.shape, self.own_dtype)

    def turned(self, v: Tensor) -> Tensor:
        """For the gradient in the teacher's logits v."""
        return shaped(self.third, v.shape, self.turned_dtype)


def over_chunks(given: Given, setup: Setup, asked: Asked) -> tuple[Tensor, ...]:
    """(rows, gradients as in setup.needs, statistics) as ops.py has them; an empty tensor for what is not
    asked for."""
    hidden, vocab, device = given.student.hidden, asked.vocab, given.student.hidden.device
    tokens = math.prod(hidden.shape[:-1])
    *of_tokens, upstream = (x if x is None else x.reshape(tokens) for x in (*given.rows, given.upstream))
    of_tokens = Rows(*of_tokens)
    if of_tokens.labels is not None and inputs.readable(of_tokens.labels):
        ops.check_labels(of_tokens.labels, of_tokens.weight, vocab)
    if of_tokens.temperature is not None and inputs.readable(of_tokens.temperature):
        ops.checked_temperatures(of_tokens.temperature, of_tokens.weight)
    index, weight = counted(of_tokens.weight, upstream, setup.num_counted, device, callable(given.logits))
    of_tokens = of_tokens._replace(weight=weight)
    count = tokens if index is None else len(index)
    teacher = Teacher(given, setup, vocab, gathered=index is not None)
    buffers = Buffers(setup, teacher, count, vocab)
    sizes = Sizes(tokens, count, vocab, buffers.chunk, index is not None)
    mine, theirs = (
        Gradients(model, *needs_of, sizes, device, setup.fitted)
        for model, needs_of in zip(given[:2], setup.models, strict=True)
    )
    h, head = hidden.reshape(tokens, hidden.shape[-1]), head_of(given.student, vocab, setup.dtype)
    of_row = dict(dtype=row_dtype(device), device=device)
    rows = (torch.empty if index is None else torch.zeros)(tokens, **of_row)
    columns = torch.full((tokens if setup.stats else 0, COLUMNS), math.nan, **of_row)
    turned = Asked.of(*exchanged(*asked.record()), vocab, asked.backend) if theirs.wanted else None
    with torch.autocast(device.type, enabled=False) if device.type != "meta" else contextlib.nullcontext():
        for start in range(0, count, sizes.chunk):
            stop, more = min(start + sizes.chunk, count), start > 0
            at = slice(start, stop) if index is None else index[start:stop]
            x = h[at].to(setup.dtype)
            z = project(x, *head, buffers.logits(stop - start, vocab))
            v = teacher.logits(at, buffers.second)
            mine_of = Rows(*(a if a is None else a[at] for a in of_tokens))
            if theirs.wanted:  # first: the student's gradient takes its logits' place
                dv = buffers.turned(v)
                ops.loss_into(v, z, *mine_of._replace(labels=None), *turned, dv, None)
            found = ops.new_columns(z) if setup.stats else None
            dz = buffers.own(z) if mine.wanted else None
            rows[at] = ops.loss_into(z, v, *mine_of, *asked, dz, found)
            if setup.stats:
                columns[at] = found
            if mine.wanted:
                mine.add(mine.fit(dz, buffers.second), x, head[0], at, more)
            if theirs.wanted:
                theirs.add(theirs.fit(dv, buffers.second), teacher.inputs(at), teacher.head[0], at, more)
    buffers = z = v = dz = dv = None  # before gradients are cast
    return rows, *mine.finish(count), *theirs.finish(count), columns


def head_of(model: Model, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of the classes that count, as the products take them."""
    return model.weight[:vocab].to(dtype), None if model.bias is None else model.bias[:vocab].to(dtype)


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


def counted(
    weight: Tensor | None,
    upstream: Tensor | None,
    num_counted: int | None,
    device: torch.device,
    in_place: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(indices of the tokens that count where their number is known without waiting for a device, else None;
    weights with upstream)."""
    index, total = None, weight
    if upstream is not None:
        total = upstream if weight is None else torch.where(weight != 0, upstream * weight, 0.0)
    if weight is None:
        return None, total
    if device.type == "cpu" and inputs.readable(weight):
        if num_counted is not None and num_counted != (found := int(weight.count_nonzero())):
            raise ValueError(f"num_counted: {num_counted} tokens are said to count, and {found} do")
        index = total.nonzero().squeeze(-1)
        if in_place or len(index) == len(total):
            index = None
    elif num_counted is not None:
        counts = weight != 0
        total = torch.where(counts.sum() == num_counted, total, math.nan)  # nobody has waited to see it
        if not in_place:
            index = torch.nonzero_static(counts, size=num_counted, fill_value=0).squeeze(-1)
    return index, total


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
