"""The Triton backend's own matters: every kernel shape and layout, what is compiled, offsets beyond 2^31,
nothing left over from a call.

Its accuracy, options and edges are tested with those of the other backends. All under the interpreter, but
for the tests marked gpu.
"""

import inspect
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import raw
import torch
from bounds import gradient_bound, plain_gradient_bound, plain_value_bound, spread_of, value_bound
from names import USUAL
from oracle import divergence_row, hard_row, member
from rows import KINDS, make_rows, with_masks

from kdkernels import fused_kd_loss, parse
from kdkernels.backends import triton as backend
from kdkernels.backends.triton import launch, spec
from kdkernels.backends.triton.numbers import is_exact
from kdkernels.backends.triton.plan import Device, Plan, plan
from kdkernels.call import Call, Numbers
from kdkernels.transforms import Modifiers

pytestmark = pytest.mark.skipif(
    backend.unavailable(torch.device("cpu")) is not None, reason="needs TRITON_INTERPRET=1"
)

# classes that lead to each kernel shape: a row in one tile, a program to a row, several programs to a row
PATHS = {"tile": 700, "row": 3000, "parts": 9001}
OPTIONS = {
    "kl": {},
    "cross_entropy": {"divergence": "cross_entropy"},
    "order below 1/2": {"divergence": "renyi(0.3)"},
    "order above 1/2": {"divergence": "renyi(0.7)", "temperature": 0.5},
    "order above 1": {"divergence": "renyi(3)"},
    "order 0": {"divergence": "renyi(0)"},
    "order inf": {"divergence": "renyi(inf)"},
    "limit": {"temperature": math.inf, "t_squared": True},
    "hard": {"hard_weight": 0.3, "soft_weight": 0.7, "temperature": 4.0, "t_squared": True},
    "hard, order": {"hard_weight": 0.3, "divergence": "renyi(0.3)", "temperature": 2.0},
}


# one of each form that a kernel is compiled for, from either side
FORMS = (
    "reverse_kl",
    "jsd(0.5)",
    "jsd(0.1)",
    "skew_kl(0.1)",
    "skew_reverse_kl(0.1)",
    "tvd",
    "alpha(-1.5)",
    "alpha(0.5)",
    "alpha(2)",
)
HERE = Device(2, in_turn=True)  # the interpreter, as a device
REVERSED = ("reverse_renyi(0)", "reverse_renyi(2)", "reverse_renyi(inf)")


def chosen(shape: str, rows: int = 3, size: int = 4) -> Plan:
    return plan(rows, PATHS[shape], size, size, HERE)


def expected(z, v, y, options):
    """Row losses and their gradients from the oracle, float64."""
    T = options.get("temperature", 1.0)
    scale = options.get("soft_weight", 1.0) * (T**2 if options.get("t_squared") and T < math.inf else 1)
    losses, grads = [], []
    for i in range(len(z)):
        wide = [x[i].double().numpy() for x in (z, v)]
        D, g = divergence_row(*wide, options.get("divergence", "kl"), T)
        loss, grad = scale * D, scale * g / (T if T < math.inf else 1)
        if hard := options.get("hard_weight", 0.0):
            D, g = hard_row(wide[0], int(y[i]))
            loss, grad = loss + hard * D, grad + hard * g
        losses.append(float(loss))
        grads.append(torch.from_numpy(grad.astype(float)))
    return torch.tensor(losses, dtype=torch.float64), torch.stack(grads)


def run(z, v, y=None, **options):
    x = z.clone().requires_grad_()
    loss = fused_kd_loss(x * 1 if options.get("inplace") else x, v, y, backend="triton", **options)
    loss.backward(torch.ones_like(loss))
    return loss.detach(), x.grad


def with_backend(backend_name, z, v, y, name, T, hard, grad):
    """(row losses, T dD/dz) of the operator; grad: whether a gradient is asked for."""
    run_of = raw.with_gradient if grad else raw.losses
    return run_of(backend_name, z, v, y, None, name, T, hard)


def agrees(z, v, name, T=1.0, y=None, hard=0.0, relative=2e-6):
    """The kernels' losses, with and without a gradient, and gradients are those of the reference in fp64."""
    exact, exact_grad = with_backend("eager", z.double(), v.double(), y, name, T, hard, True)
    (loss, grad), value = (
        with_backend("triton", z, v, y, name, T, hard, True),
        with_backend("triton", z, v, y, name, T, hard, False),
    )
    room = relative * (1 + spread_of(z, v, T))
    floor = 1e-6 if z.dtype.itemsize < 4 else 1e-30
    for x in (loss, value):
        torch.testing.assert_close(x, exact, rtol=room, atol=floor, equal_nan=True)
    assert torch.equal(grad.isnan(), exact_grad.isnan()) and (grad[z == -math.inf] == 0).all() or hard
    cast = torch.finfo(z.dtype).eps if z.dtype.itemsize < 4 else 0.0
    power = member(name)[2]
    for g, e, D in zip(grad, exact_grad, exact, strict=True):
        if e.isfinite().all():
            # of R - 1: the gradient of a Renyi divergence, times a factor with R in it
            gain = max(1.0, power.steepness(float(D))) if power else 1.0
            bound = max(gradient_bound(2, float(e.norm())), 1e-6 * gain) + cast * float(e.norm())
            assert float((g.double() - e).norm()) <= bound, (name, T)


