"""The loss from hidden states as autograd and torch.compile see it: an operator around `chunks.over_chunks`,
Functions around that, and an operator with a derivative for torch.export."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import inputs, ops
from .call import SCHEMA, Asked, Rows, row_dtype
from .chunks import over_chunks
from .folding import MOST_STEEP, boost_of, fold, largest, reduced, steepness, value_dtype
from .gradients import once, times_upstream
from .linear_call import Given, Setup
from .options import Options
from .stats import COLUMNS

TENSORS = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias", "teacher_logits")
_ROWS = tuple(f"row_{x}" for x in (*Rows._fields, "upstream"))
_SETUP = (
    "bool[] needs, ScalarType dtype, ScalarType teacher_dtype, ScalarType? logits_dtype, int "
    "memory_budget, SymInt? num_counted, "
    "bool stats, bool fitted"
)
_library, _optional = ops.library, ", ".join(f"Tensor? {x}" for x in (*TENSORS[2:], *_ROWS))
_library.define(
    f"linear_loss(Tensor hidden, Tensor weight, {_optional}, {_SETUP}, {SCHEMA}) -> "
    f"({', '.join(['Tensor'] * 8)})"
)


@torch.library.impl(_library, "linear_loss", "CompositeExplicitAutograd")
def _linear_loss(*arguments):
    tensors, setup, asked = _parts(arguments, len(_ROWS))
    return over_chunks(Given.of(tensors[:7], tensors[7:-1], tensors[-1]), setup, asked, planned=True)


@torch.library.register_fake("kdkernels::linear_loss", lib=_library)
def _(*arguments):
    tensors, setup, _ = _parts(arguments, len(_ROWS))
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


def _parts(arguments: tuple, rows: int) -> tuple[tuple, Setup, Asked]:
    """(TENSORS and so many of _ROWS, setup, what is asked for) of an operator's arguments."""
    tensors = len(TENSORS) + rows
    rest = tensors + len(Setup._fields)
    return arguments[:tensors], Setup(*arguments[tensors:rest]), Asked(*arguments[rest:])


def _pass(tensors: tuple, rows: Rows, upstream: Tensor | None, setup: Setup, asked: Asked):
    """`over_chunks`, or what a compiler takes for it. tensors: TENSORS."""
    if torch.compiler.is_compiling():
        return torch.ops.kdkernels.linear_loss.default(*tensors, *rows, upstream, *setup, *asked)
    return over_chunks(Given.of(tensors, rows, upstream), setup, asked)


def _underflows(setup: Setup) -> bool:
    """Whether a gradient goes through fp16. A function: Dynamo, which traces it, does not know properties of
    a NamedTuple in torch 2.10."""
    mine, theirs = any(setup.needs[:3]), any(setup.needs[3:])
    return mine and setup.dtype == torch.float16 or theirs and setup.teacher_dtype == torch.float16


_NO_NEEDS = (False,) * 6


class _Total(torch.autograd.Function):
    """Sum of the row losses; the forward leaves the gradients, the backward multiplies them by the upstream
    gradient."""

    @staticmethod
    def forward(ctx, labels, weight, temperature, setup: Setup, asked: Asked, boost: float, *tensors):
        of_rows = Rows(labels, weight, temperature)
        rows, *grads, columns = _pass(tensors, of_rows, None, setup, asked)
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
        return *[None] * 6, *_cast(grads, ctx.needs, ctx.dtypes), None


class _PerRow(torch.autograd.Function):
    """Row losses; the backward goes over the chunks again with the upstream gradient in the rows' weights."""

    @staticmethod
    def forward(ctx, labels, weight, temperature, setup: Setup, asked: Asked, boost: float, *tensors):
        alone, of_rows = setup._replace(needs=_NO_NEEDS), Rows(labels, weight, temperature)
        rows, *_, columns = _pass(tensors, of_rows, None, alone, asked)
        *tensors_alone, logits = tensors
        ctx.called = logits if callable(logits) else None
        ctx.save_for_backward(*tensors_alone, None if callable(logits) else logits, *of_rows)
        ctx.setup, ctx.asked, ctx.boost = setup._replace(stats=False), asked, boost
        ctx.mark_non_differentiable(columns)
        return rows.view(tensors[0].shape[:-1]).to(value_dtype(tensors[0])), columns

    @staticmethod
    def backward(ctx, upstream, _):
        inputs.check_upstream("fused_linear_kd_loss", upstream)
        *tensors, logits, labels, weight, temperature = ctx.saved_tensors
        of_rows = Rows(labels, weight, temperature)
        with torch.no_grad():
            upstream, post = upstream.to(row_dtype(upstream.device)), None
            if _underflows(ctx.setup):  # near 1 until it is in fp32, whatever the loss scale
                post = largest(upstream) / ctx.boost
                upstream = upstream / post
            tensors = *tensors, ctx.called or logits
            _, *grads, _ = _pass(tensors, of_rows, upstream, ctx.setup, ctx.asked)
            grads = grads if post is None else [g * post for g in grads]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = [once(g) for g in grads]
        wanted = (g for g, need in zip(grads, ctx.setup.needs, strict=True) if need)
        return (
            *[None] * 6,
            *_cast(wanted, ctx.setup.needs, [None if x is None else x.dtype for x in tensors[:6]]),
            None,
        )


