"""What theory says of every divergence, on logits that hypothesis thinks of."""

import math

import pytest
import torch
from bounds import plain_value_bound
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from names import APART
from rows import BACKENDS, DOUBLE_BACKENDS

from kdkernels import Renyi, fused_kd_loss, parse

DIVERGENCES = [
    *(x for x in APART if x != "cross_entropy"),
    *("jsd(0.999)", "skew_kl(0.9)", "skew_reverse_kl(0.9)", "alpha(0.9999)"),
    *(f"renyi({a})" for a in (0.01, 0.3, 0.51, 0.9999, 1, 1.0001, 3, 20, math.inf)),
    *(f"reverse_renyi({a})" for a in (0.3, 1, 1.0001, 3, math.inf)),
]

rows = st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))
vocabs = st.sampled_from([1, 2, 3, 17, 64, 65, 300, 5000])
temperatures = st.sampled_from([0.05, 0.5, 1.0, 2.0, 37.0, 1e4, 1e6])
scales = st.sampled_from([0.0, 1e-3, 0.1, 1.0, 10.0])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
profile = settings(max_examples=12, deadline=None, derandomize=True)
# the interpreter takes a thousand times as long: fewer divergences, and no large vocabularies
BRIEFLY = ["kl", "renyi(0.3)", "jsd(0.1)"]
everywhere = pytest.mark.parametrize(
    ("backend", "divergence"), [(b, d) for b in BACKENDS for d in (BRIEFLY if b == "triton" else DIVERGENCES)]
)


def draw(g, vocab, scale, dtype=torch.float32, teacher=None):
    v = torch.randn(2, vocab, generator=g) * 3
    return (v + torch.randn(2, vocab, generator=g) * scale).to(dtype), v.to(teacher or dtype)


def value_and_grad(z, v, **options):
    if options["backend"] == "triton":
        assume(torch.float64 not in (z.dtype, v.dtype) and z.shape[-1] < 100)
    z = z.clone().requires_grad_()
    loss = fused_kd_loss(z, v, reduction="none", **options)
    loss.sum().backward()
    return loss.detach(), z.grad


@everywhere
@profile
@given(g=rows, vocab=vocabs, T=temperatures, scale=scales, dtype=dtypes, teacher=dtypes)
def test_nonnegative_and_zero_sum(backend, divergence, g, vocab, T, scale, dtype, teacher):
    """D >= 0, and a gradient sums to zero over the classes (Chen et al., eq. 5), for every pair of dtypes."""
    z, v = draw(g, vocab, scale, dtype, teacher)
    loss, grad = value_and_grad(z, v, divergence=divergence, temperature=T, soft_weight=T, backend=backend)
    assert (loss >= 0).all()
    within = (loss < math.inf) & grad.isfinite().all(-1)  # the dtype's range
    loss, grad = loss[within], grad[within]
    norm = grad.double().norm(dim=-1)
    room = 3e-6 if dtype in (torch.float32, torch.float64) else 2 * torch.finfo(dtype).eps
    subnormal = torch.finfo(dtype).tiny * torch.finfo(dtype).eps * vocab
    # where q - w is a difference of numbers near 1: the rounding of an exponent, in fp64 or, of narrower
    # logits, in fp32
    absolute = 2e-16 * (1 + 60 / T) if torch.float64 in (dtype, teacher) else 2e-7
    # of two numbers as large as log q / p, or R / alpha
    if parse(divergence).form.family in ("mixture", "alpha"):
        absolute *= 1 + loss.double()
    assert (grad.double().sum(-1).abs() <= room * norm * vocab**0.5 + subnormal + absolute).all()


@everywhere
@profile
@given(g=rows, vocab=vocabs, T=temperatures, dtype=dtypes)
def test_zero_at_the_teacher(backend, divergence, g, vocab, T, dtype):
    """z = v: exactly 0 and exactly no gradient."""
    _, v = draw(g, vocab, 0.0, dtype)
    loss, grad = value_and_grad(v, v, divergence=divergence, temperature=T, t_squared=True, backend=backend)
    assert not loss.any() and not grad.any()


@everywhere
@profile
@given(g=rows, vocab=vocabs, T=temperatures, shift=st.sampled_from([-8.0, 0.5, 64.0]))
def test_shift_and_permutation(backend, divergence, g, vocab, T, shift):
    """A constant added to a row changes nothing; permuting the classes permutes the gradient."""
    z, v = draw(g, vocab, 0.5)
    z, v = (x.mul(2**14).round() / 2**14 for x in (z, v))  # so that the shift is exact
    options = {"divergence": divergence, "temperature": T, "soft_weight": T, "backend": backend}
    loss, grad = value_and_grad(z, v, **options)
    room = 2e-6 * (1 + 30 / T)
    order = torch.randperm(vocab, generator=g)
    for a, b, expected in ((z + shift, v, grad), (z[:, order], v[:, order], grad[:, order])):
        other, other_grad = value_and_grad(a, b, **options)
        torch.testing.assert_close(other, loss, rtol=room, atol=1e-29)
        assert ((other_grad - expected).norm(dim=-1) <= room * expected.norm(dim=-1) + 3e-7).all()


