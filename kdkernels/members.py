"""The divergences that have no order, by the names that papers give them: KL and its relatives, the mixtures,
total variation.

In the docstrings, per row: teacher p = softmax(v / T), student q = softmax(z / T), d = log q - log p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .form import KL_FORM, REVERSE_KL_FORM, Divergence, Form

# the registry's: what is here is a divergence for people (divergence.py)
__all__ = [
    "KL",
    "ReverseKL",
    "MixedKL",
    "CrossEntropy",
    "JSD",
    "SkewKL",
    "SkewReverseKL",
    "TVD",
]


@dataclass(frozen=True)
class KL(Divergence):
    """Kullback-Leibler divergence of the student from the teacher, sum p log(p / q).

    T dD/dz = q - p. Hinton, Vinyals and Dean (2015), eq. 2, up to the teacher's entropy; Grätzer, eq. 1.4 and
    1.8.
    """

    name: ClassVar[str] = "kl"

    @property
    def reversed(self) -> Divergence:
        return ReverseKL()

    def _make_form(self) -> Form:
        return KL_FORM


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """Kullback-Leibler divergence of the teacher from the student, sum q log(q / p): it asks the student to
    stay where the teacher is.

    T dD/dz = q (d - sum q d). Gu et al., MiniLLM (2024), eq. 1.
    """

    name: ClassVar[str] = "reverse_kl"

    @property
    def reversed(self) -> Divergence:
        return KL()

    def _make_form(self) -> Form:
        return REVERSE_KL_FORM


@dataclass(frozen=True)
class MixedKL(Divergence):
    """Both Kullback-Leibler divergences in one, w KL(p, q) + (1 - w) KL(q, p), w in [0, 1].

    T dD/dz = w (q - p) + (1 - w) q (d - sum q d). w = 1 is KL, 0 reverse KL, and 1/2 half of Jeffreys'
    divergence. +inf where either of the two has a class that the other masks. Jeffreys (1946); Kullback and
    Leibler (1951), eq. 2.6.

    Raises ValueError for w outside [0, 1].
    """

    w: float = 0.5
    name: ClassVar[str] = "mixed_kl"
    domain: ClassVar[tuple[float, float, str]] = (0.0, 1.0, "[0, 1]")
    usual: ClassVar[tuple[float, ...]] = (0.2, 0.5)

    @property
    def reversed(self) -> Divergence:
        if 0 < self.w < 1 == 1 - self.w:
            raise ValueError(f"mixed_kl: the other way round w = 1 - {self.w!r}, which rounds to 1, is KL")
        return MixedKL(1 - self.w)

    def _make_form(self) -> Form:
        if self.w in (0, 1):
            return KL_FORM if self.w else REVERSE_KL_FORM
        return Form("mixed_kl", teacher=self.w, student=1 - self.w)


@dataclass(frozen=True)
class CrossEntropy(Divergence):
    """Cross entropy of the student under the teacher, -sum p log q: KL plus the teacher's entropy, with KL's
    gradient.

    It grows like T^2 under t_squared, so it has no limit at T = inf.
    """

    name: ClassVar[str] = "cross_entropy"

    def _make_form(self) -> Form:
        return Form("cross_entropy", limit=None)


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence, beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta)
    q, beta in [0, 1].

    T dD/dz = (1 - beta) q (x - sum q x) with x = log(q / m). beta = 0 is KL and beta = 1 reverse KL by
    definition: the limits of JSD / (beta (1 - beta)), which itself is 0 there. Agarwal et al. (2024), eq. 1
    and section 2; Lin (1991), eq. 4.1.

    Raises ValueError for beta outside [0, 1].
    """

    beta: float = 0.5
    name: ClassVar[str] = "jsd"
    domain: ClassVar[tuple[float, float, str]] = (0.0, 1.0, "[0, 1]")
    usual: ClassVar[tuple[float, ...]] = (0.1, 0.5, 0.9)

    @property
    def reversed(self) -> Divergence:
        if 0 < self.beta < 1 == 1 - self.beta:
            raise ValueError(
                f"jsd: the other way round beta = 1 - {self.beta!r}, which rounds to 1, is reverse KL"
            )
        return JSD(1 - self.beta)

    def _make_form(self) -> Form:
        b = self.beta
        if b in (0, 1):
            return REVERSE_KL_FORM if b else KL_FORM
        return Form("mixture", limit=b * (1 - b), mix=1 - b, teacher=b, student=1 - b)


@dataclass(frozen=True)
class SkewKL(Divergence):
    """Skew KL divergence, KL(p, m) with m = lam p + (1 - lam) q, lam in [0, 1); lam = 0 is KL. Finite where
    lam > 0.

    T dD/dz = (1 - lam) q (sum q p / m - p / m). Lee (2001), eq. 1; Ko et al., DistiLLM (2024), eq. 2.

    Raises ValueError for lam outside [0, 1).
    """

    lam: float
    name: ClassVar[str] = "skew_kl"
    domain: ClassVar[tuple[float, float, str]] = (0.0, math.nextafter(1.0, 0.0), "[0, 1)")
    usual: ClassVar[tuple[float, ...]] = (0.1,)

    @property
    def reversed(self) -> Divergence:
        return SkewReverseKL(self.lam)

    def _make_form(self) -> Form:
        return (
            Form("mixture", limit=(1 - self.lam) ** 2, mix=1 - self.lam, teacher=1.0)
            if 1 - self.lam < 1
            else KL_FORM
        )


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """Skew reverse KL divergence, KL(q, m) with m = (1 - lam) p + lam q, lam in [0, 1); lam = 0 is reverse
    KL. Finite where lam > 0.

    T dD/dz = q (x - sum q x) with x = log(q / m) - lam q / m. Ko et al., DistiLLM (2024), section 3.1.

    Raises ValueError for lam outside [0, 1).
    """

    lam: float
    name: ClassVar[str] = "skew_reverse_kl"
    domain: ClassVar[tuple[float, float, str]] = (0.0, math.nextafter(1.0, 0.0), "[0, 1)")
    usual: ClassVar[tuple[float, ...]] = (0.1,)

    @property
    def reversed(self) -> Divergence:
        return SkewKL(self.lam)

    def _make_form(self) -> Form:
        return Form("mixture", limit=(1 - self.lam) ** 2, mix=self.lam, student=1.0)


@dataclass(frozen=True)
class TVD(Divergence):
    """Total variation distance, sum |p - q| / 2, in [0, 1].

    T dD/dz = q (s - sum q s) / 2 with s = sign(q - p), 0 where they are equal. It grows like T under
    t_squared, so it has no limit at T = inf. Wen et al., f-divergence distillation (2023), section 3.
    """

    name: ClassVar[str] = "tvd"

    @property
    def reversed(self) -> Divergence:
        return self

    def _make_form(self) -> Form:
        return Form("tvd", limit=None)


@dataclass(frozen=True)
class LogitMatching(Divergence):
    """|z - v|^2 / (2 V): not a divergence of p and q, but what T^2 KL becomes at T = inf when the means
    agree.

    Chen et al., eq. 2. Reached through `logit_matching_loss`.
    """

    name: ClassVar[str] = "logit_matching"

    @property
    def reversed(self) -> Divergence:
        return self

    def _make_form(self) -> Form:
        return Form("logit_matching")
