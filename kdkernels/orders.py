"""The divergences of an order: members of the power family, sum p^a q^(1 - a), by the names that papers give
them.

In the docstrings, per row: teacher p = softmax(v / T), student q = softmax(z / T), both over the vocabulary.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar

from .form import KL_FORM, REVERSE_KL_FORM, Divergence, Form

# the registry's: what is here is a divergence for people (divergence.py)
__all__ = [
    "Renyi",
    "ReverseRenyi",
    "Alpha",
]


@dataclass(frozen=True)
class Renyi(Divergence):
    """Renyi divergence of order alpha, log(sum p^alpha q^(1-alpha)) / (alpha - 1), for every alpha in [0,
    inf].

    T dD/dz = q - w with w = softmax((alpha v + (1 - alpha) z) / T). alpha = 1 is KL; alpha = 0 is -log
    Q(support of p); alpha = inf is max log(p / q). van Erven and Harremoës (2014), definition 2 and section
    II; Grätzer, eq. 1.16, 1.27 and 1.33.

    Raises ValueError for alpha < 0 or nan.
    """

    alpha: float
    name: ClassVar[str] = "renyi"
    domain: ClassVar[tuple[float, float, str]] = (0.0, math.inf, "[0, inf]")
    usual: ClassVar[tuple[float, ...]] = (0.5, 2.0)

    @property
    def reversed(self) -> Divergence:
        return ReverseRenyi(self.alpha)

    def _make_form(self) -> Form:
        a = self.alpha
        if a == 1:
            return KL_FORM
        if a == 0:
            return Form("support", limit=0.0)
        return Form("extreme", limit=None) if a == math.inf else Form("renyi", limit=a, order=a)


@dataclass(frozen=True)
class ReverseRenyi(Divergence):
    """Renyi divergence with the two exchanged, D_alpha(q, p) = log(sum q^alpha p^(1-alpha)) / (alpha - 1),
    for every alpha in [0, inf].

    T dD/dz = alpha / (alpha - 1) (w - q) with w = softmax((alpha z + (1 - alpha) v) / T). alpha = 1 is
    reverse KL; alpha = 0 is -log P(support of q), whose gradient is 0; alpha = inf is max log(q / p). van
    Erven and Harremoës (2014), definition 2.

    Raises ValueError for alpha < 0 or nan.
    """

    alpha: float
    name: ClassVar[str] = "reverse_renyi"
    domain: ClassVar[tuple[float, float, str]] = (0.0, math.inf, "[0, inf]")
    usual: ClassVar[tuple[float, ...]] = (0.5, 2.0)

    @property
    def reversed(self) -> Divergence:
        return Renyi(self.alpha)

    def _make_form(self) -> Form:
        a = self.alpha
        if a == 1:
            return REVERSE_KL_FORM
        if a == 0:
            return Form("support", limit=0.0, reverse=True)
        if a == math.inf:
            return Form("extreme", limit=None, reverse=True)
        return Form("renyi", limit=a, order=1 - a, factor=a / (1 - a))


@dataclass(frozen=True)
class Alpha(Divergence):
    """Alpha divergence, (sum p^alpha q^(1-alpha) - 1) / (alpha (alpha - 1)), for every finite alpha.

    T dD/dz = R (q - w) / alpha with R that sum and w = softmax((alpha v + (1 - alpha) z) / T). alpha = 1 is
    KL, 0 reverse KL, 1/2 four times the squared Hellinger distance, 2 half of Pearson's chi-square. Cressie
    and Read (1984), eq. 2.1, without their factor of 2 N; Amari (2009), eq. 4 with alpha for (1 + alpha) / 2.

    Raises ValueError for an alpha that is not finite.
    """

    alpha: float
    name: ClassVar[str] = "alpha"
    domain: ClassVar[tuple[float, float, str]] = (-sys.float_info.max, sys.float_info.max, "(-inf, inf)")
    usual: ClassVar[tuple[float, ...]] = (-1.0, 0.5, 2.0)

    @property
    def reversed(self) -> Divergence:
        return Alpha(1 - self.alpha)

    def _make_form(self) -> Form:
        a = self.alpha
        return KL_FORM if a == 1 else REVERSE_KL_FORM if a == 0 else Form("alpha", order=a)
