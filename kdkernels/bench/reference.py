"""T^2 D and its gradient in numpy's long double (80 bits on x86), by definitions in which nothing cancels.

Independent of the package's own mathematics but for the names of the divergences. With d = log q - log p, in the form
D = sum p (e^d - 1 - d) for KL, a long double keeps 15 digits at T = 2 and still 9 at T = 1e6.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ..divergence import Divergence

Extended = np.longdouble


def check_order(divergence: Divergence) -> None:
    if not 0 < divergence.order < math.inf:
        raise ValueError(f"divergence: the bench takes orders in (0, inf), got {divergence}")


def reference(z: Tensor, v: Tensor, divergence: Divergence, T: float) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) values and (rows, V) gradients in z of T^2 D, for (rows, V) logits and orders in (0, inf)."""
    check_order(divergence)
    order = Extended(divergence.order)
    # the inputs as they are: bf16 and fp16 are exact in double
    z, v = (x.detach().double().cpu().numpy().astype(Extended) for x in (z, v))
    if math.isinf(T):
        d = (z - v) - (z - v).mean(-1, keepdims=True)
        return order / 2 * (d * d).mean(-1), order * d / d.shape[-1]
    z, v, T = (z - z.max(-1, keepdims=True)) / T, (v - v.max(-1, keepdims=True)) / T, Extended(T)
    p, q = np.exp(v), np.exp(z)
    sum_p, sum_q = p.sum(-1, keepdims=True), q.sum(-1, keepdims=True)
    p, q = p / sum_p, q / sum_q
    d = (z - v) - np.log(sum_q / sum_p)
    if order == 1:
        D = (p * (np.expm1(d) - d)).sum(-1)
        if divergence.name == "cross_entropy":
            D = D - (p * (v - np.log(sum_p))).sum(-1)
        return T * T * D, T * p * np.expm1(d)
    b = 1 - order
    F = (p * ((np.expm1(d) - d) - (np.expm1(b * d) - b * d) / b)).sum(-1, keepdims=True) / (1 - b)
    log_r = np.log1p(-b * (1 - b) * F)  # of sum p^order q^(1 - order)
    return T * T * (log_r / -b)[..., 0], T * q * -np.expm1(-order * d - log_r)
