"""The fused loss, and the distillation loss as PyTorch code spells it.

From logits each is a function (student logits, teacher logits) -> mean over rows of T^2 D, T^2 being what
Hinton, Vinyals and Dean multiply by; from hidden states one of the hidden states and weights of both models.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import linear
from ..divergence import Divergence
from ..functional import fused_kd_loss

Loss = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # hidden and weight of student and teacher -> loss
FUSED = "kdkernels"
COMPILED = "torch.compile"


def fused(divergence: Divergence, T: float, backend: str = "auto") -> Loss:
    return functools.partial(
        fused_kd_loss, divergence=divergence, temperature=T, t_squared=True, backend=backend
    )


def fused_name(backend: str) -> str:
    return FUSED if backend == "auto" else f"{FUSED} ({backend})"


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

    def mixed_kl(z, v):
        return form.teacher * kl_of_logs(z, v) + form.student * reverse_kl(z, v)

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
        "mixed_kl": ("kl_div both ways", mixed_kl),
        "cross_entropy": ("cross_entropy(z, softmax)", cross_entropy),
        "renyi": ("logsumexp of log_softmaxes", renyi),
        "alpha": ("logsumexp of log_softmaxes", alpha),
        "mixture": ("kl_div from logaddexp", mixture),
        "tvd": ("abs of softmaxes", tvd),
    }
    return dict([names[form.family]])


def from_hidden(
    divergence: Divergence, T: float, backends: tuple[str, ...] = ("auto",), rounded: bool = False
) -> dict[str, Step]:
    """Our and PyTorch's ways from hidden states to the loss, by name; the fused loss of the first backend
    comes first, the best eager spelling last. rounded: also with logits of the hidden states' dtype."""
    spelling, spelled = list(spellings(divergence, T).items())[-1]
    options = dict(divergence=divergence, temperature=T, t_squared=True)

    def fused_linear(backend: str, **more) -> Step:
        return functools.partial(linear.fused_linear_kd_loss, backend=backend, **options, **more)

    def full(inplace: bool) -> Step:
        return lambda h, w, th, tw: fused_kd_loss(
            h @ w.t(), th @ tw.t(), inplace=inplace, backend=backends[0], **options
        )

    found = {fused_name(x): fused_linear(x) for x in backends}
    if rounded:
        name = f"{fused_name(backends[0])}, logits_dtype=None"
        found[name] = fused_linear(backends[0], logits_dtype=None)
    return found | {
        "full logits": full(False),
        "full logits, in place": full(True),
        f"eager {spelling}": lambda h, w, th, tw: spelled(h @ w.t(), th @ tw.t()),
    }


def compiled(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()  # the closures share their code: without this, the eighth case would run uncompiled
    return torch.compile(loss, fullgraph=True)