@pytest.mark.parametrize("backend", BACKENDS)
@profile
@given(g=rows, vocab=vocabs, T=temperatures, scale=scales)
def test_orders(backend, g, vocab, T, scale):
    """D_alpha grows with alpha, meets KL at 1, and (1 - a) D_a(p, q) = a D_(1-a)(q, p) (van Erven and
    Harremoës, prop. 2, th. 3)."""
    assume(backend != "triton" or vocab < 100)
    z, v = draw(g, vocab, scale)
    D = {
        a: fused_kd_loss(z, v, divergence=Renyi(a), temperature=T, reduction="none", backend=backend).double()
        for a in (0.01, 0.3, 0.7, 1, 3, 20, math.inf)
    }
    room = 1e-5 * (1 + 30 / T)
    for a, b in zip(list(D)[:-1], list(D)[1:], strict=True):
        assert (D[a] <= D[b] * (1 + room) + 1e-30).all()
    kl = fused_kd_loss(z, v, temperature=T, reduction="none", backend=backend).double()
    torch.testing.assert_close(D[1], kl, rtol=1e-12, atol=0)
    for a in (1 - 1e-9, 1 + 1e-9):
        near = fused_kd_loss(
            z, v, divergence=Renyi(a), temperature=T, reduction="none", backend=backend
        ).double()
        torch.testing.assert_close(near, kl, rtol=1e-6 * (1 + 30 / T), atol=1e-30)
    mirrored = fused_kd_loss(
        v, z, divergence=Renyi(0.7), temperature=T, reduction="none", backend=backend
    ).double()
    torch.testing.assert_close(0.7 * D[0.3], 0.3 * mirrored, rtol=room, atol=1e-30)


def values(z, v, *names, T=1.0, backend="cpu"):
    return [
        fused_kd_loss(z, v, divergence=x, temperature=T, reduction="none", backend=backend).double()
        for x in names
    ]


# D(p, q) on the left, factor D(q, p) on the right
MIRRORED = [
    *(
        ("kl", 1, "reverse_kl"),
        ("tvd", 1, "tvd"),
        ("jsd(0.2)", 1, "jsd(0.8)"),
        ("skew_kl(0.3)", 1, "skew_reverse_kl(0.3)"),
    ),
    *(
        ("renyi(0.3)", 1, "reverse_renyi(0.3)"),
        ("renyi(3)", 1, "reverse_renyi(3)"),
        ("renyi(inf)", 1, "reverse_renyi(inf)"),
    ),
    *(
        ("alpha(0.2)", 1, "alpha(0.8)"),
        ("alpha(-1)", 1, "alpha(2)"),
        ("renyi(0.5)", 1, "renyi(0.5)"),
        ("renyi(0.7)", 7 / 3, "renyi(0.3)"),
    ),
]


@pytest.mark.parametrize(
    ("backend", "name", "factor", "mirror"),
    [(b, *m) for b in BACKENDS for m in MIRRORED[:: 4 if b == "triton" else 1]],
)
@settings(profile, max_examples=8)
@given(g=rows, vocab=vocabs, T=temperatures, scale=scales)
def test_mirrors(backend, name, factor, mirror, g, vocab, T, scale):
    """What becomes of a divergence when teacher and student are exchanged."""
    assume(backend != "triton" or (vocab < 100 and T >= 0.5))
    z, v = draw(g, vocab, scale)
    (a,), (b,) = values(z, v, name, T=T, backend=backend), values(v, z, mirror, T=T, backend=backend)
    assume(float(b.max()) < 1e30)
    torch.testing.assert_close(
        a, factor * b, rtol=1e-5 * (1 + 30 / T), atol=1e-15 if name == "tvd" else 1e-29
    )


