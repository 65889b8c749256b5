"""What theory says of every divergence, on logits that hypothesis thinks of."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rows import BACKENDS, DOUBLE_BACKENDS

from kdkernels import CrossEntropy, Renyi, fused_kd_loss
from kdkernels.divergence import REGISTRY, LogitMatching

DIVERGENCES = ["kl", *(f"renyi({a})" for a in (0.01, 0.3, 0.5, 0.51, 0.9999, 1, 1.0001, 3, 20, math.inf))]

rows = st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))
vocabs = st.sampled_from([1, 2, 3, 17, 64, 65, 300, 5000])
temperatures = st.sampled_from([0.05, 0.5, 1.0, 2.0, 37.0, 1e4, 1e6])
scales = st.sampled_from([0.0, 1e-3, 0.1, 1.0, 10.0])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
profile = settings(max_examples=25, deadline=None, derandomize=True)
# the interpreter takes a thousand times as long: fewer divergences, and no large vocabularies
BRIEFLY = ["kl", "renyi(0.3)"]
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


def test_the_registry_is_covered():
    assert set(REGISTRY) == {"kl", "renyi", CrossEntropy.name, LogitMatching.name}


@everywhere
@profile
@given(g=rows, vocab=vocabs, T=temperatures, scale=scales, dtype=dtypes, teacher=dtypes)
def test_nonnegative_and_zero_sum(backend, divergence, g, vocab, T, scale, dtype, teacher):
    """D >= 0, and a gradient sums to zero over the classes (Chen et al., eq. 5), for every pair of dtypes."""
    z, v = draw(g, vocab, scale, dtype, teacher)
    loss, grad = value_and_grad(z, v, divergence=divergence, temperature=T, soft_weight=T, backend=backend)
    assert (loss >= 0).all()
    norm = grad.double().norm(dim=-1)
    room = 3e-6 if dtype in (torch.float32, torch.float64) else 2 * torch.finfo(dtype).eps
    subnormal = torch.finfo(dtype).tiny * torch.finfo(dtype).eps * vocab
    # where q - w is a difference of numbers near 1: the rounding of an exponent in fp64 or, in the fp32 path, of fp32
    absolute = 2e-7 if dtype == torch.float32 else 2e-16 * (1 + 60 / T)
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
    """D_alpha grows with alpha, meets KL at 1, and (1 - a) D_a(p, q) = a D_(1-a)(q, p) (van Erven and Harremoës, prop. 2, th. 3)."""
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
        near = fused_kd_loss(z, v, divergence=Renyi(a), temperature=T, reduction="none", backend=backend).double()
        torch.testing.assert_close(near, kl, rtol=1e-6 * (1 + 30 / T), atol=1e-30)
    mirrored = fused_kd_loss(v, z, divergence=Renyi(0.7), temperature=T, reduction="none", backend=backend).double()
    torch.testing.assert_close(0.7 * D[0.3], 0.3 * mirrored, rtol=room, atol=1e-30)


@profile
@given(
    g=rows,
    vocab=vocabs,
    T=temperatures,
    scale=scales,
    divergence=st.sampled_from([*DIVERGENCES, "renyi(0)", "cross_entropy"]),
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
    room = {torch.float32: 4e-6, torch.float64: 1e-9}.get(dtype, 1.01 * torch.finfo(dtype).eps)
    subnormal = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    for loss, a in found.values():
        torch.testing.assert_close(loss, expected, rtol=2e-6 * (1 + 30 / T), atol=1e-30)
        assert ((a - b).norm() <= room * b.norm() + 1e-6 * (dtype != torch.float64) + subnormal * vocab).all()
