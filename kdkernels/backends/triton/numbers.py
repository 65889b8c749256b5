"""The numbers of a divergence, each rounded once, and which form a call takes. Knows no Triton."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ... import divergence as math_of
from .spec import HOT, STEEP, STUDENT, TEACHER

WARM = 8.0  # of a temperature: above, the gradient is a small difference of p and q
NEAR = 0.2  # an order is so near to 0 or 1, where D is a small difference over another
LARGE = 8.0  # an order whose powers have too many times the rounding of a logarithm
SLIGHT = 0.05  # a mixture's weight


def is_exact(form: math_of.Form, temperature: float | None, gradient: torch.dtype) -> bool:
    """Whether a call takes the exact form, which keeps the digits of small differences: 1.15 to 1.33 times
    the time of the plain one on an H200. temperature: None for rows that have their own, which nobody looks
    at. gradient: its dtype, or the logits' where none is asked for.

    A gradient in 16 bits is rounded to 2e-3 or 2e-4 of itself; the plain form's error is below that but where
    p and q, or what D is a difference of, nearly cancel.
    """
    if gradient.itemsize > 2 or temperature is None or temperature > WARM:
        return True
    if form.family in ("renyi", "alpha"):
        return min(abs(form.order), abs(form.order - 1)) < NEAR or abs(form.order) > LARGE
    return form.family == "mixture" and 0 < form.mix and not SLIGHT <= form.mix <= 1 - SLIGHT


def single(x: float) -> float:
    """x rounded to fp32."""
    return torch.tensor(x, dtype=torch.float32).item()


class Rounded(NamedTuple):
    """What a call asks for, each number rounded once."""

    family: str
    base: int  # the side a row is seen from; for what has no sum of terms, whether p and q are exchanged
    c: float = 0.0  # log2(e) / T
    k: float = 1.0  # 1 / T
    tilt: float = 0.0  # the power family's, a mixture's l; at T = inf, whether there is a limit but 0
    inverse_tilt: float = 1.0
    base_share: float = 0.0  # a mixture's weights of KL(b, m) and KL(o, m); of KL(b, o) and KL(o, b)
    other_share: float = 0.0
    value: float = 1.0  # factors of the loss and of its gradient
    grad: float = 1.0
    centered: bool = True  # logit matching compares the logits themselves


# of a tilt or a mixture's l, for a float's range to hold what is made of them; beyond, D is proportional to
# it or no longer changes
SMALLEST, LARGEST = 1e-25, 1e36


@functools.lru_cache(maxsize=256)
def numbers(divergence: math_of.Divergence, temperature: float) -> Rounded:
    form = divergence.form
    if math.isinf(temperature):
        limit = form.limit or 0.0
        return Rounded(
            "MOMENTS",
            int(form.reverse),
            tilt=float(limit != 0),
            value=limit or 1.0,
            grad=limit,
            centered=form.family != "logit_matching",
        )
    k = single(1 / temperature)
    # a row is computed at one temperature, 1 / k; where D is proportional to 1 / T^2, what that lacks is a
    # factor; of a row's own temperature `kernels.scales_of` has the same
    correction = (
        1 / (k * temperature)
        if temperature >= HOT and form.family not in ("tvd", "support", "extreme")
        else 1.0
    )
    call = functools.partial(Rounded, c=single(k * math.log2(math.e)), k=k)
    simple = functools.partial(call, value=form.factor * correction**2, grad=form.factor * correction)
    if form.family in ("support", "extreme"):
        return call(form.family.upper(), int(form.reverse))
    if form.family == "tvd":
        return call("TVD", TEACHER)
    if form.family == "mixture":
        return _mixture(form.sides, simple)
    if form.family == "mixed_kl":
        return simple("MIXED_KL", STUDENT, base_share=single(form.student), other_share=single(form.teacher))
    if form.family in ("renyi", "alpha") and form.order != 1:
        side = TEACHER if form.order > 0.5 else STUDENT if form.order >= -1 else STEEP
        exact = max(-LARGEST, min(form.order if side else 1 - form.order, LARGEST))
        tilt = single(exact) if abs(exact) >= SMALLEST else SMALLEST
        found = simple(
            "ALPHA" if form.family == "alpha" else "POWER", side, tilt=tilt, inverse_tilt=single(1 / tilt)
        )
        less = exact / SMALLEST if tilt == SMALLEST and form.family == "renyi" else 1.0
        return found._replace(value=found.value * less, grad=found.grad * less)
    return simple("ENTROPY" if form.family == "cross_entropy" else "KL", TEACHER)


def _mixture(sides: math_of.Sides, simple: Callable[..., Rounded]) -> Rounded:
    base = STUDENT if sides.student_base else TEACHER
    if sides.mix == 0:  # KL(o, b), which KL is with b and o exchanged
        found = simple("KL", TEACHER if base else STUDENT)
        return found._replace(value=found.value * sides.other, grad=found.grad * sides.other)
    shares = dict(base_share=single(sides.base), other_share=single(sides.other))
    return simple(
        "SKEWED" if sides.shares else "MIXTURE", base, tilt=single(max(sides.mix, SMALLEST)), **shares
    )
