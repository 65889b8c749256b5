"""The divergences of rows in plain PyTorch: of each family the value, which autograd differentiates to any
order, and a function that gives the gradient by its formula (docs/numerics.md has both)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...divergence import Form
from ...terms import MixtureLogs, kl_terms, mixture_slope, mixture_term, power_closed, power_terms
from . import limits
from .row import Row, Term, ratio, summed, total

# How far the classes of a row may be apart in fp32, which then rounds y = d + c at 1e-6: of an order, where
# tilt y is a part of w's exponents, and where the gradient itself is as large as d.
OF_TILTED, OF_SLOPES, LARGEST_LOG_R = 8.0, 64.0, 3.0


def too_few_digits(row: Row, steepness: float) -> Tensor:
    return steepness * row.soft.y.detach().abs().amax(-1) > 1


# ---------------------------------------------------------------- KL


def kl(row: Row, form: Form) -> Term:
    p, q, d, _, _ = row.soft
    gap, term = kl_terms(p, q, d, ratio, row.abs, row.where)
    if row.masked is not None:
        gap = torch.where(row.masked, q - p, gap)
    value = form.factor * summed(row.fill(row.only_z, q, row.fill(row.no_z, 0.0, term)))
    lost = row.rows_with(row.only_v)
    value = limits.or_infinite(row, form, lost, value)
    return Term(value, lambda: row.fill(row.no_z, 0.0, form.factor * gap))


def mixed_kl(row: Row, form: Form) -> Term:
    """Both KL(p, q) and KL(q, p), the terms of each of one sign; of the second T dD/dz is q (d - sum q d)."""
    p, q, d, _, _ = row.soft
    gap, term = kl_terms(p, q, d, ratio, row.abs, row.where)
    _, reverse = kl_terms(q, p, -d, ratio, row.abs, row.where)
    value = form.teacher * summed(row.fill(row.masked, 0.0, term))
    value = value + form.student * summed(row.fill(row.masked, 0.0, reverse))
    lost = row.rows_with(row.only_z) | row.rows_with(row.only_v)

    def gradient() -> Tensor:
        slope = d - total(row.fill(row.masked, 0.0, q * d))
        g = form.teacher * gap + form.student * (q * slope)
        g = torch.where(lost.unsqueeze(-1), math.nan, g) if lost.any() else g
        return row.fill(row.no_z, 0.0, g)

    return Term(limits.or_infinite(row, form, lost, value), gradient, too_few_digits(row, 1 / OF_SLOPES))


def cross_entropy(row: Row, form: Form) -> Term:
    value, gradient, _ = kl(row, form)
    return Term(value + entropy(row, row.sums[1], row.v, row.top_v, row.no_v), gradient)


def entropy(row: Row, sums: tuple[Tensor, Tensor], x: Tensor, top: Tensor, masked: Tensor | None) -> Tensor:
    """Of softmax(x / T), (rows,), to its own digits also where one class has nearly all: log S is log1p of
    the other classes' sum."""
    e, of_all = sums
    scaled = row.fill(masked, 0.0, (x - top) / row.temperature)
    return (log_total(e, x, top, masked) - total(e * scaled) / of_all).squeeze(-1)


def log_total(e: Tensor, x: Tensor, top: Tensor, masked: Tensor | None) -> Tensor:
    """log sum e with the largest term, 1, left out of the sum: log1p of the others keeps its digits when they
    are few."""
    largest = x == top
    if masked is not None:
        largest &= ~masked
    others = total(torch.where(largest, e - 1, e))
    return torch.log1p(others + (largest.sum(-1, keepdim=True) - 1))


# ---------------------------------------------------------------- orders


class Tilted(NamedTuple):
    w: Tensor  # softmax of order v + (1 - order) z over T
    log_r: Tensor  # (rows, 1): R = sum p^order q^(1 - order)
    F: Tensor  # (rows, 1): (R - 1) / (order (order - 1))
    disjoint: Tensor  # (rows, 1): no class is in both


