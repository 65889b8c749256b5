"""Distillation from hidden states, a chunk of tokens at a time: projection, loss and gradient.

A chunk's logits lie in two buffers, the student's and the teacher's, which all chunks take in turn. The
operator of ops.py writes the gradient over the student's logits where its dtype is theirs, and the teacher's,
where it has one, to a third; what remains of each are products with the weight and the hidden states, and the
sum of its rows.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from . import inputs, ops
from .call import Asked, Rows, exchanged, row_dtype
from .chunk_gradients import Gradients
from .chunk_teacher import Teacher
from .linear_call import Given, Setup, Sizes, head_of
from .products import ROUND, project, shaped
from .stats import COLUMNS


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


def over_chunks(given: Given, setup: Setup, asked: Asked, planned: bool = False) -> tuple[Tensor, ...]:
    """(rows, gradients as in setup.needs, statistics) as ops.py has them; an empty tensor for what is not
    asked for. planned: as `ops.loss_into` has it."""
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
                ops.loss_into(v, z, mine_of._replace(labels=None), turned, dv, planned=planned)
            found = ops.new_columns(z) if setup.stats else None
            dz = buffers.own(z) if mine.wanted else None
            rows[at] = ops.loss_into(z, v, mine_of, asked, dz, found, planned)
            if setup.stats:
                columns[at] = found
            if mine.wanted:
                mine.add(mine.fit(dz, buffers.second), x, head[0], at, more)
            if theirs.wanted:
                theirs.add(theirs.fit(dv, buffers.second), teacher.inputs(at), teacher.head[0], at, more)
    buffers = z = v = dz = dv = None  # before gradients are cast
    return rows, *mine.finish(count), *theirs.finish(count), columns


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
