"""What only a GPU can show, of the Triton backend and of CUDA: TRITON_INTERPRET=0 python -m pytest -m gpu
tests/test_gpu.py

Streams, graphs, other devices, no waiting, no recompiling, determinism, offsets and memory. The kernels'
numbers are compared with the eager backend in float64 on the same device, which the other tests hold to 60
digits.
"""

import itertools
import math
import os

import pytest
import raw
import torch
from rows import KINDS, make_rows, with_masks

from kdkernels import backends, fused_kd_loss, fused_linear_kd_loss, tempered_log_softmax
from kdkernels.backends import triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs a GPU, TRITON_INTERPRET=0",
    ),
]
# whole rows, two sweeps, windows, several programs to a row
VOCABS = (1, 31, 1000, 4096, 8192, 32768, 50257, 128256, 262144)
CHOSEN = {"backend": "triton"}
OPTIONS = [
    {},
    {"divergence": "cross_entropy", "temperature": 2.0},
    {"divergence": "renyi(0.3)"},
    {"divergence": "renyi(0.7)", "temperature": 4.0, "t_squared": True},
    {"divergence": "renyi(3)", "temperature": 2.0},
    {"divergence": "renyi(0)"},
    {"divergence": "renyi(inf)"},
    {"temperature": math.inf, "t_squared": True},
    {"temperature": 1e4, "t_squared": True},
    {"hard_weight": 0.3, "soft_weight": 0.7, "temperature": 2.0},
]


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def backend(request, monkeypatch):
    """Each backend in turn, as the one that is asked for when nobody says."""
    reason = backends.module(request.param).unavailable(torch.device("cuda", 0))
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setitem(CHOSEN, "backend", request.param)
    return request.param


def on_gpu(kind="plain", rows=4, vocab=4096, dtype=torch.float32, seed=0):
    return (x.cuda() for x in make_rows(kind, rows, vocab, dtype, seed=seed))


def value_and_grad(z, v, y=None, **options):
    options = CHOSEN | options
    x = z.clone().requires_grad_()
    loss = fused_kd_loss(x * 1 if options.get("inplace") else x, v, y, **options)
    loss.backward(torch.ones_like(loss))
    return loss.detach(), x.grad


def compare(z, v, y=None, **options):
    loss, grad = value_and_grad(z, v, y, **options)
    options.pop("inplace", None)
    expected, exact = value_and_grad(z.double(), v.double(), y, backend="eager", **options)
    T = options.get("temperature", 1.0)
    spread = 60 / T
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5 + 1e-6 * spread, atol=1e-12, equal_nan=True)
    rounding = 0.0 if z.dtype == torch.float32 else torch.finfo(z.dtype).eps
    error, norm = (grad.double() - exact).norm(dim=-1), exact.norm(dim=-1)
    assert (error <= (3e-6 + 1e-7 * spread + rounding) * norm + 1e-6).all(), (error / norm).max()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_float64(vocab, options):
    for rows, dtype in (
        (3, torch.float32),
        (3, torch.bfloat16),
        (300 if vocab < 50000 else 40, torch.bfloat16),
    ):
        z, v = on_gpu(rows=rows, vocab=vocab, dtype=dtype)
        y = torch.arange(rows, device="cuda") % vocab
        y[0] = -100
        compare(z, v, y, reduction="none", **options)
        compare(z, v, y, inplace=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_rows(kind):
    for vocab, T, divergence in itertools.product(
        (31, 9000, 50257, 128256), (0.05, 1.0, 1e4), ("kl", "renyi(0.5)", "renyi(2)")
    ):
        z, v = on_gpu(kind, 3, vocab)
        compare(z, v, divergence=divergence, temperature=T, soft_weight=T, reduction="none")


@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_masks(where):
    for vocab, divergence in itertools.product(
        (1000, 9000, 128256), ("kl", "renyi(0.3)", "renyi(3)", "renyi(inf)")
    ):
        z, v = (x.cuda() for x in with_masks(*make_rows("plain", 3, vocab), where))
        loss, grad = value_and_grad(z, v, divergence=divergence, reduction="none")
        expected, exact = value_and_grad(
            z.double(), v.double(), divergence=divergence, reduction="none", backend="eager"
        )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-6)


