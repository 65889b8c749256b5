"""The backend of plain PyTorch, for every device: what the others are read against, and what runs where they
do not.

`loss` goes chunk by chunk, in fp32 for logits up to fp32, and takes the gradient from its formula. Rows that
fp32 cannot hold are computed again in fp64. `rows` is one graph in fp64, which autograd differentiates to any
order. The mathematics is in row.py and families.py (the divergences), limits.py (T = inf,
the orders 0 and inf) and hard.py (the hard term).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...call import Call, Rows, row_dtype
from ...transforms import LogitTransform
from . import hard as hard_term
from .families import entropy, soft_term
from .row import Row, Term

name = "eager"
# logits of a chunk, of which a dozen temporaries stay in the caches
CHUNK = 1 << 17
# What fp32 is for: temperatures where the squares of (z - v) / T are normal numbers, logits whose differences
# are, and the families that are sums over classes.
HOTTEST, FARTHEST = 1e6, 1e30
SUMS = ("kl", "cross_entropy", "renyi", "alpha", "mixture", "tvd", "mixed_kl")


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...] = ()) -> str | None:
    """Why this backend cannot run on a device for such logits: never."""
    return None


# ---------------------------------------------------------------- rows as they are computed


class _Batch:
    """(rows, vocab) logits made ready: transformed, and zeros for rows that are broken or do not count.

    graph: for autograd, which is not to depend on what the logits are.
    """

    def __init__(self, call: Call, dtype: torch.dtype, graph: bool = False):
        self.call, self.told, n = call, call.stats is not None, call.numbers
        self.soft = n.value_scale != 0 or n.grad_scale != 0
        self.hard = call.labels is not None and (n.hard_scale != 0 or n.hard_grad_scale != 0)
        of_z, of_v = n.modifiers.transforms
        z, v = call.student.to(dtype), call.teacher.to(dtype)
        self.counts = torch.ones_like(z[:, :1], dtype=torch.bool)
        if call.weight is not None:
            self.counts = (call.weight != 0).unsqueeze(-1)
        x, y = (None, None) if graph else (of_z(z), of_v(v))
        plain = not graph and _all_finite(x) and _all_finite(y)
        if plain:
            self.broken_z = self.broken_v = torch.zeros_like(self.counts)
        else:
            x, self.broken_z = _clean(z, self.counts & (self.soft or self.hard or self.told), of_z)
            y, self.broken_v = _clean(v, self.counts & (self.soft or self.told), of_v)
        # factors of D, (rows, 1), and of T dD/dz, besides the call's own scales
        T, self.unit, self.gradient_unit = n.temperature, 1.0, 1.0
        if call.temperature is not None:
            T = _temperatures(call).unsqueeze(-1)
            self.unit = T * T if n.squared else T / T
            self.gradient_unit, T = self.unit / T, T.to(dtype)
        self.row, self.slope = Row(x, y, T, plain), of_z.slope
        self.transformed = of_z != LogitTransform()
        self.labels = None
        if call.labels is not None:
            self.labels = torch.where(self.counts.squeeze(-1), call.labels, 0)

    @functools.cached_property
    def term(self) -> Term:
        return soft_term(self.row, self.call.divergence.form)

    @property
    def broken(self) -> Tensor:
        """(rows, 1): whether a term that counts reads a broken row."""
        return self.broken_z & (self.soft or self.hard) | self.broken_v & self.soft

    def losses(self) -> Tensor:
        """(rows,): without the rows' weights; not nan yet where a row is broken."""
        n, dtype = self.call.numbers, row_dtype(self.call.student.device)
        out = self.counts.squeeze(-1).to(dtype) * 0.0
        if self.soft:
            value = self.unit * self.term.value.to(dtype).unsqueeze(-1)
            out = out + n.value_scale * value.squeeze(-1)
        if self.hard:
            out = out + n.hard_scale * hard_term.hard(self.row, self.labels, n.modifiers).to(dtype)
        return out

    def gradient(self) -> Tensor:
        """(rows, vocab): without the rows' weights."""
        n = self.call.numbers
        g = torch.zeros_like(self.row.z)
        if self.soft:
            unit = n.grad_scale * self.gradient_unit
            g = (unit.to(g.dtype) if isinstance(unit, Tensor) else unit) * self.term.gradient()
        if self.hard:
            g = g + n.hard_grad_scale * hard_term.hard_gradient(self.row, self.labels, n.modifiers)
        if self.transformed:
            g = g * self.slope(self.row.given_z)
        return torch.where(self.broken, math.nan, g) if self.broken.any() else g

    def columns(self) -> Tensor:
        """Statistics, (rows, COLUMNS) as csrc/api.h has them."""
        row, T = self.row, self.row.temperature
        D = self.term.value
        hard = torch.full_like(D, math.nan)
        if self.labels is not None:
            hard = hard_term.cross_entropy(row, self.labels)
        sums, entropies, tops = [], [], []
        sides = (row.z, row.top_z, row.no_z), (row.v, row.top_v, row.no_v)
        for (x, top, masked), (e, total) in zip(sides, row.sums, strict=True):
            sums.append((total.log() + top / T).squeeze(-1))
            entropies.append(entropy(row, (e, total), x, top, masked))
            tops.append(row.fill(masked, -math.inf, x).argmax(-1).to(D.dtype))
        columns = torch.stack([D, hard, *sums, *entropies, *tops], -1)
        broken = (self.broken_z | self.broken_v).repeat(1, columns.shape[-1])
        broken[:, 1:2] = self.broken_z  # the cross entropy, which is the student's alone
        return torch.where(broken | ~self.counts, math.nan, columns).to(row_dtype(D.device))


