"""The operators as torch sees them: opcheck, torch.compile, torch.export, autocast, torch.func, pickle."""

import contextlib
import copy
import math
import pickle
import sys
from pathlib import Path

import pytest
import raw
import torch
from rows import DOUBLE_BACKENDS, make_rows
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels import KDLoss, fused_kd_loss, logit_matching_loss, tempered_log_softmax

sys.path.insert(0, str(Path(__file__).parent / "simt"))
import build  # noqa: E402


@pytest.mark.parametrize("backend", ["cpu", "eager", "auto"])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(backend, full):
    z, v = make_rows("plain", 4, 100)
    y, w = (torch.tensor([1, 2, 3, 4]), torch.rand(4).double()) if full else (None, None)
    grad, stats = (torch.empty_like(z), raw.ops.new_columns(z)) if full else (None, None)
    arguments = raw.call(z, v, y, w, "renyi(0.5)", 2.0, 0.3, 90).flat(backend)[:-2]
    torch.library.opcheck(torch.ops.kdkernels.loss_into.default, (*arguments, grad, stats))
    # without labels one of the statistics is nan, which does not equal itself
    torch.library.opcheck(torch.ops.kdkernels.loss.default, (*arguments, True, full))
    torch.library.opcheck(
        torch.ops.kdkernels.log_softmax.default, (z, v if full else None, [2.0], None, backend)
    )


