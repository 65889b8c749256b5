"""Teacher gradients, logit transforms, label smoothing and the z-loss: against PyTorch in fp64, on every
backend."""

import itertools
import math

import pytest
import raw
import torch
import torch.nn.functional as F
from rows import BACKENDS, DOUBLE_BACKENDS, KINDS, make_rows, with_masks

from kdkernels import (
    KDLoss,
    LogitTransform,
    decoupled_kd_loss,
    fused_kd_loss,
    parse,
    standardize_logits,
)
from kdkernels.transforms import Modifiers

SIDES = [
    "kl",
    "cross_entropy",
    "reverse_kl",
    "renyi(0.5)",
    "renyi(inf)",
    "reverse_renyi(3)",
    "alpha(-0.5)",
    "jsd(0.3)",
    "skew_kl(0.2)",
]
SIDES += ["skew_reverse_kl(0.2)", "tvd", "renyi(0)"]


def softmaxes(z, v, T):
    return F.softmax(v / T, -1), F.softmax(z / T, -1)


def by_definition(z, v, name, T):
    """A few divergences as PyTorch writes them, differentiable in both."""
    p, q = softmaxes(z, v, T)
    kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)  # noqa: E731
    return {
        "kl": lambda: kl(p, q),
        "cross_entropy": lambda: -(p * q.log()).sum(-1),
        "reverse_kl": lambda: kl(q, p),
        "jsd(0.3)": lambda: 0.3 * kl(p, 0.3 * p + 0.7 * q) + 0.7 * kl(q, 0.3 * p + 0.7 * q),
        "skew_kl(0.2)": lambda: kl(p, 0.2 * p + 0.8 * q),
        "skew_reverse_kl(0.2)": lambda: kl(q, 0.8 * p + 0.2 * q),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
        "renyi(0.5)": lambda: -2 * (p * q).sqrt().sum(-1).log(),
        "reverse_renyi(3)": lambda: (q**3 * p**-2).sum(-1).log() / 2,
        "alpha(-0.5)": lambda: ((q**1.5 * p**-0.5).sum(-1) - 1) / 0.75,
        "renyi(inf)": lambda: (p / q).amax(-1).log(),
        "renyi(0)": lambda: 0 * z.sum(-1) + 0 * v.sum(-1),
    }[name]()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("backend", "name"),
    [(b, n) for n in SIDES for b in BACKENDS if (b, n) == ("eager", "cross_entropy") or n != "cross_entropy"],
)
def test_teacher_gradient(backend, name, reduction):
    """Both sides' gradients, with weights, ignored rows and a vocabulary that is cut; the hard term has none
    in the teacher."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    z, v = (x.to(dtype).view(2, 3, 40) for x in make_rows("plain", 6, 40))
    labels, weight = torch.tensor([[1, -100, 3], [4, 5, 6]]), torch.tensor([[1.0, 1.0, 0.5], [0.0, 2.0, 1.0]])
    options = dict(
        divergence=name, temperature=2.0, t_squared=True, hard_weight=0.3, token_weight=weight, vocab_size=37
    )
    a, b = z.clone().requires_grad_(), v.clone().requires_grad_()
    loss = fused_kd_loss(a, b, labels, teacher_grad=True, reduction=reduction, backend=backend, **options)
    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    loss.backward(upstream)
    c, d = z.double().requires_grad_(), v.double().requires_grad_()
    counted = (weight * (labels != -100)).double()
    rows = 4 * by_definition(c[..., :37], d[..., :37], name, 2.0)
    rows = rows + 0.3 * F.cross_entropy(c[..., :37].flatten(0, 1), labels.flatten(), reduction="none").view(
        2, 3
    )
    expected = counted * torch.where(counted > 0, rows, 0.0)
    expected = (
        expected if reduction == "none" else expected.sum() / (counted.sum() if reduction == "mean" else 1)
    )
    expected.backward(upstream.double())
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=1e-12)
    for mine, right in ((a.grad, c.grad), (b.grad, d.grad)):
        assert float((mine - right).norm()) <= rtol * float(right.norm()) + (
            1e-12 if dtype == torch.float64 else 1e-6
        )


def test_teacher_gradient_compiled_in_place():
    z, v = make_rows("plain", 3, 50)
    results = []
    f = lambda a, b: fused_kd_loss(a * 1, b, divergence="jsd(0.3)", teacher_grad=True, inplace=True)  # noqa: E731
    for run in (f, torch.compile(f, fullgraph=True)):
        a, b = (x.clone().requires_grad_() for x in (z, v))
        results.append(torch.autograd.grad(run(a, b), (a, b)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_teacher_gradient_is_asked_for():
    z, v = (x.requires_grad_() for x in make_rows("plain", 2, 10))
    with pytest.raises(ValueError, match="teacher_grad=True"):
        fused_kd_loss(z, v)
    with pytest.raises(ValueError, match="inplace: teacher_grad"):
        fused_kd_loss(z * 1, v, teacher_grad=True, inplace=True, reduction="none")
    for backend in DOUBLE_BACKENDS:
        loss = fused_kd_loss(z * 1, v, teacher_grad=True, inplace=True, backend=backend)
        expected = fused_kd_loss(z, v, teacher_grad=True, backend=backend)
        for a, b in zip(
            torch.autograd.grad(loss, (z, v)), torch.autograd.grad(expected, (z, v)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        assert float(fused_kd_loss(z, v, teacher_grad=True)) == pytest.approx(float(expected), rel=1e-6)
    for options in ({}, {"backend": "eager", "inplace": True}):
        with pytest.raises(ValueError, match='of the cross entropy.*backend="eager"'):
            fused_kd_loss(z, v, divergence="cross_entropy", teacher_grad=True, **options)
    assert parse("alpha(0.3)").reversed == parse("alpha(0.7)") and parse("jsd(0.25)").reversed == parse(
        "jsd(0.75)"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transforms(backend, dtype):
    """Scale, then softcap, then / T; the hard term takes the transformed logits too; the gradient has their
    derivative."""
    z, v = make_rows("plain", 3, 60, dtype)
    z[0, 5] = v[0, 5] = -math.inf
    labels = torch.tensor([1, 2, 3])
    student, teacher = LogitTransform(scale=0.5, softcap=4.0), LogitTransform(scale=2.0)
    x = z.clone().requires_grad_()
    options = dict(divergence="renyi(0.5)", temperature=2.0, t_squared=True, hard_weight=0.5)
    loss = fused_kd_loss(
        x, v, labels, student_transform=student, teacher_transform=teacher, backend=backend, **options
    )
    loss.backward()
    y = z.double().requires_grad_()
    masked = torch.where(
        z == -math.inf, -math.inf, 4 * torch.tanh(torch.where(z == -math.inf, 0.0, y) * 0.5 / 4)
    )
    expected = fused_kd_loss(masked, 2 * v.double(), labels, backend="eager", **options)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    room = 1e-6 if dtype == torch.float32 else 0.5 * torch.finfo(dtype).eps
    assert float((x.grad - y.grad).norm()) <= room * float(y.grad.norm()) and x.grad[0, 5] == 0
    with pytest.raises(ValueError, match="softcap must be positive"):
        LogitTransform(softcap=0.0)
    with pytest.raises(TypeError, match="LogitTransform: scale: must be a number"):
        LogitTransform(scale="2")
    with pytest.raises(TypeError, match="student_transform"):
        fused_kd_loss(z, v, student_transform=2.0)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", SIDES)
def test_modifiers_of_every_family(backend, name):
    """Transforms and what joins the cross entropy, against the eager backend in fp64: masks, a label that has
    nearly everything, logits far beyond a softcap, what one exponent's range does not hold, a broken row, and
    one that does not count."""
    z, v = make_rows("plain", 6, 40)
    z[0, 5] = v[0, 5] = z[0, 9] = -math.inf
    z[1, 7], z[2, 11], z[3, 3], z[4, 0] = 60, 300, -700, math.inf
    labels, weight = (
        torch.tensor([2, 7, 11, 3, 1, 9]),
        torch.tensor([1, 2, 0.5, 1, 1, 0], dtype=torch.float64),
    )
    capped, scaled = Modifiers(0.5, 4.0, 2.0, 0.0, 0.1, 1e-2), Modifiers(0.7, 0.0, 1.3, 0.0, 0.0, 0.1)
    others = (scaled, 0.5), (Modifiers(0.5, 0.0, 1.0, 5.0), 1.0)
    for modifiers, T in ((capped, 2.0), others[SIDES.index(name) % 2]):
        asked = labels, weight, name, T, 0.3, 38, modifiers
        exact, right = raw.with_gradient("eager", z.double(), v.double(), *asked)
        found, grad = raw.with_gradient(backend, z, v, *asked)
        value = raw.losses(backend, z, v, *asked)
        for x in (found, value):
            torch.testing.assert_close(x, exact, rtol=2e-6 * (1 + 40 / T), atol=1e-9, equal_nan=True)
        assert torch.equal(grad.isnan(), right.isnan())
        for g, e, D in zip(grad, right, exact, strict=True):
            # it is in the gradient of this family
            gain = max(1.0, float(D)) if name.startswith("alpha") else 1.0
            assert e.isnan().any() or float((g - e).norm()) <= max(3e-6 * float(e.norm()), 2e-6 * gain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_label_smoothing_and_z_loss(backend, reduction):
    dtype = torch.float32 if backend == "triton" else torch.float64
    z, v = (x.to(dtype) for x in make_rows("plain", 5, 30))
    labels, weight = torch.tensor([0, 29, -100, 4, 5]), torch.tensor([1.0, 2.0, 1.0, 0.0, 0.5])
    x, y = z.clone().requires_grad_(), z.double().requires_grad_()
    options = dict(
        soft_weight=0.7, hard_weight=0.3, token_weight=weight, reduction=reduction, backend=backend
    )
    loss = fused_kd_loss(x, v, labels, label_smoothing=0.1, z_loss=1e-2, **options)
    loss.sum().backward()
    counted = weight.double() * (labels != -100)
    hard = F.cross_entropy(y, labels, reduction="none", label_smoothing=0.1) + 1e-2 * y.logsumexp(-1) ** 2
    rows = counted * (0.7 * by_definition(y, v.double(), "kl", 1.0) + 0.3 * hard)
    expected = rows if reduction == "none" else rows.sum() / counted.sum()
    expected.sum().backward()
    torch.testing.assert_close(
        loss.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-12
    )
    assert float((x.grad - y.grad).norm()) <= (1e-6 if dtype == torch.float32 else 1e-12) * float(
        y.grad.norm()
    )
    for wrong, text in (
        (dict(label_smoothing=1.0), "label_smoothing: must be"),
        (dict(z_loss=0.1, hard_weight=0.0), "hard_weight is 0"),
    ):
        with pytest.raises(ValueError, match=text):
            fused_kd_loss(z, v, labels, **(dict(hard_weight=0.3) | wrong))
    w = z.detach().clone().requires_grad_()
    inplace = fused_kd_loss(w * 1, v, labels, label_smoothing=0.1, z_loss=1e-2, inplace=True, **options)
    inplace.sum().backward()
    torch.testing.assert_close(w.grad, x.grad, rtol=0, atol=1e-7 if dtype == torch.float32 else 1e-14)


MODIFIERS = [
    dict(
        student_transform=LogitTransform(0.5, 5.0), teacher_transform=LogitTransform(2.0), label_smoothing=0.1
    ),
    dict(
        student_transform=LogitTransform(1.5),
        teacher_transform=LogitTransform(1.0, 30.0),
        label_smoothing=0.1,
        z_loss=1e-2,
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["cpu"])
def test_modifiers_of_every_divergence(backend, dtype):
    """Several blocks of a row, masks, dominant classes, rows for fp64 alone, T = inf: against the eager
    backend in fp64."""
    z, v = (
        torch.cat([make_rows(kind, 1, 5003)[side] for kind in ("plain", "dominant", "close")])
        for side in (0, 1)
    )
    z[0, 1::3] = v[0, 1::3] = -math.inf
    z[2] *= 2
    z, v, labels = z.to(dtype), v.to(dtype), torch.tensor([3, 5003 // 3, 0])
    room = dict(
        zip(
            (torch.float32, torch.bfloat16, torch.float64),
            (3e-6, 0.75 * torch.finfo(torch.bfloat16).eps, 1e-11),
            strict=True,
        )
    )
    floor = 1e-15 if dtype == torch.float64 else 3e-7  # transformed logits are rounded to fp32
    for (i, divergence), T in itertools.product(enumerate(SIDES), (0.5, math.inf)):
        modifiers = MODIFIERS[i % 2]
        if T == math.inf and parse(divergence).form.limit is None:
            continue
        options = dict(
            divergence=divergence,
            temperature=T,
            t_squared=True,
            hard_weight=0.7,
            reduction="none",
            **modifiers,
        )
        x, y = z.clone().requires_grad_(), z.double().clone().requires_grad_()
        loss, expected = (
            fused_kd_loss(a, b, labels, backend=c, **options)
            for a, b, c in ((x, v, backend), (y, v.double(), "eager"))
        )
        loss.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(
            loss.double(), expected, rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=0
        )
        assert ((x.grad - y.grad).norm(dim=-1) <= room[dtype] * y.grad.norm(dim=-1) + floor).all(), (
            divergence,
            T,
            modifiers,
        )


def test_standardized_logits():
    x = make_rows("plain", 3, 50)[0]
    x[1, 7] = -math.inf
    y = standardize_logits(x)
    rest = y[1][torch.arange(50) != 7]
    torch.testing.assert_close(
        torch.stack([y[0].std(correction=0), rest.std(correction=0), rest.mean() + 1]), torch.ones(3)
    )
    assert y[1, 7] == -math.inf and not standardize_logits(torch.full((2, 5), 3.0)).any()
    z = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(standardize_logits, (z,))
    # eps is a part of 1e-7 of std
    torch.testing.assert_close(standardize_logits(z), standardize_logits(7 * z + 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mask", [-1e30, torch.finfo(torch.float32).min])
def test_standardized_logits_of_large_finite_masks_were_zeros(mask):
    """Value and gradient are fp64's."""
    x = torch.tensor([[mask, 0.0, 1.0, 3.0, mask], [0.0, 1.0, 2.0, 3.0, mask]], requires_grad=True)
    y = x.detach().double().requires_grad_()
    a, b = standardize_logits(x), standardize_logits(y)
    torch.testing.assert_close(a.double(), b)
    assert float(a.detach().std(correction=0)) > 0.5
    (ga,), (gb,) = (
        torch.autograd.grad((out * torch.arange(5)).sum(), leaf) for out, leaf in ((a, x), (b, y))
    )
    torch.testing.assert_close(ga.double(), gb)


