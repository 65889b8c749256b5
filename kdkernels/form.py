"""What a divergence is: for people a class with a name and a number (`Divergence`), for a backend the member
of a family (`Form`), which is all that it knows of it.

`FAMILIES` is the list that csrc/divergence.h has too; the two are compared when the library is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

# renyi: factor * -log(R) / b, alpha: F, both of any order but 0 and 1. support: -log Q(p > 0), extreme: max
#     log(p / q), or, reversed, those of (q, p). logit_matching: |z - v|^2 / (2 V). tvd: sum |p - q| / 2.
#     mixed_kl: both KL(p, q) and KL(q, p), each with a weight
FAMILIES = ("kl", "cross_entropy", "renyi", "alpha", "mixture", "tvd", "support", "extreme", "logit_matching",
            "mixed_kl")  # fmt: skip

# the fields of a Form that its family has; others stay as they are
POWER, WEIGHTS, SIDE = ("order", "factor"), ("teacher", "student"), ("reverse",)
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
    mix: float = 0.0  # mixture: the student's weight in m
    # the weights of KL(p, m) and KL(q, m); mixed_kl: of KL(p, q) and KL(q, p)
    teacher: float = 0.0
    student: float = 0.0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"Form: family must be one of {', '.join(FAMILIES)}; got {self.family!r}")
        used = {"renyi": POWER, "alpha": POWER, "support": SIDE, "extreme": SIDE}
        used |= {"mixture": ("mix", *WEIGHTS), "mixed_kl": WEIGHTS}
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
        if self.family in ("logit_matching", "mixed_kl"):
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


# what several names are, in the limit or by definition
KL_FORM = Form("kl")
REVERSE_KL_FORM = Form("mixture", student=1.0)


class Divergence:
    """A divergence D(p, q) between a teacher's p and a student's q. Frozen and hashable."""

    name: ClassVar[str]
    # of the parameter: bounds, both included, and how they are written
    domain: ClassVar[tuple[float, float, str]]
    # numbers that papers use it with: what tables, tests and benchmarks go through
    usual: ClassVar[tuple[float, ...]] = ()
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
