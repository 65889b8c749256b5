"""Bad rows: what docs/numerics.md, "Bad rows", promises of each kind of row, on every backend, under every
option that meets one.

What is expected comes from the oracle (60 digits) and from PyTorch in fp64, from the rows as given. One call
has every kind of row in a batch, with plain rows between them, which must not notice. Where a backend is
known to do otherwise is a table of its own, FAULTS.
"""

import ctypes
import functools
import importlib.util
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import raw
import torch
import torch.nn.functional as F
from names import APART, ONE_EACH
from oracle import broken, divergence_row

from kdkernels import LogitTransform, fused_kd_loss, ops, parse, tempered_log_softmax
from kdkernels.backends import cuda
from kdkernels.call import Call, Numbers, exchanged
from kdkernels.divergence import Divergence
from kdkernels.transforms import Modifiers

sys.path.insert(0, str(Path(__file__).parent / "simt"))
import build  # noqa: E402

VOCAB, LABEL = 7, 2
NAN, INF, LOW = math.nan, math.inf, torch.finfo(torch.float32).min
ALL, ALL_BUT_LABEL = slice(None), [i for i in range(VOCAB) if i != LABEL]
# (classes, what becomes of them) in the student and in the teacher; None: as they were
EDITS = {
    "nan": (3, NAN),
    "nan at the label": (LABEL, NAN),
    "+inf": (3, INF),
    "no class": (ALL, -INF),
    "a masked class": (5, -INF),
    "the label masked": (LABEL, -INF),
    "all but the label masked": (ALL_BUT_LABEL, -INF),
    "finfo.min": (5, LOW),
    "finfo.min at the label": (LABEL, LOW),
    "finfo.min everywhere": (ALL, LOW),
}
SIDES = {"student": (True, False), "teacher": (False, True), "both": (True, True)}
KINDS = {
    f"{what} in {side}": tuple(edit if has else None for has in SIDES[side])
    for what, edit in EDITS.items()
    for side in SIDES
}
KINDS |= {
    "plain": (None, None),
    "no class in common": ((slice(0, 3), -INF), (slice(3, None), -INF)),
    "+inf in student, nan in teacher": ((1, INF), (3, NAN)),
    "nan in student, no class in teacher": ((3, NAN), (ALL, -INF)),
}
SOFTCAP = LogitTransform(1.0, 30.0)
OPTIONS = {
    "soft": {},
    "soft and hard": {"hard_weight": 0.5},
    "hard alone": {"soft_weight": 0.0, "hard_weight": 0.5},
    "neither": {"soft_weight": 0.0},
    "softcap": {"hard_weight": 0.5, "student_transform": SOFTCAP, "teacher_transform": SOFTCAP},
    "smoothing": {"hard_weight": 0.5, "label_smoothing": 0.1, "z_loss": 1e-3},
    "T = inf": {"hard_weight": 0.5, "temperature": INF, "t_squared": True},
}
DIVERGENCES = (
    *(x for x in ONE_EACH if x in APART),
    *("renyi(0)", "renyi(2)", "renyi(inf)", "reverse_renyi(0)", "reverse_renyi(3)", "reverse_renyi(inf)"),
    *("alpha(-0.5)", "alpha(0.5)", "alpha(2)", "jsd(0.3)"),
)
# the oracle, of what is beyond a long double
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_compiler = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")


def row_of(kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randn(VOCAB, generator=g) * 2 for _ in range(2)]
    for x, edit in zip(rows, KINDS[kind], strict=True):
        if edit is not None:
            x[edit[0]] = edit[1]
    return tuple(rows)


@functools.cache
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Every kind, in KINDS' order, each with a plain row after it."""
    rows = [row for i, kind in enumerate(KINDS) for row in (row_of(kind), row_of("plain", i))]
    return tuple(torch.stack(side) for side in zip(*rows, strict=True))


# ---------------------------------------------------------------- what is expected


