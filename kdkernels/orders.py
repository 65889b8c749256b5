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
    "Tsallis",
    "ReverseTsallis",
    "SquaredHellinger",
    "ChiSquare",
    "ReverseChiSquare",
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


@dataclass(frozen=True)
class Tsallis(Divergence):
    """Tsallis relative entropy, (sum p^order q^(1-order) - 1) / (order - 1), for orders above 0: the alpha
    divergence of that order, times the order.

    T dD/dz = R (q - w) with R that sum and w = softmax((order v + (1 - order) z) / T). order = 1 is KL, 1/2
    is twice the squared Hellinger distance, 2 is Pearson's chi-square. An order below 1 bounds D by 1 / (1 -
    order). Tsallis (1998); Furuichi, Yanagi and Kuriyama (2004).

    Raises ValueError for an order that is not finite, or below 2^-53: order 0 is 1 - Q(p > 0), which is 0
    without masks, and below 2^-53 the order of the reverse, 1 - order, rounds to 1.
    """

    order: float
    name: ClassVar[str] = "tsallis"
    domain: ClassVar[tuple[float, float, str]] = (2.0**-53, sys.float_info.max, "[2^-53, inf)")
    usual: ClassVar[tuple[float, ...]] = (0.5, 2.0)

    @property
    def reversed(self) -> Divergence:
        return ReverseTsallis(self.order)

    def _make_form(self) -> Form:
        a = self.order
        return KL_FORM if a == 1 else Form("alpha", limit=a, order=a, factor=a)


@dataclass(frozen=True)
class ReverseTsallis(Divergence):
    """Tsallis relative entropy with the two exchanged, (sum q^order p^(1-order) - 1) / (order - 1).

    T dD/dz = order / (order - 1) R (w - q) with R that sum and w = softmax((order z + (1 - order) v) / T).
    order = 1 is reverse KL, 2 Neyman's chi-square.

    Raises ValueError as `Tsallis`.
    """

    order: float
    name: ClassVar[str] = "reverse_tsallis"
    domain: ClassVar[tuple[float, float, str]] = Tsallis.domain
    usual: ClassVar[tuple[float, ...]] = Tsallis.usual

    @property
    def reversed(self) -> Divergence:
        return Tsallis(self.order)

    def _make_form(self) -> Form:
        a = self.order
        return REVERSE_KL_FORM if a == 1 else Form("alpha", limit=a, order=1 - a, factor=a)


@dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """Squared Hellinger distance, sum (sqrt(p) - sqrt(q))^2 / 2 = 1 - sum sqrt(p q), in [0, 1].

    T dD/dz = R (q - w) / 2 with R = sum sqrt(p q) and w = sqrt(p q) / R. Symmetric. Gibbs and Su (2002),
    whose Hellinger distance is the root of twice this.
    """

    name: ClassVar[str] = "squared_hellinger"

    @property
    def reversed(self) -> Divergence:
        return self

    def _make_form(self) -> Form:
        return Form("alpha", limit=0.25, order=0.5, factor=0.25)


@dataclass(frozen=True)
class ChiSquare(Divergence):
    """Pearson's chi-square, sum (p - q)^2 / q = sum p^2 / q - 1.

    T dD/dz = R (q - w) with R = sum p^2 / q and w = p^2 / (q R). Gibbs and Su (2002); Cressie and Read
    (1984), with an index of 1.
    """

    name: ClassVar[str] = "chi_square"

    @property
    def reversed(self) -> Divergence:
        return ReverseChiSquare()

    def _make_form(self) -> Form:
        return Form("alpha", limit=2.0, order=2.0, factor=2.0)


@dataclass(frozen=True)
class ReverseChiSquare(Divergence):
    """Neyman's chi-square, sum (p - q)^2 / p = sum q^2 / p - 1.

    T dD/dz = 2 R (w - q) with R = sum q^2 / p and w = q^2 / (p R). Cressie and Read (1984), with an index of
    -2.
    """

    name: ClassVar[str] = "reverse_chi_square"

    @property
    def reversed(self) -> Divergence:
        return ChiSquare()

    def _make_form(self) -> Form:
        return Form("alpha", limit=2.0, order=-1.0, factor=2.0)