@pytest.mark.parametrize("shape", PATHS)
def test_every_divergence_in_every_shape(shape):
    vocab = PATHS[shape]
    few = {
        "tile": dict.fromkeys((*USUAL, *FORMS, *REVERSED)),
        "row": ("reverse_kl", "jsd(0.5)", "alpha(-1.5)"),
        "parts": ("reverse_kl", "skew_kl(0.1)", "tvd"),
    }
    z, v = make_rows("plain", 1, vocab)
    for name in few[shape]:
        hard = 0.0 if parse(name).form.family == "alpha" else 0.3
        agrees(z, v, name, 1.5, torch.tensor([3]), hard)


def test_both_gradients_wherever_rows_lie():
    """Of views of three dimensions, shifted against each other, whose gradients lie in yet other ways."""
    z, v = (x.view(2, 3, 90) for x in make_rows("plain", 6, 90, torch.bfloat16, torch.float32))
    a, b = z[:, :2, 1:-2].requires_grad_(), v[:, 1:, 3:].requires_grad_()
    c, d = (x.detach().double().requires_grad_() for x in (a, b))
    for x, y, run in ((a, b, "triton"), (c, d, "eager")):
        fused_kd_loss(
            x, y, divergence="jsd(0.3)", teacher_grad=True, vocab_size=80, reduction="sum", backend=run
        ).backward()
    for mine, right in ((a.grad, c.grad), (b.grad, d.grad)):
        assert float((mine.double() - right).norm()) <= (
            3e-6 if mine.dtype == torch.float32 else 4e-3
        ) * float(right.norm())


# the student scaled and capped, the teacher scaled, label smoothing and the z-loss
MODIFIED = [0.5, 4.0, 2.0, 0.0, 0.1, 1e-2]


