"""T^2 D and its gradient in numpy's long double (80 bits on x86), by definitions in which nothing cancels.

Independent of the package's own mathematics but for the names of the divergences. With d = log q - log p, in
the form D = sum p (e^d - 1 - d) for KL, a long double keeps 15 digits at T = 2 and still 9 at T = 1e6.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ..divergence import Divergence

Extended = np.longdouble


FAMILIES = ("kl", "cross_entropy", "renyi", "alpha", "mixture", "tvd", "mixed_kl")


def check(divergence: Divergence) -> None:
    if divergence.form.family not in FAMILIES:
        raise ValueError(f"divergence: the bench takes orders in (0, inf), got {divergence}")


def psi(x: np.ndarray) -> np.ndarray:
    """e^x - 1 - x."""
    return np.expm1(x) - x


def reference(z: Tensor, v: Tensor, divergence: Divergence, T: float) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) values and (rows, V) gradients in z of T^2 D, for (rows, V) logits."""
    check(divergence)
    form = divergence.form
    # the inputs as they are: bf16 and fp16 are exact in double
    z, v = (x.detach().double().cpu().numpy().astype(Extended) for x in (z, v))
    if math.isinf(T):
        d = (z - v) - (z - v).mean(-1, keepdims=True)
        return form.limit * (d * d).mean(-1) / 2, form.limit * d / d.shape[-1]
    z, v, T = (z - z.max(-1, keepdims=True)) / T, (v - v.max(-1, keepdims=True)) / T, Extended(T)
    p, q = np.exp(v), np.exp(z)
    sum_p, sum_q = p.sum(-1, keepdims=True), q.sum(-1, keepdims=True)
    p, q = p / sum_p, q / sum_q
    d = (z - v) - np.log(sum_q / sum_p)

    def moment(x):
        return T * q * (x - (q * x).sum(-1, keepdims=True))

    if form.family in ("kl", "cross_entropy"):
        D = (p * psi(d)).sum(-1)
        if form.family == "cross_entropy":
            D = D - (p * (v - np.log(sum_p))).sum(-1)
        return T * T * D, T * p * np.expm1(d)
    if form.family == "mixed_kl":
        D = form.teacher * (p * psi(d)).sum(-1) + form.student * (q * psi(-d)).sum(-1)
        return T * T * D, T * form.teacher * p * np.expm1(d) + form.student * moment(d)
    if form.family == "tvd":
        return T * T * np.abs(p * np.expm1(d)).sum(-1) / 2, moment(np.sign(d) / 2)
    if form.family == "mixture":
        mix = Extended(form.mix)
        of_p, of_q = np.log1p(mix * np.expm1(d)), np.log1p((1 - mix) * np.expm1(-d))  # log(m / p), log(m / q)
        D = form.teacher * (p * psi(of_p)).sum(-1) + form.student * (q * psi(of_q)).sum(-1)
        return T * T * D, moment(
            -form.student * (of_q + mix * np.expm1(-of_q)) - form.teacher * mix * np.expm1(-of_p)
        )
    order = Extended(form.order)
    b = 1 - order
    F = (p * (psi(d) - psi(b * d) / b)).sum(-1, keepdims=True) / (1 - b)
    log_r = np.log1p(-b * (1 - b) * F)  # of sum p^order q^(1 - order)
    scale, slope = T * Extended(form.factor), q * -np.expm1(-order * d - log_r)
    if form.family == "alpha":
        return T * scale * F[..., 0], scale * slope * np.exp(log_r) / order
    return T * scale * (log_r / -b)[..., 0], scale * slope
