"""Numbers that once were wrong, each under the name of what went wrong, over the backends and what lies next to it.

backend="cuda" is the kernels on host threads (tests/simt). Triton's own faults are marked as such.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from bounds import cast_bound, gradient_bound_of, spread_of, value_bound_of

from kdkernels import backends, fused_kd_loss, fused_linear_kd_loss
from kdkernels.backends import cuda

sys.path.insert(0, str(Path(__file__).parent / "simt"))
import build  # noqa: E402

BACKENDS = ("cpu", "eager", "triton", "cuda")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MIXTURES = ("jsd(0.5)", "jsd(0.1)", "jsd(0.9)", "skew_kl(0.1)", "skew_kl(0.9)", "skew_reverse_kl(0.1)", "skew_reverse_kl(0.9)")
DIVERGENCES = (*MIXTURES, "kl", "reverse_kl", "tvd", "renyi(0.5)", "renyi(2)", "reverse_renyi(0.5)", "reverse_renyi(2)", "alpha(0.3)")


@pytest.fixture(scope="module")
def host_threads():
    if build.COMPILER is None:
        pytest.skip("needs g++")
    patch = pytest.MonkeyPatch()
    patch.setattr(cuda, "LIBRARY", build.library())
    patch.setattr(cuda, "unavailable", lambda device, dtypes=(): "fp64" if FP64 in dtypes else None)
    cuda.library.cache_clear()
    backends._resolve.cache_clear()
    yield
    patch.undo()
    cuda.library.cache_clear()
    backends._resolve.cache_clear()


@pytest.fixture(autouse=True)
def library_of_cuda(request):
    """The kernels on host threads, for the tests of backend="cuda"."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "cuda":
        request.getfixturevalue("host_threads")


def wrong_on_triton(*backends_, reason):
    return [pytest.param(b, marks=pytest.mark.xfail(strict=True, reason=reason)) if b == "triton" else b for b in backends_]


def rows_of(dtype, *rows):
    return [torch.tensor([row], dtype=dtype) for row in rows]


def exact(z, v, divergence, T=1.0):
    """(D, T dD/dz) of a row."""
    with np.errstate(all="ignore"):
        D, g = oracle.divergence_row(z[0].double().numpy(), v[0].double().numpy(), divergence, T)
    return float(D), torch.tensor(np.asarray(g, np.float64))


def measured(z, v, y=None, *, T=1.0, **options):
    """(loss, gradient times T) of rows, summed."""
    x = z.clone().requires_grad_()
    loss = fused_kd_loss(x, v, y, temperature=T, reduction="sum", **options)
    (loss[0] if isinstance(loss, tuple) else loss).backward()
    return loss, x.grad.double() * T


# ---------------------------------------------------------------- large finite masks


def masked_pairs(dtype):
    """Rows of which one model masks a class with a large finite number, as many do; of the last both do."""
    for low in (torch.finfo(dtype).min, *((-1e12, -1e30) if dtype != BF16 else (-1e30,))):
        yield from (
            ([0, low], [0, 0]),
            ([0, 0], [0, low]),
            ([0, 1, low], [0, 1, 2]),
            ([0, 1, 2], [0, 1, low]),
            ([0, 1, low], [0.5, 1, low]),
        )


def check_masks(backend, dtype, divergence, T):
    for z, v in masked_pairs(dtype):
        z, v = rows_of(dtype, z, v)
        D, g = exact(z, v, divergence, T)
        loss, grad = measured(z, v, T=T, divergence=divergence, backend=backend)
        # a class that has nothing is no part of the spread
        spread = spread_of(*(x.clamp_min(-30.0) for x in (z[0], v[0])), T)
        assert loss.item() == pytest.approx(D, abs=value_bound_of(divergence, 3, T, spread, abs(D))) or not abs(D) < 1e38, (z, v)
        if float(g.norm()) < 1e30:
            slack = gradient_bound_of(float(g.norm()), min(D, 10.0)) * (1 + spread)
            assert ((grad[0] - g).abs() <= slack + (cast_bound(dtype, g) if dtype == BF16 else 0)).all(), (z, v, grad, g)


