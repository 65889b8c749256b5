"""Distillation from hidden states: projection, loss and gradient of a chunk of tokens at a time.

A chunk's logits lie in two buffers, the student's and the teacher's, which all chunks take in turn. The
operator of ops.py writes the gradient over the student's logits, and the teacher's, where it has one, to a
third; what remains of each are products with the weight and the hidden states, and the sum of its rows.
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
from .call import SCHEMA, Asked, addressable, exchanged, row_dtype
from .divergence import Divergence
from .folding import MOST_STEEP, boost_of, fold, largest, reduced, steepness, value_dtype, weights
from .gradients import once, times_upstream
from .options import AS_THEY_ARE, DTYPES, Options, check_rows, checked_items, common_vocab, options
from .stats import COLUMNS, KDStats, from_columns
from .transforms import LogitTransform

# bytes of a chunk's logits, student's and teacher's, and gradient: see `fused_linear_kd_loss`
CPU_BUDGET, GPU_BUDGET = 256 << 20, 5 << 28
ROUND = 64  # tokens: what matrix products divide well
BLOCK_BYTES = 4 << 20  # of a temporary in `_product`
LARGEST_FITTED = 2.0**14  # of a chunk's gradient that is measured before it is rounded to fp16

TeacherLogits = Tensor | Callable[[int, int], Tensor]


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

    @property
    def models(self) -> tuple[tuple[tuple[bool, ...], torch.dtype], ...]:
        """What each model needs, and the dtype of its products."""
        return (self.needs[:3], self.dtype), (self.needs[3:], self.teacher_dtype)

    @staticmethod
    def of_gradient(dtype: torch.dtype, of_products: torch.dtype) -> torch.dtype:
        """Of the gradient in a parameter of `dtype` until its last factor is known, before which it would
        underflow in fp16."""
        return dtype if dtype == of_products != torch.float16 else torch.float32


def _underflows(setup: Setup) -> bool:
    """Whether a gradient goes through fp16. A function: Dynamo, which traces it, does not know properties of
    a NamedTuple in torch 2.10."""
    mine, theirs = any(setup.needs[:3]), any(setup.needs[3:])
    return mine and setup.dtype == torch.float16 or theirs and setup.teacher_dtype == torch.float16


# ---------------------------------------------------------------- chunks


def chunk_tokens(tokens: int, vocab: int, class_bytes: int, memory_budget: int) -> int:
    """Tokens of a chunk: as many as the budget has room for at class_bytes a token and class, in equal
    chunks; at least one."""
    most = max(1, memory_budget // (vocab * class_bytes))
    most -= most % ROUND if most > ROUND else 0
    if most >= tokens:
        return max(1, tokens)
    even = -(-tokens // -(-tokens // most))
    return min(most, -(-even // ROUND) * ROUND)


def _run(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V)
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: TeacherLogits | None,  # in place of the three
    labels: Tensor | None,
    row_weight: Tensor | None,  # (...) float64
    upstream: Tensor | None,  # (...) float64: one more factor of the rows
    setup: Setup,
    asked: Asked,
) -> tuple[Tensor, ...]:
    """(rows, gradients as in setup.needs, statistics) as ops.py has them; an empty tensor for what is not
    asked for."""
    vocab, device, dtype, stats = asked.vocab, hidden.device, setup.dtype, setup.stats
    tokens = math.prod(hidden.shape[:-1])
    labels, row_weight, upstream = (
        x if x is None else x.reshape(tokens) for x in (labels, row_weight, upstream)
    )
    if labels is not None and inputs.readable(labels):
        ops.check_labels(labels, row_weight, vocab)
    index, row_weight = _counted(
        row_weight, upstream, setup.num_counted, device, in_place=callable(teacher_logits)
    )
    count = tokens if index is None else len(index)

    teacher = _Teacher(
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        teacher_logits,
        setup,
        tokens,
        vocab,
        device,
        gathered=index is not None,
    )
    logits_dtype, others_dtype = (setup.of_logits(x) for x in (dtype, setup.teacher_dtype))
    own, others = (any(needs) for needs, _ in setup.models)
    # a gradient has the dtype of the products that take it, or fp32 until it is fitted to fp16, which lies in
    # the teacher's buffer then
    own_dtype, turned_dtype = (logits_dtype, others_dtype) if setup.fitted else (dtype, setup.teacher_dtype)
    fitted = max(x.itemsize for x in (dtype, setup.teacher_dtype)) if setup.fitted else 0
    in_place = own_dtype == logits_dtype
    sizes = (  # bytes a class: the student's logits, the teacher's, the teacher's gradient, the student's
        logits_dtype.itemsize,
        max(teacher.itemsize, fitted),
        turned_dtype.itemsize if others else 0,
        own_dtype.itemsize if own and not in_place else 0,
    )
    size = chunk_tokens(count, vocab, sum(sizes), setup.memory_budget)
    first, second, third, fourth = (
        torch.empty(size * vocab * x, dtype=torch.uint8, device=device)
        for x in (sizes[0], max(teacher.buffered, fitted), *sizes[2:])
    )
    h, head = hidden.reshape(tokens, hidden.shape[-1]), weight[:vocab].to(dtype)
    head_bias = None if bias is None else bias[:vocab].to(dtype)
    of_row = dict(dtype=row_dtype(device), device=device)
    rows = (torch.empty if index is None else torch.zeros)(tokens, **of_row)
    columns = torch.full((tokens if stats else 0, COLUMNS), math.nan, **of_row)
    turned = Asked.of(*exchanged(*asked.record()), vocab, asked.backend) if others else None
    models = (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias)
    mine, theirs = (
        _Gradients(
            *model,
            *needs_of,
            vocab,
            tokens,
            device,
            single=size >= count,
            all_written=index is None,
            fitted=setup.fitted,
        )
        for model, needs_of in zip(models, setup.models, strict=True)
    )
    with torch.autocast(device.type, enabled=False) if device.type != "meta" else contextlib.nullcontext():
        for start in range(0, count, size):
            stop = min(start + size, count)
            at = slice(start, stop) if index is None else index[start:stop]
            x = h[at].to(dtype)
            z = _project(x, head, head_bias, _shaped(first, (stop - start, vocab), logits_dtype))
            v = teacher.logits(at, second)
            y, w = (a if a is None else a[at] for a in (labels, row_weight))
            if others:  # first: the student's gradient takes its logits' place
                dv = _shaped(third, v.shape, turned_dtype)
                ops.loss_into(v, z, None, w, *turned, dv, None)
            found = ops.new_columns(z) if stats else None
            dz = (z if in_place else _shaped(fourth, z.shape, own_dtype)) if own else None
            rows[at] = ops.loss_into(z, v, y, w, *asked, dz, found)
            if stats:
                columns[at] = found
            if own:
                mine.add(mine.fit(dz, second, dtype), x, head, at, start > 0)
            if others:
                theirs.add(
                    theirs.fit(dv, second, setup.teacher_dtype),
                    teacher.inputs(at),
                    teacher.weight,
                    at,
                    start > 0,
                )
    first = second = third = fourth = z = v = dz = dv = None  # before gradients are cast
    return rows, *mine.finish(count), *theirs.finish(count), columns


class _Gradients:
    """In a model's hidden states, weight and bias, of those that need one."""

    def __init__(
        self,
        hidden,
        weight,
        bias,
        needs,
        dtype: torch.dtype,
        vocab: int,
        tokens: int,
        device,
        single: bool,
        all_written: bool,
        fitted: bool,
    ):
        self.in_hidden, self.like, self.device, self.fitted = needs[0], hidden, device, fitted
        self.unit: Tensor | None = None  # what the sums so far are multiplied with, a power of 2; None for 1
        if needs[0]:
            fresh = torch.empty if all_written else torch.zeros
            self.hidden = fresh(
                (tokens, hidden.shape[-1]), dtype=Setup.of_gradient(hidden.dtype, dtype), device=device
            )
        self.weight, self.bias = (
            _Accumulator(x, Setup.of_gradient(x.dtype, dtype), vocab, single) if need else None
            for x, need in zip((weight, bias), needs[1:], strict=True)
        )

    def fit(self, dz: Tensor, buffer: Tensor, dtype: torch.dtype) -> Tensor:
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
        return dz.mul_(unit) if dz.dtype == dtype else _shaped(buffer, dz.shape, dtype).copy_(dz.mul_(unit))

    def add(self, dz: Tensor, x: Tensor, head: Tensor, at: slice | Tensor, more: bool) -> None:
        """Of a chunk: the logits' gradient, the hidden states, and the head; more: it is not the first."""
        if self.in_hidden:
            into = self.hidden[at] if isinstance(at, slice) else self.hidden.new_empty(x.shape)
            _product(dz, head, into)
            if self.unit is not None:
                into /= self.unit
            if not isinstance(at, slice):
                self.hidden[at] = into
        if self.weight is not None:
            _product(dz.t(), x, self.weight.total, add=more)
        if self.bias is not None:
            _sum_rows(dz, self.bias.total, add=more)

    def finish(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of all `count` tokens; an empty tensor for each that needs none."""
        nothing = functools.partial(torch.empty, 0, dtype=torch.float32, device=self.device)
        for sums in (self.weight, self.bias):
            if sums is not None and self.unit is not None:
                sums.total /= self.unit
        dh = self.hidden.view(self.like.shape) if self.in_hidden else nothing()
        return dh, *(nothing() if x is None else x.finish(count) for x in (self.weight, self.bias))


def _counted(
    row_weight: Tensor | None,
    upstream: Tensor | None,
    num_counted: int | None,
    device: torch.device,
    in_place: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(indices of the tokens that count where their number is known without waiting for a device, else None;
    weights with upstream)."""
    index, total = None, row_weight
    if upstream is not None:
        total = upstream if row_weight is None else torch.where(row_weight != 0, upstream * row_weight, 0.0)
    if row_weight is None:
        return None, total
    if device.type == "cpu" and inputs.readable(row_weight):
        if num_counted is not None and num_counted != (found := int(row_weight.count_nonzero())):
            raise ValueError(f"num_counted: {num_counted} tokens are said to count, and {found} do")
        index = total.nonzero().squeeze(-1)
        if in_place or len(index) == len(total):
            index = None
    elif num_counted is not None:
        counts = row_weight != 0
        total = torch.where(counts.sum() == num_counted, total, math.nan)  # nobody has waited to see it
        if not in_place:
            index = torch.nonzero_static(counts, size=num_counted, fill_value=0).squeeze(-1)
    return index, total


class _Teacher:
    """The teacher's logits of a chunk, wherever they come from."""

    def __init__(
        self, hidden, weight, bias, logits, setup: Setup, tokens: int, vocab: int, device, gathered: bool
    ):
        self.hidden, self.source, self.vocab, self.setup, self.device = hidden, logits, vocab, setup, device
        # bytes a class: of a chunk, whoever makes it, and of the buffer that it is made in
        self.itemsize = self.buffered = 0
        if hidden is not None:
            dtype = setup.teacher_dtype
            self.hidden = hidden.reshape(tokens, hidden.shape[-1])
            self.weight, self.bias = (
                weight[:vocab].to(dtype),
                None if bias is None else bias[:vocab].to(dtype),
            )
            self.itemsize = self.buffered = setup.of_logits(dtype).itemsize
        elif callable(logits):
            self.itemsize = setup.of_logits(setup.dtype).itemsize
        else:
            self.source = logits = logits if logits.dim() > 1 else logits[None]  # of one token: (V)
            self.flat = _flat(logits)
            if self.flat is None or gathered:
                self.itemsize = logits.element_size()
            if self.flat is not None and gathered:
                self.buffered = self.itemsize

    def logits(self, at: slice | Tensor, buffer: Tensor) -> Tensor:
        """(chunk, vocab or more)."""
        if self.hidden is not None:
            x = self.inputs(at)
            dtype = self.setup.of_logits(x.dtype)
            return _project(x, self.weight, self.bias, _shaped(buffer, (len(x), self.vocab), dtype))
        if callable(self.source):
            return self._called(at.start, at.stop)
        if self.flat is None:
            ids = torch.arange(at.start, at.stop, device=self.source.device) if isinstance(at, slice) else at
            return self.source[torch.unravel_index(ids, self.source.shape[:-1])].contiguous()
        if isinstance(at, slice):
            return self.flat[at]
        return torch.index_select(
            self.flat[:, : self.vocab], 0, at, out=_shaped(buffer, (len(at), self.vocab), self.flat.dtype)
        )

    def inputs(self, at: slice | Tensor) -> Tensor:
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


def _flat(x: Tensor) -> Tensor | None:
    """(tokens, V) without a copy; None where the layout does not allow that."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return None


class _Accumulator:
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


def _shaped(buffer: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return buffer[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is not None and x.dtype == out.dtype and _has_product(x, out):
        return torch.addmm(bias, x, weight.t(), out=out)
    _product(x, weight.t(), out, rounded=out.dtype == x.dtype)
    return out if bias is None else out.add_(bias)


def _has_product(a: Tensor, out: Tensor) -> bool:
    """Whether PyTorch has a product of such factors with such a result; of fp16 on a CPU it has one, twenty
    times slower than fp32's."""
    if a.device.type == "cpu":
        return a.dtype == out.dtype != torch.float16
    return a.dtype == out.dtype or _widens(a.device.type)


@functools.cache
def _widens(device_type: str) -> bool:
    """Whether products of 16-bit factors can be added to fp32 there."""
    try:
        x = torch.zeros(16, 16, dtype=torch.bfloat16, device=device_type)
        wide = x.float()
        torch.addmm(wide, x, x, out_dtype=torch.float32, out=wide)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False, rounded: bool = True) -> Tensor:
    """out = a @ b, or out += a @ b, summed in fp32 at least, into an `out` that may be wider.

    rounded: the product may be rounded to bf16 on its way. Where PyTorch has no product with a wider result,
        that is twice as fast.
    """
    if _has_product(a, out):
        mixed = {} if a.dtype == out.dtype else dict(out_dtype=out.dtype)
        return torch.addmm(out, a, b, beta=1, out=out, **mixed) if add else torch.mm(a, b, out=out, **mixed)
    (m, k), n = a.shape, b.shape[1]
    rounded = rounded and a.dtype == torch.bfloat16
    wide = (lambda x: x) if rounded else Tensor.float
    # by blocks of the longest dimension: of k, whose products are summed, where nothing is rounded in between
    longest = max(m, n) if rounded or out.dtype.itemsize == 2 else max(m, n, k)
    step = max(ROUND, BLOCK_BYTES // (4 * (m + n + k - longest - (k if rounded else 0))))
    blocks = [slice(i, i + step) for i in range(0, longest, step)]
    if longest == m:
        b = wide(b)
        for s in blocks:
            _put(out[s], wide(a[s]), b, add)
    elif longest == n:
        a = wide(a)
        for s in blocks:
            _put(out[:, s], a, wide(b[:, s]), add)
    else:
        for s in blocks:
            _put(out, wide(a[:, s]), wide(b[s]), add or s.start > 0)
    return out


def _put(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    else:
        out.add_(a @ b) if add else out.copy_(a @ b)


def _sum_rows(z: Tensor, out: Tensor, add: bool) -> None:
    """out = z.sum(0), or out += z.sum(0), in out's dtype: on a CPU PyTorch casts before it sums, so by
    blocks."""
    step = (
        z.shape[1]
        if z.dtype == out.dtype or z.device.type != "cpu"
        else max(ROUND, BLOCK_BYTES // (4 * len(z)))
    )
    for i in range(0, z.shape[1], step):
        part = z[:, i : i + step].sum(0, dtype=out.dtype)
        out[i : i + step].copy_(out[i : i + step] + part if add else part)


# ---------------------------------------------------------------- autograd

_TENSORS = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias", "teacher_logits")
_ROWS = ("labels", "row_weight", "upstream")
_SETUP = (
    "bool[] needs, ScalarType dtype, ScalarType teacher_dtype, ScalarType? logits_dtype, int "
    "memory_budget, SymInt? num_counted, "
    "bool stats, bool fitted"
)
_library, _optional = ops.library, ", ".join(f"Tensor? {x}" for x in (*_TENSORS[2:], *_ROWS))
_library.define(
    f"linear_loss(Tensor hidden, Tensor weight, {_optional}, {_SETUP}, {SCHEMA}) -> "
    f"({', '.join(['Tensor'] * 8)})"
)


@torch.library.impl(_library, "linear_loss", "CompositeExplicitAutograd")
def _linear_loss(*arguments):
    tensors, rest = len(_TENSORS) + len(_ROWS), len(_TENSORS) + len(_ROWS) + len(Setup._fields)
    return _run(*arguments[:tensors], Setup(*arguments[tensors:rest]), Asked(*arguments[rest:]))


@torch.library.register_fake("kdkernels::linear_loss", lib=_library)
def _(*arguments):
    tensors, setup = (
        arguments[: len(_TENSORS)],
        Setup(*arguments[len(_TENSORS) + len(_ROWS) :][: len(Setup._fields)]),
    )
    hidden = tensors[0]
    rows, of_row = math.prod(hidden.shape[:-1]), row_dtype(hidden.device)
    grads = []
    for i, need in enumerate(setup.needs):
        x, (_, of_products) = tensors[i], setup.models[i // 3]
        shape, dtype = (x.shape, setup.of_gradient(x.dtype, of_products)) if need else ((0,), torch.float32)
        grads.append(torch.empty(shape, dtype=dtype, device=hidden.device))
    return (
        hidden.new_empty(rows, dtype=of_row),
        *grads,
        hidden.new_empty(rows if setup.stats else 0, COLUMNS, dtype=of_row),
    )


def _pass(tensors: tuple, labels, row_weight, upstream, setup: Setup, asked: Asked):
    """`_run`, or what a compiler takes for it."""
    if torch.compiler.is_compiling():
        return torch.ops.kdkernels.linear_loss.default(*tensors, labels, row_weight, upstream, *setup, *asked)
    return _run(*tensors, labels, row_weight, upstream, setup, asked)


_NO_NEEDS = (False,) * 6


class _Total(torch.autograd.Function):
    """Sum of the row losses; the forward leaves the gradients, the backward multiplies them by the upstream
    gradient."""

    @staticmethod
    def forward(ctx, labels, row_weight, setup: Setup, asked: Asked, boost: float, *tensors):
        rows, *grads, columns = _pass(tensors, labels, row_weight, None, setup, asked)
        ctx.save_for_backward(*(g for g, need in zip(grads, setup.needs, strict=True) if need))
        ctx.needs, ctx.dtypes = setup.needs, [None if x is None else x.dtype for x in tensors[:6]]
        ctx.boost = boost
        ctx.mark_non_differentiable(columns)
        return rows.sum().to(value_dtype(tensors[0])), columns

    @staticmethod
    def backward(ctx, upstream, _):
        inputs.check_upstream("fused_linear_kd_loss", upstream)
        factor = upstream / ctx.boost if ctx.boost != 1.0 else upstream
        grads = iter(times_upstream(ctx.saved_tensors, factor))
        return *[None] * 5, *_cast(grads, ctx.needs, ctx.dtypes), None


class _PerRow(torch.autograd.Function):
    """Row losses; the backward goes over the chunks again with the upstream gradient in the rows' weights."""

    @staticmethod
    def forward(ctx, labels, row_weight, setup: Setup, asked: Asked, boost: float, *tensors):
        rows, *_, columns = _pass(tensors, labels, row_weight, None, setup._replace(needs=_NO_NEEDS), asked)
        *tensors_alone, logits = tensors
        ctx.called = logits if callable(logits) else None
        ctx.save_for_backward(*tensors_alone, None if callable(logits) else logits, labels, row_weight)
        ctx.setup, ctx.asked, ctx.boost = setup._replace(stats=False), asked, boost
        ctx.mark_non_differentiable(columns)
        return rows.view(tensors[0].shape[:-1]).to(value_dtype(tensors[0])), columns

    @staticmethod
    def backward(ctx, upstream, _):
        inputs.check_upstream("fused_linear_kd_loss", upstream)
        *tensors, logits, labels, row_weight = ctx.saved_tensors
        with torch.no_grad():
            upstream, post = upstream.to(row_dtype(upstream.device)), None
            if _underflows(ctx.setup):  # near 1 until it is in fp32, whatever the loss scale
                post = largest(upstream) / ctx.boost
                upstream = upstream / post
            tensors = *tensors, ctx.called or logits
            _, *grads, _ = _pass(tensors, labels, row_weight, upstream, ctx.setup, ctx.asked)
            grads = grads if post is None else [g * post for g in grads]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = [once(g) for g in grads]
        wanted = (g for g, need in zip(grads, ctx.setup.needs, strict=True) if need)
        return (
            *[None] * 5,
            *_cast(wanted, ctx.setup.needs, [None if x is None else x.dtype for x in tensors[:6]]),
            None,
        )


# for torch.export, as functional's `trainable_loss`
_library.define(
    "trainable_linear_loss(Tensor hidden, Tensor weight, "
    f"{', '.join(f'Tensor? {x}' for x in (*_TENSORS[2:], *_ROWS[:2]))}, "
    f"{_SETUP}, {SCHEMA}) -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "trainable_linear_loss", "CompositeExplicitAutograd")
def _trainable_linear_loss(*arguments):
    tensors, setup, asked = _parts(arguments)
    rows, *_, columns = _run(*tensors, None, setup._replace(needs=_NO_NEEDS), asked)
    return rows, columns


def _parts(arguments: tuple) -> tuple[tuple, Setup, Asked]:
    """(tensors and what belongs to their rows, setup, what is asked for) of the operator's arguments."""
    tensors = len(_TENSORS) + len(_ROWS[:2])
    rest = tensors + len(Setup._fields)
    return arguments[:tensors], Setup(*arguments[tensors:rest]), Asked(*arguments[rest:])


@torch.library.register_fake("kdkernels::trainable_linear_loss", lib=_library)
def _(hidden, *arguments):
    rows, setup = math.prod(hidden.shape[:-1]), _parts((hidden, *arguments))[1]
    dtype = row_dtype(hidden.device)
    columns = hidden.new_empty(rows if setup.stats else 0, COLUMNS, dtype=dtype)
    return hidden.new_empty(rows, dtype=dtype), columns


def _save_trainable(ctx, inputs, output) -> None:
    tensors, ctx.setup, ctx.asked = _parts(inputs)
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _trainable_backward(ctx, upstream, _):
    *tensors, labels, row_weight = ctx.saved_tensors
    setup = ctx.setup._replace(needs=tuple(ctx.needs_input_grad[:6]), stats=False)
    most = largest(upstream) if _underflows(setup) else upstream.new_ones(())
    call = (*tensors, labels, row_weight, upstream / most, *setup, *ctx.asked)
    grads = (
        g * most
        for g, need in zip(torch.ops.kdkernels.linear_loss.default(*call)[1:7], setup.needs, strict=True)
        if need
    )
    dtypes = [None if x is None else x.dtype for x in tensors[:6]]
    return *_cast(grads, setup.needs, dtypes), *[None] * (3 + len(setup) + len(ctx.asked))


torch.library.register_autograd(
    "kdkernels::trainable_linear_loss", _trainable_backward, setup_context=_save_trainable, lib=_library
)


def _cast(grads, needs, dtypes) -> list[Tensor | None]:
    """The gradients in their places, in the parameters' dtypes."""
    return [next(grads).to(dtype) if need else None for need, dtype in zip(needs, dtypes, strict=True)]


# ---------------------------------------------------------------- the loss


def _linear_loss_of(tensors: tuple, labels, row_weight, denominator, o: Options, vocab: int, setup: Setup):
    """(loss, statistics) of checked arguments; functional.py's `_fused` for hidden states."""
    hidden = tensors[0]
    if torch.compiler.is_exporting():
        asked = Asked.of(o.divergence, o.numbers, vocab, o.backend)
        call = *tensors, labels, row_weight, *setup._replace(needs=_NO_NEEDS), *asked
        rows, columns = torch.ops.kdkernels.trainable_linear_loss.default(*call)
        return reduced(rows, hidden, o, denominator), columns
    steepest = steepness(o, vocab, of_teacher=any(setup.needs[3:])) if _underflows(setup) else None
    if steepest is not None and steepest > MOST_STEEP:
        setup, steepest = setup._replace(fitted=True, logits_dtype=torch.float32), 1.0
    folded = fold(o, hidden.shape[:-1], row_weight, denominator, steepest)
    asked = Asked.of(o.divergence, folded.numbers, vocab, o.backend)
    rows_of = labels, folded.weight, setup, asked
    if o.reduction == "none":
        boost = 1.0 if steepest is None else boost_of(folded.numbers, steepest)
        return _PerRow.apply(*rows_of, boost, *tensors)
    if any(setup.needs):
        total, columns = _Total.apply(*rows_of, folded.boost, *tensors)
    else:
        with torch.no_grad():
            rows, *_, columns = _pass(tensors, labels, folded.weight, None, setup, asked)
            total = rows.sum().to(value_dtype(hidden))
    return total if folded.post is None else (total * folded.post).to(total.dtype), columns


def _product_dtype(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Of a model's projection: autocast's, or that of its tensors, which is then one."""
    device_type = hidden.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    for part, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{name}_{part}: must be {hidden.dtype}, as {name}_hidden is, or under autocast; got "
                f"{x.dtype}"
            )
    return hidden.dtype


def _check_model(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for part, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is None and part == "bias":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}_{part}: must be a tensor, got {type(x).__name__}")
        inputs.check_dense(f"{name}_{part}", x)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}_{part}: must be bfloat16, float16, float32 or float64, got {x.dtype}")
        if x.device != hidden.device:
            raise ValueError(
                f"{name}_{part}: must be on the device of {name}_hidden, {hidden.device}, got {x.device}"
            )
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name}_hidden and {name}_weight: must be (..., H) and (V, H), got {tuple(hidden.shape)} "
            f"and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}_bias: must be ({weight.shape[0]},), got {tuple(bias.shape)}")


def _check(tensors: tuple, labels, token_weight, num_counted, o: Options) -> int:
    """Raise for tensors that do not fit together or with the options; the number of classes that count."""
    hidden, weight, bias, *teacher, logits = tensors
    _check_model("student", hidden, weight, bias)
    leading = hidden.shape[:-1]
    if logits is not None:
        if any(x is not None for x in teacher):
            raise ValueError(
                "teacher_logits: takes the place of teacher_hidden, teacher_weight and teacher_bias; "
                "give one or the other"
            )
        if o.teacher_grad:
            raise ValueError(
                "teacher_grad: goes to teacher_hidden, teacher_weight and teacher_bias, and "
                "teacher_logits are given"
            )
    elif teacher[0] is None or teacher[1] is None:
        raise ValueError("teacher_hidden and teacher_weight: both, or teacher_logits in their place")
    else:
        _check_model("teacher", *teacher)
    given = teacher[0] if logits is None else logits
    if isinstance(given, Tensor):
        name = "teacher_hidden" if logits is None else "teacher_logits"
        inputs.check_dense(name, given)
        if given.dtype not in DTYPES:
            raise TypeError(f"{name}: must be bfloat16, float16, float32 or float64, got {given.dtype}")
        if given.dim() == 0 or given.shape[:-1] != leading:
            raise ValueError(
                f"{name}: must have the leading shape of student_hidden, {tuple(leading)}, got "
                f"{tuple(given.shape)}"
            )
        if given.device != hidden.device:
            raise ValueError(f"{name}: must be on the student's device {hidden.device}, got {given.device}")
    elif not callable(given):
        raise TypeError(
            "teacher_logits: must be a tensor or a callable (start, stop) -> logits, got "
            f"{type(given).__name__}"
        )
    elif torch.compiler.is_compiling():
        raise RuntimeError(
            "teacher_logits: a callable cannot be compiled; call the loss under torch.compiler.disable"
        )
    for name, x in zip(_TENSORS[3:], (*teacher, logits), strict=True):
        if isinstance(x, Tensor) and inputs.differentiated(x) and not o.teacher_grad:
            raise ValueError(
                f"{name}: receives a gradient only with teacher_grad=True; pass that, or {name}.detach()"
            )
    # a callable's is seen when it is called
    teacher_vocab = (
        len(teacher[1]) if logits is None else len(weight) if callable(logits) else logits.shape[-1]
    )
    vocab = common_vocab(len(weight), teacher_vocab, o)
    check_rows(labels, token_weight, hidden, o, "hidden states")
    if num_counted is not None:
        tokens = math.prod(leading)
        if not 0 <= num_counted <= tokens:
            raise ValueError(
                f"num_counted: must be between 0 and the number of tokens, {tokens}, got {num_counted}"
            )
        if labels is None and token_weight is None and num_counted != tokens:
            raise ValueError(
                f"num_counted: all {tokens} tokens count where there are neither labels nor "
                f"token_weight; got {num_counted}"
            )
    return vocab


def check_chunking(logits_dtype: torch.dtype | None, memory_budget: int | None = None) -> int | None:
    """Raise for what `options` does not know; the budget."""
    if logits_dtype not in (None, torch.float32):
        raise ValueError(
            f"logits_dtype: must be torch.float32, or None for that of the products, got {logits_dtype!r}"
        )
    memory_budget = _integer("memory_budget", memory_budget, "a number of bytes or None")
    if memory_budget is not None and not 1 <= memory_budget < 2**63:
        raise ValueError(f"memory_budget: must be positive and an int64, got {inputs.shown(memory_budget)}")
    return memory_budget


def _integer(name: str, x, kind: str) -> int | None:
    """x as a Python integer, or None."""
    if x is not None and (found := inputs.integer(x)) is None:
        raise TypeError(f"{name}: must be {kind}, got {inputs.shown(x)}")
    return None if x is None else found


@inputs.names_checked
def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: TeacherLogits | None = None,
    divergence: Divergence | str = "kl",
    temperature: float = 1.0,
    t_squared: bool = False,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    num_counted: int | None = None,
    vocab_size: int | None = None,
    teacher_grad: bool = False,
    student_transform: LogitTransform = AS_THEY_ARE,
    teacher_transform: LogitTransform = AS_THEY_ARE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_stats: bool = False,
    backend: str = "auto",
    logits_dtype: torch.dtype | None = torch.float32,
    memory_budget: int | None = None,
) -> Tensor | tuple[Tensor, KDStats]:
    r"""`fused_kd_loss` of logits that are never held: those of a chunk of tokens are computed, used and
    written over by the next.

        z = student_hidden @ student_weight.T + student_bias        v = teacher_hidden @ teacher_weight.T +
                                                                    teacher_bias loss = fused_kd_loss(z, v,
                                                                    labels, ...)

    with its gradient in student_hidden, student_weight and student_bias, which is dz @ W, dz.T @ h and the
    sum of dz: for "mean" and "sum" computed in the forward, for "none" by a second pass over the chunks in
    the backward. No tensor has tokens x V elements. Projecting by chunks is Liger-Kernel's idea, Hsu et al.
    (2024), among others'.

    A chunk has `memory_budget` bytes for the logits of both, or of the student where the teacher's are given,
    and for the gradient in the student's: in the dtype of the products that take it, beside the logits where
    these are wider, else in their place. That makes budget / (V (bytes of a student's + of a teacher's logit
    + of a gradient beside them)) tokens, rounded down to 64s, then evened out between the chunks, and one at
    least; the last chunk has what is left. Each chunk reads the weights, and reads and writes the weight's
    gradient, which takes a chunk of a thousand tokens to be little on a GPU and some hundreds on a CPU: the
    budget is 1.25 GiB by default (in bf16 512 tokens of a vocabulary of 262144, 4096 of 32768), and 256 MiB
    on a CPU (192 of 131072). Beside it there are the gradients, and for 16-bit weights and several chunks the
    sum of their gradients in fp32.

    Args:
        student_hidden: (..., H) bfloat16, float16, float32 or float64, what the student's head takes.
        student_weight: (V, H) of the head, which may be the embedding's as well. No gradient is computed
            where it requires none.
        teacher_hidden, teacher_weight: (..., H') and (V', H'); H' and the dtype may differ from the
            student's. A teacher's weight and bias may be parameters that require a gradient: without
            teacher_grad they get none.
        student_bias, teacher_bias: (V), (V').
        teacher_logits: in place of the teacher's three: (..., V'), or a callable (start, stop) -> (stop -
            start, V') logits of these of the flattened tokens, on any device; in the forward, and with
            reduction="none" again in the backward. labels, divergence, temperature, t_squared, soft_weight,
            hard_weight, ignore_index, token_weight, reduction, num_items, student_transform,
            teacher_transform, label_smoothing, z_loss, return_stats, backend: as in `fused_kd_loss`.
        num_counted: how many tokens count (label not ignore_index, weight not 0). The others are then left
            out of the projections on a GPU too, where counting them would mean waiting for it; on a CPU they
            always are. A wrong number gives nan on a GPU and an error on a CPU. A callable is asked for all
            tokens.
        vocab_size: the first vocab_size classes of both; required where V and V' differ. Only these are
            projected.
        teacher_grad: the gradient in the teacher's hidden states, weight and bias too, by a second call on
            each chunk; not of the cross entropy. That in its logits has a share of the budget.
        logits_dtype: torch.float32 leaves the logits of 16-bit products unrounded: gradients are right to
            their own rounding, 0.2 % in bf16. None rounds logits to the products' dtype: chunks of 2.5 times
            the tokens in the same budget, twice as fast on a CPU, and gradients off by some per cent where
            the student is near its teacher.
        memory_budget: bytes of a chunk's logits and of the gradient in them, see above.

    The head is its weight and bias, and nothing else of its module is called. Adapters on it (PEFT's LoRA of
    `lm_head`, whose `.weight` is that of the frozen layer) are left out and get no gradient: merge them,
    leave the head out, or take `fused_kd_loss` of the logits. The same goes for forward hooks. A DTensor is
    refused; `weight.full_tensor()` is not one any more, and cannot be seen: where ranks have different tokens
    each shard of the head gets the gradient of its own rank's tokens alone. Do not pass it (docs/linear.md).

    Under autocast the products are in its dtype, and gradients in the parameters' own. The weight gradient is
    summed over chunks in fp32.

    Returns:
        As `fused_kd_loss`: a scalar, or (...) for reduction="none", and with return_stats a `KDStats` after
        it. Differentiable once.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before anything is computed; what a callable
            returns, when it does.
        RuntimeError: the backend cannot run here, or a callable meets torch.compile.

    Example:
        >>> import torch
        >>> from kdkernels import fused_linear_kd_loss
        >>> hidden = torch.randn(8, 64, requires_grad=True)
        >>> weight = torch.randn(32000, 64, requires_grad=True)
        >>> teacher_hidden, teacher_weight = torch.randn(8, 128), torch.randn(32000, 128)
        >>> loss = fused_linear_kd_loss(hidden, weight, teacher_hidden, teacher_weight, temperature=2.0)
        >>> loss.backward()
    """
    mixing = soft_weight, hard_weight, ignore_index, reduction
    more = student_transform, teacher_transform, label_smoothing, z_loss, return_stats
    o = options(divergence, temperature, t_squared, *mixing, vocab_size, False, teacher_grad, *more, backend)
    o.check_exchangeable()
    memory_budget = check_chunking(logits_dtype, memory_budget)
    num_counted = _integer("num_counted", num_counted, "an integer")
    if not teacher_grad:  # parameters of a model that nobody has frozen
        teacher_weight, teacher_bias = map(inputs.leaf_detached, (teacher_weight, teacher_bias))
    tensors = (
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        teacher_logits,
    )
    compiling = torch.compiler.is_compiling()
    if not compiling:
        differentiable = tensors[: 6 if teacher_grad else 3]
        inputs.check_mode(
            "fused_linear_kd_loss", differentiable, False, 'logits, and fused_kd_loss(backend="eager")'
        )
    vocab = _check(tensors, labels, token_weight, num_counted, o)
    num_items = checked_items(num_items, o)
    if not compiling and reduction == "none":  # which saves what it is given
        *tensors, labels, token_weight = map(inputs.saveable, (*tensors, labels, token_weight))
    if memory_budget is None:
        memory_budget = CPU_BUDGET if student_hidden.device.type == "cpu" else GPU_BUDGET
    student_dtype = _product_dtype("student", *tensors[:3])
    teacher_dtype = student_dtype if teacher_hidden is None else _product_dtype("teacher", *tensors[3:6])
    row_weight, denominator = weights(student_hidden, labels, vocab, o, token_weight, num_items)
    # as in functional.py's `_loss`
    hard = labels if o.hard_weight or student_hidden.device.type == "cpu" else None

    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors[:6])
    setup = Setup(needs, student_dtype, teacher_dtype, logits_dtype, memory_budget, num_counted, return_stats)
    loss, columns = _linear_loss_of(tensors, hard, row_weight, denominator, o, vocab, setup)
    if not return_stats:
        return loss
    return loss, from_columns(
        columns.detach(), student_hidden.shape[:-1], labels, bool(o.hard_weight), row_weight, loss.dtype
    )
