"""The reference: the loss of each row in plain PyTorch, in fp64, differentiable to any order.

It is what the other backends are read against, and what runs where none of them can. Where a class is masked (-inf) or a row
is broken (nan, +inf), values are replaced before they meet an operation that could not undo them: a gradient of `where` is
only as good as its unused branch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import divergence as math_of

name = "eager"
CHUNK_BYTES = 32 << 20  # of one fp64 temporary in `loss`; about a dozen are alive at a time


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on a device; None when it can."""
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
    if weight is not None:
        counts = (weight != 0).unsqueeze(-1)
        z, v = torch.where(counts, z, 0.0), torch.where(counts, v, 0.0)
    broken = ~((z.amax(-1, keepdim=True) < math.inf) & (v.amax(-1, keepdim=True) < math.inf))
    broken |= (z == -math.inf).all(-1, keepdim=True) | (v == -math.inf).all(-1, keepdim=True)
    row = _Row(torch.where(broken, 0.0, z), torch.where(broken, 0.0, v), temperature)
    loss = value_scale * row.divergence(math_of.parse(divergence)) if value_scale else z.new_zeros(z.shape[0])
    if labels is not None and hard_scale:
        loss = loss + hard_scale * row.cross_entropy(labels if weight is None else torch.where(weight != 0, labels, 0))
    # nan in value and gradient of the broken rows, 0 added to the others
    poison = torch.where(broken, math.nan, 0.0)
    loss = loss + (poison * torch.where(broken, z, row.z)).sum(-1)
    return loss if weight is None else torch.where(weight != 0, weight.double() * loss, 0.0)


