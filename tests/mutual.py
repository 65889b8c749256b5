"""Both models' gradients of one call."""

from __future__ import annotations

import torch
from bounds import cast_bound, gradient_bound_of, spread_of

from kdkernels import ops


def check_both(
    backend,
    z,
    v,
    name,
    T=1.0,
    y=None,
    weight=None,
    modifiers=(),
    student=True,
    inplace=False,
    stats=False,
    relative=None,
):
    """Against the reference in fp64, at the bounds; the last two classes do not count. student: whether its
    gradient is asked for.

    relative: of a gradient's norm, where the bounds are those of rounding a probability, and the gradient is
        much smaller.
    """
    hard = 0.0 if y is None else 0.3
    options = name, T, 1.0, 1.0, hard, hard, z.shape[-1] - 2, list(modifiers)
    exact = [torch.empty(x.shape, dtype=torch.float64) for x in (z, v)]
    D, _ = ops.loss_and_grads(z.double(), v.double(), y, weight, *exact, *options, "eager", False)
    mine = [z.clone() if inplace else torch.full_like(z, 7.0), torch.full_like(v, 7.0)]
    asked = [mine[0] if student else None, mine[1]]
    loss, columns = ops.loss_and_grads(
        mine[0] if inplace else z, v, y, weight, *asked, *options, backend, stats
    )
    if stats:
        right = ops.loss_and_stats(z.double(), v.double(), y, weight, None, *options, "eager")[1]
        # an entropy is a sum of logarithms as deep as the row
        torch.testing.assert_close(
            columns, right, rtol=3e-6, atol=1e-6 + 2e-7 * spread_of(z, v, T), equal_nan=True
        )
    floor = 1e-30 if not modifiers else 3e-7  # transformed logits are rounded to fp32
    torch.testing.assert_close(loss, D, rtol=2e-6 * (1 + spread_of(z, v, T)), atol=floor, equal_nan=True)
    for g, e in list(zip(mine, exact, strict=True))[0 if student else 1 :]:
        for i in range(len(z)):
            assert (g[i, -2:] == 0).all() and torch.equal(g[i].isnan(), e[i].isnan())
            if D[i] < 1e30 and not e[i].isnan().any():
                cast = cast_bound(g.dtype, e[i]).norm() if g.dtype.itemsize < 4 else 0.0
                norm = float(e[i].norm())
                bound = relative * norm if relative else gradient_bound_of(norm, float(D[i]))
                assert float((g[i].double() - e[i]).norm()) <= bound + cast, (name, T)