def tilted(row: Row, order: float) -> Tilted:
    p, q, d, y, c = row.soft
    b = 1 - order
    if order <= 0.5:
        u = row.fill(row.no_z, 0.0, (row.z - row.top_z) / row.temperature) - order * y
    else:
        u = row.fill(row.no_v, 0.0, (row.v - row.top_v) / row.temperature) + b * y
    top = row.fill(row.masked, -math.inf, u.detach()).amax(-1, keepdim=True)
    disjoint = top == -math.inf
    top = torch.where(disjoint, 0.0, top)
    if row.masked is not None:
        u = torch.where(row.masked, top, u)
    eu = row.fill(row.masked, 0.0, (u - top).exp())
    su = torch.where(disjoint, 1.0, total(eu))
    log_r = top + su.log() - row.sums[1][1].log() - b * c
    near = (log_r.abs() < 0.5) & ~disjoint
    w = eu / su
    t = w * torch.where(near, log_r, 0.0).exp()
    if order <= 0.5:  # from the side of the smaller tilt, which loses the least
        terms = power_terms((q, p, t, -d), (order, 1 / order), ratio, row.abs, row.where, False)
        term = terms[2] / b
    else:
        terms = power_terms((p, q, t, d), (b, 1 / b), ratio, row.abs, row.where, False)
        term = terms[2] / order
    if not row.plain:
        term = torch.where(row.no_v, q / order, torch.where(row.no_z, p / b, term))
        term = torch.where(row.no_z & row.no_v, 0.0, term)
    F = total(term)
    log_r, F = power_closed(F, log_r, -b * order, near, torch.log1p, torch.expm1, torch.where)
    return Tilted(w, log_r, torch.where(disjoint, 1 / (b * order), F), disjoint)


def power(row: Row, form: Form) -> Term:
    """renyi: factor log R / (order - 1); alpha: factor F."""
    if form.order == 1:  # alpha below 1e-16, reversed
        return kl(row, form)
    found = tilted(row, form.order)
    is_renyi = form.family == "renyi"
    value = form.factor * (found.log_r / (form.order - 1) if is_renyi else found.F).squeeze(-1)
    if form.order > 1:
        lost = row.rows_with(row.only_v)
    elif form.order < 0:
        lost = row.rows_with(row.only_z)
    else:
        lost = found.disjoint.squeeze(-1)
    if is_renyi or not 0 < form.order < 1:  # alpha within is always finite
        value = limits.or_infinite(row, form, lost, value)
    tilt = min(abs(form.order), abs(1 - form.order))
    too_far = too_few_digits(row, max(tilt / OF_TILTED, 0 if is_renyi else 1 / OF_SLOPES))
    if not is_renyi:  # R multiplies what rounding leaves of q - w
        too_far |= found.log_r.detach().squeeze(-1) > LARGEST_LOG_R
    return Term(value, lambda: _power_gradient(row, form, found, lost.unsqueeze(-1)), too_far)


def _power_gradient(row: Row, form: Form, found: Tilted, lost: Tensor) -> Tensor:
    """factor (q - w) for renyi, factor R / order (q - w) for alpha."""
    p, q, d, _, _ = row.soft
    w, log_r, _, _ = found
    # x = log(w / p), or log(w / q): for small orders w is nearer to q, and q itself as the order goes to 0
    of_q = form.order <= 0.5
    x = (-form.order if of_q else 1 - form.order) * d - log_r
    unit = form.factor
    if form.family == "alpha":
        unit = unit * log_r.exp() / form.order
    if not row.plain:
        w, x = torch.where(lost, p, w), torch.where(lost, math.inf if of_q else 0.0, x)
        if form.family == "alpha":
            unit = torch.where(lost, 0.0 if 0 < form.order < 1 else math.nan, unit)
    # x as a difference of numbers that are far larger (a class at finfo.min) has no digits
    farthest = row.reach / abs(form.order) if of_q and form.order else 0.5
    near = row.near(x) & row.near(d, farthest)
    small = x.clamp(-0.5, 0.5)
    if of_q:
        less = -q * torch.expm1(small)
    else:
        less = p * (torch.expm1(d.clamp(-farthest, farthest)) - torch.expm1(small))
    return row.fill(row.no_z, 0.0, unit * row.where(near, less, q - w))


# ---------------------------------------------------------------- mixtures


