"""The loss of rows as autograd sees it: Functions around the operators, and an operator with a derivative for
torch.export."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import inputs, ops
from .call import SCHEMA, Asked, Call, Numbers, Rows, exchanged
from .folding import value_dtype
from .gradients import gradient_for, once, times_upstream
from .options import Options


class Request(NamedTuple):
    """What the operator is asked for of the rows, and, where the teacher has a gradient, of them with the two
    exchanged; and what autograd wants of it."""

    own: Asked
    turned: Asked | None
    stats: bool
    wanted: tuple[bool, bool]  # gradients, of student and teacher
    inplace: bool
    boost: float  # what they have been multiplied with besides

    @staticmethod
    def of(
        o: Options, numbers: Numbers, vocab: int, wanted=(False, False), inplace=False, boost=1.0
    ) -> Request:
        own = Asked.of(o.divergence, numbers, vocab, o.backend)
        turned = None
        if wanted[1]:
            turned = Asked.of(*exchanged(o.divergence, numbers), vocab, o.backend)
        return Request(own, turned, o.return_stats, wanted, inplace, boost)


class Total(torch.autograd.Function):
    """Sum of the row losses; the forward fills the gradients of student and teacher, the backward multiplies
    them by the upstream one."""

    @staticmethod
    def forward(ctx, student, teacher, labels, weight, temperature, asked: Request):
        rows = Rows(labels, weight, temperature)
        losses, grads, columns = rows_and_gradients(student, teacher, rows, asked)
        ctx.asked, ctx.saved = asked, len(grads)
        # of eager, whose gradient can be differentiated again, what it is made from as well
        again = (student, teacher, *rows) if asked.own.backend == "eager" and not asked.inplace else ()
        ctx.save_for_backward(*grads, *again)
        if asked.stats:
            ctx.mark_non_differentiable(columns)
        return losses.sum().to(value_dtype(student)), columns

    @staticmethod
    def backward(ctx, upstream, _):
        saved, asked = ctx.saved_tensors, ctx.asked  # which a checkpoint computes once
        grads, again = saved[: ctx.saved], saved[ctx.saved :]
        if again and _needs_a_graph(upstream):
            grads = _through_a_graph(again, asked, upstream)
        else:
            inputs.check_upstream("fused_kd_loss", upstream)
            grads = times_upstream(grads, upstream / asked.boost if asked.boost != 1.0 else upstream)
        grads = iter(grads)
        return *(next(grads) if wanted else None for wanted in asked.wanted), *[None] * 4


class PerRow(torch.autograd.Function):
    """Row losses; the backward runs the operator again with the upstream gradient in the rows' weights."""

    @staticmethod
    def forward(ctx, student, teacher, labels, weight, temperature, asked: Request):
        losses, columns = rows_alone(student, teacher, Rows(labels, weight, temperature), asked)
        ctx.save_for_backward(student, teacher, labels, weight, temperature)
        ctx.asked = asked._replace(stats=False)
        if asked.stats:
            ctx.mark_non_differentiable(columns)
        return losses.view(student.shape[:-1]), columns

    @staticmethod
    def backward(ctx, upstream, _):
        saved, asked = ctx.saved_tensors, ctx.asked._replace(wanted=ctx.needs_input_grad[:2])
        if asked.own.backend == "eager" and not asked.inplace and _needs_a_graph(upstream):
            grads = _through_a_graph(saved, asked, upstream)
        else:
            inputs.check_upstream("fused_kd_loss", upstream)
            student, teacher, *rows = saved
            rows = Rows(*rows)
            with torch.no_grad():
                rows = rows._replace(weight=_times_weight(upstream, rows.weight))
                _, grads, _ = rows_and_gradients(student, teacher, rows, asked)
            if torch.is_grad_enabled():
                grads = [once(grad) for grad in grads]
        grads = iter(grads)
        return *(next(grads) if x else None for x in asked.wanted), *[None] * 4


def _needs_a_graph(upstream: Tensor) -> bool:
    """Whether a backward is to be differentiated again, or is many at once."""
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or inputs.is_batched(upstream))


