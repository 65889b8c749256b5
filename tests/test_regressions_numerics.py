"""Numbers that once were wrong, each under the name of what went wrong, over the backends and what lies next
to it.

backend="cuda" is the kernels on host threads (tests/simt). Triton's own faults are marked as such.
"""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from bounds import cast_bound, gradient_bound_of, plain_value_bound, spread_of, value_bound_of

from kdkernels import LogitTransform, decoupled_kd_loss, fused_kd_loss, fused_linear_kd_loss

sys.path.insert(0, str(Path(__file__).parent / "simt"))
import build  # noqa: E402

BACKENDS = ("cpu", "eager", "triton", "cuda")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MIXTURES = (
    "jsd(0.5)",
    "jsd(0.1)",
    "jsd(0.9)",
    "skew_kl(0.1)",
    "skew_kl(0.9)",
    "skew_reverse_kl(0.1)",
    "skew_reverse_kl(0.9)",
)
DIVERGENCES = (
    *MIXTURES,
    "kl",
    "reverse_kl",
    "tvd",
    "renyi(0.5)",
    "renyi(2)",
    "reverse_renyi(0.5)",
    "reverse_renyi(2)",
    "alpha(0.3)",
)


@pytest.fixture(scope="module")
def host_threads():
    if build.COMPILER is None:
        pytest.skip("needs g++")
    with build.in_place_of_cuda():
        yield


