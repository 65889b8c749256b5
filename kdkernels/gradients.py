"""What a backward does with the gradients that a forward has left."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, inputs, recycle


class _OnceDifferentiable(torch.autograd.Function):
    """grad * factor, with an error where a second derivative is asked for."""

    @staticmethod
    def forward(ctx, anchor, grad, factor):
        return grad * factor

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            'fused_kd_loss: the fused backends are differentiable once; backend="eager" is '
            "differentiable to any order"
        )


def gradient_for(x: Tensor) -> Tensor:
    fake = type(x) is not Tensor  # no memory to recycle
    return torch.empty_like(x, memory_format=torch.contiguous_format) if fake else recycle.empty(x)


def once(grad: Tensor, factor: Tensor | None = None) -> Tensor:
    """grad * factor, whose own derivative is an error: what a backward returns to a graph of it."""
    anchor = torch.zeros((), requires_grad=True)  # makes the first derivative differentiable
    factor = torch.ones((), device=grad.device) if factor is None else factor
    return _OnceDifferentiable.apply(anchor, grad, factor)


# whether the backward that is running keeps its graph, so that another one may follow it (retain_graph,
# checkpoints without reentry)
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def times_upstream(grads: tuple[Tensor, ...], factor: Tensor) -> list[Tensor]:
    """What the forward has saved, times a 0-d factor: in its own memory only where no backward can come after
    this one.

    So nothing that a later backward, another thread or a saved-tensor hook may read is ever changed, and no
    state passes between backwards.
    """
    if torch.compiler.is_compiling():  # a graph that plans its own memory
        return [grad * factor for grad in grads]
    if torch.is_grad_enabled():  # create_graph
        return [once(grad, factor) for grad in grads]
    if _keeps_graph():
        grads = [grad.clone() for grad in grads]
    for grad in grads:
        _multiply_(grad, factor)
    return list(grads)


def _multiply_(grad: Tensor, factor: Tensor) -> None:
    """In place by a 0-d factor; not at all when it is 1, where it can be looked at without waiting for a
    device."""
    if not inputs.readable(factor) or factor.item() != 1.0:
        getattr(backends.resolve("auto", grad.device, grad.dtype), "scale_", Tensor.mul_)(grad, factor)
