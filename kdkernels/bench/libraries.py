"""The same loss by kernels of others, where they are installed: Liger-Kernel, TRL, and flash-linear-attention (fla-core).

Their generalised JSD is this package's `jsd(beta)`, KL at beta = 0 and reverse KL at 1. Each function is T^2 times the mean over rows of
that, for a finite T. T^2 is put on here, as none of them has it. A package is imported by the first call, which raises where it cannot run.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergence import JSD, KL, Divergence, ReverseKL


def liger_kl_div(z: Tensor, v: Tensor, beta: float, T: float) -> Tensor:
    """Of logits (..., V); KL alone, whatever beta."""
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    return T * T * LigerKLDivLossFunction.apply(*_logs(z, v, T), "batchmean", True)


def liger_jsd(z: Tensor, v: Tensor, beta: float, T: float) -> Tensor:
    """Of logits (..., V)."""
    from liger_kernel.ops.jsd import LigerJSDFunction

    return T * T * LigerJSDFunction.apply(*_logs(z, v, T), None, beta)


def liger_chunked_jsd(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, beta: float, T: float) -> Tensor:
    """Of hidden states (tokens, H) and weights (V, H) of student and teacher, as are those below. In PyTorch."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return T * T * LigerFusedLinearJSDLoss(0.0, 1.0, beta, temperature=T, compiled=False)(h, w, th, tw, _labels(h))


def liger_triton_jsd(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, beta: float, T: float) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return T * T * LigerFusedLinearJSD(jsd_beta=beta, temperature=T)(h, w, th, tw, _labels(h))


def trl_chunked_divergence(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, beta: float, T: float) -> Tensor:
    """From TRL 1.16 on. It gives the tokens' divergences and their entropy, and computes both in fp32."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return T * T * ChunkedDivergenceFunction.apply(h, w, None, th, tw, None, beta, T)[0].mean()


def fla_fused_kl(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, beta: float, T: float) -> Tensor:
    """KL alone, whatever beta. It has no temperature: the hidden states are divided by T instead of the logits."""
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return T * T * fused_kl_div_loss(h / T, th / T, w, tw)


class Library(NamedTuple):
    name: str
    package: str
    loss: Callable[..., Tensor]
    kl_only: bool = False
    on_cpu: bool = False  # the others are written in Triton


OF_LOGITS = (
    Library("log_softmax + Liger KLDiv", "liger_kernel", liger_kl_div, kl_only=True),
    Library("log_softmax + Liger JSD", "liger_kernel", liger_jsd),
)
OF_HIDDEN_STATES = (
    Library("Liger chunked JSD", "liger_kernel", liger_chunked_jsd, on_cpu=True),
    Library("Liger Triton JSD", "liger_kernel", liger_triton_jsd),
    Library("TRL chunked divergence", "trl", trl_chunked_divergence, on_cpu=True),
    Library("fla fused KL", "fla", fla_fused_kl, kl_only=True),
)


def found(libraries: Iterable[Library], divergence: Divergence, T: float, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Those of them that have this loss and are installed, by name: functions of the tensors alone."""
    beta = jsd_beta(divergence)
    if beta is None or math.isinf(T):
        return {}
    return {
        x.name: functools.partial(x.loss, beta=beta, T=T)
        for x in libraries
        if (beta == 0 or not x.kl_only) and (x.on_cpu or device.type != "cpu") and importlib.util.find_spec(x.package)
    }


def jsd_beta(divergence: Divergence) -> float | None:
    """beta of the generalised JSD that is this divergence; None where none is."""
    return divergence.beta if isinstance(divergence, JSD) else {KL().form: 0.0, ReverseKL().form: 1.0}.get(divergence.form)


def _logs(z: Tensor, v: Tensor, T: float) -> list[Tensor]:
    return [F.log_softmax(x / T, -1).flatten(0, -2) for x in (z, v)]


def _labels(h: Tensor) -> Tensor:
    """No token is left out."""
    return torch.zeros(len(h), dtype=torch.int64, device=h.device)