@pytest.fixture(autouse=True)
def library_of_cuda(request):
    """The kernels on host threads, for the tests of backend="cuda"."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "cuda":
        request.getfixturevalue("host_threads")


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
        plain = backend == "triton" and dtype == BF16
        room = value_bound_of(divergence, 3, T, spread, abs(D))
        room = max(room, plain_value_bound(divergence, D)) if plain else room
        assert loss.item() == pytest.approx(D, abs=room) or not abs(D) < 1e38, (z, v)
        if float(g.norm()) < 1e30:
            slack = gradient_bound_of(float(g.norm()), min(D, 10.0)) * (1 + spread)
            assert ((grad[0] - g).abs() <= slack + (cast_bound(dtype, g) if dtype == BF16 else 0)).all(), (
                z,
                v,
                grad,
                g,
            )


def mask_cases():
    for backend, divergence, dtype in itertools.product(BACKENDS, DIVERGENCES, (BF16, FP32, FP64)):
        if dtype == FP64 and (
            backend in ("triton", "cuda") or (backend, divergence) == ("eager", "reverse_renyi(2)")
        ):
            continue  # they compute in fp32; D is the largest number there is
        yield backend, divergence, dtype


@pytest.mark.parametrize(("backend", "divergence", "dtype"), list(mask_cases()), ids=str)
def test_a_large_finite_mask_in_one_model(backend, divergence, dtype):
    """JSD and the skews lost log(l) of log(o / m): [0, -1e30], [0, 0] had a skew_kl(0.1) of 0. Reverse orders
    lost the gradient."""
    temperatures = (
        (1.0, 4.0, 0.5) if dtype != FP64 or backend == "cpu" or divergence in MIXTURES else (1.0, 4.0)
    )
    # the interpreter is slow
    for T in (0.5 if dtype == FP32 else 4.0,) if backend == "triton" else temperatures:
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


@pytest.mark.parametrize(
    "divergence", ["jsd(0.5)", "skew_kl(0.1)", "skew_reverse_kl(0.1)", "kl", "renyi(0.5)"]
)
@pytest.mark.parametrize("T", [0.5, 1.0])
def test_statistics_of_the_least_finite_number(divergence, T):
    """In fp64 it is -inf once it is divided by a T below 1: the entropies were nan."""
    z, v = rows_of(FP64, [0, 1, torch.finfo(FP64).min], [0, 1000, torch.finfo(FP64).min])
    _, stats = fused_kd_loss(z, v, divergence=divergence, temperature=T, return_stats=True, backend="cpu")
    _, short = fused_kd_loss(
        z[:, :2], v[:, :2], divergence=divergence, temperature=T, return_stats=True, backend="cpu"
    )
    for name in ("divergence", "student_entropy", "teacher_entropy"):
        assert getattr(stats, name).item() == pytest.approx(getattr(short, name).item(), rel=1e-12)


@pytest.mark.parametrize("divergence", ["jsd(0.5)", "skew_kl(0.1)", "skew_reverse_kl(0.1)"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_finite_mask_as_a_bias_of_the_linear_loss(backend, divergence):
    g = torch.Generator().manual_seed(0)
    h, w, other = (
        torch.randn(3, 8, generator=g),
        torch.randn(11, 8, generator=g),
        torch.randn(3, 11, generator=g),
    )
    bias = torch.zeros(11)
    bias[8:] = torch.finfo(FP32).min
    h.requires_grad_()
    loss = fused_linear_kd_loss(
        h,
        w,
        teacher_logits=other,
        student_bias=bias,
        divergence=divergence,
        reduction="none",
        backend=backend,
    )
    (grad,) = torch.autograd.grad(loss.sum(), h)
    x = h.detach().requires_grad_()
    for i in range(3):
        z = (x[i : i + 1] @ w.T) + bias
        D, dz = exact(z.detach(), other[i : i + 1], divergence)
        assert loss[i].item() == pytest.approx(D, rel=1e-5)
        torch.testing.assert_close(grad[i].double(), dz @ w.double(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- a soft weight of 0

BROKEN = {"nan": math.nan, "inf": math.inf, "masked": -math.inf}


def a_broken_teacher(how, vocab=40):
    """Rows of which the second has a broken teacher: one class of it, or, masked, all."""
    g = torch.Generator().manual_seed(1)
    z, v, y = (
        torch.randn(4, vocab, generator=g),
        torch.randn(4, vocab, generator=g),
        torch.tensor([3, 7, 0, 5]),
    )
    if how == "masked":
        v[1] = -math.inf
    else:
        v[1, 5] = BROKEN[how]
    return z, v, y


def of_hard_term(z, y, weight=0.5, reduction="sum", **smoothing):
    x = z.double().requires_grad_()
    loss = weight * F.cross_entropy(x, y, reduction=reduction, **smoothing)
    loss.sum().backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize(
    "divergence", ["kl", "reverse_kl", "renyi(0.5)", "renyi(0)", "renyi(inf)", "jsd(0.5)", "tvd", "alpha(2)"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_soft_weight_of_0_and_a_broken_teacher(backend, divergence, how):
    """The term is not there: value and gradient are the hard term's alone. The gradient was nan."""
    z, v, y = a_broken_teacher(how)
    for stats in (False, True):
        for reduction in ("sum", "none"):
            x = z.clone().requires_grad_()
            options = dict(
                divergence=divergence,
                soft_weight=0.0,
                hard_weight=0.5,
                return_stats=stats,
                reduction=reduction,
            )
            out = fused_kd_loss(x, v, y, temperature=2.0, backend=backend, **options)
            loss = out[0] if stats else out
            loss.sum().backward()
            right, grad = of_hard_term(z, y, reduction=reduction)
            torch.testing.assert_close(loss.detach().double(), right, rtol=1e-6, atol=0)
            torch.testing.assert_close(x.grad.double(), grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_soft_weight_of_0_at_infinite_temperature(backend):
    z, v, y = a_broken_teacher("nan")
    loss, grad = measured(z, v, y, T=1.0, soft_weight=0.0, hard_weight=0.5, backend=backend)
    x = z.clone().requires_grad_()
    fused_kd_loss(
        x,
        v,
        y,
        temperature=math.inf,
        t_squared=True,
        soft_weight=0.0,
        hard_weight=0.5,
        reduction="sum",
        backend=backend,
    ).backward()
    right, g = of_hard_term(z, y)
    torch.testing.assert_close(x.grad.double(), g, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad, g, rtol=1e-5, atol=1e-7)
    assert loss.item() == pytest.approx(right.item(), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_soft_weight_of_0_with_label_smoothing_and_a_softcap(backend):
    z, v, y = a_broken_teacher("nan")
    options = dict(
        soft_weight=0.0, hard_weight=0.5, label_smoothing=0.1, student_transform=LogitTransform(1.0, 5.0)
    )
    _, grad = measured(z, v, y, backend=backend, **options)
    x = z.double().requires_grad_()
    (0.5 * F.cross_entropy(5 * torch.tanh(x / 5), y, reduction="sum", label_smoothing=0.1)).backward()
    torch.testing.assert_close(grad, x.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_soft_weight_of_0_in_the_linear_loss_and_in_place(backend):
    z, v, y = a_broken_teacher("inf")
    eye = torch.eye(40).requires_grad_()
    fused_linear_kd_loss(
        z, eye, teacher_logits=v, labels=y, soft_weight=0.0, hard_weight=0.5, reduction="sum", backend=backend
    ).backward()
    _, grad = of_hard_term(z, y)
    torch.testing.assert_close(eye.grad.double(), grad.T @ z.double(), rtol=1e-5, atol=1e-6)
    if backend == "eager":
        return
    x = z.clone().requires_grad_()
    fused_kd_loss(
        x * 1, v, y, soft_weight=0.0, hard_weight=0.5, reduction="sum", inplace=True, backend=backend
    ).backward()
    torch.testing.assert_close(x.grad.double(), grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_soft_weight_of_0_and_the_gradient_of_a_broken_teacher(backend):
    """The hard term has none in the teacher: it is 0."""
    z, v, y = a_broken_teacher("nan")
    x, w = z.clone().requires_grad_(), v.clone().requires_grad_()
    fused_kd_loss(
        x, w, y, soft_weight=0.0, hard_weight=0.5, teacher_grad=True, reduction="sum", backend=backend
    ).backward()
    assert (w.grad == 0).all()
    torch.testing.assert_close(x.grad.double(), of_hard_term(z, y)[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab", [40, 9000])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "eager", "cuda"])
def test_a_soft_weight_of_0_and_a_broken_student(backend, dtype, vocab):
    """It breaks the hard term: nan in value and gradient, of that row alone, wherever in the row it is."""
    for at, how in (
        (0, math.nan),
        (vocab - 1, math.nan),
        (vocab // 2, math.inf),
        (slice(None), -math.inf),
        (slice(None), math.nan),
    ):
        z, v, y = a_broken_teacher("nan", vocab)
        z = z.to(dtype)
        z[2, at] = how
        loss, grad = measured(z, v.to(dtype), y, soft_weight=0.0, hard_weight=0.5, backend=backend)
        assert loss.isnan()
        assert grad[2].isnan().all() and not grad[[0, 1, 3]].isnan().any()


# ---------------------------------------------------------------- 16-bit logits with a common offset

OFFSETS = [
    (FP16, 10.0, 1e-3, 31),
    (BF16, 29952.0, 0.3, 2),
    (BF16, 100.0, 1e-3, 4099),
    (FP16, 100.0, 1e-2, 33000),
]


def with_offset(dtype, offset, spread, vocab, of_teacher):
    g = torch.Generator().manual_seed(vocab)
    near, far = (
        (torch.randn(1, vocab, generator=g) * spread).to(dtype),
        torch.full((1, vocab), offset).to(dtype),
    )
    return (near, far) if of_teacher else (far, near)


@pytest.mark.parametrize("of_teacher", [True, False])
@pytest.mark.parametrize("case", OFFSETS, ids=str)
@pytest.mark.parametrize(
    "divergence", ["kl", "cross_entropy", "renyi(0.5)", "jsd(0.5)", "skew_kl(0.1)", "reverse_kl", "tvd"]
)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_16_bit_logits_with_a_common_offset(backend, divergence, case, of_teacher):
    """10 - 0.001 of fp16 numbers has more than 24 bits, and D lost digits to its rounding: 4e-4 of it."""
    z, v = with_offset(*case, of_teacher)
    D, _ = exact(z, v, divergence)
    for stats in (False, True):
        out = fused_kd_loss(z, v, divergence=divergence, reduction="sum", return_stats=stats, backend=backend)
        loss = (out[0] if stats else out).item()
        assert abs(loss - D) <= value_bound_of(divergence, case[-1], 1.0, spread_of(z[0], v[0], 1.0), D)


@pytest.mark.parametrize("case", [c for c in OFFSETS if c[-1] < 1e4], ids=str)
@pytest.mark.parametrize("divergence", ["kl", "jsd(0.5)"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_bound_of_16_bit_logits_with_a_common_offset_on_a_gpu(backend, divergence, case):
    """docs/numerics.md, section 5: CUDA's kernels do not carry it; Triton's have other bounds for 16 bits."""
    for of_teacher in (True, False):
        z, v = with_offset(*case, of_teacher)
        D, _ = exact(z, v, divergence)
        loss = fused_kd_loss(z, v, divergence=divergence, reduction="sum", backend=backend).item()
        bound = 1.7e-7 * case[1] * math.sqrt(D) + 1e-6 * D
        assert abs(loss - D) <= (plain_value_bound(divergence, D) if backend == "triton" else bound)


# ---------------------------------------------------------------- the gradient of TVD where rows are
# confident

CONFIDENT = [
    ([0.0, -8.0], [0.21, -6.79], 0.7),
    ([0.0, -8.0], [-0.21, -9.2], 0.7),
    ([0.0, -10.0], [0.0, -10.001], 0.7),
    ([0.0, -15.0], [0.0, -14.9], 1.0),
    ([0.0, -15.0, -16.0], [0.0, -14.9, -17.0], 1.0),
    ([20.0, 0.0], [0.0, 20.0], 1.0),
]


def confident_rows():
    yield from ((*rows_of(FP32, z, v), T) for z, v, T in CONFIDENT)
    g = torch.Generator().manual_seed(0)
    v = torch.randn(1, 4999, generator=g)
    z = v + 0.3 * torch.randn(1, 4999, generator=g)
    z[0, 7] += 22
    v[0, 7] += 21
    yield z, v, 1.0
    # no class dominates, and nearly all have the same sign
    many, others = v[:, 100:200].clone(), v[:, 100:200].clone()
    many[0, :20] -= 14
    others[0, :20] -= 13
    yield many, others, 1.0


def relative_error(grad, right):
    return float((grad - right).norm() / right.norm())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_tvd_where_rows_are_confident(backend):
    """M is nearly xi of the one class: xi - M was rounded at 1e-7, and the gradient is as small as the
    others' probability."""
    for z, v, T in confident_rows():
        _, g = exact(z, v, "tvd", T)
        _, grad = measured(z, v, T=T, divergence="tvd", backend=backend)
        assert relative_error(grad[0], g) <= 3e-6, (z, v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_tvd_in_a_confident_teacher(backend):
    for z, v, T in confident_rows():
        _, g = exact(v, z, "tvd", T)
        x, w = z.clone().requires_grad_(), v.clone().requires_grad_()
        fused_kd_loss(
            x, w, divergence="tvd", temperature=T, teacher_grad=True, reduction="sum", backend=backend
        ).backward()
        assert relative_error(w.grad[0].double() * T, g) <= 3e-6, (z, v)


@pytest.mark.parametrize("backend", ["cpu", "eager", "cuda"])
def test_the_gradient_of_tvd_beside_a_hard_term_and_masks(backend):
    """The label's class is written apart; a class that one of the two masks, or both, is on one side or
    none."""
    inf = math.inf
    for z, v in (
        rows_of(FP32, [0.0, -8.0, -9.0], [0.21, -6.79, -9.5]),
        rows_of(FP32, [0.0, -8.0, -9.0, -inf], [0.21, -6.79, -inf, -inf]),
        rows_of(FP32, [0.0, -8.0, -9.0, -inf], [0.21, -6.79, -inf, -11.0]),
    ):
        for label, hard in ((0, 1e-6), (1, 1e-6), (2, 0.0)):
            y = torch.tensor([label])
            g, ce = exact(z, v, "tvd")[1], of_hard_term(z, y, hard)[1].nan_to_num(0.0)
            _, grad = measured(z, v, y, divergence="tvd", hard_weight=hard, backend=backend)
            assert relative_error(grad[0], g + ce[0]) <= 3e-6, (z, v, label)


@pytest.mark.parametrize("backend", ["cpu", "eager", "cuda"])
def test_no_gradient_of_tvd_where_all_classes_are_equal(backend):
    """Each counts half to either side."""
    z, _ = rows_of(FP32, [0.0, 1.0, 2.0, 0.0], [0.0])
    x, w = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = fused_kd_loss(x, w, divergence="tvd", teacher_grad=True, backend=backend)
    loss.backward()
    assert loss == 0 and (x.grad == 0).all() and (w.grad == 0).all()


@pytest.mark.parametrize(
    "backend",
    ("cpu", "eager", "triton", "cuda"),
)
@pytest.mark.parametrize("mask", [-1e30, -3.4e38])
def test_decoupled_classes_that_are_masked_as_a_whole(backend, mask):
    """All classes but the label at a large finite mask, in one model: they are equally likely in it."""
    z, v = rows_of(FP32, [1.0, 0.0, 3.0], [mask, 0.0, mask])
    others, _ = exact(*rows_of(FP64, [1.0, 3.0], [0.0, 0.0]), "kl", 4.0)
    target = math.log1p(math.exp(1 / 4) + math.exp(3 / 4))
    loss = decoupled_kd_loss(z.requires_grad_(), v, torch.tensor([1]), hard_weight=0.0, backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(16 * (target + 8 * others), rel=1e-5)
    assert abs(z.grad.sum()) < 1e-5


@pytest.mark.parametrize("backend", ["cpu", "eager", "cuda"])
@pytest.mark.parametrize("divergence", ["kl", "renyi(0.7)", "tvd"])
def test_statistics_lose_the_entropy_of_a_one_hot_teacher(backend, divergence):
    """Those of all divergences but the cross entropy were a difference of numbers that are rounded at 1."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, 300, generator=generator)
    v[0, 7] = 26.0
    z = v + 0.1 * torch.randn(1, 300, generator=generator)
    _, stats = fused_kd_loss(z, v, divergence=divergence, return_stats=True, backend=backend)
    p, log_p = v.double().softmax(-1), v.double().log_softmax(-1)
    assert stats.teacher_entropy.item() == pytest.approx(-(p * log_p).sum().item(), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("common", [[0.0], [0.0, 1.0]])
def test_the_largest_ratio_where_a_student_is_its_teacher_but_for_a_mask(backend, common):
    """max log(q / p) is what the mask takes from p's sum; 0 was right for the other way round alone."""
    z, v = rows_of(FP32, [-math.inf, *common], [0.5, *common])
    right = math.log1p(math.exp(0.5) / sum(map(math.exp, common)))
    loss = fused_kd_loss(z, v, divergence="reverse_renyi(inf)", backend=backend)
    assert loss.item() == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["kl", "skew_kl(0.75)", "renyi(2)"])
def test_a_masked_label_without_a_hard_term(backend, divergence):
    """hard_weight=0 and statistics: the label's cross entropy is +inf and no part of the loss."""
    z, v = rows_of(FP32, [0.0, -math.inf, 1.0], [0.0, -math.inf, 0.5])
    options = dict(divergence=divergence, return_stats=True, backend=backend)
    found, _ = fused_kd_loss(z, v, torch.tensor([1]), **options)
    assert found == fused_kd_loss(z, v, **options)[0] and found.isfinite()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(
    "divergence", ["renyi(0.5)", "renyi(0.3)", "reverse_renyi(0.5)", "renyi(2)", "alpha(0.5)", "kl"]
)
def test_fp64_rows_with_a_one_hot_teacher(backend, divergence):
    """Of -1 + e^-h and -1 + e^-h/2 the difference was 0, and the loss nan where the teacher's first class was
    not the student's."""
    for g, first in itertools.product((60.0, 74.0, 80.0, 300.0, 700.0), (0.0, 1e-3, 1.0, 30.0)):
        z, v = rows_of(FP64, [0.0, first], [0.0, -g])
        D, right = exact(z, v, divergence)
        loss, grad = measured(z, v, divergence=divergence, backend=backend)
        assert loss.item() == pytest.approx(D, rel=1e-9)
        assert relative_error(grad[0], right) <= 1e-9, (g, first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_class_of_a_row_that_is_far_below_0(backend):
    """eager: e^1002 of the masked class, which is not in the sum, made the gradient nan."""
    for label in (0, 1, 2):
        z, v = rows_of(FP32, [-1002.0, -math.inf, -1001.0], [0.0, 0.0, 0.0])
        y = torch.tensor([label])
        x = z.clone().requires_grad_()
        fused_kd_loss(x, v, y, soft_weight=0.0, hard_weight=1.0, backend=backend).backward()
        torch.testing.assert_close(x.grad[0], F.softmax(z[0], -1) - F.one_hot(y, 3)[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ("cpu", "eager", "triton", "cuda"))
def test_no_term_and_a_softcap_of_an_infinite_logit(backend):
    """The slope of a softcap at +inf was -inf, and 0 times it nan, though no term asks for the row."""
    z, v = rows_of(FP32, [math.inf, 0.0, 1.0], [0.0, 0.0, 0.0])
    options = dict(soft_weight=0.0, student_transform=LogitTransform(0.5, 1.0), backend=backend)
    x = z.clone().requires_grad_()
    loss = fused_kd_loss(x, v, **options)
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()