def _temperatures(call: Call) -> Tensor:
    """The rows' own, 1 where a row does not count, whose own may be anything."""
    T = call.temperature
    return T if call.weight is None else torch.where(call.weight != 0, T, 1.0)


def _all_finite(x: Tensor) -> bool:
    low, high = x.aminmax()
    return bool((low > -math.inf) & (high < math.inf))


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


def _weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    """Rows, or their losses, times the weights; 0 where a weight is, whatever they are."""
    if weight is None:
        return x
    weight = weight.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return torch.where(weight != 0, weight * x, 0.0)


# ---------------------------------------------------------------- a graph


def rows(call: Call) -> Tensor:
    """Per-row loss, (rows,), in plain autograd; rows of weight 0, and the logits of a term of weight 0, are
    not looked at."""
    z, v = (x[..., : call.vocab].reshape(-1, call.vocab) for x in (call.student, call.teacher))
    of_rows = {x: None if (y := getattr(call, x)) is None else y.reshape(-1) for x in Rows._fields}
    call = call._replace(student=z, teacher=v, stats=None, **of_rows)
    batch = _Batch(call, row_dtype(z.device), graph=True)
    loss = batch.losses()
    # nan in the value of the rows that are broken, and in the gradient of all the logits that are read; 0
    # added to the others
    broken = batch.broken
    for x, lost in ((call.student, broken), (call.teacher, broken & batch.soft)):
        x = torch.where(lost, x.to(loss.dtype), 0.0)
        loss = loss + (torch.where(lost, math.nan, 0.0) * x).sum(-1)
    return _weighted(loss, call.weight)


# ---------------------------------------------------------------- chunks


class _Found(NamedTuple):
    losses: Tensor  # (rows,)
    grad: Tensor | None  # (rows, vocab)
    columns: Tensor | None