def lowered(x: np.ndarray) -> np.ndarray:
    """A row of logits that are all alike as one of zeros, which is the same to a divergence; others as they
    are."""
    return x - x if np.isfinite(x).all() and (x == x[0]).all() else x


def log_softmax(x: np.ndarray, T: float) -> torch.Tensor:
    """fp64, of a row of long doubles."""
    return torch.log_softmax(torch.from_numpy(((x - x.max()) / T).astype(np.float64)), -1)


def soft(z: np.ndarray, v: np.ndarray, name: str, T: float):
    """(D, dD/dz, dD/dv), fp64: the limits of T^2 D at T = inf."""
    z, v, scale = lowered(z), lowered(v), 1 if math.isinf(T) else T
    D, g = divergence_row(z, v, name, T)
    if name == "cross_entropy" and D < INF:
        p, log_q = log_softmax(v, T).exp(), log_softmax(z, T)
        terms = torch.where(p > 0, p * log_q, 0.0)
        h = torch.where(p > 0, p * (terms.sum() - log_q), 0.0).numpy()
    else:
        turned = parse("kl" if name == "cross_entropy" else name).reversed.text
        _, h = divergence_row(v, z, turned, T)
    # beyond fp64: of a gradient beyond it no form is promised
    if D == INF and np.isfinite(z).all() and np.isfinite(v).all():
        g = h = np.full(VOCAB, INF)
    return np.float64(D), *(torch.from_numpy(np.asarray(x, np.float64) / scale) for x in (g, h))


def hard(z: np.ndarray, smooth: float, z_loss: float):
    """(value, gradient), fp64; the classes that are there share in the smoothing."""
    top = z.max()
    x = torch.from_numpy((z - top).astype(np.float64)).requires_grad_()
    there = x.detach() > -INF
    log_sum = torch.logsumexp(x, -1)
    value = (1 - smooth) * F.cross_entropy(x, torch.tensor(LABEL))
    if smooth or z_loss:
        value = value + smooth * (log_sum - x[there].mean()) + z_loss * (log_sum + float(top)) ** 2
    return value.item(), torch.autograd.grad(value, x)[0]


def transformed(x: torch.Tensor, t: LogitTransform) -> tuple[np.ndarray, torch.Tensor]:
    """(long doubles, derivative), flat where a softcap meets an infinity."""
    if t.softcap is None:
        return x.numpy().astype(np.longdouble), torch.full_like(x, t.scale, dtype=torch.float64)
    u = torch.where(x.abs() == INF, 0.0, x.double()) * (t.scale / t.softcap)
    slope = torch.where(x.abs() == INF, 0.0, t.scale * (1 - u.tanh() ** 2))
    return torch.where(x.abs() == INF, x.double(), u.tanh() * t.softcap).numpy().astype(np.longdouble), slope


@functools.cache
def expected(kind: str, name: str, option: str, seed: int = 0):
    """(value, gradient in the student, in the teacher, statistics), fp64, of a row that counts."""
    o = OPTIONS[option]
    z, v = row_of(kind, seed)
    T, smooth, z_loss = o.get("temperature", 1.0), o.get("label_smoothing", 0.0), o.get("z_loss", 0.0)
    soft_weight, hard_weight = o.get("soft_weight", 1.0), o.get("hard_weight", 0.0)
    (z, slope_z), (v, slope_v) = (
        transformed(x, o.get("student_transform", LogitTransform())) for x in (z, v)
    )
    D, own, other = soft(z, v, name, T)
    value, grad, teacher_grad = (
        0.0,
        torch.zeros(VOCAB, dtype=torch.float64),
        torch.zeros(VOCAB, dtype=torch.float64),
    )
    nan = torch.full((VOCAB,), NAN, dtype=torch.float64)
    if soft_weight:
        value, grad, teacher_grad = (
            value + soft_weight * D,
            grad + soft_weight * own * slope_z,
            soft_weight * other * slope_v,
        )
    if hard_weight:
        CE, g = (NAN, nan) if broken(z) else hard(z, smooth, z_loss)
        value, grad = value + hard_weight * CE, grad + hard_weight * g * slope_z
    return float(value), grad, teacher_grad, statistics(z, v, D, T, hard_weight)