CASES = {
    "kl": {},
    "hard": {"hard_weight": 0.3, "temperature": 2.0, "t_squared": True, "divergence": "renyi(0.5)"},
    "none": {"reduction": "none", "hard_weight": 0.3},
    "sum": {"reduction": "sum", "divergence": "renyi(inf)"},
    "limit": {"temperature": math.inf, "t_squared": True},
    "vocab": {"vocab_size": 90},
    "fp16": {"hard_weight": 0.1},
    "inplace": {"inplace": True},
    "eager": {"backend": "eager", "divergence": "renyi(2)"},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(name, dynamic):
    """One graph, also with dynamic shapes, and the same numbers."""
    torch._dynamo.reset()
    options = CASES[name]
    dtype = torch.float16 if name == "fp16" else torch.float32

    def f(z, v, y):
        return fused_kd_loss(z * 1.5, v, y, **options).sum() * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for rows in (5, 4) if dynamic else (4,):
        z, v = make_rows("plain", rows, 100, dtype)
        y = torch.arange(rows)
        y[1] = -100
        a, b = (z.clone().requires_grad_() for _ in range(2))
        la, lb = compiled(a, v, y), f(b, v, y)
        la.backward()
        lb.backward()
        torch.testing.assert_close(la, lb, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            a.grad, b.grad, rtol=2e-3 if name == "fp16" else 1e-5, atol=1e-4 if name == "fp16" else 1e-8
        )


def test_compile_other_functions():
    torch._dynamo.reset()
    z, v = make_rows("plain", 3, 100)

    def f(z):
        return tempered_log_softmax(z, 2.0).square().sum() + logit_matching_loss(z, v)

    a, b = (z.clone().requires_grad_() for _ in range(2))
    torch.compile(f, fullgraph=True)(a).backward()
    f(b).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_export():
    z, v = make_rows("plain", 4, 100)
    n = torch.export.Dim("n")
    exported = torch.export.export(
        KDLoss(temperature=2.0, t_squared=True), (z, v), dynamic_shapes=({0: n}, {0: n})
    )
    other = make_rows("independent", 3, 100)
    torch.testing.assert_close(exported.module()(*other), KDLoss(temperature=2.0, t_squared=True)(*other))


def test_autocast():
    """A bf16 projection under autocast, an fp32 loss, gradients in the parameters' dtype."""
    w, h = torch.randn(16, 100, requires_grad=True), torch.randn(4, 16)
    v = torch.randn(4, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = h @ w
        loss = fused_kd_loss(logits, v, torch.tensor([1, 2, 3, 4]), hard_weight=0.1)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    exact = h.bfloat16().float() @ w.detach().bfloat16().float()
    exact = exact.bfloat16().float().requires_grad_()
    fused_kd_loss(exact, v, torch.tensor([1, 2, 3, 4]), hard_weight=0.1).backward()
    torch.testing.assert_close(w.grad, h.t() @ exact.grad, rtol=3e-2, atol=1e-2)


def test_torch_func():
    z, v = make_rows("plain", 3, 20)
    expected = z.clone().requires_grad_()
    fused_kd_loss(expected, v).backward()
    got = torch.func.grad(lambda z: fused_kd_loss(z, v, backend="eager"))(z)
    torch.testing.assert_close(got, expected.grad, rtol=1e-5, atol=1e-8)
    with pytest.raises(RuntimeError, match='backend="eager"'):
        torch.func.grad(lambda z: fused_kd_loss(z, v))(z)


def test_copies():
    z, v = make_rows("plain", 3, 20)
    module = KDLoss(divergence="renyi(0.5)", temperature=2.0)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(z, v), module(z, v)) and repr(other) == repr(module)


def test_no_grad_and_frozen_student():
    z, v = make_rows("plain", 3, 20)
    with torch.no_grad():
        assert fused_kd_loss(z.clone().requires_grad_(), v).grad_fn is None
    assert not fused_kd_loss(z, v).requires_grad
    with torch.inference_mode():
        assert fused_kd_loss(z * 1, v * 1).isfinite()


@pytest.mark.parametrize("backend", ["cpu", "eager", "triton", "cuda"])
@pytest.mark.parametrize(
    ("logits", "gradient"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
)
def test_a_gradient_of_another_dtype(backend, logits, gradient):
    """It is the student's own, rounded; past the classes that count, and in rows of weight 0, it is 0."""
    if logits == torch.float64 and backend not in DOUBLE_BACKENDS:
        pytest.skip("no float64")
    y, w = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0]).double()
    cuda = build.in_place_of_cuda() if backend == "cuda" else contextlib.nullcontext()
    with cuda:
        for divergence, modifiers in (("kl", ()), ("jsd(0.3)", ()), ("renyi(2)", (1.0, 3.0)), ("tvd", ())):
            z, v = make_rows("plain", 5, 515, logits)
            asked = v, y, w, divergence, 2.0, 0.3, 507, modifiers
            exact = torch.full(z.shape, 7.0, dtype=z.dtype if z.dtype.itemsize >= 4 else torch.float32)
            found = torch.full(z.shape, 7.0, dtype=gradient)
            losses = raw.losses(backend, z.to(exact.dtype), *asked, grad=exact)
            torch.testing.assert_close(raw.losses(backend, z, *asked, grad=found), losses, rtol=1e-6, atol=0)
            assert found.any() and not found[:, 507:].any() and not found[1].any()
            rounded = exact.to(gradient) if gradient.itemsize < 4 else exact.float()
            unit = torch.finfo(gradient).eps if gradient.itemsize < 4 else 1e-6
            torch.testing.assert_close(found, rounded, rtol=unit, atol=1e-7 * float(exact.abs().max()))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_negative_that_is_a_flag():
    """The dispatcher writes it out."""
    z, v = make_rows("plain", 4, 100)
    right = fused_kd_loss(-z, -v)
    assert fused_kd_loss(torch._neg_view(z), -v) == fused_kd_loss(-z, torch._neg_view(v)) == right


def test_who_looks_on_sees_the_operator():
    """Although a plain call goes past torch's dispatcher: modes, profilers, and tensors that hold nothing."""
    z, v = make_rows("plain", 4, 100)
    with Seen() as seen:
        fused_kd_loss(z, v)
    assert "kdkernels.loss_into.default" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fused_kd_loss(z, v)
    assert "kdkernels::loss_into" in {x.key for x in profile.key_averages()}
    with FakeTensorMode() as mode:
        a, b = (mode.from_tensor(x) for x in (z, v))
    for x, y in ((a, b), (z.to("meta"), v.to("meta"))):
        loss = fused_kd_loss(x, y, reduction="none")
        assert loss.shape == (4,) and (loss.is_meta or type(loss) is FakeTensor)
