"""What is no sum of terms: T = inf, the orders 0 and inf, and what a gradient is where D is infinite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...divergence import Form
from .row import Row, Term, lost_digits, summed, total

# ---------------------------------------------------------------- T = inf


def flat(row: Row, form: Form) -> Term:
    """(k/2) Var(z - v), or |z - v|^2 / (2 V) for logit matching; +inf for masks that differ, where k = 0 for
    those that matter."""
    if row.plain:
        n = row.z.shape[-1]
    else:
        n = (~row.masked).sum(-1, keepdim=True).clamp_min(1)
    if form.family == "logit_matching":
        x = row.fill(row.masked, 0.0, row.z - row.v)
    else:
        x = row.apart
        for _ in range(2):  # what rounding leaves of the mean goes with the second
            x = row.fill(row.masked, 0.0, x - total(x) / n)
    value = form.limit / 2 * summed(x * x / n)
    if not row.plain:
        differ = row.only_z | row.only_v
        if form.family == "support":
            differ = row.only_v if form.reverse else row.only_z
        value = value + torch.where(differ.any(-1), math.inf, 0.0)
    return Term(value, lambda: form.limit * x / n)


# ---------------------------------------------------------------- order 0: -log Q(p > 0), or -log P(q > 0)


def support(row: Row, form: Form) -> Term:
    p, q, *_ = row.soft
    lone, x = (row.no_z, p) if form.reverse else (row.no_v, q)
    inside = total(row.fill(lone, 0.0, x))
    outside = torch.zeros_like(x) if lone is None else torch.where(lone, x, 0.0)
    nothing = inside == 0
    ratio = total(outside) / torch.where(nothing, 1.0, inside)
    value = or_infinite(row, form, nothing.squeeze(-1), torch.log1p(ratio).squeeze(-1))

    def gradient() -> Tensor:
        if form.reverse:
            return torch.zeros_like(q)
        return outside + row.fill(lone, 0.0, -q * torch.where(nothing, 0.0, ratio))

    return Term(value, gradient)


# -------------------------------------------------------- order inf: the largest log(p / q), or log(q / p)


def extreme(row: Row, form: Form) -> Term:
    sign = -1 if form.reverse else 1
    _, q, _, y, c = row.soft
    least, share, rest = least_classes(row, sign)
    value = (sign * (c.squeeze(-1) - summed(share * y))).clamp_min(0.0)
    absent, only = (row.no_v, row.only_z) if form.reverse else (row.no_z, row.only_v)
    equal = (least if absent is None else least | absent).all(-1)
    value = or_infinite(row, form, row.rows_with(only), torch.where(equal, 0.0, value))
    return Term(value, lambda: sign * torch.where(least, -share * rest, q))


def least_classes(row: Row, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """The classes where sign d is smallest, as far as the logits as given tell them apart; q restricted to
    them; q of the others."""
    less, more = (row.no_z, row.no_v) if sign > 0 else (row.no_v, row.no_z)
    gap = row.fill(more, math.inf, row.fill(less, -math.inf, sign * (row.z - row.v).detach()))
    least = gap == gap.amin(-1, keepdim=True)
    if row.masked is not None:
        least &= ~row.masked
    gap = torch.where(least, sign * lost_digits(row.z, row.v), math.inf)
    least &= gap == gap.amin(-1, keepdim=True)
    top = torch.where(least, row.z.detach(), -math.inf).amax(-1, keepdim=True)
    there = top > -math.inf
    share = ((row.z.detach() - torch.where(there, top, 0.0)) / row.temperature).exp()
    share = torch.where(least, share, 0.0)
    share = share / torch.where(there, total(share), 1.0)
    return least, share, total(torch.where(least, 0.0, row.soft.q))


# ---------------------------------------------------------------- where D is infinite


def or_infinite(row: Row, form: Form, rows: Tensor, value: Tensor) -> Tensor:
    """The value, and +inf in the rows that are asked for, none of them plain, with the gradients that are
    agreed upon (docs/numerics.md, 7)."""
    if row.plain:
        return value
    p, q, *_ = row.soft
    (_, sz), (_, sv) = row.sums
    student, teacher = slopes(form)
    of_z = nothing_but_gradient(student, row, row.z, row.no_z, sz, p, rows)
    of_v = nothing_but_gradient(teacher, row, row.v, row.no_v, sv, q, rows)
    return torch.where(rows, math.inf + of_z + of_v, value)


def nothing_but_gradient(factors, row: Row, x, absent, of_all, other, rows) -> Tensor:
    """0, whose T d/dx is factors[0] softmax(x/T) - factors[1] other; nan without factors, in the rows that
    are asked for."""
    if factors is None:
        u = torch.where(rows.unsqueeze(-1) & ~absent, x - x.detach(), 1.0).sqrt()
        return summed(u - u * 1.0)
    pull = summed(other.detach() * x / row.temperature)
    term = factors[0] * of_all.log().squeeze(-1) - factors[1] * pull
    return term - term.detach()


def slopes(form: Form) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """(a, b) of T dD/dz = a q - b p and of T dD/dv = a p - b q where D is +inf; None for nan, where an
    infinite moment is in it."""
    if form.family in ("kl", "cross_entropy"):
        return (1, 1), None
    if form.family == "support":
        return ((0, 0), (1, 1)) if form.reverse else ((1, 1), (0, 0))
    if form.family == "extreme":
        return ((-1, 0), (1, 0)) if form.reverse else ((1, 0), (-1, 0))
    if form.family == "renyi":
        # of alpha below 1e-16, reversed
        mirrored = form.factor * form.order / (1 - form.order) if form.order != 1 else 1.0
        return (form.factor, form.factor), (mirrored, mirrored)
    return None, (1, 1) if form.family == "mixture" else None  # reverse KL, alpha, mixed KL