def statistics(z: np.ndarray, v: np.ndarray, D, T: float, hard_weight: float) -> torch.Tensor:
    columns = torch.full((8,), NAN, dtype=torch.float64)
    if hard_weight and not broken(z):
        columns[1] = hard(z, 0.0, 0.0)[0]
    if not (broken(z) or broken(v)):
        columns[0] = float(D)
        for i, x in enumerate((z, v)):
            top = x.max()
            log_p = log_softmax(np.where(x > -INF, 0, x) if math.isinf(T) else x, min(T, 1e300))
            columns[2 + i] = -log_p.max() + float(top / T)
            columns[4 + i] = -torch.where(log_p > -INF, log_p.exp() * log_p, 0.0).sum()
            columns[6 + i] = int(x.argmax())
    return columns


def agree(found: torch.Tensor, right: torch.Tensor, atol: float = 1e-5) -> None:
    """nan where it is nan, infinite where it is beyond fp32, which a loss comes back in; the rest to fp32's
    digits."""
    found, right = found.float().double(), right.float().double()
    assert torch.equal(found.isnan(), right.isnan()), (found, right)
    finite = right.isfinite()
    assert torch.equal(found[~finite & ~right.isnan()], right[~finite & ~right.isnan()]), (found, right)
    found, right = found[finite], right[finite]
    norm = float(right.norm()) if right.numel() else 0.0
    assert ((found - right).abs() <= max(2e-5 * norm, atol)).all(), (found, right)


def gradient_agrees(found: torch.Tensor, right: torch.Tensor) -> None:
    if right.isinf().any():  # beyond fp64, and so is what is found; in which form is not promised
        assert not found.isfinite().all(), (found, right)
    else:
        agree(found, right)


# ---------------------------------------------------------------- what a backend has


def asked_of(name: str, option: str) -> tuple[Divergence, Numbers]:
    o = OPTIONS[option]
    soft, hard = o.get("soft_weight", 1.0), o.get("hard_weight", 0.0)
    t = o.get("student_transform", LogitTransform())
    modifiers = Modifiers.of(t, t, o.get("label_smoothing", 0.0), o.get("z_loss", 0.0))
    return parse(name), Numbers(o.get("temperature", 1.0), soft, soft, hard, hard, modifiers)


@functools.cache
def operator(backend: str, name: str, option: str, weight: float = 1.0):
    """(values, the student's gradients, the teacher's, statistics) of the batch, the rows of KINDS with that
    weight, by the operator; the teacher's None for the cross entropy, of which it has none."""
    z, v = batch()
    labels = torch.full(z.shape[:1], LABEL) if OPTIONS[option].get("hard_weight") else None
    weights = torch.ones(len(z), dtype=torch.float64)
    weights[::2] = weight
    asked, grad, other, stats = asked_of(name, option), torch.full_like(z, 7.0), None, ops.new_columns(z)
    value = raw.run(backend, Call(z, v, VOCAB, labels, weights, *asked, grad, stats))
    if name != "cross_entropy":
        other = torch.full_like(v, 7.0)
        raw.run(backend, Call(v, z, VOCAB, None, weights, *exchanged(*asked), other))
    return value, grad, other, stats


# ---------------------------------------------------------------- what is known to be otherwise


def one_class_of_many(name, option, kind):
    form = parse(name).form
    return (
        form.family in ("renyi", "alpha")
        and form.order in (0.5, 2)
        and kind == "all but the label masked in teacher"
    )


def broken_in(kind: str) -> tuple[bool, bool]:
    return tuple(broken(x.numpy()) for x in row_of(kind))


