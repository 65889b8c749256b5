"""`tempered_log_softmax`: log softmax(x / T), and its gradient, which keeps nothing but the logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import inputs, ops
from .call import told
from .checks import DTYPES
from .options import options


class _TemperedLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, *asked):
        ctx.save_for_backward(logits)
        ctx.asked = asked
        return ops.log_softmax(logits.detach(), None, *asked)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (logits,) = ctx.saved_tensors
        return ops.log_softmax(logits.detach(), upstream.to(logits.dtype), *ctx.asked), None, None, None


# as `trainable_loss`
ops.library.define(
    "trainable_log_softmax(Tensor logits, float[] numbers, Tensor? varying, str backend) -> Tensor"
)


@torch.library.impl(ops.library, "trainable_log_softmax", "CompositeExplicitAutograd")
def _trainable_log_softmax(logits: Tensor, *asked) -> Tensor:
    return ops.log_softmax(logits, None, *asked)


@torch.library.register_fake("kdkernels::trainable_log_softmax", lib=ops.library)
def _(logits, *asked):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save_log_softmax(ctx, inputs, output) -> None:
    logits, *ctx.asked = inputs
    ctx.save_for_backward(logits)


def _log_softmax_backward(ctx, upstream):
    (logits,) = ctx.saved_tensors
    return ops.log_softmax(logits, upstream.to(logits.dtype), *ctx.asked), None, None, None


torch.library.register_autograd(
    "kdkernels::trainable_log_softmax",
    _log_softmax_backward,
    setup_context=_save_log_softmax,
    lib=ops.library,
)


@inputs.names_checked
def tempered_log_softmax(logits: Tensor, temperature: float = 1.0, *, backend: str = "auto") -> Tensor:
    r"""log softmax(x / T) over the last dimension, (..., V) in the logits' dtype; T = inf is the uniform -log
    V.

    Hinton, Vinyals and Dean (2015), eq. 1. The gradient is (u - softmax(x / T) sum u) / T for an upstream u,
    computed from the logits: nothing but them is kept. Raises TypeError for logits that are not floating
    point, ValueError for T outside [1e-4, 1e12] but inf.
    """
    o = options(temperature=temperature, t_squared=True, backend=backend)
    if not torch.compiler.is_compiling():
        inputs.check_mode("tempered_log_softmax", (logits,), by_autograd=backend == "eager")
    if not isinstance(logits, Tensor) or logits.dtype not in DTYPES:
        raise TypeError(
            "logits: must be bfloat16, float16, float32 or float64, got "
            f"{getattr(logits, 'dtype', type(logits).__name__)}"
        )
    inputs.check_dense("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: must be (..., V) with V > 0, got {tuple(logits.shape)}")
    logits = logits if torch.compiler.is_compiling() else inputs.saveable(logits)
    if backend == "eager":
        from .backends import eager

        return eager.log_softmax(logits, None, float(o.temperature))
    asked = *told(float(o.temperature)), backend
    if torch.compiler.is_exporting():
        return torch.ops.kdkernels.trainable_log_softmax.default(logits, *asked)
    return _TemperedLogSoftmax.apply(logits, *asked)