def mixture(row: Row, form: Form) -> Term:
    """c_p KL(p, m) + c_q KL(q, m); T dD/dz = q xi - q sum q xi."""
    p, q, d, _, _ = row.soft
    sides = form.sides
    if sides.student_base:
        b, o, x, only_b, only_o = q, p, -d, row.only_z, row.only_v
    else:
        b, o, x, only_b, only_o = p, q, d, row.only_v, row.only_z
    mix = sides.mix
    x = x.clamp_max(row.reach) if mix else x  # beyond, log m is log o + log(mix), whatever x
    m1 = torch.expm1(x.clamp_max(row.reach))
    u = torch.log1p(mix * m1)
    psi_u = row.where(row.abs(u) < 0.5, u * ratio(u), mix * m1 - u)
    b_in, o_in = row.fill(row.masked, 1.0, b), row.fill(row.masked, 1.0, o)
    small = torch.expm1(x.clamp(-0.5, 0.5))  # its square must not be inf where it is not asked for
    logs, weights = MixtureLogs(x, small, x * ratio(x), u, psi_u, x - u), (mix, sides.base, sides.other)
    term = mixture_term(b_in, o_in, logs, weights, row.abs, row.where, sides.shares)
    xi = mixture_slope(logs._replace(m1=m1), weights, sides.student_base, sides.shares)
    G = row.fill(row.masked, 0.0, (b_in if sides.student_base else o_in) * xi)
    term = row.fill(row.masked, 0.0, term)
    if not row.plain:
        G = G + (alone(b, only_b, sides.b_moves) if sides.student_base else alone(o, only_o, sides.o_moves))
        term = term + alone(b, only_b, sides.b_alone) + alone(o, only_o, sides.o_alone)
    D = summed(term)
    lost = D == math.inf
    value = limits.or_infinite(row, form, lost, D)

    def gradient() -> Tensor:
        g = G - q * total(G)
        return row.fill(row.no_z, 0.0, torch.where(lost.unsqueeze(-1), math.nan, g) if lost.any() else g)

    return Term(value, gradient, None if mix else too_few_digits(row, 1 / OF_SLOPES))


def alone(x: Tensor, only: Tensor, factor: float) -> Tensor:
    """factor x where only one of the two has the class; +inf for a factor of inf, also where x underflows."""
    return torch.where(only, torch.where(only, x, 1.0).clamp_min(torch.finfo(x.dtype).tiny) * factor, 0.0)


def tvd(row: Row, form: Form) -> Term:
    """sum |p - q| / 2.

    With what q has of the classes where it is above, below and equal to p, T dD/dz is q (below + equal / 2)
    above, -q (above + equal / 2) below, and q (below - above) / 2 where they are equal: sums of one sign, so
    that a confident row's small gradient keeps its digits.
    """
    p, q, d, _, _ = row.soft
    gap = row.where(row.near(d), p * torch.expm1(d.clamp(-0.5, 0.5)), q - p)

    def gradient() -> Tensor:
        is_above, is_below = gap.sign().clamp_min(0), (-gap).sign().clamp_min(0)
        is_equal = 1 - is_above - is_below
        above, below, equal = (total(q * x) for x in (is_above, is_below, is_equal))
        slope = is_above * (below + equal / 2) - is_below * (above + equal / 2)
        return q * (slope + is_equal * (below - above) / 2)

    # the side with less probability: an error of c shifts both sums by the probability of their classes
    more, less = summed(gap.clamp_min(0)), summed((-gap).clamp_min(0))
    is_likely = summed(q.detach() * gap.detach().sign()) > 0
    return Term(torch.where(is_likely, less, more), gradient)


# ---------------------------------------------------------------- all of them

FAMILIES: dict[str, Callable[[Row, Form], Term]] = {
    "kl": kl,
    "mixed_kl": mixed_kl,
    "cross_entropy": cross_entropy,
    "renyi": power,
    "alpha": power,
    "mixture": mixture,
    "tvd": tvd,
    "support": limits.support,
    "extreme": limits.extreme,
}


def soft_term(row: Row, form: Form) -> Term:
    flat = not isinstance(row.temperature, Tensor) and math.isinf(row.temperature)
    return limits.flat(row, form) if flat else FAMILIES[form.family](row, form)