LOST_EXPONENT = pytest.mark.xfail(strict=True, reason="log(w / q) is a difference of numbers as large as the mask")


def mask_cases():
    for backend, divergence, dtype in itertools.product(BACKENDS, DIVERGENCES, (BF16, FP32, FP64)):
        if dtype == FP64 and (backend in ("triton", "cuda") or (backend, divergence) == ("eager", "reverse_renyi(2)")):
            continue  # they compute in fp32; D is the largest number there is
        yield pytest.param(
            backend, divergence, dtype, marks=[LOST_EXPONENT] if (backend, divergence) == ("triton", "reverse_renyi(2)") else []
        )


@pytest.mark.parametrize(("backend", "divergence", "dtype"), list(mask_cases()), ids=str)
def test_a_large_finite_mask_in_one_model(backend, divergence, dtype):
    """JSD and the skews lost log(l) of log(o / m): [0, -1e30], [0, 0] had a skew_kl(0.1) of 0. Reverse orders lost the gradient."""
    for T in (1.0, 4.0, 0.5) if dtype != FP64 or backend == "cpu" or divergence in MIXTURES else (1.0, 4.0):
        check_masks(backend, dtype, divergence, T)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("divergence", ["jsd(0.5)", "skew_kl(0.1)", "skew_reverse_kl(0.1)"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_finite_mask_in_statistics(backend, divergence, dtype):
    for z, v in masked_pairs(dtype):
        z, v = rows_of(dtype, z, v)
        D, _ = exact(z, v, divergence)
        _, stats = fused_kd_loss(z, v, divergence=divergence, return_stats=True, backend=backend)
        assert stats.divergence.item() == pytest.approx(D, rel=1e-5, abs=1e-7)
        assert all(x.isfinite().all() for x in (stats.student_entropy, stats.teacher_entropy))


@pytest.mark.parametrize("divergence", ["jsd(0.5)", "skew_kl(0.1)", "skew_reverse_kl(0.1)", "kl", "renyi(0.5)"])
@pytest.mark.parametrize("T", [0.5, 1.0])
def test_statistics_of_the_least_finite_number(divergence, T):
    """In fp64 it is -inf once it is divided by a T below 1: the entropies were nan."""
    z, v = rows_of(FP64, [0, 1, torch.finfo(FP64).min], [0, 1000, torch.finfo(FP64).min])
    _, stats = fused_kd_loss(z, v, divergence=divergence, temperature=T, return_stats=True, backend="cpu")
    _, short = fused_kd_loss(z[:, :2], v[:, :2], divergence=divergence, temperature=T, return_stats=True, backend="cpu")
    for name in ("divergence", "student_entropy", "teacher_entropy"):
        assert getattr(stats, name).item() == pytest.approx(getattr(short, name).item(), rel=1e-12)


@pytest.mark.parametrize("divergence", ["jsd(0.5)", "skew_kl(0.1)", "skew_reverse_kl(0.1)"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_finite_mask_as_a_bias_of_the_linear_loss(backend, divergence):
    g = torch.Generator().manual_seed(0)
    h, w, other = torch.randn(3, 8, generator=g), torch.randn(11, 8, generator=g), torch.randn(3, 11, generator=g)
    bias = torch.zeros(11)
    bias[8:] = torch.finfo(FP32).min
    h.requires_grad_()
    loss = fused_linear_kd_loss(h, w, teacher_logits=other, student_bias=bias, divergence=divergence, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), h)
    x = h.detach().requires_grad_()
    for i in range(3):
        z = (x[i : i + 1] @ w.T) + bias
        D, dz = exact(z.detach(), other[i : i + 1], divergence)
        assert loss[i].item() == pytest.approx(D, rel=1e-5)
        torch.testing.assert_close(grad[i].double(), dz @ w.double(), rtol=1e-5, atol=1e-5)