def test_auto_is_triton_and_float64_is_eager(backend):
    if backend != "triton":
        pytest.skip("auto is triton")
    z, v = on_gpu()
    assert torch.equal(fused_kd_loss(z, v), fused_kd_loss(z, v, backend="triton"))
    assert torch.equal(fused_kd_loss(z.double(), v), fused_kd_loss(z.double(), v, backend="eager"))


def test_nothing_waits_for_the_device():
    z, v = on_gpu(rows=8, vocab=50257, dtype=torch.bfloat16)
    y = torch.arange(8, device="cuda")
    z.requires_grad_()
    for options in ({}, {"hard_weight": 0.1}, {"reduction": "none"}, {"divergence": "renyi(0.5)"}):
        value_and_grad(z.detach(), v, y, **options)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            fused_kd_loss(z, v, y, **CHOSEN, **options).sum().mul(3.0).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_new_number_compiles_nothing(backend):
    if backend != "triton":
        pytest.skip("compiles nothing at all")

    def compiled() -> int:
        found = 0
        for name in ("loss_rows", "careful_rows", "scale_all"):
            for cache in triton.kernel(name).device_caches.values():
                found += len(cache[0])
        return found

    def step(rows, T, alpha, weight):
        z, v = on_gpu(rows=rows, vocab=50257, dtype=torch.bfloat16)
        y = torch.arange(rows + rows % 2, device="cuda")[rows % 2 :]  # labels[1:] of an odd number of rows
        value_and_grad(
            z, v, y, divergence=f"renyi({alpha})", temperature=T, soft_weight=weight, hard_weight=1 - weight
        )

    step(512, 2.0, 2.0, 0.9)
    before = compiled()
    for rows, T, alpha, weight in ((511, 2.0, 2.0, 0.9), (513, 3.7, 1.5, 0.5), (1024, 7.0, 4.0, 0.1)):
        step(rows, T, alpha, weight)
    assert compiled() == before


def test_graph_capture():
    z, v = on_gpu(rows=16, vocab=128256, dtype=torch.bfloat16)
    z.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fused_kd_loss(z, v, temperature=2.0, **CHOSEN).backward()
            z.grad = None
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = fused_kd_loss(z, v, temperature=2.0, **CHOSEN)
        loss.backward()
    for seed in (1, 2):
        a, b = on_gpu(rows=16, vocab=128256, dtype=torch.bfloat16, seed=seed)
        with torch.no_grad():
            z.copy_(a)
            v.copy_(b)
        graph.replay()
        expected, exact = value_and_grad(a, b, temperature=2.0)
        assert torch.equal(loss, expected) and torch.equal(z.grad, exact)


