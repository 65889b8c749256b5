"""A temperature for each row: on every backend each row is what a call with that temperature makes of it."""

import ctypes
import functools
import math
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from bounds import gradient_bound_of, spread_of, value_bound_of
from rows import BACKENDS, DOUBLE_BACKENDS, KINDS, make_rows, with_masks

from kdkernels import (
    KDLoss,
    LinearKDLoss,
    LogitTransform,
    backends,
    fused_kd_loss,
    fused_linear_kd_loss,
    parse,
)
from kdkernels.backends import cuda
from kdkernels.call import Call, Numbers

sys.path.insert(0, str(Path(__file__).parent / "simt"))
import build  # noqa: E402

TEMPERATURES = torch.tensor([0.5, 1.0, 2.0, 7.3, 100.0, 1e6])
ROWS, VOCAB = len(TEMPERATURES), 150
DIVERGENCES = (
    *("kl", "reverse_kl", "mixed_kl(0.3)", "cross_entropy", "renyi(0.5)", "alpha(2)", "jsd(0.3)"),
    *("skew_kl(0.1)", "tvd", "renyi(0)", "renyi(inf)"),
)
OPTIONS = {
    "labels": dict(hard_weight=0.3, soft_weight=0.7),
    "smoothing": dict(hard_weight=0.3, label_smoothing=0.1, z_loss=1e-3, t_squared=True),
    "softcap": dict(student_transform=LogitTransform(0.7, 20.0), teacher_transform=LogitTransform(1.0, 30.0)),
    "vocabulary": dict(vocab_size=VOCAB - 3, t_squared=True),
    "soft_weight 0": dict(soft_weight=0.0, hard_weight=1.0),
}
LABELS = torch.arange(ROWS) * 7


@pytest.fixture(scope="module")
def cuda_on_a_host():
    with build.in_place_of_cuda():
        cuda.library().c.kd_simt_device((ctypes.c_int * 5)(80, 2, 227 << 10, 228 << 10, 1))
        yield


@pytest.fixture(params=[*BACKENDS, "cuda"])
def backend(request):
    """backend="cuda" is the library for host threads."""
    if request.param == "cuda":
        if build.COMPILER is None:
            pytest.skip("needs g++")
        request.getfixturevalue("cuda_on_a_host")
    return request.param


def with_gradients(z, v, *args, teacher_grad=False, **options):
    """(loss of the rows, gradient in the student, in the teacher, statistics)."""
    z, v = z.clone().requires_grad_(), v.clone().requires_grad_(teacher_grad)
    options |= dict(teacher_grad=teacher_grad, return_stats=True, reduction="none")
    loss, stats = fused_kd_loss(z, v, *args, **options)
    loss.sum().backward()
    columns = [x.double() for x in vars(stats).values() if x is not None and x.dim()]
    return loss.detach(), z.grad, v.grad, torch.stack(columns)


# ---------------------------------------------------------------- what is right


# the interpreter and CUDA's kernels on host threads take long
GRID = [
    (backend, name, t_squared)
    for backend in (*BACKENDS, "cuda")
    for i, name in enumerate(DIVERGENCES)
    for t_squared in ((False, True) if backend in DOUBLE_BACKENDS else (bool(i % 2),))
]


@functools.cache
def exact(name: str):
    """(student, teacher, [(D, T dD/dz) of each row])."""
    z, v = make_rows(KINDS[DIVERGENCES.index(name) % 3], ROWS, VOCAB)
    rows = zip(*(x.double().numpy() for x in (z, v)), TEMPERATURES.tolist(), strict=True)
    return z, v, [oracle.divergence_row(*x[:2], name, x[2]) for x in rows]


