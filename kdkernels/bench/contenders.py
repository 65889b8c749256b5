"""The distillation loss as PyTorch code spells it: what the fused one is measured against.

Each is a function (student logits, teacher logits) -> mean over rows of T^2 D, T^2 being what Hinton, Vinyals
and Dean multiply by.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergence import JSD, CrossEntropy, Divergence
from ..functional import fused_kd_loss

Loss = Callable[[Tensor, Tensor], Tensor]
FUSED = "kdkernels"
COMPILED = "torch.compile"
TORCHTUNE_FORWARD = "torchtune forward KL"
# contenders for KL whose value is this divergence's, with the same gradient
VALUES = {TORCHTUNE_FORWARD: CrossEntropy()}


def fused(divergence: Divergence, T: float, backend: str = "auto") -> Loss:
    return functools.partial(
        fused_kd_loss, divergence=divergence, temperature=T, t_squared=True, backend=backend
    )


def fused_name(backend: str) -> str:
    return FUSED if backend == "auto" else f"{FUSED} ({backend})"


def jsd_beta(divergence: Divergence) -> float | None:
    """What Liger and TRL call this divergence, whose generalised JSD is KL for 0 and reverse KL for 1; None
    where they have it not."""
    form = divergence.form
    if form.family == "kl":
        return 0.0
    if form.family == "mixture" and form.mix == 0:
        return 1.0
    return divergence.beta if isinstance(divergence, JSD) else None


def spellings(divergence: Divergence, T: float) -> dict[str, Loss]:
    """The eager ways to write the loss, by name; the best one, which is also the best when compiled, comes
    last."""
    form, scale = divergence.form, T * T

    def kl(z, v):
        return scale * F.kl_div(F.log_softmax(z / T, -1), F.softmax(v / T, -1), reduction="batchmean")

    def kl_of_logs(z, v):
        return scale * F.kl_div(
            F.log_softmax(z / T, -1), F.log_softmax(v / T, -1), reduction="batchmean", log_target=True
        )

    def reverse_kl(z, v):
        return scale * F.kl_div(
            F.log_softmax(v / T, -1), F.log_softmax(z / T, -1), reduction="batchmean", log_target=True
        )

    def cross_entropy(z, v):
        return scale * F.cross_entropy(z / T, F.softmax(v / T, -1))

    def log_power_sum(z, v):
        return (
            form.order * F.log_softmax(v / T, -1) + (1 - form.order) * F.log_softmax(z / T, -1)
        ).logsumexp(-1)

    def renyi(z, v):
        return scale * form.factor * (log_power_sum(z, v) / (form.order - 1)).mean()

    def alpha(z, v):
        power = form.factor / (form.order * (form.order - 1))
        return scale * power * log_power_sum(z, v).expm1().mean()

    def mixture(z, v):
        log_q, log_p = F.log_softmax(z / T, -1), F.log_softmax(v / T, -1)
        log_m = torch.logaddexp(log_p + math.log(1 - form.mix), log_q + math.log(form.mix))
        sides = ((form.teacher, log_p), (form.student, log_q))
        return scale * sum(
            c * F.kl_div(log_m, x, reduction="batchmean", log_target=True) for c, x in sides if c
        )

    def tvd(z, v):
        return scale * (F.softmax(z / T, -1) - F.softmax(v / T, -1)).abs().sum(-1).mean() / 2

    def half_variance(z, v):
        return form.limit / 2 * (z - v).var(-1, correction=0).mean()

    if math.isinf(T):
        return {"(z - v).var(-1) / 2": half_variance}
    if form.family == "kl":
        return {"kl_div(log_softmax, softmax)": kl, "kl_div(log_target=True)": kl_of_logs}
    if form.family == "mixture" and form.mix == 0:
        return {"kl_div(log_target=True)": reverse_kl}
    names = {
        "cross_entropy": ("cross_entropy(z, softmax)", cross_entropy),
        "renyi": ("logsumexp of log_softmaxes", renyi),
        "alpha": ("logsumexp of log_softmaxes", alpha),
        "mixture": ("kl_div from logaddexp", mixture),
        "tvd": ("abs of softmaxes", tvd),
    }
    return dict([names[form.family]])


def libraries(divergence: Divergence, T: float) -> dict[str, Loss]:
    """Kernels of others that take logits or what PyTorch makes of them, where they are installed. For GPUs:
    they are written in Triton."""
    beta = jsd_beta(divergence)
    if not importlib.util.find_spec("liger_kernel") or beta is None or math.isinf(T):
        return {}

    def log_softmaxes(z, v):
        return (F.log_softmax(x / T, -1).flatten(0, -2) for x in (z, v))

    def kl(z, v):
        from liger_kernel.ops.kl_div import LigerKLDivLossFunction

        return T * T * LigerKLDivLossFunction.apply(*log_softmaxes(z, v), "batchmean", True)

    def jsd(z, v):
        from liger_kernel.ops.jsd import LigerJSDFunction

        return T * T * LigerJSDFunction.apply(*log_softmaxes(z, v), None, beta)

    return (
        {"log_softmax + Liger KLDiv": kl, "log_softmax + Liger JSD": jsd}
        if beta == 0
        else {"log_softmax + Liger JSD": jsd}
    )


def functions(divergence: Divergence, T: float) -> dict[str, Loss]:
    """What other packages have for logits in plain PyTorch, where they are installed: `--peers`.

    TRL's generalised JSD, which takes the rows for sequences. torchtune's losses, which have no temperature,
    and whose forward KL is a cross entropy: see `VALUES`.
    """
    beta, family = jsd_beta(divergence), divergence.form.family

    def trl(z, v):
        from trl.experimental.gkd import GKDTrainer

        return T * T * GKDTrainer.generalized_jsd_loss(z, v, beta=beta, temperature=T)

    def torchtune(z, v):
        from torchtune.modules.loss import kd_losses

        loss = kd_losses.ReverseKLLoss() if beta == 1 else kd_losses.ForwardKLLoss()
        return T * T * loss(z / T, v / T, torch.zeros(len(z), dtype=torch.int64, device=z.device))

    known = (
        ("trl", "TRL generalized_jsd_loss", trl, beta is not None),
        ("torchtune", "torchtune reverse KL", torchtune, beta == 1),
        ("torchtune", TORCHTUNE_FORWARD, torchtune, family in ("kl", "cross_entropy")),
    )
    runs = {name: loss for package, name, loss, has in known if has and importlib.util.find_spec(package)}
    return {} if math.isinf(T) else runs


def compiled(loss: Loss) -> Loss:
    torch._dynamo.reset()  # the closures share their code: without this, the eighth case would run uncompiled
    return torch.compile(loss, fullgraph=True)