FAULTS = [
    (
        ("cuda", "orders: of a teacher with one class the sums are what the student's leave, to 1e-4"),
        one_class_of_many,
    ),
]


def known(backend: str, name: str, option: str, kind: str) -> bool:
    return any(backend == b and match(name, option, kind) for (b, _), match in FAULTS)


# ---------------------------------------------------------------- the operator


@pytest.fixture(scope="module")
def cuda_on_a_host():
    """backend="cuda" is the library for host threads (test_cuda.py), a warp to a row."""
    with build.in_place_of_cuda():
        cuda.library().c.kd_simt_device((ctypes.c_int * 5)(80, 2, 227 << 10, 228 << 10, 1))
        yield


@pytest.fixture
def backend(request):
    if request.param == "cuda":
        request.getfixturevalue("cuda_on_a_host")
    return request.param


BATCHES = [(d, o) for d in DIVERGENCES for o in OPTIONS if o != "T = inf" or parse(d).form.limit is not None]
# the interpreter takes seconds for a batch
INTERPRETED = [("kl", o) for o in OPTIONS if o not in ("soft", "neither")]
INTERPRETED += [(d, "soft and hard") for d in ("renyi(2)", "renyi(inf)", "jsd(0.3)", "alpha(-0.5)")]
CALLS = [pytest.param(b, d, o, id=f"{b}-{d}-{o}") for b in ("cpu", "eager") for d, o in BATCHES]
SLOW = {("renyi(2)", "soft and hard"), ("alpha(-0.5)", "soft and hard"), ("kl", "softcap")}
for d, o in INTERPRETED:
    marks = [needs_triton, *[pytest.mark.slow] * ((d, o) in SLOW)]
    CALLS.append(pytest.param("triton", d, o, id=f"triton-{d}-{o}", marks=marks))
CALLS += [pytest.param("cuda", d, o, id=f"cuda-{d}-{o}", marks=needs_compiler) for d, o in BATCHES[::3]]


def check_row(backend: str, name: str, option: str, kind: str) -> None:
    at = 2 * list(KINDS).index(kind)
    value, grad, other, columns = (None if x is None else x[at] for x in operator(backend, name, option))
    right, own, teachers, statistics = expected(kind, name, option)
    agree(value[None], torch.tensor([right], dtype=torch.float64))
    gradient_agrees(grad, own)
    if other is not None:
        gradient_agrees(other, teachers)
    for i in range(8):
        agree(columns[i : i + 1], statistics[i : i + 1])


def check_others(backend: str, name: str, option: str, weight: float) -> None:
    value, grad, other, columns = operator(backend, name, option, weight)
    for i in range(len(KINDS)):
        right, own, teachers, statistics = expected("plain", name, option, i)
        assert float(value[2 * i + 1]) == pytest.approx(right, rel=2e-5, abs=1e-6)
        agree(grad[2 * i + 1], own)
        if other is not None:
            agree(other[2 * i + 1], teachers)
        agree(columns[2 * i + 1], statistics, atol=1e-4)


@pytest.mark.parametrize(("backend", "name", "option"), CALLS, indirect=["backend"])
def test_rows_that_count(backend, name, option):
    """Values, both gradients and statistics: nan of a broken row, the conventions of a masked one; and the
    rows beside them."""
    for kind in KINDS:
        if not known(backend, name, option, kind):
            try:
                check_row(backend, name, option, kind)
            except AssertionError as error:
                raise AssertionError(f"{kind}: {error}") from error
    check_others(backend, name, option, 1.0)


FAULT_CALLS = []
for (b, reason), match in FAULTS:
    mark = [
        pytest.mark.xfail(strict=True, reason=reason),
        {"triton": needs_triton, "cuda": needs_compiler}.get(b, []),
    ]
    marks = [x for x in mark if x != []]
    FAULT_CALLS.append(pytest.param(b, match, id=f"{b}-{match.__name__}", marks=marks))


