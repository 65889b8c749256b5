"""The distillation loss as PyTorch code spells it: what the fused one is measured against.

Each is a function (student logits, teacher logits) -> mean over rows of T^2 D, T^2 being what Hinton, Vinyals and Dean multiply by.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergence import Divergence
from ..functional import fused_kd_loss

Loss = Callable[[Tensor, Tensor], Tensor]
FUSED = "kdkernels"
COMPILED = "torch.compile"


def fused(divergence: Divergence, T: float) -> Loss:
    return functools.partial(fused_kd_loss, divergence=divergence, temperature=T, t_squared=True)


def spellings(divergence: Divergence, T: float) -> dict[str, Loss]:
    """The eager ways to write the loss, by name; the best one, which is also the best when compiled, comes last."""
    order, scale = divergence.order, T * T

    def kl(z, v):
        return scale * F.kl_div(F.log_softmax(z / T, -1), F.softmax(v / T, -1), reduction="batchmean")

    def kl_of_logs(z, v):
        return scale * F.kl_div(F.log_softmax(z / T, -1), F.log_softmax(v / T, -1), reduction="batchmean", log_target=True)

    def cross_entropy(z, v):
        return scale * F.cross_entropy(z / T, F.softmax(v / T, -1))

    def renyi(z, v):
        mixed = order * F.log_softmax(v / T, -1) + (1 - order) * F.log_softmax(z / T, -1)
        return scale * (mixed.logsumexp(-1) / (order - 1)).mean()

    def half_variance(z, v):
        return order / 2 * (z - v).var(-1, correction=0).mean()

    if math.isinf(T):
        return {"(z - v).var(-1) / 2": half_variance}
    if divergence.name == "cross_entropy":
        return {"cross_entropy(z, softmax)": cross_entropy}
    if order == 1:
        return {"kl_div(log_softmax, softmax)": kl, "kl_div(log_target=True)": kl_of_logs}
    return {"logsumexp of log_softmaxes": renyi}


def libraries(divergence: Divergence, T: float) -> dict[str, Loss]:
    """Kernels of others that take logits or what PyTorch makes of them, where they are installed. For GPUs: they are written in Triton."""
    found: dict[str, Loss] = {}
    if importlib.util.find_spec("liger_kernel") and divergence.order == 1 and divergence.name == "kl" and math.isfinite(T):
        from liger_kernel.ops.kl_div import LigerKLDivLossFunction

        def liger(z, v):
            log_q, log_p = (F.log_softmax(x / T, -1).flatten(0, -2) for x in (z, v))
            return T * T * LigerKLDivLossFunction.apply(log_q, log_p, "batchmean", True)

        found["log_softmax + Liger KLDiv"] = liger
    return found


def compiled(loss: Loss) -> Loss:
    torch._dynamo.reset()  # the closures share their code: without this, the eighth case would run uncompiled
    return torch.compile(loss, fullgraph=True)