@pytest.mark.parametrize(("backend", "name", "t_squared"), GRID, indirect=["backend"])
def test_against_the_oracle(backend, name, t_squared):
    z, v, right = exact(name)
    loss, grad, _, _ = with_gradients(
        z, v, divergence=name, temperature=TEMPERATURES, t_squared=t_squared, backend=backend
    )
    for i, (T, (D, g)) in enumerate(zip(TEMPERATURES.tolist(), right, strict=True)):
        unit, D = T * T if t_squared else 1.0, float(D)
        bound = value_bound_of(name, VOCAB, T, spread_of(z[i], v[i], T), D)
        assert abs(float(loss[i]) / unit - D) <= bound + 1e-45
        error, norm = grad[i].numpy() * (T / unit) - g, float(np.linalg.norm(g))
        assert float(np.linalg.norm(error)) <= gradient_bound_of(norm, D), (T, norm)


@pytest.mark.parametrize("option", OPTIONS)
def test_each_row_is_a_call_of_its_own(backend, option):
    """With every other option, masks, statistics and the teacher's gradient."""
    z, v = make_rows("plain", ROWS, VOCAB)
    z, v = with_masks(z, v, "both")
    options = dict(teacher_grad=True, backend=backend) | OPTIONS[option]
    found = with_gradients(z, v, LABELS, temperature=TEMPERATURES, **options)
    for i, T in list(enumerate(TEMPERATURES.tolist()))[:: 1 if backend in DOUBLE_BACKENDS else 3]:
        at = slice(i, i + 1)
        alone = with_gradients(z[at], v[at], LABELS[at], temperature=T, **options)
        torch.testing.assert_close(found[0][at], alone[0], rtol=3e-6, atol=1e-12)
        for grad, own in zip(found[1:3], alone[1:3], strict=True):
            assert (grad[at] - own).norm() <= 3e-6 * own.norm()
        torch.testing.assert_close(found[3][:, at], alone[3], rtol=3e-6, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(backend, dtype):
    """A gradient that is right to its own rounding: it never takes the form for few digits."""
    z, v = make_rows("close", ROWS, VOCAB, dtype)
    _, grad, _, _ = with_gradients(z, v, temperature=TEMPERATURES, t_squared=True, backend=backend)
    _, right, _, _ = with_gradients(
        z.double(), v.double(), temperature=TEMPERATURES.double(), t_squared=True, backend="eager"
    )
    rounded = right.to(dtype).double()
    assert (grad.double() - right).norm() <= 1.1 * (rounded - right).norm() + 1e-7


def test_fp16_gradients_do_not_underflow():
    """Nothing bounds them, so that they are computed in fp32, also with the loss scale."""
    z, v = make_rows("independent", 4, 50, torch.float16)
    T = torch.tensor([1.0, 10.0, 300.0, 3000.0])
    x = z.clone().requires_grad_()
    (fused_kd_loss(x, v, temperature=T) * 2.0**16).backward()
    right = z.double().requires_grad_()
    (fused_kd_loss(right, v.double(), temperature=T) * 2.0**16).backward()
    assert (right.grad.abs() > 1e-5).any(-1).all()
    torch.testing.assert_close(x.grad.double(), right.grad, rtol=1e-3, atol=6e-8)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_threads_of_the_cpu(threads, rows):
    """Threads that take rows, and threads that share one."""
    z, v = make_rows("plain", rows, 70_000 if rows < 40 else 3000)
    T = torch.linspace(0.5, 4.0, rows)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        loss, grad, _, _ = with_gradients(z, v, temperature=T, divergence="jsd(0.3)", backend="cpu")
    finally:
        torch.set_num_threads(before)
    for i in range(rows):
        at = slice(i, i + 1)
        alone = with_gradients(z[at], v[at], temperature=T[i].item(), divergence="jsd(0.3)", backend="cpu")
        torch.testing.assert_close(loss[at], alone[0], rtol=1e-6, atol=0)
        assert (grad[at] - alone[1]).norm() <= 1e-6 * alone[1].norm()


# ---------------------------------------------------------------- rows and shapes


def test_rows_that_do_not_count(backend):
    """Their temperature may be anything: padding."""
    z, v = make_rows("plain", 4, 40)
    labels, weight = torch.tensor([1, -100, 2, 3]), torch.tensor([1.0, 1.0, 0.0, 2.0])
    options = dict(hard_weight=0.1, token_weight=weight, backend=backend)
    T = torch.tensor([2.0, math.nan, 0.0, 3.0])
    found = with_gradients(z, v, labels, temperature=T, **options)
    right = with_gradients(z, v, labels, temperature=torch.tensor([2.0, 1.0, 1.0, 3.0]), **options)
    for a, b in zip(found, right, strict=True):
        assert a is b is None or torch.equal(a[~a.isnan()], b[~b.isnan()])
    assert (found[1][1:3] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_reductions_and_layouts(backend, reduction, inplace):
    """(batch, tokens, V) without a copy, temperatures that are expanded, and of any floating dtype."""
    z, v = (x.view(2, 3, 40) for x in make_rows("plain", 6, 40))
    T = torch.tensor([0.5, 3.0], dtype=torch.bfloat16)[:, None].expand(2, 2)
    options = dict(reduction=reduction, inplace=inplace, t_squared=True, backend=backend)
    x = z.clone().requires_grad_()
    fused_kd_loss((x * 1.0)[:, :-1], v[:, :-1], temperature=T, **options).sum().backward()
    y, parts = z.clone().requires_grad_(), []
    for i, t in enumerate((0.5, 3.0)):
        options |= dict(inplace=False)
        parts.append(fused_kd_loss(y[i, :-1], v[i, :-1], temperature=t, **options).sum())
    (sum(parts) / (2 if reduction == "mean" else 1)).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear(reduction):
    """By chunks, of which each takes its own rows' temperatures, and without those that do not count."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    h, w, th, tw = draw(10, 6), draw(33, 6), draw(10, 4), draw(33, 4)
    T, labels = torch.linspace(0.5, 5.0, 10), torch.arange(10)
    labels[3] = -100
    options = dict(temperature=T, t_squared=True, hard_weight=0.2, reduction=reduction)
    found = [x.clone().requires_grad_() for x in (h, w, th, tw)]
    fused_linear_kd_loss(
        *found, labels, memory_budget=33 * 12 * 3, teacher_grad=True, **options
    ).sum().backward()
    right = [x.clone().requires_grad_() for x in (h, w, th, tw)]
    logits = right[0] @ right[1].t(), right[2] @ right[3].t()
    fused_kd_loss(*logits, labels, teacher_grad=True, **options).sum().backward()
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_modules():
    z, v = make_rows("plain", 3, 40)
    T = torch.tensor([1.0, 2.0, 3.0])
    loss = KDLoss(temperature=4.0, t_squared=True)
    assert torch.equal(loss(z, v, temperature=T), fused_kd_loss(z, v, temperature=T, t_squared=True))
    assert torch.equal(loss(z, v, temperature=2.0), fused_kd_loss(z, v, temperature=2.0, t_squared=True))
    assert torch.equal(loss(z, v), fused_kd_loss(z, v, temperature=4.0, t_squared=True))
    linear = LinearKDLoss(t_squared=True)
    expected = fused_kd_loss(z, v, temperature=T, t_squared=True)
    found = linear(z, torch.eye(40), teacher_logits=v, temperature=T)
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("wrong", [0.0, -1.0, 1e-5, 1e13, math.inf, math.nan])
def test_a_temperature_out_of_range(wrong):
    z, v = make_rows("plain", 3, 40)
    T = torch.tensor([1.0, wrong, 2.0])
    h = torch.eye(40)
    calls = (
        *(lambda b=b: fused_kd_loss(z, v, temperature=T, backend=b) for b in BACKENDS),
        lambda: fused_linear_kd_loss(z, h, teacher_logits=v, temperature=T),
        lambda: fused_kd_loss(z, v, temperature=T.clone().requires_grad_(), backend="eager"),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"temperature: must be in \[0.0001, 1e\+12\]; that of row 1"):
            call()


def test_of_a_device_it_makes_its_row_nan(backend):
    """Nobody waits for a device to look at temperatures; its operator is given nan for one out of range."""
    z, v = make_rows("plain", 3, 40)
    T = torch.tensor([1.0, math.nan, 2.0], dtype=torch.float64)
    for name in ("kl", "renyi(2)", "jsd(0.5)", "renyi(inf)"):
        for squared in (False, True):
            grad = torch.empty_like(z)
            numbers = Numbers(squared=squared)
            call = Call(z, v, 40, None, None, parse(name), numbers, grad, None, T)
            losses = backends.resolve(backend, z.device, z.dtype).loss(call)
            assert losses.isnan().tolist() == [False, True, False]
            assert grad[1].isnan().all() and grad[::2].isfinite().all()


def test_wrong_tensors():
    z, v = make_rows("plain", 3, 40)
    linear = functools.partial(fused_linear_kd_loss, z, torch.eye(40), teacher_logits=v)
    for error, T in (
        (ValueError, torch.ones(2)),
        (ValueError, torch.ones(3, 1)),
        (TypeError, torch.ones(3, dtype=torch.int64)),
        (ValueError, torch.ones(3, device="meta")),
    ):
        for loss in (functools.partial(fused_kd_loss, z, v), linear):
            with pytest.raises(error, match="temperature: must be"):
                loss(temperature=T)
    with pytest.raises(TypeError, match="temperature: must be a number"):
        KDLoss(temperature=torch.ones(3))
    x = z.double()
    with pytest.raises(ValueError, match="inplace: temperature shares memory"):
        fused_kd_loss(x, v.double(), temperature=x[:, 0], inplace=True)


@pytest.mark.parametrize("T", [torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)])
def test_a_gradient_needs_eager(T):
    z, v = make_rows("plain", 3, 40)
    for loss in (
        lambda: fused_kd_loss(z, v, temperature=T),
        lambda: fused_kd_loss(z.clone(), v, temperature=T, backend="eager", inplace=True),
        lambda: fused_linear_kd_loss(z, torch.eye(40), teacher_logits=v, temperature=T, backend="eager"),
    ):
        with pytest.raises(ValueError, match='temperature: receives a gradient.*backend="eager"'):
            loss()


# ---------------------------------------------------------------- learned temperatures, graphs


@pytest.mark.parametrize("t_squared", [False, True])
@pytest.mark.parametrize("name", DIVERGENCES[:-1])
def test_eager_differentiates_it(name, t_squared):
    """CTKD learns T."""
    z, v = (x.double() for x in make_rows("plain", 3, 12))
    options = dict(divergence=name, t_squared=t_squared, reduction="none", backend="eager")
    T = torch.tensor([0.7, 1.5, 4.0], dtype=torch.float64, requires_grad=True)
    f = lambda T, z: fused_kd_loss(z, v, temperature=T, **options)  # noqa: E731
    z.requires_grad_()
    assert torch.autograd.gradcheck(f, (T, z))
    if name not in ("tvd", "renyi(0)"):
        assert torch.autograd.gradgradcheck(f, (T, z))


def test_one_temperature_that_is_learned():
    """(global, of all rows): a 0-d tensor."""
    z, v = (x.double() for x in make_rows("plain", 3, 12))
    T = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 0.0, 2.0])
    loss, stats = fused_kd_loss(
        z, v, temperature=T, token_weight=weight, t_squared=True, return_stats=True, backend="eager"
    )
    loss.backward()
    ends = [fused_kd_loss(z, v, temperature=t, token_weight=weight, t_squared=True) for t in (1.999, 2.001)]
    assert T.grad.item() == pytest.approx(((ends[1] - ends[0]) / 0.002).item(), rel=1e-5)
    assert not stats.divergence.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_and_export(reduction):
    torch._dynamo.reset()

    def f(z, v, T):
        return fused_kd_loss(z * 1.0, v, temperature=T, t_squared=True, reduction=reduction).sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for rows in (5, 4):
        z, v = make_rows("plain", rows, 40)
        T = torch.linspace(0.5, 4.0, rows)
        a, b = (z.clone().requires_grad_() for _ in range(2))
        compiled(a, v, T).backward()
        f(b, v, T).backward()
        torch.testing.assert_close(a.grad, b.grad)
    exported = torch.export.export(KDLoss(reduction=reduction), (z, v), dict(temperature=T))
    torch.testing.assert_close(
        exported.module()(z, v, temperature=T), fused_kd_loss(z, v, temperature=T, reduction=reduction)
    )
