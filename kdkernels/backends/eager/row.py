"""What the divergences share of rows of logits, in plain PyTorch and the dtype of the logits.

Stage after stage: masks and largest logits, `sums` of exponentials, then `soft`, both distributions and
d = log q - log p.

Where a class is masked (-inf), numbers are replaced before they meet an operation that could not undo them: a
gradient of `where` is only as good as its unused branch. Rows without masks and without a graph skip that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import terms
from ...call import row_dtype


class Term(NamedTuple):
    value: Tensor  # D, (rows,); the limit of T^2 D at T = inf
    gradient: Callable[[], Tensor]  # T dD/dz, (rows, vocab); the limit's own gradient at T = inf
    lost: Tensor | None = None  # (rows,): whether fp32 has too few digits for a row


class Soft(NamedTuple):
    p: Tensor
    q: Tensor
    d: Tensor  # log q - log p
    y: Tensor  # d + c, known before the log-sum-exps are
    c: Tensor  # (rows, 1)


class Row:
    """(rows, vocab) logits without nan and +inf.

    temperature: of all rows, or (rows, 1). plain: no class is masked, and no graph is made.
    """

    def __init__(self, z: Tensor, v: Tensor, temperature: float | Tensor, plain: bool):
        self.temperature, self.plain = temperature, plain
        self.given_z = self.z = z
        self.v = v
        self.no_z = self.no_v = self.only_z = self.only_v = self.masked = None
        if not plain:
            self.no_z, self.no_v = z == -math.inf, v == -math.inf
            self.only_z, self.only_v = self.no_v & ~self.no_z, self.no_z & ~self.no_v
            self.masked = self.no_z | self.no_v
            self.z, self.v = torch.where(self.no_z, 0.0, z), torch.where(self.no_v, 0.0, v)
        self.top_z = z.detach().amax(-1, keepdim=True)
        self.top_v = v.detach().amax(-1, keepdim=True)
        self.abs, self.where = (_Size, _chosen) if plain else (torch.abs, torch.where)
        # below it e^x and e^-x are normal numbers
        self.reach = 700.0 if z.dtype == torch.float64 else 85.0

    def fill(self, mask: Tensor | None, value: float, x: Tensor) -> Tensor:
        """x, with a value at the classes of one of the masks."""
        return x if mask is None else torch.where(mask, value, x)

    def rows_with(self, mask: Tensor | None) -> Tensor:
        """(rows,): whether a mask has a class."""
        return self.top_z.squeeze(-1) != self.top_z.squeeze(-1) if mask is None else mask.any(-1)

    def near(self, x: Tensor, bound: float = 0.5):
        """Whether |x| < bound, at the classes that both have."""
        found = self.abs(x) < bound
        return found if self.masked is None else found & ~self.masked

    def scaled_exp(self, x: Tensor, top: Tensor, masked: Tensor | None, temperature) -> Tensor:
        return self.fill(masked, 0.0, ((x - top) / temperature).exp())

    @functools.cached_property
    def sums(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """e^((x - top) / T) and its sum, for z and for v."""
        T = self.temperature
        ez = self.scaled_exp(self.z, self.top_z, self.no_z, T)
        ev = self.scaled_exp(self.v, self.top_v, self.no_v, T)
        return (ez, total(ez)), (ev, total(ev))

    @functools.cached_property
    def apart(self) -> Tensor:
        """(z - v) - (top_z - top_v), 0 where a class is masked; with what the differences lose to rounding,
        all of it where one model's logits are all at finfo.min."""
        lost = lost_digits(self.z, self.v) - lost_digits(self.top_z, self.top_v)
        return self.fill(self.masked, 0.0, (self.z - self.v) - (self.top_z - self.top_v) + lost)

    @functools.cached_property
    def soft(self) -> Soft:
        (ez, sz), (ev, sv) = self.sums
        # finfo.min over a small T: no number, and no mask
        largest = torch.finfo(ez.dtype).max
        y = (self.apart / self.temperature).clamp(-largest, largest)
        away = self.where(self.near(y), ev * torch.expm1(y.clamp(-0.5, 0.5)), ez - ev)
        away = total(away) / sv
        near = away.abs() < 0.5
        c = torch.where(near, torch.log1p(torch.where(near, away, 0.0)), sz.log() - sv.log())
        return Soft(ev / sv, ez / sz, y - c, y, c)


class _Size:
    """|x| as something to compare: torch.where is twenty times as slow as a product on a CPU, so that masks
    are 0.0 and 1.0."""

    def __init__(self, x: Tensor):
        self.x = x.abs()

    def __lt__(self, bound: float) -> _Mask:
        return _Mask(torch.lt(self.x, bound, out=torch.empty_like(self.x)))


class _Mask:
    def __init__(self, x: Tensor):
        self.x = x

    def __and__(self, other: _Mask) -> _Mask:
        return _Mask(self.x * other.x)


def _chosen(mask: _Mask, a: Tensor, b: Tensor) -> Tensor:
    """`where` of such a mask; nan where what is not chosen is inf."""
    return torch.lerp(b, a, mask.x)


# ---------------------------------------------------------------- digits


def summed(x: Tensor) -> Tensor:
    """Sum over the classes, (rows,), of the rows' dtype."""
    return x.sum(-1, dtype=row_dtype(x.device))


def total(x: Tensor) -> Tensor:
    """The same as (rows, 1), of the logits' dtype."""
    return summed(x).to(x.dtype).unsqueeze(-1)


def ratio(x: Tensor) -> Tensor:
    """psi(x) / x where |x| < 1/2."""
    series = terms.ratio_series if x.dtype == torch.float64 else terms.ratio_short
    return series(x.clamp(-0.5, 0.5))


def lost_digits(a: Tensor, b: Tensor) -> Tensor:
    """(a - b) less a - b as rounded; 0 where that is out of range."""
    a, b = a.detach(), b.detach()
    gap = a - b
    back = a - gap
    lost = (a - (gap + back)) + (back - b)
    return lost.nan_to_num(0.0, 0.0, 0.0)