def _through_a_graph(tensors, asked: Request, upstream: Tensor) -> tuple[Tensor, ...]:
    """The gradients that are wanted of student and teacher, by autograd, so that they can be differentiated
    again."""
    from .backends import eager

    student, teacher, labels, weight, temperature = tensors
    of_rows = labels, weight, *asked.own.record()
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        rows = eager.rows(Call(student, teacher, asked.own.vocab, *of_rows, temperature=temperature))
        leaves = [x for x, has in zip((student, teacher), asked.wanted, strict=True) if has]
        upstream = upstream.to(rows.dtype)
        upstream = upstream.expand_as(rows) if upstream.dim() == 0 else upstream.reshape(rows.shape)
        return torch.autograd.grad(rows, leaves, upstream, create_graph=again)


def _times_weight(upstream: Tensor, weight: Tensor | None) -> Tensor:
    """A gradient in the rows' losses as their weights; 0 where the weight is, whatever the gradient is."""
    return upstream if weight is None else torch.where(weight != 0, upstream * weight, 0.0)


# torch.export keeps operators, and nothing of an autograd.Function: what is to be trained through its graph
# is one with a derivative
ops.library.define(f"trainable_loss({ops.ROWS}, {SCHEMA}) -> Tensor")


@torch.library.impl(ops.library, "trainable_loss", "CompositeExplicitAutograd")
def _trainable_loss(*arguments) -> Tensor:
    return ops.loss(*arguments, False, False)[0]


@torch.library.register_fake("kdkernels::trainable_loss", lib=ops.library)
def _(student, *rest):
    return ops.new_losses(student)


def _save_trainable(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.asked = Asked(*inputs[5:])


def _trainable_backward(ctx, upstream):
    student, teacher, labels, weight, temperature = ctx.saved_tensors
    weight = _times_weight(upstream.view(student.shape[:-1]), weight)
    own, others = ctx.needs_input_grad[:2]
    asked, grad, other = ctx.asked, None, None
    if others:
        turned = Asked.of(*exchanged(*asked.record()), asked.vocab, asked.backend)
        _, other, _ = ops.loss(teacher, student, None, weight, temperature, *turned, True, False)
    if own:
        _, grad, _ = ops.loss(student, teacher, labels, weight, temperature, *asked, True, False)
    return grad, other, *[None] * (3 + len(asked))


torch.library.register_autograd(
    "kdkernels::trainable_loss", _trainable_backward, setup_context=_save_trainable, lib=ops.library
)


def rows_alone(student, teacher, of_rows: Rows, asked: Request) -> tuple[Tensor, Tensor | None]:
    """The rows' losses and statistics, without a gradient."""
    z, v = student.detach(), teacher.detach()
    if torch.compiler.is_compiling():
        rows, _, columns = ops.loss(z, v, *of_rows, *asked.own, False, asked.stats)
        return rows, columns if asked.stats else None
    columns = ops.new_columns(z) if asked.stats else None
    return ops.loss_into(z, v, of_rows, asked.own, None, columns), columns


def rows_and_gradients(
    student, teacher, of_rows: Rows, asked: Request
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """The rows' losses, the gradients that are wanted of student and teacher, and statistics.

    A gradient is in the student's storage, in memory that is used again, or in the compiler's. The teacher's
    comes first: in place, the student's takes the logits that it is made from.
    """
    z, v, compiling = student.detach(), teacher.detach(), torch.compiler.is_compiling()
    own, others = asked.wanted
    grads: tuple[Tensor, ...] = ()
    if others:
        without = of_rows._replace(labels=None)
        if compiling:
            grads = (ops.loss(v, z, *without, *asked.turned, True, False)[1],)
        else:
            grads = (gradient_for(teacher),)
            ops.loss_into(v, z, without, asked.turned, grads[0])
    if not own:
        rows, columns = rows_alone(student, teacher, of_rows, asked)
        return rows, grads, columns
    if compiling and not asked.inplace:
        rows, grad, columns = ops.loss(z, v, *of_rows, *asked.own, True, asked.stats)
        return rows, (grad, *grads), columns if asked.stats else None
    grad = z if asked.inplace else gradient_for(student)
    columns = ops.new_columns(z) if asked.stats else None
    rows = ops.loss_into(z, v, of_rows, asked.own, grad, columns)
    if asked.inplace and not compiling:  # autograd is told, so that whoever saved the logits finds out
        torch.autograd.graph.increment_version(student)
    return rows, (grad, *grads), columns
