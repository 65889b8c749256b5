"""fused_kd_loss beyond its accuracy: reductions, weights, masks, layouts, gradient semantics. Where peers go
wrong, the test says so."""

import math

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from bounds import gradient_bound
from rows import BACKENDS, DOUBLE_BACKENDS, make_rows, with_masks

from kdkernels import KDLoss, fused_kd_loss, logit_matching_loss, tempered_log_softmax

backends = pytest.mark.parametrize("backend", BACKENDS)


def grad_of(z, v, *args, upstream=None, **kwargs):
    z = z.detach().clone().requires_grad_()
    loss = fused_kd_loss(z, v, *args, **kwargs)
    loss.backward(upstream)
    return loss.detach(), z.grad


def eager_loss(z, v, y=None, T=1.0, hard=0.0, soft=1.0, t_squared=False, ignore=-100):
    """The textbook, in fp64, per row."""
    z, v = z.double(), v.double()
    kl = (F.softmax(v / T, -1) * (F.log_softmax(v / T, -1) - F.log_softmax(z / T, -1))).sum(-1)
    rows = soft * kl * (T * T if t_squared else 1)
    if y is not None:
        rows = rows + hard * F.cross_entropy(z, y, reduction="none", ignore_index=ignore)
        rows = torch.where(y == ignore, 0, rows)
    return rows


# ---------------------------------------------------------------- temperature, T^2, hard labels


@backends
@pytest.mark.parametrize("t_squared", [False, True])
@pytest.mark.parametrize("vocab", [7, 5000])
def test_temperature_scales_value_and_gradient_alike(backend, t_squared, vocab):
    """T divides both models' logits, T^2 multiplies value and gradient of the soft term and never the cross
    entropy."""
    z, v = make_rows("plain", 4, vocab)
    y = torch.randint(vocab, (4,), generator=torch.Generator().manual_seed(0))
    for T in (0.5, 2.0, 4.0):
        loss, grad = grad_of(
            z, v, y, temperature=T, t_squared=t_squared, soft_weight=0.9, hard_weight=0.1, backend=backend
        )
        x = z.double().requires_grad_()
        expected = eager_loss(x, v, y, T, 0.1, 0.9, t_squared).mean()
        (g,) = torch.autograd.grad(expected, x)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(grad.double(), g, rtol=1e-5, atol=1e-8)


@backends
def test_default_is_plain_kl(backend):
    """No cross entropy is mixed in unasked, also when labels are there."""
    z, v = make_rows("plain", 3, 50)
    y = torch.tensor([1, 2, 3])
    assert torch.equal(fused_kd_loss(z, v, y, backend=backend), fused_kd_loss(z, v, backend=backend))
    assert fused_kd_loss(z, v, backend=backend).item() == pytest.approx(
        eager_loss(z, v).mean().item(), rel=1e-6
    )


@backends
@pytest.mark.parametrize("vocab", [9, 5000])
@pytest.mark.parametrize("gap", [0.0, 30.0, 60.0])
def test_hard_term_keeps_its_digits(backend, vocab, gap):
    """Where q of the label rounds to 1, the loss and the label's gradient are what the other classes are, not
    0."""
    z, v = make_rows("plain", 2, vocab)
    z[0, 4] += gap
    z[1, vocab - 1] += gap
    y = torch.tensor([4, vocab - 1])
    loss, grad = grad_of(
        z, v, y, soft_weight=0.0, hard_weight=1.0, reduction="none", upstream=torch.ones(2), backend=backend
    )
    for i in range(2):
        D, g = oracle.hard_row(z[i].numpy(), int(y[i]))
        exponent = 1e-6 + 6e-8 * (gap + 20)  # the rounding of z_j - z_label, which is an exponent, in fp32
        assert float(loss[i]) == pytest.approx(float(D), rel=exponent)
        assert float(np.linalg.norm(grad[i].numpy() - g)) <= exponent * float(np.linalg.norm(g))