def loss(student, teacher, labels, weight, grad, divergence, temperature, value_scale, grad_scale, hard_scale, hard_grad_scale, vocab):
    """The operator's contract (ops.py): the loss of each row, and its gradient written into `grad`."""
    width = student.shape[-1]
    z, v = student.detach().reshape(-1, width), teacher.detach().reshape(-1, teacher.shape[-1])
    out = z.new_empty(z.shape[0], dtype=torch.float64)
    step = max(1, CHUNK_BYTES // (8 * max(vocab, 1)))
    for start in range(0, z.shape[0], step):
        part = slice(start, start + step)
        pick = lambda x: None if x is None else x.reshape(-1)[part]  # noqa: B023, E731
        y, w = pick(labels), pick(weight)
        with torch.enable_grad():
            x = z[part, :vocab].double().requires_grad_(grad is not None)
            soft = rows(x, v[part, :vocab], None, w, divergence, temperature, 1.0, 0.0)
            hard = rows(x, x, y, w, "kl", 1.0, 0.0, 1.0) if y is not None and (hard_scale or hard_grad_scale) else None
        out[part] = (value_scale * soft.detach() if value_scale else 0) + (hard_scale * hard.detach() if hard is not None else 0)
        if grad is not None:
            # grad_scale belongs to T dD/dz, which at T = inf is the limit's own gradient
            factor = grad_scale * (1.0 if math.isinf(temperature) else temperature)
            total = factor * soft.sum() + (hard_grad_scale * hard.sum() if hard is not None else 0)
            (g,) = torch.autograd.grad(total, x)
            if w is not None:
                g = torch.where((w != 0).unsqueeze(-1), g, 0.0)
            target = grad.view(-1, width)[part] if grad.is_contiguous() else None
            if target is None:  # the student's own storage, in whatever layout it has
                grad.flatten(0, -2)[part, :vocab] = g.to(grad.dtype)
                grad.flatten(0, -2)[part, vocab:] = 0
            else:
                target[:, :vocab] = g
                target[:, vocab:] = 0
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

    def divergence(self, divergence: math_of.Divergence) -> Tensor:
        if math.isinf(self.temperature):
            return self._limit(divergence)
        T = self.temperature
        ez, ev = self._exp(self.z, self.top_z, self.no_z, T), self._exp(self.v, self.top_v, self.no_v, T)
        sz, sv = ez.sum(-1, keepdim=True), ev.sum(-1, keepdim=True)
        y = torch.where(self.masked, 0.0, ((self.z - self.v) - (self.top_z - self.top_v)) / T)
        near = (y.abs() < 0.5) & ~self.masked
        away = torch.where(near, ev * torch.expm1(torch.where(near, y, 0.0)), ez - ev).sum(-1, keepdim=True) / sv
        near = away.abs() < 0.5
        c = torch.where(near, torch.log1p(torch.where(near, away, 0.0)), sz.log() - sv.log())
        p, q, d = ev / sv, ez / sz, y - c

        term = math_of.kl_term(p, q, d, torch.abs, torch.where)
        kl = torch.where(self.only_z, q, torch.where(self.no_z, 0.0, term)).sum(-1)
        # rows whose D is +inf have KL's gradient q - p at the classes the student has
        lone = (p * self.only_v).sum(-1)
        infinite = kl + lone * (c - c.detach()).squeeze(-1) + math.inf

        order, support = divergence.order, self.only_v.any(-1)
        if order == 1:
            value = torch.where(support, infinite, kl)
            if isinstance(divergence, math_of.CrossEntropy):
                logp = torch.where(self.no_v, 0.0, (self.v - self.top_v) / T - _log_total(ev, self.v, self.top_v, self.no_v))
                value = value - (p * logp).sum(-1)
            return value
        if order == 0:
            inside, outside = torch.where(self.no_v, 0.0, ez).sum(-1), torch.where(self.no_v, ez, 0.0).sum(-1)
            empty = inside == 0
            return torch.where(empty, infinite, torch.log1p(outside / torch.where(empty, 1.0, inside)))
        if math.isinf(order):
            gap = torch.where(self.no_v, math.inf, torch.where(self.no_z, -math.inf, (self.z - self.v).detach()))
            least = gap == gap.amin(-1, keepdim=True)
            share = torch.where(least, q, 0.0).detach()
            share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            value = (c.squeeze(-1) - (share * y).sum(-1)).clamp_min(0.0)
            return torch.where(support, (c - c.detach()).squeeze(-1) + math.inf, value)

        b = 1 - order
        u = torch.where(self.masked, -math.inf, (self.v - self.top_v) / T + b * y)
        top = u.detach().amax(-1, keepdim=True)
        disjoint = top == -math.inf
        eu = torch.where(self.masked, 0.0, (torch.where(self.masked, 0.0, u) - torch.where(disjoint, 0.0, top)).clamp_max(0.0).exp())
        su = torch.where(disjoint, 1.0, eu.sum(-1, keepdim=True))
        log_r = torch.where(disjoint, 0.0, top) + su.log() - sv.log() - b * c
        near = (log_r.abs() < 0.5) & ~disjoint
        t = eu / su * torch.where(near, log_r, 0.0).exp()
        term = math_of.power_term(p, q, t, d, b, torch.abs, torch.where)
        term = torch.where(self.no_v, q / (1 - b), torch.where(self.no_z, p / b, term))
        F = torch.where(self.no_z & self.no_v, 0.0, term).sum(-1, keepdim=True)
        log_r = torch.where(near, torch.log1p(torch.where(near, -b * (1 - b) * F, 0.0)), log_r)
        lost = support if order > 1 else disjoint.squeeze(-1)
        return torch.where(lost, infinite, log_r.squeeze(-1) / -b)

    def cross_entropy(self, labels: Tensor) -> Tensor:
        """Hard cross entropy at T = 1, (rows,); nan for a label outside the vocabulary.

        log1p(sum of e^{z_j - z_r} over j != r) - (z_label - z_r), with r the label where that is a largest class: the other classes
        alone are then what value and gradient are made of.
        """
        known = (labels >= 0) & (labels < self.z.shape[-1])
        label = torch.where(known, labels, 0).unsqueeze(-1)
        lost = ~known | self.no_z.gather(-1, label).squeeze(-1)
        z = torch.where(self.no_z, -math.inf, self.z.detach())
        r = torch.where(z.gather(-1, label) == self.top_z, label, z.argmax(-1, keepdim=True))
        x = self.z - self.z.gather(-1, r)
        others = torch.where(self.no_z, 0.0, x.exp()).scatter(-1, r, 0.0).sum(-1)
        value = torch.log1p(others) - torch.where(r == label, 0.0, x.gather(-1, label)).squeeze(-1)
        return value + torch.where(lost, torch.where(known, math.inf, math.nan), 0.0)

    def _limit(self, divergence: math_of.Divergence) -> Tensor:
        """T = inf: (k/2) Var(z - v), or |z - v|^2 / (2 V) for logit matching."""
        n = (~self.masked).sum(-1, keepdim=True).clamp_min(1)
        x = torch.where(self.masked, 0.0, self.z - self.v)
        if not isinstance(divergence, math_of.LogitMatching):
            x = torch.where(self.masked, 0.0, x - x.sum(-1, keepdim=True) / n)
        value = divergence.order / 2 * (x * x).sum(-1) / n.squeeze(-1)
        differ = self.only_z.any(-1) if divergence.order == 0 else (self.only_z | self.only_v).any(-1)
        return value + torch.where(differ, math.inf, 0.0)


def _log_total(e: Tensor, x: Tensor, top: Tensor, masked: Tensor) -> Tensor:
    """log sum e with the largest term, 1, left out of the sum: log1p of the others keeps its digits when they are few."""
    largest = (x == top) & ~masked
    return torch.log1p(torch.where(largest, e - 1, e).sum(-1, keepdim=True) + (largest.sum(-1, keepdim=True) - 1))
