"""The records that the stages hand on: NamedTuples, which Triton takes apart when it compiles. And the names
of spec.py as constants of the kernels."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import spec as names

KL, ENTROPY, MIXED_KL, MOMENTS, MIXTURE, SKEWED, TVD, POWER, ALPHA, SUPPORT, EXTREME = (
    tl.constexpr(i) for i in range(len(names.FAMILIES))
)
STUDENT = tl.constexpr(names.STUDENT)
EVEN, WINDOW, SCALAR, FULL = (tl.constexpr(x) for x in (names.EVEN, names.WINDOW, names.SCALAR, names.FULL))
SMOOTHED, SCALED, CAPPED = (tl.constexpr(x) for x in (names.SMOOTHED, names.SCALED, names.CAPPED))
SQUARED, HOT = tl.constexpr(names.SQUARED), tl.constexpr(names.HOT)
FIRST, AGAIN, MIDDLE, LAST, ALL = (
    tl.constexpr(x) for x in (names.FIRST, names.AGAIN, names.MIDDLE, names.LAST, names.ALL)
)
KEPT, MOST_PARTS = tl.constexpr(names.KEPT), tl.constexpr(names.MOST_PARTS)


@triton.constexpr_function
def inner_of(spec):
    return spec.inner


class Side(NamedTuple):
    """One model's logits of a row, and what is to be done to them: softcap tanh(scale x / softcap)."""

    X: tl.tensor
    scale: tl.tensor
    softcap: tl.tensor  # its negative; 0 for none
    steepness: tl.tensor  # -2 / softcap


class Row(NamedTuple):
    """The part [first, last) of a row that a program has, in a window whose place `edge` is class 0."""

    base: Side
    other: Side
    G: tl.tensor
    edge: tl.tensor
    first: tl.tensor
    last: tl.tensor
    vocab: tl.tensor
    label: tl.tensor


class Numbers(NamedTuple):
    """Of a divergence: c = log2(e) / T, k = 1 / T; a power's tilt; a mixture's l and its weights."""

    c: tl.tensor
    k: tl.tensor
    tilt: tl.tensor
    inverse_tilt: tl.tensor
    base_share: tl.tensor
    other_share: tl.tensor


class Scales(NamedTuple):
    """What the terms of a loss and of its gradient are multiplied with, the row's weight in those of the
    gradient."""

    weight: tl.tensor
    value: tl.tensor  # two factors, whose product need not be a float
    value_unit: tl.tensor
    grad: tl.tensor
    hard: tl.tensor
    hard_grad: tl.tensor
    smoothing: tl.tensor
    z_loss: tl.tensor
    factor: tl.tensor  # of D alone, for statistics


class Ending(NamedTuple):
    """What a row's loss and statistics are made of besides D, and where they go."""

    LOSS: tl.tensor
    STATS: tl.tensor
    hard: tl.tuple
    scales: tl.tuple
    reference: tl.tuple  # of the first sweep


class Reference(NamedTuple):
    """What y = (o - b) k - K - K_low is relative to, in the exact form: an estimate of log sum o - log sum b.

    N, an integer, and w have K in base 2: 2^{-N} w = e^{-K}.
    """

    K: tl.tensor
    K_low: tl.tensor
    N: tl.tensor
    w: tl.tensor


class Sums(NamedTuple):
    """The first sweep's sums: of the lanes of a tile, of a program, or of a row.

    s and so are of 2^{b c - M_b} and 2^{o c - M_o} (`sums.exponents_of`); f, p and u are the family's, and
    peak is the largest lane's part of so. others, exponents and classes are the hard term's, moved_b to
    place_o the statistics'. In the order in which they are needed: programs exchange the first `Spec.slots`.
    The exact form asks for top_o only where there are a hard term or statistics.
    """

    top_b: tl.tensor
    top_o: tl.tensor
    s: tl.tensor
    so: tl.tensor
    f: tl.tensor
    others: tl.tensor
    p: tl.tensor
    u: tl.tensor
    peak: tl.tensor
    exponents: tl.tensor
    classes: tl.tensor
    moved_b: tl.tensor
    moved_o: tl.tensor
    place_b: tl.tensor
    place_o: tl.tensor