@pytest.mark.parametrize(("backend", "match"), FAULT_CALLS, indirect=["backend"])
def test_rows_that_are_known_to_be_otherwise(backend, match):
    calls = [x.values[1:] for x in CALLS if x.values[0] == backend]
    cases = [(d, o, k) for (d, o), k in itertools.product(calls, KINDS) if match(d, o, k)]
    for case in cases:
        check_row(backend, *case)


def takes_long(backend: str, name: str, option: str) -> bool:
    return backend == "triton" and (name, option) not in (
        ("kl", "softcap"),
        ("renyi(inf)", "soft and hard"),
        ("kl", "T = inf"),
    )


WEIGHTLESS = [
    x for x in CALLS if x.values[1] in ("kl", "renyi(inf)", "jsd(0.3)") and not takes_long(*x.values)
]


@pytest.mark.parametrize(("backend", "name", "option"), WEIGHTLESS, indirect=["backend"])
def test_rows_of_weight_0_are_not_read(backend, name, option):
    """Value 0, gradients 0 and no statistics, whatever the row has; and the rows beside them."""
    value, grad, other, columns = (x[::2] for x in operator(backend, name, option, 0.0))
    assert (value == 0).all() and (grad == 0).all() and (other == 0).all() and columns.isnan().all()
    check_others(backend, name, option, 0.0)


# ---------------------------------------------------------------- the functions


def options_of(option: str) -> dict:
    return {**OPTIONS[option], "teacher_grad": True}


def three_rows(kind: str):
    """A row between two plain ones."""
    rows = row_of("plain", 1), row_of(kind), row_of("plain", 2)
    return tuple(torch.stack(side).requires_grad_() for side in zip(*rows, strict=True))


def reduced(rows: list[float], reduction: str, count: int) -> torch.Tensor:
    rows = torch.tensor(rows, dtype=torch.float64)
    return rows if reduction == "none" else rows.sum() / (count if reduction == "mean" else 1)


PUBLIC = [
    ("cpu", d, o)
    for d in ("kl", "reverse_kl", "renyi(2)", "jsd(0.3)", "alpha(-0.5)")
    for o in ("soft and hard", "hard alone", "softcap")
]
PUBLIC += [("eager", d, o) for _, d, o in PUBLIC] + [("eager", d, "T = inf") for d in ("kl", "renyi(2)")]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("backend", "name", "option"), PUBLIC)
def test_reductions_of_rows_that_count(backend, name, option, reduction):
    """A reduction is nan or +inf where a row is; the gradient of each row is its own. Of "eager",
    autograd's."""
    for kind in KINDS:
        if known(backend, name, option, kind):
            continue
        z, v = three_rows(kind)
        loss = fused_kd_loss(
            z,
            v,
            torch.full((3,), LABEL),
            divergence=name,
            reduction=reduction,
            backend=backend,
            **options_of(option),
        )
        loss.backward(torch.ones_like(loss))
        right = [
            expected(*row)
            for row in (("plain", name, option, 1), (kind, name, option), ("plain", name, option, 2))
        ]
        values = reduced([x[0] for x in right], reduction, 3)
        for found, wanted in zip(loss.detach().view(-1), values.view(-1), strict=True):
            agree(found[None], wanted[None])
        scale = 3 if reduction == "mean" else 1
        for i in range(3):
            gradient_agrees(z.grad[i] * scale, right[i][1])
            gradient_agrees(v.grad[i] * scale, right[i][2])