@backends
def test_infinite_temperature_is_the_limit(backend):
    z, v = make_rows("plain", 3, 1000)
    for divergence, k in (("kl", 1.0), ("renyi(0.25)", 0.25), ("renyi(3)", 3.0), ("renyi(0)", 0.0)):
        loss, grad = grad_of(
            z, v, divergence=divergence, temperature=math.inf, t_squared=True, backend=backend
        )
        near, grad_near = grad_of(
            z, v, divergence=divergence, temperature=1e6, t_squared=True, backend=backend
        )
        d = z.double() - v.double()
        assert loss.item() == pytest.approx(k / 2 * d.var(-1, correction=0).mean().item(), rel=1e-6)
        assert loss.item() == pytest.approx(near.item(), rel=1e-4, abs=1e-12)
        torch.testing.assert_close(grad, grad_near, rtol=1e-4, atol=1e-8)


@backends
@pytest.mark.parametrize("kind", ["plain", "offset", "close"])
@pytest.mark.parametrize("vocab", [1, 31, 9000])
def test_logit_matching(backend, kind, vocab):
    z, v = make_rows(kind, 2, vocab)
    for center in (False, True):
        x = z.clone().requires_grad_()
        loss = logit_matching_loss(x, v, center, reduction="none", backend=backend)
        loss.sum().backward()
        for i in range(2):
            D, g = oracle.logit_matching_row(z[i].numpy(), v[i].numpy(), center)
            assert float(loss[i]) == pytest.approx(float(D), rel=1e-6, abs=1e-30)
            assert float(np.linalg.norm(x.grad[i].numpy() - g)) <= 1e-6 * float(np.linalg.norm(g))
    x = z.clone().requires_grad_()
    centered = logit_matching_loss(x, v, True, backend=backend)
    assert (
        centered.item() == fused_kd_loss(z, v, temperature=math.inf, t_squared=True, backend=backend).item()
    )


@backends
@pytest.mark.parametrize("T", [0.1, 1.0, 3.0, 1e4])
@pytest.mark.parametrize("vocab", [1, 31, 9000])
def test_tempered_log_softmax(backend, T, vocab):
    for kind in ("plain", "offset", "dominant"):
        z = make_rows(kind, 2, vocab)[0].requires_grad_()
        out = tempered_log_softmax(z, T, backend=backend)
        u = torch.randn(2, vocab, generator=torch.Generator().manual_seed(0))
        (g,) = torch.autograd.grad(out, z, u)
        for i in range(2):
            exact = oracle.log_softmax_row(z[i].detach().numpy(), T)
            # near 0 a value is the sum of the others, and 6e-8 of their exponent is its relative error
            relative = np.where(abs(exact) < 1e-2, 6e-8 * (40 / T + 5), 3e-7)
            assert (abs(out[i].detach().numpy() - exact) <= relative * abs(exact)).all()
            p = np.exp(exact)
            exact_g = (u[i].numpy() - p * u[i].double().sum().numpy()) / T
            assert (
                float(np.linalg.norm(g[i].numpy() - exact_g))
                <= 1e-6 * float(np.linalg.norm(exact_g)) + 1e-6 * vocab**0.5 * float(p.max()) / T
            )


@backends
def test_tempered_log_softmax_edges(backend):
    x = torch.tensor([[1.0, -math.inf, 2.0], [0.0, 0.0, 0.0], [math.nan, 0.0, 1.0]])
    out = tempered_log_softmax(x, 2.0, backend=backend)
    torch.testing.assert_close(out[:2], (x[:2] / 2).log_softmax(-1))
    assert out[2].isnan().all()
    uniform = tempered_log_softmax(x[:2], math.inf, backend=backend)
    torch.testing.assert_close(
        uniform, torch.tensor([[-math.log(2), -math.inf, -math.log(2)], [-math.log(3)] * 3])
    )
    assert tempered_log_softmax(torch.empty(0, 3), backend=backend).shape == (0, 3)
    for dtype in (torch.bfloat16, torch.float16, *([torch.float64] if backend in DOUBLE_BACKENDS else [])):
        z = torch.randn(3, 40).to(dtype)
        torch.testing.assert_close(
            tempered_log_softmax(z, 2.0, backend=backend), (z.double() / 2).log_softmax(-1).to(dtype)
        )


# ---------------------------------------------------------------- rows: reductions, masks, weights


