"""The reference: the loss of each row in plain PyTorch, in fp64, differentiable to any order.

It is what the other backends are read against, and what runs where none of them can. Where a class is masked
(-inf) or a row is broken (nan, +inf), values are replaced before they meet an operation that could not undo
them: a gradient of `where` is only as good as its unused branch.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import divergence as math_of
from ..call import Call
from ..transforms import LogitTransform, Modifiers

name = "eager"
CHUNK_BYTES = 32 << 20  # of one fp64 temporary in `loss`; about a dozen are alive at a time


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...] = ()) -> str | None:
    """Why this backend cannot run on a device for such logits; None when it can."""
    return "mps has no float64" if device.type == "mps" else None


def rows(call: Call) -> Tensor:
    """Per-row loss, (rows,) float64, of (rows, vocab) logits; rows of weight 0, and the logits of a term of
    weight 0, are not looked at."""
    student, teacher, labels, weight, n = call.student, call.teacher, call.labels, call.weight, call.numbers
    soft, hard = n.value_scale != 0, labels is not None and n.hard_scale != 0
    of_z, of_v = n.modifiers.transforms
    counts = _counts(student, weight)
    z, broken_z = _clean(student.double(), counts & (soft or hard), of_z)
    v, broken_v = _clean(teacher.double(), counts & soft, of_v)
    row = _Row(z, v, n.temperature)
    loss = n.value_scale * row.divergence(call.divergence) if soft else z.new_zeros(z.shape[0])
    if hard:
        loss = loss + n.hard_scale * row.hard(torch.where(counts.squeeze(-1), labels, 0), n.modifiers)
    # nan in the value of the rows that are broken, and in the gradient of all the logits that are read; 0
    # added to the others
    broken = broken_z | broken_v
    for x, lost in ((student, broken), (teacher, broken & soft)):
        loss = loss + (torch.where(lost, math.nan, 0.0) * torch.where(lost, x.double(), 0.0)).sum(-1)
    return loss if weight is None else torch.where(weight != 0, weight.double() * loss, 0.0)


def _counts(x: Tensor, weight: Tensor | None) -> Tensor:
    """(rows, 1): whether a row counts."""
    return torch.ones_like(x[:, :1], dtype=torch.bool) if weight is None else (weight != 0).unsqueeze(-1)


def _clean(x: Tensor, counts: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """(transformed logits, broken): rows that do not count, and rows with nan or +inf or without a class, as
    rows of zeros.

    Before the transform, whose derivative would make nan of a nan in a row that does not count.
    """
    x = transform(torch.where(counts, x, 0.0))
    if transform.softcap is not None:  # flat at -inf, as its slope has it
        x = torch.where(x == -math.inf, x.detach(), x)
    broken = ~(x.amax(-1, keepdim=True) < math.inf) | (x == -math.inf).all(-1, keepdim=True)
    return torch.where(broken, 0.0, x), broken


def loss(call: Call) -> Tensor:
    """The contract of `Call`, chunk by chunk; the gradient comes from its formula."""
    if call.student.dim() == 1:
        per_row = ("student", "teacher", "labels", "weight", "grad")
        given = {name: x for name in per_row if (x := getattr(call, name)) is not None}
        call = call._replace(**{name: x.unsqueeze(0) for name, x in given.items()})
    leading, vocab = call.student.shape[:-1], call.vocab
    count = math.prod(leading)
    out = call.student.new_empty(count, dtype=torch.float64)
    step = max(1, CHUNK_BYTES // (8 * max(vocab, 1)))
    for start in range(0, count, step):
        index = torch.arange(start, min(start + step, count), device=out.device)
        at = tuple(torch.unravel_index(index, leading))
        z, v = (x[(*at, slice(vocab))].double() for x in (call.student, call.teacher))
        labels, weight = (x if x is None else x[at] for x in (call.labels, call.weight))
        chunk = call._replace(student=z, teacher=v, labels=labels, weight=weight)
        out[index] = rows(chunk)
        if call.grad is not None or call.stats is not None:
            g, columns = _gradient_and_columns(chunk)
            if call.stats is not None:
                call.stats[index] = columns
            if call.grad is not None:
                _write(call.grad, at, vocab, g, weight)
    return out


def _gradient_and_columns(call: Call) -> tuple[Tensor, Tensor | None]:
    """Of (rows, vocab) logits: the gradient without the rows' weights, and statistics where `call` has
    them."""
    z, v, labels, n, told = call.student, call.teacher, call.labels, call.numbers, call.stats is not None
    soft, hard = n.grad_scale != 0, labels is not None and n.hard_grad_scale != 0
    of_z, of_v = n.modifiers.transforms
    counts = _counts(z, call.weight)
    if labels is not None:
        labels = torch.where(counts.squeeze(-1), labels, 0)
    z, broken_z = _clean(z, counts & (soft or hard or told), of_z)
    v, broken_v = _clean(v, counts & (soft or told), of_v)
    row, columns = _Row(z, v, n.temperature), None
    if told:
        columns = row.columns(call.divergence, labels)
        broken = (broken_z | broken_v).repeat(1, columns.shape[-1])
        broken[:, 1:2] = broken_z  # the cross entropy, which is the student's alone
        columns = torch.where(broken | ~counts, math.nan, columns)
    g = n.grad_scale * row.gradient(call.divergence) if soft else torch.zeros_like(z)
    if hard:
        g = g + n.hard_grad_scale * row.hard_gradient(labels, n.modifiers)
    broken = broken_z | broken_v if soft else broken_z if hard else torch.zeros_like(broken_z)
    return torch.where(broken, math.nan, g * of_z.slope(z)), columns


def _write(grad: Tensor, at: tuple[Tensor, ...], vocab: int, g: Tensor, weight: Tensor | None) -> None:
    """The rows of a gradient; zeros beyond the vocabulary, and where a weight is 0."""
    if weight is not None:
        g = torch.where((weight != 0).unsqueeze(-1), weight.double().unsqueeze(-1) * g, 0.0)
    grad[(*at, slice(vocab))] = g.to(grad.dtype)
    grad[(*at, slice(vocab, None))] = 0


def log_softmax(logits: Tensor, upstream: Tensor | None, temperature: float) -> Tensor:
    """log softmax(x / T), or its gradient for an upstream one; see ops.py."""
    x = logits.double()
    flat = math.isinf(temperature)  # the same logit wherever there is one, whatever it is
    if flat and upstream is not None:
        return torch.zeros_like(logits)
    finite = x.abs() < math.inf
    scaled = torch.where(finite, 0.0, x).detach() if flat else x / temperature
    if upstream is not None:
        u = upstream.double()
        return ((u - scaled.softmax(-1) * u.sum(-1, keepdim=True)) / temperature).to(logits.dtype)
    broken = ~(x.amax(-1, keepdim=True) < math.inf) | (x == -math.inf).all(-1, keepdim=True)
    top = scaled.argmax(-1, keepdim=True)
    scaled = scaled - scaled.gather(-1, top)
    others = scaled.exp().scatter(-1, top, 0.0).sum(-1, keepdim=True)
    out = torch.where(broken, math.nan, scaled - torch.log1p(others))
    # what is added is 0, and has a gradient: 0 at T = inf, nan of a broken row elsewhere
    more = (
        0.0 * torch.where(finite, x, 0.0)
        if flat
        else torch.where(broken, math.nan, 0.0) * torch.where(broken, x, 0.0)
    )
    return (out + more).to(logits.dtype)


LARGEST = torch.finfo(torch.float64).max


class _Row:
    """The sums of sweep 1 over (rows, vocab) fp64 logits without nan or +inf, and the divergences made of
    them."""

    def __init__(self, z: Tensor, v: Tensor, temperature: float):
        self.temperature = temperature
        no_z, no_v = z == -math.inf, v == -math.inf
        self.only_z, self.only_v, self.masked = no_v & ~no_z, no_z & ~no_v, no_z | no_v
        self.no_z, self.no_v = no_z, no_v
        self.given_z, self.z, self.v = z, torch.where(no_z, 0.0, z), torch.where(no_v, 0.0, v)
        self.top_z = torch.where(no_z, -math.inf, z.detach()).amax(-1, keepdim=True)
        self.top_v = torch.where(no_v, -math.inf, v.detach()).amax(-1, keepdim=True)

    def _exp(self, x: Tensor, top: Tensor, masked: Tensor, temperature: float) -> Tensor:
        return torch.where(masked, 0.0, ((x - top) / temperature).exp())

    @functools.cached_property
    def sums(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """e^((x - top) / T) and its sum, for z and for v."""
        T = self.temperature
        ez, ev = self._exp(self.z, self.top_z, self.no_z, T), self._exp(self.v, self.top_v, self.no_v, T)
        return (ez, ez.sum(-1, keepdim=True)), (ev, ev.sum(-1, keepdim=True))

    @functools.cached_property
    def apart(self) -> Tensor:
        """(z - v) - (top_z - top_v), 0 where a class is masked; with what the differences lose to rounding,
        all of it where one model's logits are all at finfo.min."""
        lost = _lost_digits(self.z, self.v) - _lost_digits(self.top_z, self.top_v)
        return torch.where(self.masked, 0.0, (self.z - self.v) - (self.top_z - self.top_v) + lost)

    @functools.cached_property
    def soft(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(p, q, d, y, c): both distributions, d = log q - log p, y = d + c before the log-sum-exps were
        known."""
        (ez, sz), (ev, sv) = self.sums
        # fp64's finfo.min over a small T: no number, and no mask
        y = (self.apart / self.temperature).clamp(-LARGEST, LARGEST)
        near = (y.abs() < 0.5) & ~self.masked
        away = (
            torch.where(near, ev * torch.expm1(torch.where(near, y, 0.0)), ez - ev).sum(-1, keepdim=True) / sv
        )
        near = away.abs() < 0.5
        c = torch.where(near, torch.log1p(torch.where(near, away, 0.0)), sz.log() - sv.log())
        return ev / sv, ez / sz, y - c, y, c

    def tilted(self, order: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(w, log R, F, disjoint): w = softmax of order v + (1 - order) z over T, R = sum p^order q^(1 -
        order), F where R is near 1."""
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
        if order <= 0.5:  # from the side of the smaller tilt, which loses the least
            term = (
                math_of.power_terms(q, p, t, -d, order, 1 / order, _psi, torch.abs, torch.where, False)[2] / b
            )
        else:
            term = math_of.power_terms(p, q, t, d, b, 1 / b, _psi, torch.abs, torch.where, False)[2] / order
        term = torch.where(self.no_v, q / order, torch.where(self.no_z, p / b, term))
        F = torch.where(self.no_z & self.no_v, 0.0, term).sum(-1, keepdim=True)
        log_r = torch.where(near, torch.log1p(torch.where(near, -b * order * F, 0.0)), log_r)
        F = torch.where(near, F, torch.expm1(torch.where(near, 0.0, log_r)) / (-b * order))
        return w, log_r, torch.where(disjoint, 1 / (b * order), F), disjoint

    def mixture(self, form: math_of.Form) -> tuple[Tensor, Tensor]:
        """(D, G = q xi) of the mixture family: T dD/dz = G - q sum G."""
        p, q, d, _, _ = self.soft
        sides = form.sides
        b, o, x, only_b, only_o = (
            (q, p, -d, self.only_z, self.only_v)
            if sides.student_base
            else (p, q, d, self.only_v, self.only_z)
        )
        l = sides.mix  # noqa: E741
        x = x.clamp_max(700) if l else x  # beyond, log m is log o + log(l), whatever x
        m1 = torch.expm1(x.clamp_max(700))
        u = torch.log1p(l * m1)
        chi = torch.where(u.abs() < 0.5, _psi(u), l * m1 - u)
        b_in, o_in = torch.where(self.masked, 1.0, b), torch.where(self.masked, 1.0, o)
        small = torch.where(x.abs() < 0.5, m1, 0.0)  # its square must not be inf where it is not asked for
        term = math_of.mixture_term(
            b_in,
            o_in,
            x,
            small,
            _psi(x),
            u,
            chi,
            x - u,
            l,
            sides.base,
            sides.other,
            torch.abs,
            torch.where,
            sides.shares,
        )
        xi = math_of.mixture_slope(
            m1, u, chi, x - u, l, sides.base, sides.other, sides.student_base, sides.shares
        )
        term, G = (
            torch.where(self.masked, 0.0, t) for t in (term, (b_in if sides.student_base else o_in) * xi)
        )
        moves = _alone(b, only_b, sides.b_moves) if sides.student_base else _alone(o, only_o, sides.o_moves)
        return (term + _alone(b, only_b, sides.b_alone) + _alone(o, only_o, sides.o_alone)).sum(-1), G + moves

    def divergence(self, divergence: math_of.Divergence) -> Tensor:
        """D, (rows,); the limit of T^2 D at T = inf."""
        form = divergence.form
        if math.isinf(self.temperature):
            return self._limit(form)
        p, q, d, y, c = self.soft
        lone_p, lone_q = self.only_v.any(-1), self.only_z.any(-1)
        if form.family == "mixture":
            D = self.mixture(form)[0]
            return torch.where(D == math.inf, self._infinite(form, D == math.inf), D)
        if form.family == "tvd":
            return self._gap(p, q, d).abs().sum(-1) / 2
        term = math_of.kl_terms(p, q, d, _psi, torch.abs, torch.where)[1]
        kl = torch.where(self.only_z, q, torch.where(self.no_z, 0.0, term)).sum(-1)
        # alpha below 1e-16, reversed
        if form.family in ("kl", "cross_entropy") or form.order == 1 and form.family == "renyi":
            value = torch.where(lone_p, self._infinite(form, lone_p), form.factor * kl)
            if form.family == "cross_entropy":
                T = self.temperature
                total = _log_total(self._exp(self.v, self.top_v, self.no_v, T), self.v, self.top_v, self.no_v)
                value = value - (p * torch.where(self.no_v, 0.0, (self.v - self.top_v) / T - total)).sum(-1)
            return value
        if form.family == "support":
            lone, x = (self.no_z, p) if form.reverse else (self.no_v, q)
            inside, outside = torch.where(lone, 0.0, x).sum(-1), torch.where(lone, x, 0.0).sum(-1)
            value = torch.log1p(outside / torch.where(inside == 0, 1.0, inside))
            return torch.where(inside == 0, self._infinite(form, inside == 0), value)
        if form.family == "extreme":
            sign = -1 if form.reverse else 1
            least, share, _ = self._least(sign)
            value = (sign * (c.squeeze(-1) - (share * y).sum(-1))).clamp_min(0.0)
            # p = q
            value = torch.where((least | (self.no_v if form.reverse else self.no_z)).all(-1), 0.0, value)
            lost = lone_q if form.reverse else lone_p
            return torch.where(lost, self._infinite(form, lost), value)
        _, log_r, F, disjoint = self.tilted(form.order)
        lost = (
            lone_p
            if form.order > 1
            else lone_q
            if form.order < 0
            else disjoint.squeeze(-1) & (form.family == "renyi")
        )
        value = log_r.squeeze(-1) / (form.order - 1) if form.family == "renyi" else F.squeeze(-1)
        value = form.factor * value
        if form.family == "alpha" and 0 < form.order < 1:
            return value  # always finite
        return torch.where(lost, self._infinite(form, lost), value)

    def gradient(self, divergence: math_of.Divergence) -> Tensor:
        """T dD/dz, (rows, vocab), from the table of formulas; the limit's own gradient at T = inf."""
        form = divergence.form
        if math.isinf(self.temperature):
            n, x = self._differences(form)
            return form.limit * x / n
        p, q, d, _, _ = self.soft
        if form.family in ("mixture", "tvd"):
            D, G = self.mixture(form) if form.family == "mixture" else (q, q * self._gap(p, q, d).sign() / 2)
            g = G - q * G.sum(-1, keepdim=True)
            g = torch.where((D == math.inf).unsqueeze(-1), math.nan, g) if form.family == "mixture" else g
            return torch.where(self.no_z, 0.0, g)
        if form.family == "support":
            if form.reverse:
                return torch.zeros_like(q)
            inside, outside = (
                torch.where(self.no_v, 0.0, q).sum(-1, keepdim=True),
                torch.where(self.no_v, q, 0.0).sum(-1, keepdim=True),
            )
            return torch.where(
                self.no_v,
                q,
                -q * torch.where(inside == 0, 0.0, outside / torch.where(inside == 0, 1.0, inside)),
            )
        if form.family == "extreme":
            sign = -1 if form.reverse else 1
            least, share, rest = self._least(sign)
            return sign * torch.where(least, -share * rest, q)
        # x = log(w / p), or log(w / q): for small orders w is nearer to q, and q itself as the order goes to
        # 0
        of_q = form.order <= 0.5
        w, x, unit = p, torch.zeros_like(d), form.factor
        if form.family in ("renyi", "alpha") and form.order != 1:
            tilted, log_r, F, disjoint = self.tilted(form.order)
            lost = (
                (self.only_v if form.order > 1 else self.only_z).any(-1, keepdim=True)
                if not 0 < form.order < 1
                else disjoint
            )
            w = torch.where(lost, p, tilted)
            x = torch.where(
                lost, math.inf if of_q else 0.0, (-form.order if of_q else 1 - form.order) * d - log_r
            )
            unit = form.factor
            if form.family == "alpha":
                gain = log_r.exp() / form.order
                unit = unit * torch.where(lost, 0.0 if 0 < form.order < 1 else math.nan, gain)
        # x as a difference of numbers that are far larger (a class at finfo.min) has no digits
        near = (
            (x.abs() < 0.5)
            & (d.abs() < (700 / abs(form.order) if of_q and form.order else 0.5))
            & ~self.masked
        )
        less = -q * torch.expm1(x) if of_q else p * (torch.expm1(d) - torch.expm1(x))
        return torch.where(self.no_z, 0.0, unit * torch.where(near, less, q - w))

    def _infinite(self, form: math_of.Form, rows: Tensor) -> Tensor:
        """+inf, with the gradients that are agreed upon for the rows that are asked for (docs/numerics.md,
        7)."""
        p, q, *_ = self.soft
        (_, sz), (_, sv) = self.sums
        student, teacher = _where_infinite(form)
        of_z, of_v = (self.z, self.no_z, sz, p, rows), (self.v, self.no_v, sv, q, rows)
        return (
            math.inf + self._nothing_but_gradient(student, *of_z) + self._nothing_but_gradient(teacher, *of_v)
        )

    def _nothing_but_gradient(
        self, factors: tuple[float, float] | None, x, absent, total, other, rows
    ) -> Tensor:
        """0, whose T d/dx is factors[0] softmax(x/T) - factors[1] other; nan without factors, in the rows
        that are asked for."""
        if factors is None:
            u = torch.where(rows.unsqueeze(-1) & ~absent, x - x.detach(), 1.0).sqrt()
            return (u - u * 1.0).sum(-1)
        term = factors[0] * total.log().squeeze(-1) - factors[1] / self.temperature * (
            other.detach() * x
        ).sum(-1)
        return term - term.detach()

    def _gap(self, p: Tensor, q: Tensor, d: Tensor) -> Tensor:
        """q - p to its own digits."""
        near = (d.abs() < 0.5) & ~self.masked
        return torch.where(near, p * torch.expm1(torch.where(near, d, 0.0)), q - p)

    def _least(self, sign: int) -> tuple[Tensor, Tensor, Tensor]:
        """The classes where sign d is smallest, as far as the logits as given tell them apart; q restricted
        to them; q of the others."""
        less, more = (self.no_z, self.no_v) if sign > 0 else (self.no_v, self.no_z)
        gap = torch.where(more, math.inf, torch.where(less, -math.inf, sign * (self.z - self.v).detach()))
        least = (gap == gap.amin(-1, keepdim=True)) & ~self.masked
        gap = torch.where(least, sign * _lost_digits(self.z, self.v), math.inf)
        least &= gap == gap.amin(-1, keepdim=True)
        top = torch.where(least, self.z.detach(), -math.inf).amax(-1, keepdim=True)
        share = torch.where(
            least, ((self.z.detach() - torch.where(top > -math.inf, top, 0.0)) / self.temperature).exp(), 0.0
        )
        share = share / torch.where(top > -math.inf, share.sum(-1, keepdim=True), 1.0)
        return least, share, torch.where(least, 0.0, self.soft[1]).sum(-1, keepdim=True)

    def _hard(self, labels: Tensor):
        """(label, r, x, x of the label, others): x = z - z_r, others the sum of e^x over j != r, r the label
        where that is a largest class.

        The other classes alone are then what value and gradient are made of where q of the label rounds to 1.
        """
        label = labels.clamp(0, self.z.shape[-1] - 1).unsqueeze(-1)
        z = torch.where(self.no_z, -math.inf, self.z.detach())
        r = torch.where(z.gather(-1, label) == self.top_z, label, z.argmax(-1, keepdim=True))
        # of a masked class e^x may be inf, whose derivative times 0 is nan
        x = torch.where(self.no_z, 0.0, self.z - self.z.gather(-1, r))
        # -inf, with its gradient of 1, where the label is masked
        of_label = self.given_z.gather(-1, label) - self.z.gather(-1, r)
        return (
            label,
            r,
            x,
            of_label,
            torch.where(self.no_z, 0.0, x.exp()).scatter(-1, r, 0.0).sum(-1, keepdim=True),
        )

    def cross_entropy(self, labels: Tensor) -> Tensor:
        """Hard cross entropy at T = 1, (rows,); nan for a label outside the vocabulary."""
        label, r, _, of_label, others = self._hard(labels)
        value = torch.log1p(others) - torch.where(r == label, 0.0, of_label)
        return torch.where(label == labels.unsqueeze(-1), value, math.nan).squeeze(-1)

    def cross_entropy_gradient(self, labels: Tensor) -> Tensor:
        """softmax(z) - onehot(label), (rows, vocab)."""
        label, r, x, _, others = self._hard(labels)
        q = torch.where(self.no_z, 0.0, x.exp()) / (1 + others)
        at_label = torch.where(r == label, -others / (1 + others), q.gather(-1, label) - 1)
        return torch.where(label == labels.unsqueeze(-1), q.scatter(-1, label, at_label), math.nan)

    def _evenly(self):
        """(log-sum-exp at T = 1 and mean of the logits, less the largest one; softmax, 1 / N) over the N
        classes that are not masked."""
        e = self._exp(self.z, self.top_z, self.no_z, 1.0)
        present = (~self.no_z).to(self.z.dtype)
        each = present / present.sum(-1, keepdim=True)
        mean = (torch.where(self.no_z, 0.0, self.z - self.top_z) * each).sum(-1, keepdim=True)
        return _log_total(e, self.z, self.top_z, self.no_z), mean, e / e.sum(-1, keepdim=True), each

    def hard(self, labels: Tensor, modifiers: Modifiers) -> Tensor:
        """The hard term, (rows,): cross entropy with label smoothing and the z-loss."""
        value, smooth = self.cross_entropy(labels), modifiers.label_smoothing
        if not (smooth or modifiers.z_loss):
            return value
        log_sum, mean, _, _ = self._evenly()
        more = smooth * (log_sum - mean) + modifiers.z_loss * (log_sum + self.top_z) ** 2
        return (1 - smooth) * value + more.squeeze(-1)

    def hard_gradient(self, labels: Tensor, modifiers: Modifiers) -> Tensor:
        """Of `hard`, (rows, vocab)."""
        g, smooth = self.cross_entropy_gradient(labels), modifiers.label_smoothing
        if not (smooth or modifiers.z_loss):
            return g
        log_sum, _, q, each = self._evenly()
        return (1 - smooth) * g + smooth * (q - each) + 2 * modifiers.z_loss * (log_sum + self.top_z) * q

    def columns(self, divergence: math_of.Divergence, labels: Tensor | None) -> Tensor:
        """Statistics, (rows, COLUMNS) as csrc/api.h has them."""
        D = self.divergence(divergence)
        hard = torch.full_like(D, math.nan) if labels is None else self.cross_entropy(labels)
        sums, entropies, tops = [], [], []
        for x, top, masked in ((self.z, self.top_z, self.no_z), (self.v, self.top_v, self.no_v)):
            scaled = torch.where(masked, -math.inf, (x - top) / self.temperature)
            total = scaled.logsumexp(-1, keepdim=True)
            sums.append((total + top / self.temperature).squeeze(-1))
            log_p = torch.where(masked, 0.0, scaled - total)
            entropies.append(-torch.where(masked, 0.0, log_p.exp() * log_p).sum(-1))
            tops.append(torch.where(masked, -math.inf, x).argmax(-1).double())
        return torch.stack([D, hard, *sums, *entropies, *tops], -1)

    def _differences(self, form: math_of.Form) -> tuple[Tensor, Tensor]:
        """T = inf: the classes both have, and z - v over them, centred but for logit matching."""
        n = (~self.masked).sum(-1, keepdim=True).clamp_min(1)
        if form.family == "logit_matching":
            return n, torch.where(self.masked, 0.0, self.z - self.v)
        x = self.apart
        return n, torch.where(self.masked, 0.0, x - x.sum(-1, keepdim=True) / n)

    def _limit(self, form: math_of.Form) -> Tensor:
        """(k/2) Var(z - v), or |z - v|^2 / (2 V) for logit matching; +inf for masks that differ, where k = 0
        for those that matter."""
        n, x = self._differences(form)
        value = form.limit / 2 * (x * x).sum(-1) / n.squeeze(-1)
        differ = self.only_z | self.only_v
        if form.family == "support":
            differ = self.only_v if form.reverse else self.only_z
        return value + torch.where(differ.any(-1), math.inf, 0.0)


def _where_infinite(form: math_of.Form) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
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
    return None, (1, 1) if form.family == "mixture" else None  # reverse KL, alpha


def _lost_digits(a: Tensor, b: Tensor) -> Tensor:
    """(a - b) less a - b as rounded; 0 where that is out of range."""
    a, b = a.detach(), b.detach()
    gap = a - b
    back = a - gap
    lost = (a - (gap + back)) + (back - b)
    return torch.where(lost.abs() < math.inf, lost, 0.0)


def _alone(x: Tensor, only: Tensor, factor: float) -> Tensor:
    """factor x where only one of the two has the class; +inf for a factor of inf, also where x underflows."""
    return torch.where(only, torch.where(only, x, 1.0).clamp_min(1e-300) * factor, 0.0)


def _psi(x: Tensor) -> Tensor:
    near = x.abs() < 0.5
    return math_of.psi_series(torch.where(near, x, 0.0))


def _log_total(e: Tensor, x: Tensor, top: Tensor, masked: Tensor) -> Tensor:
    """log sum e with the largest term, 1, left out of the sum: log1p of the others keeps its digits when they
    are few."""
    largest = (x == top) & ~masked
    return torch.log1p(
        torch.where(largest, e - 1, e).sum(-1, keepdim=True) + (largest.sum(-1, keepdim=True) - 1)
    )
