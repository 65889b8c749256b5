"""The losses that other packages have for the same divergence, where they are installed.

From logits: TRL's generalized_jsd_loss, torchtune's losses and, on a GPU, Liger-Kernel's Triton kernels.
From hidden states: TRL's chunked divergence, Liger-Kernel's and torchtune's chunked losses and, on a GPU, the
Triton kernels of Liger-Kernel and flash-linear-attention. A package is imported when its loss first runs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergence import JSD, CrossEntropy, Divergence
from .contenders import Loss, Step

# what is imported, and what is installed
PACKAGES = {
    "trl": "trl",
    "liger_kernel": "liger-kernel",
    "torchtune": "torchtune",
    "fla": "flash-linear-attention",
}
FORWARD, CHUNKED_FORWARD = "torchtune forward KL", "torchtune chunked forward KL"
# contenders for KL whose value is this divergence's, with the same gradient
VALUES = dict.fromkeys((FORWARD, CHUNKED_FORWARD), CrossEntropy())
CHUNKS = 8  # torchtune's default


def missing() -> list[str]:
    """The packages that are not installed."""
    return [x for x in PACKAGES if not importlib.util.find_spec(x)]


def versions() -> dict[str, str]:
    """Of those that are."""
    there = [x for x in PACKAGES if x not in missing()]
    return {PACKAGES[x]: importlib.metadata.version(PACKAGES[x]) for x in there}


def jsd_beta(divergence: Divergence) -> float | None:
    """What Liger and TRL call this divergence, whose generalised JSD is KL for 0 and reverse KL for 1; None
    where they have it not."""
    form = divergence.form
    if form.family == "kl":
        return 0.0
    if form.family == "mixture" and form.mix == 0:
        return 1.0
    return divergence.beta if isinstance(divergence, JSD) else None


def _installed(T: float, known: Iterable[tuple[str, str, Callable, bool]]) -> dict[str, Callable]:
    """Of (package, name, loss, whether it has this case); none of them has the limit T = inf."""
    if math.isinf(T):
        return {}
    return {name: loss for package, name, loss, has in known if has and importlib.util.find_spec(package)}


def _labels(*shape: int, like: Tensor) -> Tensor:
    """Of tokens that all count."""
    return torch.zeros(shape, dtype=torch.int64, device=like.device)


def kernels(divergence: Divergence, T: float) -> dict[str, Loss]:
    """From what PyTorch makes of logits, by kernels in Triton: for GPUs."""
    beta = jsd_beta(divergence)

    def log_softmaxes(z, v):
        return (F.log_softmax(x / T, -1).flatten(0, -2) for x in (z, v))

    def kl(z, v):
        from liger_kernel.ops.kl_div import LigerKLDivLossFunction

        return T * T * LigerKLDivLossFunction.apply(*log_softmaxes(z, v), "batchmean", True)

    def jsd(z, v):
        from liger_kernel.ops.jsd import LigerJSDFunction

        return T * T * LigerJSDFunction.apply(*log_softmaxes(z, v), None, beta)

    known = (
        ("liger_kernel", "log_softmax + Liger KLDiv", kl, beta == 0),
        ("liger_kernel", "log_softmax + Liger JSD", jsd, beta is not None),
    )
    return _installed(T, known)


def functions(divergence: Divergence, T: float) -> dict[str, Loss]:
    """From logits, in plain PyTorch.

    TRL's generalised JSD takes the rows for sequences. torchtune's losses have no temperature, and its
    forward KL is a cross entropy: see `VALUES`.
    """
    beta, family = jsd_beta(divergence), divergence.form.family

    def trl(z, v):
        from trl.experimental.gkd import GKDTrainer

        return T * T * GKDTrainer.generalized_jsd_loss(z, v, beta=beta, temperature=T)

    def torchtune(z, v):
        from torchtune.modules.loss import kd_losses

        loss = kd_losses.ReverseKLLoss() if beta == 1 else kd_losses.ForwardKLLoss()
        return T * T * loss(z / T, v / T, _labels(len(z), like=z))

    known = (
        ("trl", "TRL generalized_jsd_loss", trl, beta is not None),
        ("torchtune", "torchtune reverse KL", torchtune, beta == 1),
        ("torchtune", FORWARD, torchtune, family in ("kl", "cross_entropy")),
    )
    return _installed(T, known)


def from_hidden(divergence: Divergence, T: float, device: torch.device) -> dict[str, Step]:
    """From hidden states and weights. flash-linear-attention's and torchtune's have no temperature: they take
    the hidden states over T."""
    beta, family, on_gpu = jsd_beta(divergence), divergence.form.family, device.type != "cpu"

    def trl(h, w, th, tw):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return T * T * ChunkedDivergenceFunction.apply(h, w, None, th, tw, None, beta, T)[0].mean()

    def liger(h, w, th, tw):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta, temperature=T, compiled=False)
        return T * T * loss(h, w, th, tw, _labels(len(h), like=h))

    def liger_triton(h, w, th, tw):
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD(jsd_beta=beta, temperature=T)
        return T * T * loss(h, w, th, tw, _labels(len(h), like=h))

    def torchtune(h, w, th, tw):
        from torchtune.modules.loss import kd_losses as of

        kind = of.ReverseKLWithChunkedOutputLoss if beta == 1 else of.ForwardKLWithChunkedOutputLoss
        z, v = ([x @ y.t() for x in (a / T).chunk(CHUNKS)] for a, y in ((h, w), (th, tw)))
        return T * T * kind(CHUNKS)(z, v, _labels(1, len(h), like=h))

    def fla(h, w, th, tw):
        from fla.modules.fused_kl_div import fused_kl_div_loss

        return T * T * fused_kl_div_loss(h / T, th / T, w, tw)

    known = (
        ("liger_kernel", "Liger chunked JSD", liger, beta is not None),
        ("liger_kernel", "Liger Triton JSD", liger_triton, beta is not None and on_gpu),
        ("trl", "TRL chunked divergence", trl, beta is not None),
        ("torchtune", "torchtune chunked reverse KL", torchtune, beta == 1),
        ("torchtune", CHUNKED_FORWARD, torchtune, family in ("kl", "cross_entropy")),
        ("fla", "flash-linear-attention KL", fla, beta == 0 and on_gpu),
    )
    return _installed(T, known)