@backends
def test_reductions_count_rows(backend):
    """mean divides by the counted rows: not by rows x classes, not by all rows."""
    z, v = make_rows("plain", 6, 40)
    y = torch.tensor([1, -100, 3, 4, -100, 5])
    rows, _ = grad_of(z, v, y, hard_weight=0.5, reduction="none", upstream=torch.ones(6), backend=backend)
    torch.testing.assert_close(rows.double(), eager_loss(z, v, y, hard=0.5), rtol=1e-6, atol=0)
    total, g_sum = grad_of(z, v, y, hard_weight=0.5, reduction="sum", backend=backend)
    mean, g_mean = grad_of(z, v, y, hard_weight=0.5, backend=backend)
    assert total.item() == pytest.approx(rows.sum().item(), rel=1e-6)
    assert mean.item() == pytest.approx(rows.sum().item() / 4, rel=1e-6)
    torch.testing.assert_close(g_sum / 4, g_mean, rtol=1e-6, atol=1e-12)
    assert not g_mean[1].any() and not g_mean[4].any()
    for num_items in (8, torch.tensor(8), torch.tensor(8.0)):
        scaled, g = grad_of(z, v, y, hard_weight=0.5, num_items=num_items, backend=backend)
        assert scaled.item() == pytest.approx(rows.sum().item() / 8, rel=1e-6)
        torch.testing.assert_close(g_sum / 8, g, rtol=1e-6, atol=1e-12)


@backends
def test_token_weight(backend):
    z, v = make_rows("plain", 5, 40)
    y = torch.tensor([1, -100, 3, 4, 0])
    w = torch.tensor([0.5, 7.0, 0.0, 2.0, 1.0])
    mean, g = grad_of(z, v, y, hard_weight=0.5, token_weight=w, backend=backend)
    x = z.double().requires_grad_()
    expected = (w * eager_loss(x, v, y, hard=0.5)).sum() / (0.5 + 2 + 1)
    (ge,) = torch.autograd.grad(expected, x)
    assert mean.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(g.double(), ge, rtol=1e-5, atol=1e-8)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ignored_rows_are_not_read(backend, dtype):
    """nan in an ignored row spoils nothing; all rows ignored gives 0 with a zero gradient, not 0/0 and not no
    gradient."""
    z, v = make_rows("plain", 4, 5000, dtype)
    y = torch.tensor([1, -100, 3, 4])
    clean, g = grad_of(z, v, y, hard_weight=0.5, backend=backend)
    z[1], v[1] = math.nan, math.inf
    dirty, h = grad_of(z, v, y, hard_weight=0.5, backend=backend)
    assert torch.equal(clean, dirty) and torch.equal(g, h)
    for reduction in ("mean", "sum"):
        loss, g = grad_of(z, v, torch.full((4,), -100), hard_weight=0.5, reduction=reduction, backend=backend)
        assert loss.item() == 0 and not g.any()
    loss, g = grad_of(z, v, token_weight=torch.tensor([1.0, 0, 1, 1]), backend=backend)
    assert loss.isfinite() and g.isfinite().all() and not g[1].any()


def several_tiles(backend: str) -> int:
    """Classes of a row of three blocks of the CPU, or three tiles of Triton's, whose interpreter takes its
    time."""
    return 3000 if backend == "triton" else 9000