@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
@profile
@given(g=rows, vocab=vocabs, T=temperatures, scale=scales)
def test_limits_between_members(backend, g, vocab, T, scale):
    """Members of the families meet where theory says, in fp64; and known inequalities hold."""
    assume(scale <= 1 and T >= 0.5)  # the nearness of 1e-9 has to be much smaller than q / p
    z, v = (x.double() for x in draw(g, vocab, scale))
    kl, reverse, half, tvd, jsd = values(
        z, v, "kl", "reverse_kl", "alpha(0.5)", "tvd", "jsd(0.5)", T=T, backend=backend
    )
    room = dict(rtol=2e-6 * (1 + 30 / T), atol=1e-25)
    for name, factor, expected in [
        *(
            ("alpha(1)", 1, kl),
            ("alpha(1.000000001)", 1, kl),
            ("alpha(0.000000001)", 1, reverse),
            ("jsd(0)", 1, kl),
            ("jsd(1)", 1, reverse),
        ),
        *(
            ("jsd(0.000000001)", 1e9, kl),
            ("jsd(0.999999999)", 1 / (1 - 0.999999999), reverse),
            ("skew_kl(0.000000001)", 1, kl),
        ),
        *(
            ("skew_reverse_kl(0.000000001)", 1, reverse),
            ("reverse_renyi(1)", 1, reverse),
            ("reverse_renyi(1.000000001)", 1, reverse),
        ),
        ("reverse_renyi(1e-17)", 1e17, kl),
    ]:
        (found,) = values(z, v, name, T=T, backend=backend)
        torch.testing.assert_close(
            factor * found, expected, msg=lambda text, name=name: f"{name}: {text}", **room
        )
    (renyi,) = values(z, v, "renyi(0.5)", T=T, backend=backend)
    # four times the squared Hellinger distance
    torch.testing.assert_close(half, -4 * torch.expm1(-renyi / 2), **room)
    assert (tvd <= 1 + 1e-12).all() and (2 * tvd**2 <= kl * (1 + 1e-9) + 1e-25).all()  # Pinsker
    # Lin (1991), theorem 3
    assert (jsd <= math.log(2) * torch.minimum(torch.ones_like(tvd), tvd) * (1 + 1e-9) + 1e-15).all()
    # squared Hellinger distance: H^2 <= TVD, with half = 8 H^2 / 2
    assert (half / 8 <= tvd * (1 + 1e-9) + 1e-15).all()


@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
@pytest.mark.parametrize("divergence", [*DIVERGENCES, "cross_entropy", "renyi(0)", "reverse_renyi(0)"])
def test_gradients_by_differences(backend, divergence):
    """gradcheck in fp64, also with masked classes where D is finite; away from ties, where TVD and order inf
    have a kink."""
    g = torch.Generator().manual_seed(3)
    z, v = (torch.randn(3, 7, generator=g, dtype=torch.float64) for _ in range(2))
    v[0, 2] = z[0, 2] = -math.inf

    def f(x):
        return fused_kd_loss(x, v, divergence=divergence, temperature=1.5, reduction="none", backend=backend)

    if math.isfinite(float(f(torch.where(torch.arange(7) == 4, -math.inf, z))[1])):
        z[1, 4] = -math.inf
    w = v.clone()
    w[2, 5] = -math.inf
    if math.isfinite(
        float(
            fused_kd_loss(z, w, divergence=divergence, temperature=1.5, reduction="none", backend=backend)[2]
        )
    ):
        v = w
    free = torch.isfinite(z)
    x = z[free].clone().requires_grad_()
    # a difference of values that were divided by 1e-4
    room = 1e-5 if "(0.9999)" in divergence or "(1.0001)" in divergence else 1e-7
    assert torch.autograd.gradcheck(lambda y: f(z.masked_scatter(free, y)), (x,), atol=room, rtol=1e-6)


@profile
@given(
    g=rows,
    vocab=vocabs,
    T=temperatures,
    scale=scales,
    divergence=st.sampled_from([*DIVERGENCES, "renyi(0)", "reverse_renyi(0)", "cross_entropy"]),
    dtype=dtypes,
)
def test_backends_agree(g, vocab, T, scale, divergence, dtype):
    z, v = draw(g, vocab, scale, dtype)
    y = torch.randint(vocab, (2,), generator=g)
    options = {"divergence": divergence, "temperature": T, "soft_weight": 0.9 * T, "hard_weight": 0.1}
    found = {}
    for backend in DOUBLE_BACKENDS if dtype == torch.float64 or vocab > 100 else BACKENDS:
        x = z.clone().requires_grad_()
        loss = fused_kd_loss(x, v, y, backend=backend, **options)
        loss.backward()
        found[backend] = loss.detach(), x.grad.double()
    expected, b = found.pop("eager")
    assume(float(expected) < 1e30 and float(b.norm()) < 1e30)  # alpha(2) can be beyond fp32
    kinks = divergence == "tvd"  # where q - p is within rounding of 0, its sign is anybody's guess
    room = {torch.float32: 4e-6, torch.float64: 1e-9}.get(dtype, 1.01 * torch.finfo(dtype).eps)
    subnormal = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    # R is the exponential of what has that error
    large = 10 if parse(divergence).form.family == "alpha" else 1
    for backend, (loss, a) in found.items():
        floor = 1e-15 if kinks else 1e-30
        if backend == "triton" and dtype.itemsize == 2 and T <= 8:  # its plain form has a bound of its own
            floor = 0.9 * T * plain_value_bound(divergence, float(expected) / (0.9 * T))
        torch.testing.assert_close(loss, expected, rtol=large * 2e-6 * (1 + 30 / T), atol=floor)
        assert (
            kinks
            or ((a - b).norm() <= room * b.norm() + 1e-6 * (dtype != torch.float64) + subnormal * vocab).all()
        )
