"""The reference: the loss of each row in plain PyTorch, in fp64, differentiable to any order.

It is what the other backends are read against, and what runs where none of them can. Where a class is masked (-inf) or a row
is broken (nan, +inf), values are replaced before they meet an operation that could not undo them: a gradient of `where` is
only as good as its unused branch.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import divergence as math_of

name = "eager"
CHUNK_BYTES = 32 << 20  # of one fp64 temporary in `loss`; about a dozen are alive at a time


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...] = ()) -> str | None:
    """Why this backend cannot run on a device for such logits; None when it can."""
    return "mps has no float64" if device.type == "mps" else None


def rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    divergence: str,
    temperature: float,
    value_scale: float,
    hard_scale: float,
) -> Tensor:
    """Per-row loss, (rows,) float64, of (rows, vocab) logits; rows of weight 0 are not looked at."""
    z, v = student.double(), teacher.detach().double()
    clean_z, clean_v, labels, broken = _clean(z, v, labels, weight)
    row = _Row(clean_z, clean_v, temperature)
    loss = value_scale * row.divergence(math_of.parse(divergence)) if value_scale else clean_z.new_zeros(z.shape[0])
    if labels is not None and hard_scale:
        loss = loss + hard_scale * row.cross_entropy(labels)
    # nan in value and gradient of the broken rows, 0 added to the others
    poison = torch.where(broken, math.nan, 0.0)
    loss = loss + (poison * torch.where(broken, z, row.z)).sum(-1)
    return loss if weight is None else torch.where(weight != 0, weight.double() * loss, 0.0)


def _clean(z: Tensor, v: Tensor, labels: Tensor | None, weight: Tensor | None):
    """(z, v, labels, broken): rows that count for nothing and rows with nan or +inf, or without a class, as rows of zeros."""
    counts = torch.ones_like(z[:, :1], dtype=torch.bool) if weight is None else (weight != 0).unsqueeze(-1)
    z, v = torch.where(counts, z, 0.0), torch.where(counts, v, 0.0)
    top = torch.maximum(z.amax(-1, keepdim=True), v.amax(-1, keepdim=True))  # nan where either is
    broken = ~(top < math.inf) | (z == -math.inf).all(-1, keepdim=True) | (v == -math.inf).all(-1, keepdim=True)
    labels = labels if labels is None else torch.where(counts.squeeze(-1), labels, 0)
    return torch.where(broken, 0.0, z), torch.where(broken, 0.0, v), labels, broken


def loss(student, teacher, labels, weight, grad, divergence, temperature, value_scale, grad_scale, hard_scale, hard_grad_scale, vocab):
    """The operator's contract (ops.py): the loss of each row, and its gradient, from its formula, written into `grad`."""
    if student.dim() == 1:
        student, teacher, labels, weight, grad = (x if x is None else x.unsqueeze(0) for x in (student, teacher, labels, weight, grad))
    leading, width = student.shape[:-1], student.shape[-1]
    count = math.prod(leading)
    out = student.new_empty(count, dtype=torch.float64)
    which = math_of.parse(divergence)
    step = max(1, CHUNK_BYTES // (8 * max(vocab, 1)))
    for start in range(0, count, step):
        index = torch.arange(start, min(start + step, count), device=student.device)
        at = tuple(torch.unravel_index(index, leading))
        z, v = student[(*at, slice(vocab))].double(), teacher[(*at, slice(vocab))].double()
        y, w = (x if x is None else x[at] for x in (labels, weight))
        out[index] = rows(z, v, y, w, divergence, temperature, value_scale, hard_scale)
        if grad is None:
            continue
        z, v, y, broken = _clean(z, v, y, w)
        row = _Row(z, v, temperature)
        g = grad_scale * row.gradient(which)
        if y is not None and hard_grad_scale:
            g = g + hard_grad_scale * row.cross_entropy_gradient(y)
        g = torch.where(broken, math.nan, g)
        if w is not None:
            g = torch.where((w != 0).unsqueeze(-1), w.double().unsqueeze(-1) * g, 0.0)
        grad[(*at, slice(vocab))] = g.to(grad.dtype)
        grad[(*at, slice(vocab, width))] = 0
    return out


def log_softmax(logits: Tensor, upstream: Tensor | None, temperature: float) -> Tensor:
    """log softmax(x / T), or its gradient for an upstream one; see ops.py."""
    x = logits.double()
    scaled = x / temperature if math.isfinite(temperature) else torch.where(x > -math.inf, x - x.detach(), x)
    if upstream is None:
        broken = ~(x.amax(-1, keepdim=True) < math.inf) | (x == -math.inf).all(-1, keepdim=True)
        top = scaled.argmax(-1, keepdim=True)
        scaled = scaled - scaled.gather(-1, top)
        others = scaled.exp().scatter(-1, top, 0.0).sum(-1, keepdim=True)
        return torch.where(broken, math.nan, scaled - torch.log1p(others)).to(logits.dtype)
    u = upstream.double()
    return ((u - scaled.softmax(-1) * u.sum(-1, keepdim=True)) / temperature).to(logits.dtype)


class _Row:
    """The sums of sweep 1 over (rows, vocab) fp64 logits without nan or +inf, and the divergences made of them."""

    def __init__(self, z: Tensor, v: Tensor, temperature: float):
        self.temperature = temperature
        no_z, no_v = z == -math.inf, v == -math.inf
        self.only_z, self.only_v, self.masked = no_v & ~no_z, no_z & ~no_v, no_z | no_v
        self.no_z, self.no_v = no_z, no_v
        self.z, self.v = torch.where(no_z, 0.0, z), torch.where(no_v, 0.0, v)
        self.top_z = torch.where(no_z, -math.inf, z.detach()).amax(-1, keepdim=True)
        self.top_v = torch.where(no_v, -math.inf, v).amax(-1, keepdim=True)

    def _exp(self, x: Tensor, top: Tensor, masked: Tensor, temperature: float) -> Tensor:
        return torch.where(masked, 0.0, ((x - top) / temperature).exp())

    @functools.cached_property
    def soft(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(p, q, d, y, c): both distributions, d = log q - log p, y = d + c before the log-sum-exps were known."""
        T = self.temperature
        ez, ev = self._exp(self.z, self.top_z, self.no_z, T), self._exp(self.v, self.top_v, self.no_v, T)
        sz, sv = ez.sum(-1, keepdim=True), ev.sum(-1, keepdim=True)
        y = torch.where(self.masked, 0.0, ((self.z - self.v) - (self.top_z - self.top_v)) / T)
        near = (y.abs() < 0.5) & ~self.masked
        away = torch.where(near, ev * torch.expm1(torch.where(near, y, 0.0)), ez - ev).sum(-1, keepdim=True) / sv
        near = away.abs() < 0.5
        c = torch.where(near, torch.log1p(torch.where(near, away, 0.0)), sz.log() - sv.log())
        return ev / sv, ez / sz, y - c, y, c

    def tilted(self, order: float) -> tuple[Tensor, Tensor, Tensor]:
        """(w, log R, disjoint): w = softmax of order v + (1 - order) z over T, R = sum p^order q^(1 - order)."""
        p, q, d, y, c = self.soft
        b, T = 1 - order, self.temperature
        a = torch.where(self.no_v, 0.0, (self.v - self.top_v) / T)
        u = torch.where(self.masked, -math.inf, a + b * y)
        top = u.detach().amax(-1, keepdim=True)
        disjoint = top == -math.inf
        top = torch.where(disjoint, 0.0, top)
        eu = torch.where(self.masked, 0.0, (torch.where(self.masked, top, a + b * y) - top).exp())
        su = torch.where(disjoint, 1.0, eu.sum(-1, keepdim=True))
        log_r = top + su.log() - torch.where(self.no_v, 0.0, a.exp()).sum(-1, keepdim=True).log() - b * c
        near = (log_r.abs() < 0.5) & ~disjoint
        w = eu / su
        t = w * torch.where(near, log_r, 0.0).exp()
        term = math_of.power_terms(p, q, t, d, b, 1 / b, _psi, torch.abs, torch.where, False)[2] / (1 - b)
        term = torch.where(self.no_v, q / (1 - b), torch.where(self.no_z, p / b, term))
        F = torch.where(self.no_z & self.no_v, 0.0, term).sum(-1, keepdim=True)
        return w, torch.where(near, torch.log1p(torch.where(near, -b * (1 - b) * F, 0.0)), log_r), disjoint

    def divergence(self, divergence: math_of.Divergence) -> Tensor:
        """D, (rows,); the limit of T^2 D at T = inf."""
        if math.isinf(self.temperature):
            return self._limit(divergence)
        p, q, d, y, c = self.soft
        order, lone = divergence.order, self.only_v.any(-1)
        term = math_of.kl_terms(p, q, d, _psi, torch.abs, torch.where)[1]
        kl = torch.where(self.only_z, q, torch.where(self.no_z, 0.0, term)).sum(-1)
        # rows whose D is +inf have KL's gradient q - p at the classes the student has
        infinite = kl + (p * self.only_v).sum(-1) * (c - c.detach()).squeeze(-1) + math.inf
        if order == 1:
            value = torch.where(lone, infinite, kl)
            if isinstance(divergence, math_of.CrossEntropy):
                T = self.temperature
                total = _log_total(self._exp(self.v, self.top_v, self.no_v, T), self.v, self.top_v, self.no_v)
                value = value - (p * torch.where(self.no_v, 0.0, (self.v - self.top_v) / T - total)).sum(-1)
            return value
        if order == 0:
            inside, outside = torch.where(self.no_v, 0.0, q).sum(-1), torch.where(self.no_v, q, 0.0).sum(-1)
            return torch.where(inside == 0, infinite, torch.log1p(outside / torch.where(inside == 0, 1.0, inside)))
        if math.isinf(order):
            least, share, _ = self._least()
            value = (c.squeeze(-1) - (share * y).sum(-1)).clamp_min(0.0)
            value = torch.where((least | self.no_z).all(-1), 0.0, value)  # p = q
            return torch.where(lone, (c - c.detach()).squeeze(-1) + math.inf, value)
        _, log_r, disjoint = self.tilted(order)
        return torch.where(lone if order > 1 else disjoint.squeeze(-1), infinite, log_r.squeeze(-1) / (order - 1))

    def gradient(self, divergence: math_of.Divergence) -> Tensor:
        """T dD/dz = q - w, (rows, vocab), from the table of formulas; the limit's own gradient at T = inf."""
        order = divergence.order
        if math.isinf(self.temperature):
            n, x = self._differences(divergence)
            return order * x / n
        p, q, d, _, _ = self.soft
        if order == 0:
            inside, outside = torch.where(self.no_v, 0.0, q).sum(-1, keepdim=True), torch.where(self.no_v, q, 0.0).sum(-1, keepdim=True)
            return torch.where(self.no_v, q, -q * torch.where(inside == 0, 0.0, outside / torch.where(inside == 0, 1.0, inside)))
        if math.isinf(order):
            least, share, rest = self._least()
            return torch.where(least, -share * rest, q)
        w, x = p, torch.zeros_like(d)
        if order != 1:
            tilted, log_r, disjoint = self.tilted(order)
            lost = self.only_v.any(-1, keepdim=True) if order > 1 else disjoint
            w, x = torch.where(lost, p, tilted), torch.where(lost, 0.0, (1 - order) * d - log_r)
        near = (d.abs() < 0.5) & (x.abs() < 0.5) & ~self.masked
        return torch.where(near, p * (torch.expm1(d) - torch.expm1(x)), torch.where(self.no_z, 0.0, q - w))

    def _least(self) -> tuple[Tensor, Tensor, Tensor]:
        """The classes where d is smallest, as far as the logits as given can tell them apart; q restricted to them; q of the others."""
        gap = torch.where(self.no_v, math.inf, torch.where(self.no_z, -math.inf, (self.z - self.v).detach()))
        least = (gap == gap.amin(-1, keepdim=True)) & ~self.masked
        top = torch.where(least, self.z.detach(), -math.inf).amax(-1, keepdim=True)
        share = torch.where(least, ((self.z.detach() - torch.where(top > -math.inf, top, 0.0)) / self.temperature).exp(), 0.0)
        share = share / torch.where(top > -math.inf, share.sum(-1, keepdim=True), 1.0)
        return least, share, torch.where(least, 0.0, self.soft[1]).sum(-1, keepdim=True)

    def _hard(self, labels: Tensor):
        """(label, r, x, others): x = z - z_r, others the sum of e^x over j != r, r the label where that is a largest class.

        The other classes alone are then what value and gradient are made of where q of the label rounds to 1.
        """
        label = labels.clamp(0, self.z.shape[-1] - 1).unsqueeze(-1)
        z = torch.where(self.no_z, -math.inf, self.z.detach())
        r = torch.where(z.gather(-1, label) == self.top_z, label, z.argmax(-1, keepdim=True))
        x = self.z - self.z.gather(-1, r)
        return label, r, x, torch.where(self.no_z, 0.0, x.exp()).scatter(-1, r, 0.0).sum(-1, keepdim=True)

    def cross_entropy(self, labels: Tensor) -> Tensor:
        """Hard cross entropy at T = 1, (rows,); nan for a label outside the vocabulary."""
        label, r, x, others = self._hard(labels)
        value = torch.log1p(others) - torch.where(r == label, 0.0, x.gather(-1, label))
        lost = torch.where(self.no_z.gather(-1, label), math.inf, 0.0)
        return (value + torch.where(label == labels.unsqueeze(-1), lost, math.nan)).squeeze(-1)

    def cross_entropy_gradient(self, labels: Tensor) -> Tensor:
        """softmax(z) - onehot(label), (rows, vocab)."""
        label, r, x, others = self._hard(labels)
        q = torch.where(self.no_z, 0.0, x.exp()) / (1 + others)
        at_label = torch.where(r == label, -others / (1 + others), q.gather(-1, label) - 1)
        return torch.where(label == labels.unsqueeze(-1), q.scatter(-1, label, at_label), math.nan)

    def _differences(self, divergence: math_of.Divergence) -> tuple[Tensor, Tensor]:
        """T = inf: the classes both have, and z - v over them, centred but for logit matching."""
        n = (~self.masked).sum(-1, keepdim=True).clamp_min(1)
        x = torch.where(self.masked, 0.0, self.z - self.v)
        if not isinstance(divergence, math_of.LogitMatching):
            x = torch.where(self.masked, 0.0, x - x.sum(-1, keepdim=True) / n)
        return n, x

    def _limit(self, divergence: math_of.Divergence) -> Tensor:
        """(k/2) Var(z - v), or |z - v|^2 / (2 V) for logit matching."""
        n, x = self._differences(divergence)
        value = divergence.order / 2 * (x * x).sum(-1) / n.squeeze(-1)
        differ = self.only_z.any(-1) if divergence.order == 0 else (self.only_z | self.only_v).any(-1)
        return value + torch.where(differ, math.inf, 0.0)


def _psi(x: Tensor) -> Tensor:
    near = x.abs() < 0.5
    return math_of.psi_series(torch.where(near, x, 0.0))


def _log_total(e: Tensor, x: Tensor, top: Tensor, masked: Tensor) -> Tensor:
    """log sum e with the largest term, 1, left out of the sum: log1p of the others keeps its digits when they are few."""
    largest = (x == top) & ~masked
    return torch.log1p(torch.where(largest, e - 1, e).sum(-1, keepdim=True) + (largest.sum(-1, keepdim=True) - 1))