@backends
def test_a_broken_row_stays_alone(backend):
    for bad in (math.nan, math.inf):
        for side in (0, 1):
            for vocab in (5, several_tiles(backend)):
                z, v = make_rows("plain", 3, vocab)
                (z, v)[side][1, vocab // 2] = bad
                loss, g = grad_of(z, v, reduction="none", upstream=torch.ones(3), backend=backend)
                assert loss[1].isnan() and g[1].isnan().all()
                assert loss[[0, 2]].isfinite().all() and g[[0, 2]].isfinite().all()
    z[1] = -math.inf
    loss, g = grad_of(z, v, reduction="none", upstream=torch.ones(3), backend=backend)
    assert loss[1].isnan() and loss[[0, 2]].isfinite().all()


@backends
@pytest.mark.parametrize("where", ["both", "teacher", "student"])
@pytest.mark.parametrize(
    "divergence", ["kl", "cross_entropy", "renyi(0)", "renyi(0.3)", "renyi(0.7)", "renyi(2)", "renyi(inf)"]
)
@pytest.mark.parametrize("few", [True, False])
def test_masked_classes(backend, where, divergence, few):
    """-inf is a masked class: value and gradient as the oracle has them, where peers give nan or hide it with
    nan_to_num."""
    vocab = 10 if few else several_tiles(backend)
    for T in (1.0, 0.05):
        z, v = with_masks(*make_rows("plain", 2, vocab), where)
        loss, g = grad_of(
            z,
            v,
            divergence=divergence,
            temperature=T,
            soft_weight=T,
            reduction="none",
            upstream=torch.ones(2),
            backend=backend,
        )
        for i in range(2):
            D, exact = oracle.divergence_row(z[i].numpy(), v[i].numpy(), divergence, T)
            spread = 1e-6 * 30 / T
            assert float(loss[i]) == pytest.approx(T * float(D), rel=2e-6 + spread * 0.1, abs=1e-30)
            assert float(np.linalg.norm(g[i].numpy() - exact)) <= gradient_bound(
                2 if divergence.startswith("renyi") else 1, float(np.linalg.norm(exact))
            )
            masked = (z[i] == -math.inf) & (v[i] == -math.inf)
            assert not g[i][masked].any()


@backends
def test_masked_blocks_and_disjoint_supports(backend):
    """A teacher that kept its top classes only, in a corner of the vocabulary; and two models with nothing in
    common."""
    vocab = 2 * several_tiles(backend) + 2000
    corner = slice(vocab * 2 // 3, vocab * 2 // 3 + 50)
    z, v = make_rows("plain", 2, vocab)
    top = torch.full_like(v, -math.inf)
    top[:, corner] = v[:, corner]
    for divergence in ("kl", "renyi(0.3)", "renyi(0.7)", "renyi(0)", "renyi(2)"):
        loss, g = grad_of(
            z, top, divergence=divergence, reduction="none", upstream=torch.ones(len(z)), backend=backend
        )
        for i in range(len(z)):
            D, exact = oracle.divergence_row(z[i].numpy(), top[i].numpy(), divergence, 1.0)
            assert float(loss[i]) == pytest.approx(float(D), rel=2e-6)
            assert float(np.linalg.norm(g[i].numpy() - exact)) <= 3e-6 * float(np.linalg.norm(exact)) + 1e-7
    z[:, corner] = -math.inf
    for divergence in ("kl", "renyi(0.3)", "renyi(0)", "renyi(2)"):
        loss, g = grad_of(
            z, top, divergence=divergence, reduction="none", upstream=torch.ones(len(z)), backend=backend
        )
        assert (loss == math.inf).all() and not g.isnan().any()


@backends
@pytest.mark.parametrize("order", [0.0, 0.01, 0.5, 1.0, 2.0, 20.0, math.inf])
@pytest.mark.parametrize("vocab", [30, 9000])
def test_restricted_support(backend, order, vocab):
    """P = Q restricted to A: D_alpha = -log Q(A) for every order (Grätzer, eq. 1.20)."""
    z, _ = make_rows("plain", 2, vocab)
    v = z.clone()
    v[:, ::3] = -math.inf
    inside = torch.where(v > -math.inf, z.double().softmax(-1), 0).sum(-1)
    loss = fused_kd_loss(z, v, divergence=f"renyi({order})", reduction="none", backend=backend)
    torch.testing.assert_close(loss.double(), -inside.log(), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- vocabularies, layouts, sizes


@backends
def test_vocabularies_that_differ(backend):
    """151936 beside 152064: the first classes of both, each row at its own stride; the rest gets a zero
    gradient, not a padded logit."""
    # the interpreter is slow
    vocab, student, teacher = (151665, 152064, 151936) if backend != "triton" else (15161, 15200, 15192)
    z, v = torch.randn(3, student), torch.randn(3, teacher)
    loss, g = grad_of(z, v, vocab_size=vocab, temperature=2.0, backend=backend)
    cut, h = grad_of(z[:, :vocab], v[:, :vocab], temperature=2.0, backend=backend)
    assert torch.equal(loss, cut)
    assert torch.equal(g[:, :vocab], h) and not g[:, vocab:].any()
    v.requires_grad_()
    with pytest.raises(ValueError, match="teacher_logits"):
        fused_kd_loss(z, v, vocab_size=vocab, backend=backend)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend, dtype):
    """Sliced, expanded, transposed and deep inputs are the contiguous ones; grad has the shape of the
    input."""
    if backend == "triton" and dtype == torch.float32:
        pytest.skip("as bfloat16, and the interpreter is slow")
    g = torch.Generator().manual_seed(6)  # whose gradients have elements next to 0
    big_z, big_v = (torch.randn(4, 6, 700, generator=g).to(dtype) for _ in range(2))
    y = torch.randint(700, (4, 6), generator=g)
    y[1, 2] = -100
    layouts = {
        "shifted": lambda x: x[:, :-1],
        "step": lambda x: x[::2, 1::2],
        "transposed rows": lambda x: x.transpose(0, 1),
        "deep": lambda x: x.unflatten(1, (2, 3)),
        "deep step": lambda x: x.unflatten(1, (2, 3))[:, :, ::2],
        "column": lambda x: x[0].t().contiguous().t()[None].expand(4, 6, 700),
        "expanded": lambda x: x[:1].expand(4, 6, 700),
        "one row": lambda x: x[2, 3],
        "narrow": lambda x: x[..., 3:603],
    }
    for name, layout in layouts.items():
        labels = layout(y.unsqueeze(-1).expand(4, 6, 700))[..., 0].clamp(max=500)
        base = big_z.clone().requires_grad_()
        z = layout(base)
        loss = fused_kd_loss(
            z, layout(big_v), labels, hard_weight=0.3, divergence="renyi(0.5)", backend=backend
        )
        loss.backward()
        other = big_z.clone().requires_grad_()
        flat = layout(other).contiguous()
        expected = fused_kd_loss(
            flat,
            layout(big_v).contiguous(),
            labels.contiguous(),
            hard_weight=0.3,
            divergence="renyi(0.5)",
            backend=backend,
        )
        expected.backward()
        # on a GPU, how rows lie in memory decides which lane adds what: a unit of bf16, and of an element
        # next to 0 what fp32 rounds
        room = (
            dict(rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-8)
            if backend == "triton"
            else dict(rtol=0, atol=0)
        )
        torch.testing.assert_close(loss, expected, msg=name, **room)
        torch.testing.assert_close(base.grad, other.grad, msg=name, **room)


@backends
def test_empty_and_single(backend):
    for shape in ((0, 5), (2, 0, 5), (0,)):
        if shape == (0,):
            continue
        z = torch.zeros(shape, requires_grad=True)
        loss = fused_kd_loss(z, torch.zeros(shape), backend=backend)
        loss.backward()
        assert loss.item() == 0 and z.grad.shape == shape
        assert fused_kd_loss(z, torch.zeros(shape), reduction="none", backend=backend).shape == shape[:-1]
    z = torch.tensor([[3.0]], requires_grad=True)
    for divergence in ("kl", "cross_entropy", "renyi(0)", "renyi(0.5)", "renyi(3)", "renyi(inf)"):
        loss = fused_kd_loss(z, torch.tensor([[-1000.7]]), divergence=divergence, backend=backend)
        (g,) = torch.autograd.grad(loss, z)
        assert loss.item() == 0 and g.item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_offsets_beyond_int32(dtype):
    """Two rows 2^31 elements apart; the pages between them are never touched."""
    z = torch.empty(2**31 + 9000, dtype=dtype).as_strided((2, 5000), (2**31, 1))
    v, w = torch.randn(2, 5000).to(dtype), torch.randn(2, 5000).to(dtype)
    z.copy_(w)
    loss, g = fused_kd_loss(z, v, reduction="none"), torch.empty(0)
    assert torch.equal(loss, fused_kd_loss(w, v, reduction="none"))
    base = z.view(2, 5000).requires_grad_(False)
    x = base.requires_grad_()
    fused_kd_loss(x * 1, v).backward()
    _, g = grad_of(w, v)
    assert torch.equal(x.grad, g)


# ---------------------------------------------------------------- gradient semantics


def test_vector_upstream():
    """reduction="none" takes any vector from upstream, also zeros and signs."""
    z, v = make_rows("plain", 4, 5000)
    u = torch.tensor([2.0, 0.0, -1.0, 0.5])
    _, g = grad_of(z, v, reduction="none", upstream=u)
    for i in range(4):
        _, h = grad_of(z[i : i + 1], v[i : i + 1])
        torch.testing.assert_close(g[i], u[i] * h[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_second_backward_does_not_scale_twice(dtype):
    z, v = make_rows("plain", 3, 500, dtype)
    z.requires_grad_()
    loss = fused_kd_loss(z, v)
    (first,) = torch.autograd.grad(loss, z, torch.tensor(2.0), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, z, torch.tensor(2.0), retain_graph=True)
    (third,) = torch.autograd.grad(loss, z, torch.tensor(6.0))
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(third, 3 * first, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-7)
    (expected,) = torch.autograd.grad(fused_kd_loss(z, v, backend="eager"), z, torch.tensor(2.0))
    torch.testing.assert_close(first, expected, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backwards_of_every_kind_in_any_order(dtype):
    """create_graph, retain_graph and plain backwards with different upstream gradients do not disturb each
    other."""
    z, v = make_rows("plain", 3, 500, dtype)
    z.requires_grad_()
    (unit,) = torch.autograd.grad(fused_kd_loss(z, v, reduction="sum", backend="eager"), z)
    tolerance = {"rtol": 3e-3, "atol": 1e-6} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-8}
    for first in (True, False):
        loss = fused_kd_loss(z, v, reduction="sum")
        for create_graph, scale in ((first, 2.0), (not first, 5.0), (first, 0.5)):
            (g,) = torch.autograd.grad(
                loss, z, torch.tensor(scale), retain_graph=True, create_graph=create_graph
            )
            torch.testing.assert_close(g.detach(), scale * unit, **tolerance)


def test_accumulated_gradients_are_not_aliased():
    z, v = make_rows("plain", 3, 500)
    z.requires_grad_()
    loss = fused_kd_loss(z, v)
    loss.backward(retain_graph=True)
    once = z.grad.clone()
    loss.backward()
    torch.testing.assert_close(z.grad, 2 * once)


def test_fp16_gradients_survive_the_mean():
    """Under a loss scale: dividing by the rows before the upstream gradient arrives would flush an fp16
    gradient to zero."""
    z, v = make_rows("plain", 2000, 500, torch.float16)
    scale = torch.tensor(65536.0)
    for weight in (None, torch.rand(2000)):
        _, g = grad_of(z, v, token_weight=weight, upstream=scale)
        _, exact = grad_of(z.double(), v.double(), token_weight=weight, upstream=scale.double())
        assert float((g.double() - exact).norm() / exact.norm()) < 1e-3


def test_inplace():
    z, v = make_rows("plain", 5, 700)
    y = torch.tensor([0, 1, 2, -100, 4])
    for reduction in ("mean", "none"):
        x = z.clone().requires_grad_()
        logits = x * 1
        pointer = logits.data_ptr()
        seen = []
        logits.register_hook(lambda g, seen=seen: seen.append(g.data_ptr()))
        loss = fused_kd_loss(logits, v, y, hard_weight=0.2, reduction=reduction, inplace=True)
        loss.sum().backward()
        other = z.clone().requires_grad_()
        expected = fused_kd_loss(other, v, y, hard_weight=0.2, reduction=reduction)
        expected.sum().backward()
        assert seen == [pointer]
        assert torch.equal(loss, expected) and torch.equal(x.grad, other.grad)
    (once,) = torch.autograd.grad(fused_kd_loss(x, v), x)
    loss = fused_kd_loss(x * 1, v, inplace=True)
    for retain_graph in (True, True, False):  # the gradient lies over the logits until the last backward
        (again,) = torch.autograd.grad(loss, x, retain_graph=retain_graph)
        assert torch.equal(again, once)


def test_inplace_on_a_saved_tensor_is_autograds_error():
    x = torch.randn(3, 50, requires_grad=True)
    logits = x.exp()  # saves its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fused_kd_loss(logits, torch.randn(3, 50), inplace=True).backward()


def test_second_derivative():
    z, v = make_rows("plain", 2, 6)
    z = z.double().requires_grad_()
    for reduction in ("mean", "none"):
        (g,) = torch.autograd.grad(fused_kd_loss(z, v, reduction=reduction).sum(), z, create_graph=True)
        with pytest.raises(RuntimeError, match='backend="eager"'):
            g.sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda x: fused_kd_loss(x, v.double(), temperature=2.0, backend="eager"), z
    )
    assert torch.autograd.gradgradcheck(
        lambda x: fused_kd_loss(x, v.double(), divergence="renyi(0.3)", backend="eager"), z
    )


@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
@pytest.mark.parametrize(
    "divergence",
    [
        "kl",
        "cross_entropy",
        "renyi(0.01)",
        "renyi(0.5)",
        "renyi(0.9999)",
        "renyi(2)",
        "renyi(5)",
        "renyi(inf)",
    ],
)
def test_gradcheck(backend, divergence):
    z, v = make_rows("plain", 3, 7, torch.float64)
    y = torch.tensor([0, -100, 3])
    z.requires_grad_()
    for options in ({"temperature": 2.0, "t_squared": True}, {"hard_weight": 0.3, "reduction": "sum"}):
        # a fused gradient is computed for the whole loss, so it is not re-entrant in gradcheck's sense only
        # by one rounding
        assert torch.autograd.gradcheck(
            lambda x, o=options: fused_kd_loss(x, v, y, divergence=divergence, backend=backend, **o), z
        )
    if divergence not in ("cross_entropy", "renyi(inf)"):
        assert torch.autograd.gradcheck(
            lambda x: fused_kd_loss(
                x, v, divergence=divergence, temperature=math.inf, t_squared=True, backend=backend
            ),
            z,
        )


# ---------------------------------------------------------------- determinism


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["kl", "renyi(0.3)", "renyi(0.7)"])
def test_bits_do_not_depend_on_threads_or_batch(dtype, divergence):
    z, v = make_rows("plain", 9, 40000, dtype)
    y = torch.arange(9) * 4000
    options = {"divergence": divergence, "temperature": 2.0, "hard_weight": 0.1, "reduction": "none"}
    threads = torch.get_num_threads()
    loss, g = grad_of(z, v, y, upstream=torch.ones(9), **options)
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for rows in (slice(0, 1), slice(3, 5), slice(0, 9)):
                some, h = grad_of(z[rows], v[rows], y[rows], upstream=torch.ones(len(z[rows])), **options)
                assert torch.equal(some, loss[rows]) and torch.equal(h, g[rows])
            # in place there is little room to keep exponentials: most blocks are swept twice
            x = z.clone().requires_grad_()
            fused_kd_loss(x * 1, v, y, inplace=True, **{**options, "reduction": "sum"}).backward()
            _, fresh = grad_of(z, v, y, **{**options, "reduction": "sum"})
            assert torch.equal(x.grad, fresh)
    finally:
        torch.set_num_threads(threads)


def test_workspace_in_the_gradient_leaves_no_trace():
    """Enough rows that the last ones of the gradient serve as workspace first."""
    z, v = make_rows("plain", 64, 9000)
    _, g = grad_of(z, v, divergence="renyi(0.7)", reduction="sum")
    for i in (0, 40, 62, 63):
        _, h = grad_of(z[i : i + 1], v[i : i + 1], divergence="renyi(0.7)", reduction="sum")
        assert torch.equal(g[i], h[0])


def test_uninitialised_memory_is_never_read():
    """With torch.empty filled with nan."""
    torch.use_deterministic_algorithms(True)
    try:
        z, v = make_rows("plain", 3, 5000)
        y = torch.tensor([1, -100, 3])
        for options in ({}, {"vocab_size": 4000}, {"divergence": "renyi(0.3)"}, {"temperature": 0.05}):
            _, g = grad_of(z, v, y.clamp(max=3999), hard_weight=0.1, **options)
            assert g.isfinite().all()
            assert fused_kd_loss(z, v, y, **options).isfinite()
        assert tempered_log_softmax(z).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_module_is_the_function():
    z, v = make_rows("plain", 3, 50)
    y = torch.tensor([1, 2, 3])
    options = {"divergence": "renyi(0.5)", "temperature": 2.0, "t_squared": True, "hard_weight": 0.2}
    module = KDLoss(**options)
    assert torch.equal(module(z, v, y, num_items=7), fused_kd_loss(z, v, y, num_items=7, **options))
    assert "renyi(0.5)" in repr(module)