@pytest.mark.parametrize("how", ["weight 0", "ignored"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("backend", "name", "option"), PUBLIC)
def test_reductions_of_rows_that_do_not_count(backend, name, option, reduction, how):
    """The loss of the others, a gradient of exactly 0, statistics that are nan, -1 and False."""
    for kind in KINDS:
        z, v = three_rows(kind)
        labels, weight = torch.full((3,), LABEL), None
        if how == "ignored":
            labels[1] = -100
        else:
            weight = torch.tensor([1.0, 0.0, 1.0])
        options = {
            **options_of(option),
            "divergence": name,
            "token_weight": weight,
            "reduction": reduction,
            "backend": backend,
        }
        loss, stats = fused_kd_loss(z, v, labels, return_stats=True, **options)
        loss.backward(torch.ones_like(loss))
        plain = [expected("plain", name, option, i) for i in (1, 2)]
        right = reduced([plain[0][0], 0.0, plain[1][0]], reduction, 2)
        torch.testing.assert_close(loss.detach().double(), right, rtol=2e-5, atol=1e-6)
        assert (z.grad[1] == 0).all() and (v.grad[1] == 0).all()
        assert z.grad.isfinite().all() and v.grad.isfinite().all()
        assert stats.divergence[1].isnan() and stats.student_top1[1] == stats.teacher_top1[1] == -1
        assert not (stats.mask[1] or stats.correct[1] or stats.agree[1]) and stats.counted == 2


def test_second_derivatives_beside_a_row_that_does_not_count():
    """eager: nan and +inf in a row of weight 0, a softcap before it, masked classes in the others."""
    z, v = (x.detach().double() for x in three_rows("a masked class in both"))
    z[0], v[2, 1] = NAN, INF
    weight = torch.tensor([0.0, 1.0, 0.0])

    def loss(row):
        rows = torch.cat([z[:1], row[None], z[2:]])
        options = {**OPTIONS["softcap"], "token_weight": weight, "backend": "eager", "z_loss": 1e-3}
        return fused_kd_loss(
            rows.masked_fill(z == -INF, -INF), v, torch.full((3,), LABEL), divergence="jsd(0.3)", **options
        )

    start = z[1].masked_fill(z[1] == -INF, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(loss, start) and torch.autograd.gradgradcheck(loss, start)


# ---------------------------------------------------------------- log-softmax


LOG_SOFTMAX = [kind for kind in KINDS if kind.endswith("student")]
SOFTMAXES = [
    "cpu",
    "eager",
    pytest.param("cuda", marks=needs_compiler),
    pytest.param("triton", marks=needs_triton),
]
OF_BACKENDS = [pytest.param(b, LOG_SOFTMAX, id=b) for b in ("cpu", "eager")]
OF_BACKENDS += [pytest.param("cuda", LOG_SOFTMAX, marks=needs_compiler, id="cuda")]
OF_BACKENDS += [pytest.param("triton", LOG_SOFTMAX, marks=needs_triton, id="triton")]


@pytest.mark.parametrize(("backend", "kinds"), OF_BACKENDS, indirect=["backend"])
def test_log_softmax_of_bad_rows(backend, kinds):
    """PyTorch's, value and gradient."""
    for kind in kinds:
        x = row_of(kind)[0][None].requires_grad_()
        exact = x.detach().double().requires_grad_()
        upstream = torch.linspace(-1, 2, VOCAB)[None]
        found, right = tempered_log_softmax(x, backend=backend), F.log_softmax(exact, -1)
        agree(found.detach()[0], right.detach()[0])
        agree(
            torch.autograd.grad(found, x, upstream)[0][0],
            torch.autograd.grad(right, exact, upstream.double())[0][0],
        )


@pytest.mark.parametrize("backend", SOFTMAXES, indirect=True)
def test_log_softmax_at_infinity_has_no_gradient(backend):
    """log 1/N of the N classes that are there, nan of a broken row; nothing of the logits is in it."""
    for kind in LOG_SOFTMAX:
        x = row_of(kind)[0][None].requires_grad_()
        found = tempered_log_softmax(x, INF, backend=backend)
        (g,) = torch.autograd.grad(found, x, torch.linspace(-1, 2, VOCAB)[None])
        there = x.detach() > -INF
        right = torch.where(there, -there.sum().double().log(), -INF)
        agree(
            found.detach()[0], torch.full_like(right, NAN)[0] if broken(x[0].detach().numpy()) else right[0]
        )
        assert (g == 0).all(), kind