# for torch.export, as functional's `trainable_loss`
_library.define(
    "trainable_linear_loss(Tensor hidden, Tensor weight, "
    f"{', '.join(f'Tensor? {x}' for x in (*TENSORS[2:], *_ROWS[:-1]))}, "
    f"{_SETUP}, {SCHEMA}) -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "trainable_linear_loss", "CompositeExplicitAutograd")
def _trainable_linear_loss(*arguments):
    tensors, setup, asked = _parts(arguments, len(Rows._fields))
    given = Given.of(tensors[:7], tensors[7:])
    rows, *_, columns = over_chunks(given, setup._replace(needs=_NO_NEEDS), asked, planned=True)
    return rows, columns


@torch.library.register_fake("kdkernels::trainable_linear_loss", lib=_library)
def _(hidden, *arguments):
    rows, setup = math.prod(hidden.shape[:-1]), _parts((hidden, *arguments), len(Rows._fields))[1]
    dtype = row_dtype(hidden.device)
    columns = hidden.new_empty(rows if setup.stats else 0, COLUMNS, dtype=dtype)
    return hidden.new_empty(rows, dtype=dtype), columns


def _save_trainable(ctx, inputs, output) -> None:
    tensors, ctx.setup, ctx.asked = _parts(inputs, len(Rows._fields))
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _trainable_backward(ctx, upstream, _):
    tensors = ctx.saved_tensors
    setup = ctx.setup._replace(needs=tuple(ctx.needs_input_grad[:6]), stats=False)
    most = largest(upstream) if _underflows(setup) else upstream.new_ones(())
    call = (*tensors, upstream / most, *setup, *ctx.asked)
    grads = (
        g * most
        for g, need in zip(torch.ops.kdkernels.linear_loss.default(*call)[1:7], setup.needs, strict=True)
        if need
    )
    dtypes = [None if x is None else x.dtype for x in tensors[:6]]
    others = 1 + len(Rows._fields) + len(setup) + len(ctx.asked)
    return *_cast(grads, setup.needs, dtypes), *[None] * others


torch.library.register_autograd(
    "kdkernels::trainable_linear_loss", _trainable_backward, setup_context=_save_trainable, lib=_library
)


def _cast(grads, needs, dtypes) -> list[Tensor | None]:
    """The gradients in their places, in the parameters' dtypes."""
    return [next(grads).to(dtype) if need else None for need, dtype in zip(needs, dtypes, strict=True)]


def loss_of(tensors: tuple, rows: Rows, denominator, o: Options, vocab: int, setup: Setup):
    """(loss, statistics) of checked arguments; functional.py's `_fused` for hidden states."""
    hidden = tensors[0]
    if torch.compiler.is_exporting():
        asked = Asked.of(o.divergence, o.numbers, vocab, o.backend)
        call = *tensors, *rows, *setup._replace(needs=_NO_NEEDS), *asked
        losses, columns = torch.ops.kdkernels.trainable_linear_loss.default(*call)
        return reduced(losses, hidden, o, denominator), columns
    steepest = steepness(o, vocab, of_teacher=any(setup.needs[3:])) if _underflows(setup) else None
    if steepest is not None and steepest > MOST_STEEP:
        setup, steepest = setup._replace(fitted=True, logits_dtype=torch.float32), 1.0
    folded = fold(o, hidden.shape[:-1], rows.weight, denominator, steepest)
    asked = Asked.of(o.divergence, folded.numbers, vocab, o.backend)
    rows = rows._replace(weight=folded.weight)
    if o.reduction == "none":
        boost = 1.0 if steepest is None else boost_of(folded.numbers, steepest)
        return _PerRow.apply(*rows, setup, asked, boost, *tensors)
    if any(setup.needs):
        total, columns = _Total.apply(*rows, setup, asked, folded.boost, *tensors)
    else:
        with torch.no_grad():
            losses, *_, columns = _pass(tensors, rows, None, setup, asked)
            total = losses.sum().to(value_dtype(hidden))
    return total if folded.post is None else (total * folded.post).to(total.dtype), columns
