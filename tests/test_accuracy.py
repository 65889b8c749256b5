"""Value and gradient of every backend against the oracle, at the bounds of bounds.py, over temperature,
order, vocabulary and kind of row.

`python tests/test_accuracy.py [backend]` prints the largest error as a fraction of its bound in each cell.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import oracle
import pytest
import torch
from bounds import cast_bound, gradient_bound, gradient_bound_of, spread_of, value_bound, value_bound_of
from names import APART, USUAL
from rows import BACKENDS, DOUBLE_BACKENDS, KINDS, make_rows, with_masks

from kdkernels import fused_kd_loss

TEMPERATURES = (0.05, 0.1, 1.0, 2.0, 4.0, 20.0, 100.0, 1e4, 1e6, math.inf)
ORDERS = (0.0, 0.01, 0.5, 0.9, 0.9999, 1.0, 1.0001, 1.5, 2.0, 5.0, 20.0, math.inf)
VOCABS = (1, 2, 31, 1023, 50257, 128256)
OTHERS = (
    *(x for x in APART if x not in ("kl", "cross_entropy") and not x.startswith("renyi")),
    *("jsd(0.001)", "jsd(0.999)", "skew_kl(0.9)", "skew_reverse_kl(0.9)", "skew_reverse_kl(0.99)"),
    *("alpha(0.9999)", "reverse_renyi(0)", "reverse_renyi(0.9999)", "reverse_renyi(5)", "reverse_renyi(inf)"),
)


@functools.cache
def expected(kind, vocab, T, order, student=torch.float32, teacher=None, rows=1, seed=0):
    z, v = make_rows(kind, rows, vocab, student, teacher, seed)
    name = "kl" if order == 1 else f"renyi({order!r})"
    wide = lambda x: x.double().numpy()  # noqa: E731
    return z, v, [oracle.divergence_row(wide(z[i]), wide(v[i]), name, T) for i in range(rows)]


def measured(z, v, T, order, backend):
    z = z.clone().requires_grad_()
    limit = math.isinf(T)
    loss = fused_kd_loss(
        z,
        v,
        divergence=f"renyi({order!r})",
        temperature=T,
        t_squared=limit,
        reduction="none",
        backend=backend,
    )
    # the gradient through "sum" is the fused one; T^2 D / T = T dD/dz keeps it clear of fp16's small numbers
    fused_kd_loss(
        z,
        v,
        divergence=f"renyi({order!r})",
        temperature=T,
        soft_weight=1 if limit else T,
        t_squared=limit,
        reduction="sum",
        backend=backend,
    ).backward()
    return loss.detach(), z.grad


def cases(sweep: bool):
    """The grid, or of it a set in which every pair of (T, order, vocab, kind) that matters meets."""
    grid = [
        (T, order, vocab, kind)
        for T, order, vocab, kind in itertools.product(TEMPERATURES, ORDERS, VOCABS, KINDS)
        if not (math.isinf(T) and math.isinf(order))
    ]
    if sweep:
        return grid
    small = [c for c in grid if c[2] < 50257]
    large = [c for c in grid if c[2] >= 50257 and c[3] in ("plain", "close", "peaked_teacher")]
    return small[::13] + large[::29]


def errors(T, order, vocab, kind, backend):
    """[(error, bound)] of value and gradient for one case."""
    z, v, exact = expected(kind, vocab, T, order)
    loss, grad = measured(z, v, T, order, backend)
    out = []
    for i, (D, g) in enumerate(exact):
        # 1e-45: the smallest float
        out.append(
            (
                abs(float(loss[i]) - float(D)),
                value_bound(order, vocab, T, spread_of(z[i], v[i], T), float(D), kind.startswith("outlier"))
                + 1e-45,
            )
        )
        out.append(
            (float(np.linalg.norm(grad[i].numpy() - g)), gradient_bound(order, float(np.linalg.norm(g))))
        )
    return out


def check(T, order, vocab, kind, backend):
    for what, (error, bound) in zip(
        ("value", "gradient"), errors(T, order, vocab, kind, backend), strict=True
    ):
        assert error <= bound, f"{what}: error {error:.3g}, bound {bound:.3g}"


@pytest.mark.parametrize(
    ("backend", "T", "order", "vocab", "kind"),
    [(b, *c) for b in BACKENDS for c in cases(False)[:: 5 if b == "triton" else 1]],
)
def test_bounds(backend, T, order, vocab, kind):
    check(T, order, vocab, kind, backend)


def check_other(T, name, vocab, kind, backend):
    """`check` for the rest of the family. Where |d| is within rounding of 0, TVD's sign is not defined: those
    classes are left out."""
    z, v = make_rows(kind, 1, vocab)
    D, g = oracle.divergence_row(z[0].double().numpy(), v[0].double().numpy(), name, T)
    x = z.clone().requires_grad_()
    loss = fused_kd_loss(x, v, divergence=name, temperature=T, reduction="none", backend=backend)
    fused_kd_loss(
        x, v, divergence=name, temperature=T, soft_weight=T, reduction="sum", backend=backend
    ).backward()
    if not D < 1e38:  # beyond fp32
        assert float(loss) == math.inf
        return
    error, norm = x.grad[0].numpy() - g, float(np.linalg.norm(g))
    assert (
        abs(float(loss) - float(D))
        <= value_bound_of(name, vocab, T, spread_of(z[0], v[0], T), float(D)) + 1e-45
    )
    if name == "tvd":
        p, q = (torch.softmax(t[0].double() / T, -1).numpy() for t in (v, z))
        error = error[np.abs(q - p) > 3e-7 * (1 + 300 / T) * q]
    if norm < 1e37:
        assert float(np.linalg.norm(error)) <= gradient_bound_of(norm, float(D))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [x for x in USUAL if x != "cross_entropy"])
def test_every_divergence_on_every_backend(name, backend):
    for T, kind, vocab in ((1.0, "plain", 200), (4.0, "close", 31), (50.0, "independent", 31)):
        check_other(T, name, vocab, kind, backend)


def other_cases():
    grid = list(itertools.product(TEMPERATURES[:-1], OTHERS, VOCABS, KINDS))
    small = [c for c in grid if c[2] < 50257]
    large = [c for c in grid if c[2] >= 50257 and c[3] in ("plain", "close", "outlier_student")]
    return small[::53] + large[::97]


@pytest.mark.parametrize(
    ("backend", "T", "name", "vocab", "kind"),
    [(b, *c) for b in DOUBLE_BACKENDS for c in other_cases()]
    + [("triton", *c) for c in other_cases()[::5] if c[2] < 50257],
)
def test_bounds_of_the_others(backend, T, name, vocab, kind):
    check_other(T, name, vocab, kind, backend)


SKEWS = [
    f"{skew}({weight})" for skew in ("skew_kl", "skew_reverse_kl") for weight in (0.001, 0.9, 0.99, 0.999)
]


@pytest.mark.parametrize(
    ("backend", "name"),
    [*itertools.product(DOUBLE_BACKENDS, SKEWS), ("triton", SKEWS[2]), ("triton", SKEWS[6])],
)
def test_skews_of_little_weight(backend, name):
    """D is as small as a weight's square: from rows that are nearly alike to rows that have little in
    common."""
    for T, kind in itertools.product((0.5, 2.0, 1e4), ("plain", "independent", "close", "peaked_teacher")):
        check_other(T, name, 1023, kind, backend)


@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
@pytest.mark.parametrize("where", ["both", "teacher", "student"])
@pytest.mark.parametrize("name", OTHERS)
def test_masks_of_the_others(name, where, backend):
    """Classes at -inf: what is +inf is, with its gradient by the convention, and the rest is as exact as
    without masks."""
    for vocab, T in itertools.product((10, 5000), (1.0, 4.0)):
        z, v = with_masks(*make_rows("plain", 1, vocab), where)
        D, g = oracle.divergence_row(z[0].double().numpy(), v[0].double().numpy(), name, T)
        x = z.clone().requires_grad_()
        loss = fused_kd_loss(x, v, divergence=name, temperature=T, soft_weight=T, backend=backend)
        loss.backward()
        if math.isinf(D):
            np.testing.assert_allclose(x.grad[0].numpy(), g.astype(float), atol=1e-6)
            assert float(loss) == math.inf
        else:
            assert abs(float(loss) / T - float(D)) <= 2 * value_bound_of(
                name, vocab, T, spread_of(z[0], v[0], T), float(D)
            )
            assert float(np.linalg.norm(x.grad[0].numpy() - g)) <= gradient_bound_of(
                float(np.linalg.norm(g)), float(D)
            )


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_bounds_of_the_others_everywhere(vocab, name, backend):
    for T, kind in itertools.product(TEMPERATURES[:-1], KINDS):
        check_other(T, name, vocab, kind, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("T", "order", "vocab", "kind"), cases(True))
def test_bounds_everywhere(T, order, vocab, kind, backend):
    check(T, order, vocab, kind, backend)


@pytest.mark.parametrize(
    ("backend", "vocab"), [*itertools.product(DOUBLE_BACKENDS, (31, 1023, 50257)), ("triton", 1023)]
)
@pytest.mark.parametrize("order", [0.0, 0.5, 1.0, 2.0, math.inf])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
    ],
)
def test_sixteen_bit_inputs(student, teacher, order, vocab, backend):
    """The inputs are exact, so the value is held to the bound of fp32, and the gradient to one rounding of
    its dtype."""
    if torch.float64 in (student, teacher) and backend not in DOUBLE_BACKENDS:
        pytest.skip("computes in fp32")
    for T in (1.0, 4.0):
        z, v, exact = expected("plain", vocab, T, order, student, teacher)
        loss, grad = measured(z, v, T, order, backend)
        for i, (D, g) in enumerate(exact):
            assert abs(float(loss[i]) - float(D)) <= value_bound(
                order, vocab, T, spread_of(z[i], v[i], T), float(D)
            )
            assert grad.dtype == student
            g = torch.from_numpy(g.astype(np.float64))
            # before the rounding, the bound of fp32 on each class
            slack = gradient_bound(order, float(g.norm()))
            allowed = (
                cast_bound(student, g) + slack if student != torch.float32 else torch.full_like(g, slack)
            )
            assert ((grad[i].double() - g).abs() <= allowed).all()


@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_fp64_is_fp64(backend):
    for T, order in itertools.product((0.5, 2.0, 1e4, 1e6, math.inf), (0.01, 0.5, 1.0, 1.0001, 5.0)):
        for kind in ("plain", "offset", "peaked_teacher"):
            z, v = make_rows(kind, 2, 257, torch.float64)
            z = z + 1e-9 * torch.randn(
                z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
            )
            loss, grad = measured(z, v, T, order, backend)
            assert loss.dtype == grad.dtype == torch.float64
            for i in range(2):
                D, g = oracle.divergence_row(
                    z[i].numpy(), v[i].numpy(), f"renyi({order!r})" if order != 1 else "kl", T
                )
                assert float(loss[i]) == pytest.approx(float(D), rel=1e-9)
                assert float(np.linalg.norm(grad[i].numpy() - g)) <= 1e-9 * float(np.linalg.norm(g))


def main() -> None:
    import sys

    backend, worst = (sys.argv[1:] or ["cpu"])[0], {}
    for T, order, vocab, kind in (
        cases(True) if "all" in sys.argv else [c for c in cases(True) if c[2] in (2, 31, 1023, 50257)][::7]
    ):
        for what, (error, bound) in zip("vg", errors(T, order, vocab, kind, backend), strict=True):
            key = (what, order, vocab)
            if error / bound >= worst.get(key, (-1,))[0]:
                worst[key] = (error / bound, T, kind)
    for key in sorted(worst):
        print(*key, "{:.3f} of the bound at T = {:g}, {}".format(*worst[key]))


if __name__ == "__main__":
    main()
