"""The mathematics: what a divergence is, its limit at high temperature, and its terms in the form that loses no digits.

Per row: teacher p = softmax(v / T), student q = softmax(z / T), and d = log q - log p, always student minus teacher. Every
divergence here is a member of the power family with tilt b = 1 - order:

    t = p^order q^(1 - order) = p e^{b d},    R = sum t,    f(d) = (psi(d) - psi(b d) / b) / (1 - b),    F = sum p f(d) >= 0

with psi(x) = e^x - 1 - x, so that R = 1 - b (1 - b) F and D = -log(R) / b; order 1 is D = F = sum p psi(d). Nothing in F
cancels, which is what keeps its digits when d is small: at high temperature, or when the student has become the teacher.

`kl_terms` and `power_terms` are plain arithmetic with `psi`, `abs` and `where` handed in: the eager and the Triton backend run the
same lines. The C++ twin of this file is csrc/divergence.h; its list of names is checked against `REGISTRY` when it is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar


class Divergence:
    """A divergence D(p, q) between a teacher's p and a student's q. Frozen and hashable."""

    name: ClassVar[str]

    @property
    def order(self) -> float:
        """The order in the power family; 1 is the Kullback-Leibler divergence."""
        return 1.0

    @property
    def limit_factor(self) -> float | None:
        """k in the limit T^2 D -> (k/2) Var(z - v) of high temperature, or None where there is no such limit."""
        return self.order

    @property
    def text(self) -> str:
        """The text form: parse(d.text) == d."""
        return self.name

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class KL(Divergence):
    """Kullback-Leibler divergence of the student from the teacher, sum p log(p / q).

    T dD/dz = q - p. Hinton, Vinyals and Dean (2015), eq. 2, up to the teacher's entropy; Grätzer, eq. 1.4 and 1.8.
    """

    name: ClassVar[str] = "kl"


@dataclass(frozen=True)
class CrossEntropy(Divergence):
    """Cross entropy of the student under the teacher, -sum p log q: KL plus the teacher's entropy, with KL's gradient.

    It grows like T^2 under t_squared, so it has no limit at T = inf.
    """

    name: ClassVar[str] = "cross_entropy"
    limit_factor: ClassVar[None] = None


@dataclass(frozen=True)
class Renyi(Divergence):
    """Renyi divergence of order alpha, log(sum p^alpha q^(1-alpha)) / (alpha - 1), for every alpha in [0, inf].

    T dD/dz = q - w with w = softmax((alpha v + (1 - alpha) z) / T). alpha = 1 is KL; alpha = 0 is -log Q(support of p);
    alpha = inf is max log(p / q). van Erven and Harremoës (2014), definition 2 and section II; Grätzer, eq. 1.16, 1.27 and 1.33.

    Raises ValueError for alpha < 0 or nan.
    """

    alpha: float
    name: ClassVar[str] = "renyi"

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)):
            raise TypeError(f"Renyi: alpha is a number in [0, inf], got {self.alpha!r}")
        if not self.alpha >= 0:
            raise ValueError(f"Renyi: alpha must be in [0, inf], got {self.alpha!r}")
        object.__setattr__(self, "alpha", float(self.alpha))
        short = f"{self.alpha:g}"
        object.__setattr__(self, "_text", f"{self.name}({short if float(short) == self.alpha else repr(self.alpha)})")

    @property
    def order(self) -> float:
        return self.alpha

    @property
    def limit_factor(self) -> float | None:
        return None if math.isinf(self.alpha) else self.alpha

    @property
    def text(self) -> str:
        return self._text


@dataclass(frozen=True)
class LogitMatching(Divergence):
    """|z - v|^2 / (2 V): not a divergence of p and q, but what T^2 KL becomes at T = inf when the means agree.

    Chen et al., eq. 2. Reached through `logit_matching_loss`.
    """

    name: ClassVar[str] = "logit_matching"


REGISTRY: dict[str, type[Divergence]] = {cls.name: cls for cls in (KL, CrossEntropy, Renyi, LogitMatching)}


def parse(text: str) -> Divergence:
    """The divergence of a text form: "kl", "cross_entropy", "renyi(0.5)", "renyi(inf)". parse(d.text) == d."""
    name, bracket, rest = text.strip().partition("(")
    cls = REGISTRY.get(name.strip())
    if cls is None or (bracket and not rest.endswith(")")):
        known = ", ".join(f"{c.name}(alpha)" if c is Renyi else c.name for c in REGISTRY.values() if c is not LogitMatching)
        raise ValueError(f"divergence: unknown {text!r}; known are {known}")
    try:
        arguments = [float(x) for x in rest[:-1].split(",")] if bracket else []
        return cls(*arguments)
    except TypeError:
        raise ValueError(f"divergence: {text!r} has the wrong number of arguments; see kdkernels.{cls.__name__}") from None
    except ValueError as error:
        raise ValueError(f"divergence: {text!r}: {error}") from None


def psi_series(x):
    """psi(x) = e^x - 1 - x for |x| <= 1/2, to the last digit of fp64."""
    s = 1 + x / 16
    s = 1 + x * s / 15
    s = 1 + x * s / 14
    s = 1 + x * s / 13
    s = 1 + x * s / 12
    s = 1 + x * s / 11
    s = 1 + x * s / 10
    s = 1 + x * s / 9
    s = 1 + x * s / 8
    s = 1 + x * s / 7
    s = 1 + x * s / 6
    s = 1 + x * s / 5
    s = 1 + x * s / 4
    s = 1 + x * s / 3
    return x * x * s / 2


def psi_short(x):
    """psi(x) for |x| <= 1/2, to 3e-8 of itself: minimax, exact to second order. For fp32."""
    return x * x * (0.5 + x * (0.16666666 + x * (0.041666 + x * (0.00833348 + x * (0.0013975331 + x * 0.00019863351)))))


def kl_terms(p, q, d, psi, abs, where):
    """(q - p, p psi(d)) for q = p e^d, each to its own digits. psi is asked for every d, and used where |d| < 1/2.

    The second is what is left of p log(p / q) when sum q - p = 0 is added.
    """
    near = abs(d) < 0.5
    s = psi(d)
    gap = where(near, p * (d + s), q - p)
    return gap, where(near, p * s, gap - p * d)


def power_terms(p, q, t, d, tilt, inverse_tilt, psi, abs, where, small_tilt):
    """(q - p, t - p, (1 - tilt) p f(d)) for q = p e^d and t = p e^{tilt d}; powers are only subtracted where they differ.

    small_tilt says that |tilt| <= 1: the third then asks for nothing that is only the first's.
    """
    x = tilt * d
    near = abs(d) < 0.5
    close = abs(x) < 0.5
    s = psi(d)
    u = psi(x)
    gap = where(near, p * (d + s), q - p)
    powers = where(close, p * (x + u), t - p)
    rest = q - p if small_tilt else gap
    return gap, powers, where(near & close, p * (s - u * inverse_tilt), rest - powers * inverse_tilt)
