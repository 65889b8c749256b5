"""The mathematics: what a divergence is, its limit at high temperature, and its terms in the form that loses
no digits.

Per row: teacher p = softmax(v / T), student q = softmax(z / T), and d = log q - log p, always student minus
teacher. With psi(x) = e^x - 1 - x there are two families, both sums of terms of one sign, which is what keeps
their digits when d is small: at high temperature, or when the student has become the teacher.

The power family (`power_terms`), of order a, with tilt b = 1 - a:

    t = p^a q^(1 - a) = p e^{b d},    R = sum t
    f(d) = (psi(d) - psi(b d) / b) / (1 - b),    F = sum p f(d) >= 0

so that R = 1 - b (1 - b) F; order 1 is F = sum p psi(d). `Alpha` is F itself, `Renyi` is -log(R) / b.

The mixture family (`mixture_term`): c_p KL(p, m) + c_q KL(q, m) with m = (1 - mix) p + mix q.

A `Divergence` says by its `form` which member of a family it is, and that is all that a backend knows of it.
`kl_terms`, `power_terms` and `mixture_term` are plain arithmetic with `psi`, `abs` and `where` handed in: the
eager and the Triton backend run the same lines. The C++ twin of this file is csrc/divergence.h; its list of
families is checked against `FAMILIES` when it is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from dataclasses import dataclass
from typing import ClassVar

# renyi: factor * -log(R) / b, alpha: F, both of any order but 0 and 1. support: -log Q(p > 0), extreme: max
#     log(p / q), or, reversed, those of (q, p). logit_matching: |z - v|^2 / (2 V). tvd: sum |p - q| / 2
FAMILIES = ("kl", "cross_entropy", "renyi", "alpha", "mixture", "tvd", "support", "extreme", "logit_matching")

# the fields of a Form that its family has; others stay as they are
POWER, MIXTURE, SIDE = ("order", "factor"), ("mix", "teacher", "student"), ("reverse",)
UNSET = dict(order=1.0, factor=1.0, reverse=False, mix=0.0, teacher=0.0, student=0.0)


@dataclass(frozen=True)
class Form:
    """A divergence as a backend computes it: the member of a family that these numbers name."""

    family: str
    # k in the limit T^2 D -> (k/2) Var(z - v) of high temperature; None where there is no such limit
    limit: float | None = 1.0
    order: float = 1.0  # renyi, alpha
    factor: float = 1.0  # renyi, alpha: D is that many times what the family has
    reverse: bool = False  # support, extreme
    mix: float = 0.0  # mixture: the student's weight in m, and the weights of KL(p, m) and KL(q, m)
    teacher: float = 0.0
    student: float = 0.0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"Form: family must be one of {', '.join(FAMILIES)}; got {self.family!r}")
        used = {"renyi": POWER, "alpha": POWER, "mixture": MIXTURE, "support": SIDE, "extreme": SIDE}
        for name, unset in UNSET.items():
            if getattr(self, name) != unset and name not in used.get(self.family, ()):
                raise ValueError(f"Form: {name} means nothing to the family {self.family}")

    @property
    def steepest(self) -> float:
        """A bound on |T dD/dz_i| over all p and q; inf where there is none.

        q - p, q - w and q (s - sum q s)/2 are within 1. alpha has R/a (q - w), and R <= 1 for 0 < a < 1. Of a
        mixture's q (h - sum q h), h = student (log q/m - mix q/m) - teacher mix p/m: mix q <= m bounds the
        two last, and -m/e <= q log q/m <= q log 1/mix.
        """
        if self.family == "mixture":
            if self.mix == 0:
                return math.inf if self.student else 0.0
            return self.student * (2 - math.log(self.mix)) + self.teacher
        if self.family == "alpha":
            return abs(self.factor) / self.order if 0 < self.order < 1 else math.inf
        if self.family == "logit_matching":
            return math.inf
        return abs(self.factor)

    @property
    def sides(self) -> Sides:
        """A mixture as seen from one of the two."""
        if self.mix > 0.5:
            return Sides(True, 1 - self.mix, self.student, self.teacher)
        return Sides(False, self.mix, self.teacher, self.student)


@dataclass(frozen=True)
class Sides:
    """The mixture family from its base b, the distribution that m has more of; o is the other: m = (1 - mix)
    b + mix o, mix <= 1/2.

    What a class adds where only one of the two has it: to D, `b_alone` b or `o_alone` o; and, where the
    student is the one that has it, xi (`mixture_slope`): `b_moves` or `o_moves`.
    """

    student_base: bool
    mix: float
    base: float  # weights of KL(b, m) and KL(o, m)
    other: float

    @property
    def shares(self) -> bool:
        """Whether (o - b) / m counts in xi; it does not for JSD."""
        return abs(self.base * self.mix - self.other * (1 - self.mix)) > 1e-15 * max(
            self.base * self.mix, self.other
        )

    @property
    def b_alone(self) -> float:
        return self.base * (-self.mix - math.log1p(-self.mix)) + self.other * (1 - self.mix)

    @property
    def o_alone(self) -> float:
        if self.mix == 0:
            return math.inf if self.other else 0.0
        return self.base * self.mix + self.other * (self.mix - 1 - math.log(self.mix))

    @property
    def b_moves(self) -> float:
        return self.other * (1 - self.mix) - self.base * (self.mix + math.log1p(-self.mix))

    @property
    def o_moves(self) -> float:
        if self.mix == 0:
            return math.inf if self.other else 0.0
        return self.base * self.mix - self.other * (1 - self.mix + math.log(self.mix))


_KL = Form("kl")
_REVERSE_KL = Form("mixture", student=1.0)


class Divergence:
    """A divergence D(p, q) between a teacher's p and a student's q. Frozen and hashable."""

    name: ClassVar[str]
    # of the parameter: bounds, both included, and how they are written
    domain: ClassVar[tuple[float, float, str]]
    # its one number; 0 where it has none. of(d.name, d.parameter) == d
    parameter: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, (low, high, written) = getattr(self, field.name), self.domain
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(
                    f"{type(self).__name__}: {field.name} is a number in {written}, got {value!r}"
                )
            if not low <= value <= high:
                raise ValueError(f"{type(self).__name__}: {field.name} must be in {written}, got {value!r}")
            object.__setattr__(self, field.name, float(value))
            object.__setattr__(self, "parameter", float(value))
        # once: it is asked for with every call
        object.__setattr__(self, "_form", self._make_form())

    def _make_form(self) -> Form:
        raise NotImplementedError

    @property
    def form(self) -> Form:
        """What a backend computes: the member of a family."""
        return self._form

    @property
    def reversed(self) -> Divergence:
        """The divergence whose student is this one's teacher: d.reversed(q, p) = d(p, q)."""
        raise NotImplementedError

    @property
    def text(self) -> str:
        """The text form: parse(d.text) == d."""
        if not dataclasses.fields(self):
            return self.name
        short = f"{self.parameter:g}"
        return f"{self.name}({short if float(short) == self.parameter else repr(self.parameter)})"

    def __str__(self) -> str:
        return self.text


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
        return _KL


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
        return _REVERSE_KL


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

    @property
    def reversed(self) -> Divergence:
        return ReverseRenyi(self.alpha)

    def _make_form(self) -> Form:
        a = self.alpha
        if a == 1:
            return _KL
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

    @property
    def reversed(self) -> Divergence:
        return Renyi(self.alpha)

    def _make_form(self) -> Form:
        a = self.alpha
        if a == 1:
            return _REVERSE_KL
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

    @property
    def reversed(self) -> Divergence:
        return Alpha(1 - self.alpha)

    def _make_form(self) -> Form:
        a = self.alpha
        return _KL if a == 1 else _REVERSE_KL if a == 0 else Form("alpha", order=a)


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
            return _REVERSE_KL if b else _KL
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

    @property
    def reversed(self) -> Divergence:
        return SkewReverseKL(self.lam)

    def _make_form(self) -> Form:
        return (
            Form("mixture", limit=(1 - self.lam) ** 2, mix=1 - self.lam, teacher=1.0)
            if 1 - self.lam < 1
            else _KL
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


REGISTRY: dict[str, type[Divergence]] = {
    cls.name: cls
    for cls in (
        KL,
        ReverseKL,
        CrossEntropy,
        Renyi,
        ReverseRenyi,
        Alpha,
        JSD,
        SkewKL,
        SkewReverseKL,
        TVD,
        LogitMatching,
    )
}
# other names that papers and libraries have for some of them
ALIASES = {"forward_kl": "kl", "js": "jsd(0.5)"}


@functools.lru_cache(maxsize=256)
def of(name: str, parameter: float) -> Divergence:
    """The divergence of a name and a parameter, which those without one pass over."""
    cls = REGISTRY[name]
    return cls(parameter) if dataclasses.fields(cls) else cls()


def parse(text: str) -> Divergence:
    """The divergence of a text form: "kl", "renyi(0.5)", "renyi(inf)", "jsd(0.1)". parse(d.text) == d.

    "forward_kl" is "kl", and "js" is "jsd(0.5)".
    """
    name, bracket, rest = ALIASES.get(text.strip(), text).strip().partition("(")
    cls = REGISTRY.get(name.strip())
    if cls is None or (bracket and not rest.endswith(")")):
        written = {
            c: ", ".join(f.name for f in dataclasses.fields(c))
            for c in REGISTRY.values()
            if c is not LogitMatching
        }
        known = ", ".join(
            f"{c.name}({arguments})" if arguments else c.name for c, arguments in written.items()
        )
        raise ValueError(f"divergence: unknown {text!r}; known are {known}")
    try:
        arguments = [float(x) for x in rest[:-1].split(",")] if bracket else []
        return cls(*arguments)
    except TypeError:
        raise ValueError(
            f"divergence: {text!r} has the wrong number of arguments; see kdkernels.{cls.__name__}"
        ) from None
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
    return (
        x
        * x
        * (
            0.5
            + x * (0.16666666 + x * (0.041666 + x * (0.00833348 + x * (0.0013975331 + x * 0.00019863351))))
        )
    )


def kl_terms(p, q, d, psi, abs, where):
    """(q - p, p psi(d)) for q = p e^d, each to its own digits. psi is asked for every d, and used where |d| <
    1/2.

    The second is what is left of p log(p / q) when sum q - p = 0 is added.
    """
    near = abs(d) < 0.5
    s = psi(d)
    gap = where(near, p * (d + s), q - p)
    return gap, where(near, p * s, gap - p * d)


def power_terms(p, q, t, d, tilt, inverse_tilt, psi, abs, where, small_tilt):
    """(q - p, t - p, (1 - tilt) p f(d)) for q = p e^d and t = p e^{tilt d}; powers are only subtracted where
    they differ.

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


def log_short(f):
    """f - log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)], to 1e-7 of itself: minimax, exact to second order.
    For fp32."""
    s = 0.1663188 + f * (-0.1420354 + f * (0.13082902 + f * (-0.12722263 + f * 0.07786799)))
    return f * f * (0.5 + f * (-0.33333328 + f * (0.25000563 + f * (-0.2000136 + f * s))))


def mixture_term(b, o, x, m1, s, u, psi_u, w, mix, base, other, abs, where, shares):
    """The term of D of a mixture (`Sides`) for o = b e^x, from m1 = e^x - 1, s = psi(x), u = log1p(mix m1) =
    log(m / b), psi(u), and w = x - u = log(o / m).

    All to their own digits; shares as for `mixture_slope`. s is used where |x| < 1/2. x may be cut off where
    e^x is beyond reach: b and o say what x then does not.
    """
    keep = 1 - mix
    if shares:
        gap = o - b
        of_base = where(abs(u) < 0.5, b * psi_u, mix * gap - b * u)
        of_other = where(abs(x) < 0.5, b * (keep * m1 * m1 + (1 + m1) * (psi_u - s)), o * w - keep * gap)
        return base * of_base + other * of_other
    else:
        n = 1 + m1
        near = b * ((base + other * n) * psi_u + other * (keep * m1 * m1 - n * s))
        return where(abs(x) < 0.5, near, other * o * w - base * b * u)


def mixture_slope(m1, u, psi_u, w, mix, base, other, student_base, shares):
    """xi of a mixture: T dD/dz = q (xi - sum q xi). Arguments are those of `mixture_term`.

    shares: whether base mix and other (1 - mix) differ, as they do not for JSD; (o - b) / m then counts. The
        gradient in the teacher's logits is the student's of the mixture with p and q exchanged.
    """
    keep = 1 - mix
    if student_base:
        if shares:
            back = mix * m1 * u - psi_u  # psi(-u) m / b
            return -(base * mix * u + (base * keep * back + other * keep * keep * m1) / (1 + mix * m1))
        else:
            return -base * u
    else:
        if shares:
            return other * w + mix * (base * mix - other * keep) * m1 / (1 + mix * m1)
        else:
            return other * w
