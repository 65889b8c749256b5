"""The operator by what it takes: rows of logits, and numbers that no reduction is in."""

from __future__ import annotations

import torch
from bounds import cast_bound, gradient_bound_of, spread_of

from kdkernels import ops
from kdkernels.call import Call, Numbers
from kdkernels.divergence import parse
from kdkernels.transforms import Modifiers


def call(z, v, y=None, w=None, divergence="kl", T=1.0, hard=0.0, vocab=None, modifiers=(), **buffers) -> Call:
    """All of the scales 1 but for the hard term's; buffers: grad and stats."""
    numbers = Numbers(T, 1.0, 1.0, hard, hard, Modifiers(*modifiers))
    return Call(z, v, vocab or z.shape[-1], y, w, parse(divergence), numbers, **buffers)


def run(backend: str, call: Call) -> torch.Tensor:
    """The operator, of a record."""
    return torch.ops.kdkernels.loss_into.default(*call.flat(backend))


def losses(backend: str, *args, **options) -> torch.Tensor:
    """Of the rows, of `call`'s arguments."""
    return run(backend, call(*args, **options))


def with_gradient(backend: str, z, *args, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, T dD/dz and the hard term's)."""
    grad = torch.full_like(z, 7.0)
    return losses(backend, z, *args, grad=grad, **options), grad


def with_statistics(backend: str, z, *args, grad=None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, statistics as stats.py has them)."""
    stats = ops.new_columns(z)
    return losses(backend, z, *args, grad=grad, stats=stats, **options), stats


def check(backend, z, v, name, T=1.0, y=None, weight=None, modifiers=(), inplace=False) -> None:
    """Value and gradient against the reference in fp64, at the bounds; the last two classes do not count."""
    asked = y, weight, name, T, 0.0 if y is None else 0.3, z.shape[-1] - 2, modifiers
    D, exact = with_gradient("eager", z.double(), v.double(), *asked)
    g = z.clone() if inplace else torch.full_like(z, 7.0)
    loss = losses(backend, g if inplace else z, v, *asked, grad=g)
    floor = 1e-30 if not modifiers else 3e-7  # transformed logits are rounded to fp32
    torch.testing.assert_close(loss, D, rtol=2e-6 * (1 + spread_of(z, v, T)), atol=floor, equal_nan=True)
    for i in range(len(z)):
        assert (g[i, -2:] == 0).all() and torch.equal(g[i].isnan(), exact[i].isnan())
        if D[i] < 1e30 and not exact[i].isnan().any():
            cast = cast_bound(g.dtype, exact[i]).norm() if g.dtype.itemsize < 4 else 0.0
            bound = gradient_bound_of(float(exact[i].norm()), float(D[i]))
            assert float((g[i].double() - exact[i]).norm()) <= bound + cast, (name, T)