def test_side_stream():
    z, v = on_gpu(rows=64, vocab=50257)
    expected, exact = value_and_grad(z, v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = z * 1.0
        loss, grad = value_and_grad(late, v)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(loss, expected) and torch.equal(grad, exact)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    z, v = (x.cuda(1) for x in make_rows("plain", 4, 9000))
    loss, grad = value_and_grad(z, v)
    assert loss.device.index == grad.device.index == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(loss.cpu(), value_and_grad(z.cpu(), v.cpu(), backend="cpu")[0])


def test_a_hundred_repeats_are_the_same_bits():
    z, v = on_gpu(rows=200, vocab=262144, dtype=torch.bfloat16)
    expected, exact = value_and_grad(z, v, divergence="renyi(0.5)", reduction="none")
    for _ in range(100):
        loss, grad = value_and_grad(z, v, divergence="renyi(0.5)", reduction="none")
        assert torch.equal(loss, expected) and torch.equal(grad, exact)


def test_a_tensor_beyond_two_to_the_31():
    rows, vocab = 16500, 131072  # 2.16e9 logits
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB")
    z = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16)
    some = [x[-3:].clone() for x in (z, v)]
    expected, exact = value_and_grad(*some, reduction="none")
    loss = raw.losses(CHOSEN["backend"], z, v, grad=z)
    torch.testing.assert_close(loss[-3:].float(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(z[-3:], exact, rtol=1e-2, atol=1e-8)


def test_peak_memory():
    z, v = on_gpu(rows=512, vocab=128256, dtype=torch.bfloat16)
    z.requires_grad_()
    fused_kd_loss(z, v, **CHOSEN).backward()
    z.grad = None
    for inplace, most in ((False, 1.01), (True, 0.01)):
        logits = z * 1
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = fused_kd_loss(logits, v, inplace=inplace, **CHOSEN)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before <= most * logits.nbytes
        del loss, logits


def test_log_softmax():
    for vocab, T, dtype in itertools.product((5, 9000, 128256), (0.5, 2.0), (torch.float32, torch.bfloat16)):
        x = torch.randn(3, vocab, device="cuda").to(dtype).requires_grad_()
        y = x.detach().double().requires_grad_()
        u = torch.randn(3, vocab, device="cuda").to(dtype)
        a, b = tempered_log_softmax(x, T, **CHOSEN), (y / T).log_softmax(-1)
        a.backward(u)
        b.backward(u.double())
        room = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(a.double(), b, rtol=room, atol=1e-6)
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=room, atol=room)


def hidden_states(tokens, vocab, width, dtype):
    """(hidden, weight, teacher's hidden, teacher's weight, labels), of which a quarter are ignored."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(tokens, width, generator=g), torch.randn(vocab, width, generator=g) * 2 * width**-0.5
    th, tw = h + 0.2 * torch.randn(h.shape, generator=g), w
    labels = torch.randint(vocab, (tokens,), generator=g)
    labels[::4] = -100
    student, teacher = ([x.to("cuda", dtype) for x in pair] for pair in ((h, w), (th, tw)))
    return [x.requires_grad_() for x in student], teacher, labels.cuda()


@pytest.mark.parametrize(
    "dtype, logits_dtype, bound", [(torch.float32, None, 1e-3), (torch.bfloat16, None, 0.1)]
)
@pytest.mark.parametrize("dropped", [True, False])
def test_from_hidden_states(dtype, logits_dtype, bound, dropped):
    """Without waiting, also where tokens are dropped; the gradients are fp64's, of full logits. fp32 products
    may be TF32's."""
    student, teacher, labels = hidden_states(1000, 5000, 256, dtype)
    counted = int((labels != -100).sum()) if dropped else None
    options = CHOSEN | dict(
        hard_weight=0.2, num_counted=counted, logits_dtype=logits_dtype, memory_budget=300 * 5000 * 8
    )
    for reduction in ("mean", "none"):
        fused_linear_kd_loss(*student, *teacher, labels, reduction=reduction, **options).sum().backward()
        for x in student:
            x.grad = None
        torch.cuda.set_sync_debug_mode("error")
        try:
            fused_linear_kd_loss(*student, *teacher, labels, reduction=reduction, **options).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        leaves = [x.detach().double().requires_grad_() for x in student]
        v = teacher[0].double() @ teacher[1].double().t()
        fused_kd_loss(
            leaves[0] @ leaves[1].t(), v, labels, hard_weight=0.2, reduction=reduction, backend="eager"
        ).sum().backward()
        for x, y in zip(student, leaves, strict=True):
            assert float((x.grad.double() - y.grad).norm() / y.grad.norm()) < bound
            x.grad = None
    wrong = fused_linear_kd_loss(*student, *teacher, labels, **(options | dict(num_counted=10)))
    assert wrong.isnan()


def test_fp32_logits_of_bf16_products():
    student, teacher, labels = hidden_states(1000, 5000, 256, torch.bfloat16)
    errors = []
    leaves = [x.detach().double().requires_grad_() for x in student]
    fused_kd_loss(
        leaves[0] @ leaves[1].t(), teacher[0].double() @ teacher[1].double().t(), backend="eager"
    ).backward()
    for logits_dtype in (None, torch.float32):
        fused_linear_kd_loss(
            *student, *teacher, logits_dtype=logits_dtype, memory_budget=300 * 5000 * 8, **CHOSEN
        ).backward()
        errors.append(
            [
                float((x.grad.double() - y.grad).norm() / y.grad.norm())
                for x, y in zip(student, leaves, strict=True)
            ]
        )
        for x in student:
            x.grad = None
    assert all(wide < 5e-3 and wide < half / 2 for half, wide in zip(*errors, strict=True))


def test_peak_memory_from_hidden_states():
    """Two chunks of logits, the gradients, and their sum in fp32."""
    tokens, vocab, width, chunk = 4096, 50000, 64, 256
    student, teacher, labels = hidden_states(tokens, vocab, width, torch.bfloat16)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_linear_kd_loss(*student, *teacher, memory_budget=2 * chunk * vocab * 2, **CHOSEN).backward()
        peak = torch.cuda.max_memory_allocated() - before
        for x in student:
            x.grad = None
    assert peak < 1.1 * (2 * chunk * vocab * 2 + 6 * vocab * width + 2 * tokens * width) + (4 << 20)