@pytest.mark.parametrize(
    ("shape", "name"), [("tile", "kl"), ("row", "jsd(0.1)"), ("parts", "kl"), ("parts", "jsd(0.1)")]
)
def test_modifiers_in_every_shape(shape, name):
    """A window in place and a value alone, against the reference in fp64."""
    vocab = PATHS[shape]
    z, v = (x[:, 3:vocab] for x in make_rows("plain", 1, vocab))
    asked = torch.tensor([vocab // 2]), None, name, 1.5, 0.3, vocab - 3, MODIFIED
    exact, right = raw.with_gradient("eager", z.double(), v.double(), *asked)
    value = raw.losses("triton", z, v, *asked)
    base = torch.full((1, vocab + 8), 7.0)
    logits = base[:, 3:vocab]
    logits.copy_(z)
    loss = raw.losses("triton", logits, v, *asked, grad=logits)
    for x in (loss, value):
        torch.testing.assert_close(x, exact, rtol=2e-7, atol=0)
    assert float((logits - right).norm()) <= gradient_bound(1, float(right.norm()))
    assert (base[:, :3] == 7).all() and (base[:, vocab:] == 7).all()


@pytest.mark.parametrize(
    ("shape", "name", "T"),
    [("tile", "kl", math.inf), ("row", "jsd(0.3)", 2.0), ("parts", "renyi(0.3)", 2.0)],
)
def test_statistics_in_every_shape(shape, name, T):
    """Of a row in a window, whose gradient takes its place, and of one with an outlier; the first of equal
    classes is the top-1."""
    vocab = PATHS[shape]
    z, v = (
        torch.cat(x)
        for x in zip(*(make_rows(kind, 1, vocab) for kind in ("plain", "outlier_student")), strict=True)
    )
    z[0, [vocab - 2, vocab // 2, vocab // 2 + 1]], v[0, [4, vocab - 1]] = 20.0, 20.0
    z, v = z[:, 3:], v[:, 3:]
    z[:, 7] = -math.inf
    asked = torch.tensor([5, 6]), None, name, T, 0.3, vocab - 3, MODIFIED
    exact, right = raw.with_statistics("eager", z.double(), v.double(), *asked)
    alone, found = raw.with_statistics("triton", z, v, *asked)
    loss, in_place = raw.with_statistics("triton", z, v, *asked, grad=z)
    torch.testing.assert_close(alone, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)
    for x in (found, in_place):
        torch.testing.assert_close(x, right, rtol=1e-6, atol=2e-6)
        assert torch.equal(x[:, 6:], right[:, 6:])


def test_slopes_of_a_softcap_to_their_own_digits():
    """Of classes at the cap, whose distance to it is lost in a float, and of small logits, whose tanh is lost
    in 1 - e^{-2u}."""
    z, v = torch.tensor([[300.0, 280.0, -250.0, 1e-3, 2e-3, 0.0, 9.0, 40.0]]), torch.zeros(1, 8)
    asked = dict(T=20.0, modifiers=(1.0, 30.0))
    _, exact = raw.with_gradient("eager", z.double(), v.double(), **asked)
    _, grad = raw.with_gradient("triton", z, v, **asked)
    torch.testing.assert_close(grad.double(), exact, rtol=5e-6, atol=0)


@pytest.mark.parametrize("name", [*FORMS, *REVERSED, "renyi(0)", "renyi(inf)"])
def test_masks_of_every_divergence(name):
    """What a class adds that only one of the two has, and what is infinite; classes that neither has add
    nothing."""
    for where in ("student", "teacher", "both"):
        agrees(*with_masks(*make_rows("independent", 2, 40), where), name)
    z, v = make_rows("plain", 1, 40)
    tail = torch.full((1, 9), -math.inf)
    short, long = (
        with_backend("triton", a, b, None, name, 1.0, 0.0, True)
        for a, b in ((z, v), (torch.cat([z, tail], 1), torch.cat([v, tail], 1)))
    )
    torch.testing.assert_close(short[0], long[0], rtol=1e-6, atol=0)
    assert (long[1][:, 40:] == 0).all()


@pytest.mark.parametrize(
    "name",
    [
        "reverse_kl",
        "jsd(0.5)",
        "jsd(0.999)",
        "skew_kl(0.1)",
        "skew_reverse_kl(0.9)",
        "alpha(-1)",
        "reverse_renyi(2)",
    ],
)
def test_the_bounds_hold_for_every_family(name):
    """Close and distant students, common offsets and dominant classes, where the reference of a row matters
    most."""
    for kind, T in itertools.product(
        ("close", "offset", "outlier", "outlier_student", "peaked_teacher"), (0.5, 20.0, 1e4)
    ):
        if (name, T) != ("alpha(-1)", 0.5):  # whose values there are beyond a float
            agrees(*make_rows(kind, 1, 31), name, T)


@pytest.mark.parametrize("name", [*FORMS, *REVERSED])
def test_a_student_that_is_the_teacher(name):
    _, v = make_rows("plain", 2, 40, torch.bfloat16)
    loss, grad = with_backend("triton", v, v, None, name, 1.0, 0.0, True)
    assert (loss == 0).all() and (grad == 0).all()


def test_limits_of_high_temperature():
    for name in (
        "reverse_kl",
        "alpha(3)",
        "jsd(0.3)",
        "skew_kl(0.1)",
        "reverse_renyi(2)",
        "reverse_renyi(0)",
        "renyi(0)",
    ):
        z, v = make_rows("plain", 2, 40)
        agrees(z, v, name, math.inf)
        for where in ("student", "teacher"):
            found, exact = (
                with_backend(b, *with_masks(z, v, where), None, name, math.inf, 0.0, False)
                for b in ("triton", "eager")
            )
            assert torch.equal(found.isinf(), exact.isinf()), (name, where)


PLAIN = (
    "kl",
    "reverse_kl",
    "cross_entropy",
    "renyi(0.5)",
    "renyi(3)",
    "reverse_renyi(2)",
    "alpha(-1.5)",
    "alpha(2)",
)
PLAIN += ("jsd(0.5)", "jsd(0.9)", "skew_kl(0.1)", "skew_reverse_kl(0.3)", "tvd")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_form_is_right_to_the_rounding_of_its_gradient(name, dtype):
    """All kinds of rows, one of many classes and one of few, at the temperatures that it is for."""
    for i, kind in enumerate(KINDS):
        for vocab, T in ((700, (0.5, 1.0, 2.0, 8.0)[i % 4]), (31, (8.0, 2.0, 1.0, 0.5)[i % 4])):
            z, v = make_rows(kind, 1, vocab, dtype)
            assert not is_exact(parse(name).form, T, dtype)
            (D,), (g,) = with_backend("eager", z.double(), v.double(), None, name, T, 0.0, True)
            (loss,), (grad,) = with_backend("triton", z, v, None, name, T, 0.0, True)
            value = with_backend("triton", z, v, None, name, T, 0.0, False)[0]
            if not (D < 1e30 and g.isfinite().all()):
                assert loss == D
                continue
            D = float(D)
            assert max(abs(float(loss) - D), abs(float(value) - D)) <= plain_value_bound(name, D), (kind, T)
            if g.abs().max() < torch.finfo(dtype).max:
                bound = plain_gradient_bound(name, g, dtype, spread_of(z, v, T), D)
                assert float((grad.double() - g).norm()) <= bound, (kind, vocab, T)
            assert loss >= 0 or name == "alpha"


def test_which_form_a_call_takes():
    """The exact one where a gradient has more digits than the plain form, or p and q nearly cancel."""
    exact = lambda name="kl", T=1.0, dtype=torch.bfloat16: is_exact(parse(name).form, T, dtype)  # noqa: E731
    assert not exact() and exact(dtype=torch.float32) and exact(T=8.5) and not exact(T=8.0)
    assert exact(T=None)  # rows have their own
    found = [exact(f"renyi({a})") for a in (0.1, 0.5, 0.9, 1.1, 2, 9)]
    assert found == [True, False, True, True, False, True]
    assert [exact(f"jsd({b})") for b in (0.01, 0.1, 0.99)] == [True, False, True]
    z = torch.zeros(1, 8, dtype=torch.bfloat16)
    for gradient, expected in ((None, False), (z, False), (z.float(), True)):
        found, _ = backend.launches(raw.call(z, z, grad=gradient), torch.empty(1), HERE)
        assert found[0].arguments["SPEC"].exact == expected
    own = raw.call(z, z)._replace(temperature=torch.ones(1, dtype=torch.float64))
    found, _ = backend.launches(own, torch.empty(1), HERE)
    assert found[0].arguments["SPEC"].exact and found[0].arguments["SPEC"].own


def test_orders_and_weights_beyond_a_float():
    """Where a tilt or a weight would round to nothing, D is proportional to it, or no longer depends on
    it."""
    z, v = make_rows("plain", 1, 31)
    value = lambda name: with_backend("triton", z, v, None, name, 1.0, 0.0, False).item()  # noqa: E731
    reverse = value("reverse_kl")
    for name, exact in (
        ("renyi(1e-40)", 1e-40 * reverse),
        ("alpha(1e-60)", reverse),
        ("alpha(-1e-60)", reverse),
    ):
        assert value(name) == pytest.approx(exact, rel=1e-6)
    assert value("skew_reverse_kl(1e-60)") == pytest.approx(reverse, rel=1e-6)
    assert value("jsd(1e-30)") == pytest.approx(1e-30 * value("kl"), rel=1e-6)


def test_paths_are_what_they_are_called():
    for size in (2, 4):
        tile, row, parts = (chosen(shape, size=size) for shape in PATHS)
        assert tile.parts == row.parts == 1 < parts.parts
        assert tile.lanes * tile.run >= PATHS["tile"] and row.lanes * row.run < PATHS["row"]


def meeting(shapes, others) -> list:
    """(shape, other) of all; a third of them, no shape and no other as a whole, is left to `make slow`."""
    pairs = [(i + j, shape, other) for i, other in enumerate(others) for j, shape in enumerate(shapes)]
    return [pytest.param(shape, other, marks=[pytest.mark.slow] * (n % 3 == 1)) for n, shape, other in pairs]


@pytest.mark.parametrize("shape, name", meeting(PATHS, OPTIONS))
def test_every_kernel_shape(shape, name):
    """Value alone, and with the gradient: through "none", whose backward has per-row weights, and in place
    through "sum"."""
    vocab = PATHS[shape]
    options = OPTIONS[name]
    z, v = make_rows("plain", 2 if shape == "parts" else 3, vocab)
    y = torch.arange(len(z)) * (vocab // 4) if "hard_weight" in options else None
    exact, exact_grad = expected(z, v, y, options)
    loss, grad = run(z, v, y, reduction="none", **options)
    total, in_place = run(z, v, y, reduction="sum", inplace=True, **options)
    order = 1 if options.get("divergence", "kl") in ("kl", "cross_entropy") else 2
    torch.testing.assert_close(
        loss.double(), exact, rtol=value_bound(order, vocab, 1.0, 0.0, 1.0), atol=1e-30
    )
    assert total.item() == pytest.approx(exact.sum().item(), rel=1e-6)
    for g in (grad, in_place):
        for i in range(len(z)):
            bound = gradient_bound(order, float(exact_grad[i].norm()))
            assert float((g[i].double() - exact_grad[i]).norm()) <= bound


@pytest.mark.parametrize("shape", ["row", "parts"])
@pytest.mark.parametrize("order", [1.0, 0.3, 3.0])
def test_values_that_cancel_take_a_second_sweep(shape, order):
    """Where the sampled classes say nothing of the row's mean difference, a value without a gradient is as
    accurate as with one."""
    vocab = PATHS[shape]
    z, v = make_rows("close", 2, vocab)
    z, v = z.clone(), v.clone()
    z[:, vocab // 3 :: 7] += 3  # elsewhere than the sample looks, for the most part
    v[:, vocab // 3 :: 7] += 3.001
    # one class has nearly everything, at another difference
    z[:, vocab // 2 + 40], v[:, vocab // 2 + 40] = 40.0, 43.0
    loss = fused_kd_loss(
        z, v, divergence=f"renyi({order})", temperature=20.0, reduction="none", backend="triton"
    )
    for i in range(2):
        D = float(
            divergence_row(z[i].numpy(), v[i].numpy(), f"renyi({order})" if order != 1 else "kl", 20.0)[0]
        )
        assert abs(float(loss[i]) - D) <= value_bound(order, vocab, 20.0, 60 / 20, D)


@pytest.mark.parametrize(
    ("student", "teacher"), itertools.product((torch.bfloat16, torch.float16, torch.float32), repeat=2)
)
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_dtypes_and_windows(student, teacher, offset):
    """Rows that begin on 16 bytes, off them by the same number of classes, and by different ones."""
    rows, vocab = 3, 1001
    z, v = make_rows("plain", rows, vocab + 8, student, teacher)
    z, v = z[:, :vocab], v[:, :vocab] if offset else v[:, :vocab].contiguous()
    x = torch.zeros(rows, vocab + 8, dtype=student)
    x[:, offset % 8 : vocab + offset % 8] = z
    x = x[:, offset % 8 : vocab + offset % 8].requires_grad_()
    exact, exact_grad = expected(x.detach(), v, None, {})
    loss = fused_kd_loss(x, v, reduction="none", backend="triton")
    loss.sum().backward()
    plain = student != torch.float32  # the gradient has the student's dtype
    torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-6, atol=1e-6 if plain else 0)
    room = {torch.float32: 1e-6}.get(student, torch.finfo(student).eps)
    assert float((x.grad.double() - exact_grad).norm()) <= room * float(exact_grad.norm())


OTHER_ORDERS = [pytest.param(path, order, marks=pytest.mark.slow) for path in PATHS for order in (0.7, 2.0)]


@pytest.mark.parametrize("shape, order", meeting(PATHS, [1.0, 0.3, 5.0]) + OTHER_ORDERS)
def test_rows_of_few_classes(shape, order):
    """Low temperatures, where K is far from what the sample says and one exponential's rounding would be the
    gradient's: a repeat helps."""
    vocab = PATHS[shape]
    name = f"renyi({order})" if order != 1 else "kl"
    for seed, (T, scale) in enumerate([(0.05, 1.0), (0.2, 1.0), (0.2, 10.0), (0.5, 10.0)]):
        g = torch.Generator().manual_seed(seed)
        v = torch.randn(1, vocab, generator=g) * 3
        z = v + torch.randn(1, vocab, generator=g) * scale
        # soft_weight=T: the gradient is T dD/dz, as the bounds have it
        loss, grad = run(z, v, reduction="none", divergence=name, temperature=T, soft_weight=T)
        D, exact = divergence_row(z[0].numpy(), v[0].numpy(), name, T)
        exact = torch.from_numpy(exact.astype(float))
        assert abs(float(loss[0]) / T - float(D)) <= value_bound(
            order, vocab, T, spread_of(z, v, T), float(D)
        )
        assert float((grad[0].double() - exact).norm()) <= gradient_bound(order, float(exact.norm())), (
            T,
            scale,
        )


@pytest.mark.parametrize("shape", PATHS)
def test_a_nan_that_arithmetic_makes_is_no_lost_row(shape):
    """In place the logits are gone by then: inf - inf stays nan, and the gradient is what it is without the
    hard term's infinity."""
    vocab = PATHS[shape]
    z, v = make_rows("plain", 1, vocab)
    z[0, 5] = -math.inf
    exact = run(z, v, torch.tensor([5]), reduction="sum", soft_weight=1.0, hard_weight=-1.0)[1]
    logits = z.clone()
    out = raw.losses("triton", logits, v, torch.tensor([5]), hard=-1.0, grad=logits)
    assert out.isnan().all() and torch.equal(logits, exact)


def layout_of(*tensors, vocab=None):
    R = 16 // min(x.element_size() for x in tensors[:2])
    return launch._layout([launch.Lie(*launch.lie(x)) for x in tensors], R, vocab or tensors[0].shape[-1])[1]


def test_accesses_are_as_wide_as_memory_allows():
    bf16 = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta")  # noqa: E731
    assert layout_of(bf16(4, 4096), bf16(4, 4096)) == spec.EVEN
    assert layout_of(bf16(4, 50257), bf16(4, 50257)) == spec.WINDOW
    # Qwen's, padded differently
    assert layout_of(bf16(4, 151936), bf16(4, 152064), vocab=151665) == spec.WINDOW
    assert layout_of(bf16(4, 50257), bf16(4, 50264)) == spec.SCALAR
    assert layout_of(bf16(4, 4096), bf16(4, 4096).float()) == spec.EVEN
    # rows of two strides, not the same two
    assert layout_of(bf16(2, 3, 50257)[:, :2], bf16(2, 2, 50257)) == spec.SCALAR
    # data that begins off 16 bytes
    assert layout_of(bf16(2, 3, 50257)[:, :2], bf16(2, 3, 50257)[:, 1:]) == spec.SCALAR


@pytest.mark.parametrize(
    "start, size", [(0, 2048), (0, 2052), (3, 2045), (3, 2044), (3, 4093), (3, 5), (0, 4096)]
)
def test_tiles_with_and_without_a_mask(start, size):
    """Rows whose first tile, last tile, both or none are masked: each class counts once."""
    for form, T in (("kl", 16.0), ("jsd(0.5)", 16.0)):
        z, v = (x[:, start : start + size] for x in make_rows("close", 2, 4224))
        agrees(z, v, form, T)


def test_a_classes_neighbours_are_not_written():
    """The edges of a window: gradients of one row leave those of the next, and what lies between them,
    alone."""
    z, v = make_rows("plain", 4, 50)
    base = torch.full((4, 64), 7.0)
    logits = base[:, 3:53]
    logits.copy_(z)
    _, expected_grad = run(z, v, reduction="sum")
    out = raw.losses("triton", logits, v, grad=logits)
    assert out.isfinite().all()
    torch.testing.assert_close(logits, expected_grad, rtol=1e-5, atol=1e-8)
    assert (base[:, :3] == 7).all() and (base[:, 53:] == 7).all()


def test_what_is_compiled_depends_on_no_number():
    """A new number of rows, temperature, order or weight launches what was compiled before: only constexprs
    and types make a kernel."""

    def kernels(rows, vocab, divergence="renyi(2)", T=2.0, weight=0.5, modifiers=()):
        z = torch.empty(rows, vocab, dtype=torch.bfloat16, device="meta")
        out = torch.empty(rows, dtype=torch.float64, device="meta")
        numbers = Numbers(T, weight, weight, 0.1 * weight, 0.2 * weight, Modifiers(*modifiers))
        call = Call(z, z, vocab, out.long(), None, parse(divergence), numbers, z)
        found, _ = backend.launches(call, out, Device(132))
        return [
            (
                x.kernel,
                x.warps,
                *sorted((k, v) for k, v in x.arguments.items() if k.isupper()),
            )
            for x in found
        ]

    first = kernels(4096, 50257)
    assert (
        first
        == kernels(8000, 50257)
        == kernels(4097, 50257, "renyi(1.5)", 7.3, 0.01)
        == kernels(4096, 50257, "renyi(0.6)")
    )
    assert first != kernels(4096, 50257, "kl") and first != kernels(4096, 50264)
    assert first == kernels(4096, 50257, modifiers=(1.0, 0.0, 1.0, 0.0, 0.0, 1e-4))
    modified = kernels(4096, 50257, modifiers=MODIFIED)
    assert modified == kernels(4096, 50257, modifiers=[1.0, 30.0, 1.0, 50.0, 0.2, 0.0]) != first
    for name in ("loss_rows", "careful_rows", "log_softmax_rows", "scale_all"):
        source = Path(inspect.getsourcefile(backend.kernel(name).fn)).read_text()
        head = source[: source.index(f"def {name}(")]
        decorator = head[head.rindex("@triton.jit") :]
        assert "do_not_specialize=" in decorator
        # labels[1:] begin at 8 bytes of 16
        assert "do_not_specialize_on_alignment=ROWS_DATA" in decorator or name in (
            "log_softmax_rows",
            "scale_all",
        )


def test_plans_fit_their_device():
    """Parts cover a row that begins anywhere in an access, none of them is empty, and all of a row's are in
    flight at once."""
    for vocab, rows, size, device in itertools.product(
        (1, 1000, 8192, 32768, 50257, 128256, 262144),
        (1, 7, 4096),
        (2, 4),
        (Device(20), Device(108), Device(304, 64)),
    ):
        p = plan(rows, vocab, size, size, device)
        even = plan(rows, vocab, size, size, device, window=False)
        assert (even.parts - 1) * even.size < vocab <= even.parts * even.size
        assert p.run * size == 16 and 1 <= p.parts <= min(spec.MOST_PARTS, device.processors * 4)
        assert (p.parts - 1) * p.size < vocab <= p.parts * p.size - p.run + 1
        assert p.size % (p.lanes * p.run) == 0 and p.warps * device.warp <= 1024
        assert p.parts == 1 or p.size >= 2 * p.lanes * p.run


def test_repeats_bit_for_bit():
    for shape in PATHS:
        vocab = PATHS[shape]
        z, v = make_rows("plain", 1, vocab)
        for name in {"tile": ("renyi(0.3)", "jsd(0.1)"), "row": ("renyi(0.3)",), "parts": ("jsd(0.1)",)}[
            shape
        ]:
            (a, g), (b, h) = (run(z, v, reduction="none", divergence=name) for _ in range(2))
            assert torch.equal(a, b) and torch.equal(g, h)


def test_scale():
    for dtype, factor in itertools.product((torch.float32, torch.bfloat16), (1.0, 0.5)):
        x = torch.randn(3, 5000).to(dtype)
        y = x.clone()
        backend.scale_(y, torch.tensor(factor))
        assert torch.equal(y, x * factor)
    y = torch.ones(4, 6)[:, ::2]
    backend.scale_(y, torch.tensor(3.0))
    assert (y == 3).all()


def test_a_kernel_is_looked_up_once_for_a_kind_of_call(monkeypatch):
    """What Triton has compiled for a call runs the next one of its kind, with that one's tensors; of another
    dtype, alignment or device Triton is asked again."""

    class Kernel:
        arg_names = ("X", "FACTOR", "count", "BLOCK")

        def __init__(self):
            self.asked, self.ran = [], []

        def __getitem__(self, grid):
            def first(*taken, **options):
                self.asked.append((grid, taken[0], taken[2:]))
                return {(*grid, 1, 1): lambda *again: self.ran.append((again[0], again[2:]))}

            return first

    found = Kernel()
    monkeypatch.setattr(launch, "kernel", lambda name: found)
    factor, x, y, off = torch.tensor(0.5), torch.zeros(80), torch.zeros(80), torch.zeros(81)[1:]
    backend._scaling.cache_clear()
    for z in (x, y, off, x.bfloat16(), off):
        backend.scale_(z, factor)
    one = backend._scaling(80, 2, True, x.dtype, factor.dtype)
    backend._scaling.cache_clear()
    assert [(taken.dtype, taken.data_ptr() % 16) for _, taken, _ in found.asked] == [
        (x.dtype, 0),
        (x.dtype, 4),
        (torch.bfloat16, 0),
    ]
    one.run((x.to("meta"), factor))
    one.run((x.to("meta"), factor))
    rest = (80, backend.SCALE_BLOCK)
    assert {taken for _, _, taken in found.asked} == {taken for _, taken in found.ran} == {rest}
    assert len(found.asked) == 4
    assert [x.device.type for x, _ in found.ran] == ["cpu", "cpu", "meta"] and found.ran[0][0] is y
    first, second = torch.zeros(2, 40), torch.zeros(81)[1:].view(2, 40)
    one, two = (backend.launches(raw.call(z, z), torch.empty(2), HERE)[0] for z in (first, first.clone()))
    assert one is two and one is not backend.launches(raw.call(second, second), torch.empty(2), HERE)[0]


def test_scaling_takes_a_program_for_each_8192_elements(monkeypatch):
    """64128 of them to find that the factor is 1, as nearly always: a few to a multiprocessor do, and each
    walks."""
    launched = []
    run_it = backend.Launch.run
    monkeypatch.setattr(backend.Launch, "run", lambda self, x: (launched.append(self.grid), run_it(self, x)))
    x = torch.randn(20, 9000)
    y = x.clone()
    backend.scale_(y, torch.tensor(0.5))
    assert torch.equal(y, x * 0.5)
    assert (
        launched == [backend.SCALE_PROGRAMS * backend.figures(x.device).processors]
        and launched[0] < x.numel() // backend.SCALE_BLOCK
    )


def test_float64_has_its_reason():
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="triton: it computes in fp32"):
        fused_kd_loss(x, x, backend="triton")


def test_labels_beyond_the_vocabulary_are_nan_on_a_gpu():
    """What the host cannot look at without waiting: the row is nan, and nothing is read out of bounds."""
    z, v = make_rows("plain", 3, 100)
    out, grad = torch.empty(3, dtype=torch.float64), torch.zeros_like(z)
    y = torch.tensor([5, 10**12, -7])
    found, tensors = backend.launches(raw.call(z, v, y, hard=1.0, grad=grad), out, HERE)
    for x in found:
        x.run(tensors)
    assert out[0].isfinite() and out[1:].isnan().all() and grad[0].isfinite().all()


def test_offsets_beyond_int32():
    """Two rows 2^31 elements apart, in a process of their own; the pages between them are never touched."""
    code = """
import sys
import torch
sys.path.insert(0, "tests")
import interpreter
interpreter.install()
import raw
from kdkernels import fused_kd_loss
z = torch.empty(2**31 + 9000, dtype=torch.bfloat16).as_strided((2, 700), (2**31, 1))
v, w = torch.randn(2, 700).bfloat16(), torch.randn(2, 700).bfloat16()
z.copy_(w)
out = raw.losses("triton", z, v, grad=z)
x = w.clone().requires_grad_()
loss = fused_kd_loss(x, v, reduction="none", backend="triton")
loss.sum().backward()
torch.testing.assert_close(out.float(), loss.detach(), rtol=1e-6, atol=0)
assert torch.equal(z, x.grad)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_masks_in_every_shape(where):
    """Teachers cut to their top classes, padding, and D = +inf, whatever kernel meets them first."""
    for shape in PATHS:
        vocab = PATHS[shape]
        z, v = with_masks(*make_rows("plain", 2, vocab), where)
        for divergence in ("kl", "renyi(0.3)") if shape != "parts" else ("renyi(3)",):
            loss, grad = run(z, v, reduction="none", divergence=divergence)
            for i in range(2):
                D, g = divergence_row(z[i].numpy(), v[i].numpy(), divergence, 1.0)
                assert float(loss[i]) == pytest.approx(float(D), rel=2e-6)
                assert float((grad[i].double() - torch.from_numpy(g.astype(float))).norm()) <= 3e-6


@pytest.mark.parametrize("shape, T", meeting(["tile", "row"], [0.5, 1.0, 20.0, 1e4]))
@pytest.mark.parametrize("order", [1.0, 0.5, 0.9999, 2.0])
def test_the_bounds_hold_with_the_hardwares_exponential(shape, T, order, monkeypatch):
    """ex2.approx is right to 2^-22, four times worse than the interpreter's."""
    interpreter = pytest.importorskip("interpreter")
    monkeypatch.setattr(interpreter.Builder, "create_exp2", interpreter.approximate_exp2)
    vocab = PATHS[shape]
    name = f"renyi({order})" if order != 1 else "kl"
    for kind in ("plain", "offset", "peaked_teacher"):
        z, v = make_rows(kind, 1, vocab)
        loss, grad = run(z, v, reduction="none", divergence=name, temperature=T, soft_weight=T)
        D, g = divergence_row(z[0].numpy(), v[0].numpy(), name, T)
        assert abs(float(loss[0]) / T - float(D)) <= value_bound(order, vocab, T, 30 / T, float(D))
        assert float((grad[0].double() - torch.from_numpy(g.astype(float))).norm()) <= gradient_bound(
            order, float((g**2).sum() ** 0.5)
        )


@pytest.mark.parametrize("shape", PATHS)
def test_ordinary_rows_are_left_to_no_other_kernel(shape):
    """What the fast kernels give up is rare: not the rows of models at the temperatures that they are
    distilled at."""
    vocab = PATHS[shape]
    for kind, T, divergence in itertools.product(
        ("plain", "independent", "peaked_teacher"), (1.0, 4.0), ("kl", "renyi(0.5)", "renyi(2)")
    ):
        z, v = make_rows(kind, 1, vocab)
        out = torch.empty(1, dtype=torch.float64)
        (*fast, _), tensors = backend.launches(raw.call(z, v, divergence=divergence, T=T), out, HERE)
        for x in fast:
            x.run(tensors)
        assert out.isfinite().all(), (kind, T, divergence)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "name", ["kl", "reverse_kl", "renyi(0.5)", "renyi(2)", "jsd(0.5)", "skew_kl(0.1)", "tvd"]
)
def test_a_padded_vocabulary_is_left_to_no_other_kernel(name, dtype):
    """Masks of -inf and of the dtype's smallest number, in both models, or in the one where D stays finite:
    the loss is there after the fast kernel, and right."""
    infinite_at = {"kl": "student", "reverse_kl": "teacher", "renyi(2)": "student"}
    for shape, mask in (("tile", -math.inf), ("row", torch.finfo(dtype).min), ("parts", -math.inf)):
        for where in ("both", "student", "teacher"):
            z, v = make_rows("plain", 1, PATHS[shape], dtype)
            if infinite_at.get(name) == where:
                continue
            for x, other in ((z, "teacher"), (v, "student")):
                if where != other:
                    x[:, -PATHS[shape] // 3 :] = mask
            out, grad = torch.empty(1, dtype=torch.float64), torch.zeros_like(z)
            call = raw.call(z, v, divergence=name, T=2.0, grad=grad)
            (*fast, _), tensors = backend.launches(call, out, HERE)
            for x in fast:
                x.run(tensors)
            D, g = with_backend("eager", z.double(), v.double(), None, name, 2.0, 0.0, True)
            assert float(out) == pytest.approx(float(D), rel=2e-6, abs=1e-6), (shape, mask, where)
            bound = max(1e-6, 2 * torch.finfo(dtype).eps * float(g.norm()))
            assert float((grad.double() - g).norm()) <= bound, (shape, mask, where)


@pytest.mark.parametrize("name", PLAIN)
def test_a_loss_is_never_negative(name):
    """Of the plain form, whose rounding is larger than D where the student is nearly the teacher."""
    for seed in range(5):
        v = torch.randn(2, 300, generator=torch.Generator().manual_seed(seed)).bfloat16()
        z = v.clone()
        z[:, seed] += 0.01
        loss = fused_kd_loss(z, v, divergence=name, reduction="none", backend="triton")
        assert (loss >= (1 if name == "cross_entropy" else 0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("name", "side"),
    [("kl", 0), ("cross_entropy", 0), ("reverse_kl", 1), ("mixed_kl(0.5)", 0), ("mixed_kl(0.5)", 1)],
)
def test_a_class_of_one_side_that_is_too_small_for_a_float(name, side, dtype):
    """D is +inf there in either form, although the other's probability is 0 in fp32."""
    logits = make_rows("plain", 1, 10, dtype)
    logits[side][:, 3:7] = -math.inf
    z, v = logits
    loss = fused_kd_loss(z.requires_grad_(), v, divergence=name, temperature=0.01, backend="triton")
    assert float(loss.detach()) == math.inf
