"""What is compiled of a call (`Spec`), and the constants that launcher and kernels share. Knows no Triton.

A row has a base b, the distribution that its sums are weighted with, and another, o: teacher and student, or
the other way round (`Spec.base`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

# of a Form (form.py), as the kernels tell them apart. KL is KL(b, o): reverse KL with the student for b.
# MIXED_KL has KL(o, b) besides, and the student for b
FAMILIES = (
    "KL", "ENTROPY", "MIXED_KL", "MOMENTS", "MIXTURE", "SKEWED", "TVD", "POWER", "ALPHA", "SUPPORT", "EXTREME"
)  # fmt: skip
MIXTURES = ("MIXTURE", "SKEWED", "TVD")  # their gradient takes a sum more: three sweeps
# Spec.base; STEEP: the student, where the tilt is below -1
TEACHER, STUDENT, STEEP = range(3)
# Spec.access. EVEN: every row starts and ends on 16 bytes. WINDOW: the rows of all tensors are off by the
# same number of classes, so that all but the ends are read 16 bytes at a time. SCALAR: a class an access.
# FULL: of a tile that lies within its row, 16 bytes at a time and no mask
EVEN, WINDOW, SCALAR, FULL = range(4)
# Spec.hard: without and with label smoothing. Spec.transform: scales alone, or a softcap too
CROSS_ENTROPY, SMOOTHED = 1, 2
SCALED, CAPPED = 1, 2
# Spec.own: rows have temperatures of their own; with t_squared
OWN, SQUARED = 1, 2
HOT = 64.0  # a temperature from which D is so small that the rounding of 1 / T shows
# Spec.phase: under the interpreter, whose programs run one after another, those of a row cannot wait for each
# other, and what lies between two exchanges is a launch of its own. ALL: everything, which is what a GPU runs
FIRST, AGAIN, MIDDLE, LAST, ALL = range(5)
KEPT = 15  # numbers of `Sums`
MOST_PARTS = 32  # programs to a row


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for: everything else of a call is a number at run time."""

    family: int
    base: int
    exact: bool  # whether small differences keep their digits: `numbers.is_exact`
    hard: int
    grad: bool
    weighted: bool
    own: int
    transform: int
    stats: bool
    carry: bool  # whether o - b is more than a float: for fp32 logits and transformed ones
    fast_log2: bool  # whether the compiler has NVIDIA's instruction
    centered: bool  # of MOMENTS: logit matching compares the logits themselves
    access: int
    alone: bool  # one program to a row
    phase: int
    lanes: int  # a tile has so many runs
    run: int  # of so many classes, 16 bytes of the narrower logits

    @property
    def tile(self) -> int:
        return self.lanes * self.run

    @property
    def student_base(self) -> bool:
        return self.base != TEACHER

    @property
    def power(self) -> bool:
        return FAMILIES[self.family] in ("POWER", "ALPHA")

    @property
    def mixes(self) -> bool:
        return FAMILIES[self.family] in MIXTURES

    @property
    def is_limit(self) -> bool:
        """Orders 0 and inf."""
        return FAMILIES[self.family] in ("SUPPORT", "EXTREME")

    @property
    def reverse_kl(self) -> bool:
        """Whether KL(b, o) is, or is a part of D, whose gradient is in the base's logits and asks for it."""
        return FAMILIES[self.family] in ("KL", "MIXED_KL") and self.student_base

    @property
    def splits(self) -> bool:
        """Whether the gradient is not linear in the reference K: the sweeps subtract its rounding, too."""
        return self.mixes or self.reverse_kl

    @property
    def slots(self) -> int:
        """fp64 numbers of a first sweep that programs exchange; between launches also what is read once."""
        if self.phase != ALL:
            return KEPT + 2
        if self.stats or self.hard == SMOOTHED:
            return KEPT
        if self.exact:
            return 9
        return 8 if FAMILIES[self.family] == "MIXED_KL" else 6 if self.hard else 5

    @property
    def second(self) -> int:
        """fp64 numbers of the sweep after it that they exchange."""
        return 6 if self.exact or self.mixes else 0

    @property
    def state(self) -> int:
        """fp64 numbers of a program."""
        return self.slots * (2 if self.exact else 1) + self.second

    @property
    def edges(self) -> bool:
        """Whether a sweep takes the tiles that need a mask in a loop of their own. Rows that are read class
        by class because of how they lie have it for the same bits."""
        return self.run > 1

    @property
    def inner(self) -> Spec:
        """Of tiles that lie within a row."""
        return self if self.access == SCALAR else dataclasses.replace(self, access=FULL)