def test_options_in_a_module_and_compiled():
    z, v = make_rows("plain", 4, 33)
    labels = torch.tensor([1, 2, 3, 4])
    options = dict(
        divergence="jsd(0.3)",
        temperature=2.0,
        hard_weight=0.5,
        label_smoothing=0.1,
        z_loss=1e-4,
        teacher_grad=True,
    )
    criterion = KDLoss(student_transform=LogitTransform(softcap=20.0), **options)
    assert "softcap=20.0" in repr(criterion)
    a, b, c, d = (x.clone().requires_grad_() for x in (z, v, z, v))
    criterion(a, b, labels).backward()
    torch.compile(criterion, fullgraph=True)(c, d, labels).backward()
    torch.testing.assert_close(a.grad, c.grad)
    torch.testing.assert_close(b.grad, d.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_decoupled(backend, reduction):
    """Against the definition of its two parts; weights 1 and 1 - p_t give KL."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    z, v = (x.to(dtype) for x in make_rows("plain", 5, 20))
    labels, T = torch.tensor([0, 19, -100, 4, 7]), 4.0
    x, y = z.clone().requires_grad_(), z.double().requires_grad_()
    options = dict(temperature=T, hard_weight=0.5, reduction=reduction, backend=backend)
    loss = decoupled_kd_loss(x, v, labels, target_weight=0.7, non_target_weight=3.0, **options)
    loss.sum().backward()
    p, q = softmaxes(y, v.double(), T)
    at = labels.clamp_min(0).unsqueeze(-1)
    p_t, q_t = p.gather(-1, at), q.gather(-1, at)
    target = (p_t * (p_t / q_t).log() + (1 - p_t) * ((1 - p_t) / (1 - q_t)).log()).squeeze(-1)
    others = torch.ones_like(p).scatter(-1, at, 0.0)
    p_, q_ = p / (1 - p_t), q / (1 - q_t)
    rest = (others * p_ * (p_ / q_).log()).sum(-1)
    rows = T * T * (0.7 * target + 3.0 * rest) + 0.5 * F.cross_entropy(y, labels, reduction="none")
    rows = torch.where(labels == -100, 0.0, rows)
    expected = rows if reduction == "none" else rows.sum() / (4 if reduction == "mean" else 1)
    expected.sum().backward()
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=1e-12)
    assert float((x.grad - y.grad).norm()) <= rtol * float(y.grad.norm())
    with pytest.raises(ValueError, match="non_target_weight"):
        decoupled_kd_loss(z, v, labels, non_target_weight=math.inf)
    with pytest.raises(ValueError, match="finite temperature"):
        decoupled_kd_loss(z, v, labels, temperature=math.inf)


# the eager backend has its own from PyTorch, whatever the divergence
STATS_OF = [
    (b, d)
    for b in DOUBLE_BACKENDS
    for d in ("kl", "cross_entropy", "renyi(0.3)", "renyi(3)", "renyi(0)", "jsd(0.3)", "tvd")
]


@pytest.mark.parametrize("where", ["", "student", "teacher", "both"])
@pytest.mark.parametrize(("backend", "divergence"), [*STATS_OF, *(("triton", d) for d in ("kl", "renyi(0)"))])
def test_stats(backend, divergence, where):
    """Every figure against its definition in fp64; ignored rows are nan and -1, broken rows too, and
    alone."""
    for vocab, T in ((40, 2.0), (700 if backend == "triton" else 9000, 1.0)):
        z, v = make_rows("plain", 4, vocab)
        z, v = with_masks(z, v, where) if where else (z, v)
        z[3, 0] = math.nan
        labels = torch.tensor([3, int(z[1].argmax()), -100, 0])
        options = dict(divergence=divergence, temperature=T, backend=backend, reduction="none")
        loss, stats = fused_kd_loss(
            z, v, labels, return_stats=True, hard_weight=0.5, t_squared=True, **options
        )
        expected = fused_kd_loss(z, v, labels, hard_weight=0.5, t_squared=True, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-30, equal_nan=True)
        D = fused_kd_loss(
            z.double(), v.double(), divergence=divergence, temperature=T, backend="eager", reduction="none"
        )
        torch.testing.assert_close(stats.divergence[:2].double(), D[:2], rtol=1e-5, atol=1e-7)
        x, y = z[:2].double(), v[:2].double()
        torch.testing.assert_close(
            stats.cross_entropy[:2].double(),
            F.cross_entropy(x, labels[:2], reduction="none"),
            rtol=1e-5,
            atol=1e-7,
        )
        sides = (x, stats.student_logsumexp, stats.student_entropy, stats.student_top1)
        for logits, log_sum, entropy, top in (
            sides,
            (y, stats.teacher_logsumexp, stats.teacher_entropy, stats.teacher_top1),
        ):
            torch.testing.assert_close(log_sum[:2].double(), (logits / T).logsumexp(-1), rtol=1e-5, atol=1e-6)
            log_p = (logits / T).log_softmax(-1)
            exact = -torch.where(log_p > -math.inf, log_p.exp() * log_p, 0.0).sum(-1)
            torch.testing.assert_close(entropy[:2].double(), exact, rtol=3e-5, atol=1e-5)
            assert (
                torch.equal(top[:2], logits.argmax(-1))
                and (top[2:] == -1).all()
                and log_sum[2:].isnan().all()
            )
        assert torch.equal(stats.agree[:2], x.argmax(-1) == y.argmax(-1)) and not stats.agree[2:].any()
        assert (
            stats.correct.tolist() == [bool(x[0].argmax() == 3), True, False, False]
            and int(stats.counted) == 3
        )
        assert stats.divergence[2].isnan() and not stats.divergence.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_of_stats(backend):
    """Over the rows that count: neither the ignored ones nor those without weight are in it, and nothing is
    nan because of them."""
    z, v = (x.view(2, 3, 40) for x in make_rows("plain", 6, 40))
    labels = torch.tensor([[3, -1, 2], [-1, 0, 5]])
    labels[0, 0] = z[0, 0].argmax()
    weight = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.25, 2.0]])
    options = dict(temperature=2.0, ignore_index=-1, hard_weight=0.5, backend=backend, return_stats=True)
    _, stats = fused_kd_loss(z, v, labels, token_weight=weight, **options)
    counts = torch.tensor([[True, False, False], [False, True, True]])
    assert torch.equal(stats.mask, counts) and not stats.correct[~counts].any()
    found = stats.mean()
    assert all(type(x) is float for x in found.values()) and found.pop("counted") == 3
    assert list(found) == [
        "divergence",
        "cross_entropy",
        *(f"{x}_{y}" for y in ("logsumexp", "entropy") for x in ("student", "teacher")),
    ] + [
        "agree",
        "correct",
    ]
    for name, x in found.items():
        assert x == pytest.approx(float(getattr(stats, name)[counts].double().mean()), rel=1e-6), name
    assert 0 < found["divergence"] and 1 / 3 <= found["correct"] <= 1

    _, whole = fused_kd_loss(z, v, temperature=2.0, backend=backend, return_stats=True)
    assert "correct" not in whole.mean() and whole.mean()["counted"] == 6 and whole.mask.all()
    z[1, 1, 0] = math.nan  # a broken row that counts shows
    _, broken = fused_kd_loss(z, v, labels, token_weight=weight, **options)
    assert math.isnan(broken.mean()["divergence"]) and broken.mean()["counted"] == 3
    _, none = fused_kd_loss(z, v, torch.full_like(labels, -1), **options)
    assert (
        all(math.isnan(x) for name, x in none.mean().items() if name != "counted")
        and none.mean()["counted"] == 0
    )


@pytest.mark.parametrize("divergence", ["kl", "jsd(0.3)", "renyi(0.3)", "renyi(3)"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_entropies_of_difficult_rows(backend, divergence):
    """Where nearly all of one distribution lies where the other has nearly nothing, or is masked, sums for
    the two must not cancel."""
    masks = ("",) if backend == "triton" else ("", "student", "teacher")
    for kind, vocab, where in itertools.product(KINDS, (5, 300), masks):
        z, v = make_rows(kind, 2, vocab)
        z, v = with_masks(z, v, where) if where else (z, v)
        _, stats = fused_kd_loss(z, v, divergence=divergence, return_stats=True, backend=backend)
        for logits, entropy, top in (
            (z, stats.student_entropy, stats.student_top1),
            (v, stats.teacher_entropy, stats.teacher_top1),
        ):
            p = logits.double().softmax(-1)
            torch.testing.assert_close(entropy.double(), -torch.xlogy(p, p).sum(-1), rtol=3e-5, atol=1e-5)
            assert torch.equal(top, logits.argmax(-1))


@pytest.mark.parametrize("backend", DOUBLE_BACKENDS)
def test_stats_of_other_calls(backend):
    """Through the gradient, in place, without labels, at T = inf, orders in fp64 rows, one long row; the loss
    is what it was."""
    z, v = (x.double() for x in make_rows("plain", 3, 4100))
    for options in (
        dict(),
        dict(divergence="renyi(20)", temperature=0.05),
        dict(temperature=math.inf, t_squared=True),
        dict(divergence="tvd"),
    ):
        x = z.clone().requires_grad_()
        loss, stats = fused_kd_loss(x, v, return_stats=True, backend=backend, **options)
        (g,) = torch.autograd.grad(loss, x)
        expected = fused_kd_loss(x, v, backend=backend, **options)
        (h,) = torch.autograd.grad(expected, x)
        torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(g, h, rtol=1e-12, atol=1e-18)
        assert stats.cross_entropy is None and stats.correct is None
        T = options.get("temperature", 1.0)
        scaled = z / T if math.isfinite(T) else z * 0
        torch.testing.assert_close(stats.student_logsumexp, scaled.logsumexp(-1))
        p = (v / T if math.isfinite(T) else v * 0).softmax(-1)
        torch.testing.assert_close(stats.teacher_entropy, -torch.xlogy(p, p).sum(-1), rtol=1e-9, atol=1e-12)
        assert torch.equal(stats.student_top1, z.argmax(-1)) and int(stats.counted) == 3
    x = z.clone().requires_grad_()
    loss, stats = fused_kd_loss(x * 1, v, return_stats=True, inplace=True, backend=backend)
    loss.backward()
    assert torch.equal(stats.teacher_top1, v.argmax(-1)) and x.grad.abs().sum() > 0
    long, other = (x.repeat(1, 20)[:1] for x in (z, v))  # a row that threads share
    _, stats = fused_kd_loss(long, other, return_stats=True, backend=backend)
    assert stats.student_top1.item() == z[0].argmax() and torch.allclose(
        stats.student_logsumexp, long.logsumexp(-1)
    )
    compiled = torch.compile(
        lambda a, b: fused_kd_loss(a, b, return_stats=True, backend=backend), fullgraph=True
    )
    x = z.clone().requires_grad_()
    loss, stats = compiled(x, v)
    loss.backward()
    torch.testing.assert_close(
        stats.student_entropy, fused_kd_loss(z, v, return_stats=True, backend=backend)[1].student_entropy
    )