def loss(call: Call) -> Tensor:
    """The contract of `Call`."""
    if call.student.dim() == 1:
        call = _each(call, lambda x: x.unsqueeze(0))
        call = call._replace(grad=None if call.grad is None else call.grad.unsqueeze(0))
    out = torch.empty(
        math.prod(call.student.shape[:-1]),
        dtype=row_dtype(call.student.device),
        device=call.student.device,
    )
    for index, at in _chunks(call):
        chunk = _each(call, lambda x, at=at: x[at])
        chunk = chunk._replace(student=chunk.student[:, : call.vocab], teacher=chunk.teacher[:, : call.vocab])
        found = _found(chunk)
        out[index] = found.losses.to(out.device, out.dtype)
        if call.stats is not None:
            call.stats[index] = found.columns.to(out.device, out.dtype)
        if call.grad is not None:
            call.grad[(*at, slice(call.vocab))] = found.grad.to(out.device, call.grad.dtype)
            call.grad[(*at, slice(call.vocab, None))] = 0
    return out


def _each(call: Call, change) -> Call:
    """The call with its tensors that have rows changed, those to be filled in apart."""
    names = [x for x in ("student", "teacher", *Rows._fields) if getattr(call, x) is not None]
    return call._replace(**{name: change(getattr(call, name)) for name in names})


def _chunks(call: Call) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Numbers of rows, and what indexes them in leading dimensions."""
    leading = call.student.shape[:-1]
    count, step = math.prod(leading), max(1, CHUNK // max(call.vocab, 1))
    for start in range(0, count, step):
        index = torch.arange(start, min(start + step, count), device=call.student.device)
        yield index, torch.unravel_index(index, leading)


def _found(call: Call) -> _Found:
    """Of (rows, vocab) logits: in fp32 where that does, and then again in fp64 what is lost."""
    if not _fits_single(call):
        return _in_double(call)
    found, lost = _computed(call, torch.float32)
    if lost.any():
        at = lost.nonzero().squeeze(-1)
        for x, y in zip(found, _in_double(_each(call, lambda x: x[at])), strict=True):
            if x is not None:
                x[at] = y.to(x.device, x.dtype)
    return found


def _in_double(call: Call) -> _Found:
    """On the CPU where the device has no fp64."""
    if row_dtype(call.student.device) != torch.float64:
        call = _each(call, Tensor.cpu)
    return _computed(call, torch.float64)[0]


def _fits_single(call: Call) -> bool:
    if torch.float64 in (call.student.dtype, call.teacher.dtype):
        return False
    own = call.temperature is not None and call.temperature.numel()
    hottest = float(_temperatures(call).max()) if own else call.numbers.temperature
    return call.divergence.form.family in SUMS and hottest <= HOTTEST


def _computed(call: Call, dtype: torch.dtype) -> tuple[_Found, Tensor]:
    """What is asked for, and which rows the dtype cannot hold."""
    batch = _Batch(call, dtype)
    row = batch.row
    losses = torch.where(batch.broken.squeeze(-1), math.nan, batch.losses())
    grad = batch.gradient() if call.grad is not None else None
    columns = batch.columns() if batch.told else None
    lost = torch.zeros_like(batch.counts.squeeze(-1))
    if batch.soft and batch.term.lost is not None:
        lost = batch.term.lost
    lost = lost | ~(losses.abs() < torch.finfo(dtype).max)
    lost |= torch.maximum(row.z.abs(), row.v.abs()).amax(-1) > FARTHEST
    if columns is not None:  # but for the cross entropy, of which there may be none
        lost |= ~columns[:, 2:].sum(-1).isfinite()
    if grad is not None:
        lost |= ~grad.sum(-1).isfinite()
        grad = _weighted(grad, call.weight)
    return _Found(_weighted(losses, call.weight), grad, columns), lost & batch.counts.squeeze(-1)


# ---------------------------------------------------------------- log-softmax


def log_softmax(logits: Tensor, upstream: Tensor | None, temperature: float) -> Tensor:
    """log softmax(x / T), or its gradient for an upstream one; see ops.py."""
    x = logits.to(row_dtype(logits.device))
    flat = math.isinf(temperature)  # the same logit wherever there is one, whatever it is
    if flat and upstream is not None:
        return torch.zeros_like(logits)
    finite = x.abs() < math.inf
    scaled = torch.where(finite, 0.0, x).detach() if flat else x / temperature
    if upstream is not None:
        u = upstream.to(x.dtype)
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
