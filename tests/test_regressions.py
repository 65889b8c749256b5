"""Each test is named by what once went wrong."""

import dataclasses
import math
import threading

import pytest
import raw
import torch
from rows import make_rows
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.utils.checkpoint import checkpoint

from kdkernels import (
    JSD,
    LogitTransform,
    Renyi,
    SkewKL,
    call,
    chunks,
    folding,
    fused_kd_loss,
    fused_linear_kd_loss,
    linear_ops,
    ops,
    tempered_log_softmax,
)
from kdkernels.backends import eager
from kdkernels.backends.eager import row

BACKWARDS = ["logits", "logits in place", "both models", "hidden states"]


def losses(what: str, dtype: torch.dtype, rows: int = 6, vocab: int = 300):
    """(loss of one tensor, that tensor) for a way to a loss."""
    z, v = make_rows("plain", rows, vocab, dtype)
    if what == "hidden states":
        head = torch.randn(vocab, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
        teacher = torch.randn(rows, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
        options = dict(memory_budget=2 * vocab * 8)
        return lambda h: fused_linear_kd_loss(h, head, teacher, head, **options), teacher.roll(
            1
        ).requires_grad_()
    if what == "both models":
        return lambda x: fused_kd_loss(
            x, x.detach().roll(1, 0).requires_grad_(), teacher_grad=True
        ), z.requires_grad_()
    return lambda x: fused_kd_loss(x * 1, v, inplace=what == "logits in place"), z.requires_grad_()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=3e-3 if a.dtype == torch.float16 else 1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("what", BACKWARDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_second_backward_under_a_checkpoint_lost_its_factor(what, dtype, reentrant):
    loss, x = losses(what, dtype)
    (right,) = torch.autograd.grad(3 * loss(x), x)
    whole = 3 * checkpoint(loss, x, use_reentrant=reentrant)
    if reentrant:  # its graph is made and freed within the backward
        whole.backward()
        return close(x.grad, right)
    for retain_graph in (True, True, False):
        (again,) = torch.autograd.grad(whole, x, retain_graph=retain_graph)
        close(again, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("what", BACKWARDS)
def test_second_backward_through_saved_tensor_hooks_lost_its_factor(what, dtype):
    """The hooks give out copies, as those do that keep activations on a disk or another device."""
    loss, x = losses(what, dtype)
    (right,) = torch.autograd.grad(3 * loss(x), x)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        whole = 3 * loss(x)
    for retain_graph in (True, True, False):
        (again,) = torch.autograd.grad(whole, x, retain_graph=retain_graph)
        close(again, right)


@pytest.mark.parametrize(
    ("dtype", "small", "large"),
    [(torch.float16, 1.0, 65536.0), (torch.float32, 1e-38, 1.0), (torch.float32, 0.0, 1.0)],
)
@pytest.mark.parametrize("what", BACKWARDS)
def test_a_backward_with_a_small_upstream_took_the_digits_of_the_next(what, dtype, small, large):
    """As logging the gradient's norm without the loss scale, before the scaled backward; after 0 everything
    was nan."""
    loss, x = losses(what, dtype, rows=64)
    (right,) = torch.autograd.grad(loss(x), x, torch.tensor(large))
    whole = loss(x)
    torch.autograd.grad(whole, x, torch.tensor(small), retain_graph=True)
    (again,) = torch.autograd.grad(whole, x, torch.tensor(large), retain_graph=True)
    assert torch.equal(again, right)


@pytest.mark.parametrize("what", BACKWARDS)
def test_threads_through_one_graph_disturbed_each_other(what):
    loss, x = losses(what, torch.float32, rows=64, vocab=2000)
    (unit,) = torch.autograd.grad(loss(x), x)
    wrong = []

    def backward(whole: torch.Tensor, scale: float, ready: threading.Barrier) -> None:
        ready.wait()
        (g,) = torch.autograd.grad(whole, x, torch.tensor(scale), retain_graph=True)
        wrong.extend([scale] if not torch.allclose(g, scale * unit, rtol=1e-5, atol=1e-9) else [])

    for _ in range(30):
        whole = loss(x)
        ready = threading.Barrier(4)
        threads = [
            threading.Thread(target=backward, args=(whole, scale, ready)) for scale in (0.5, 2.0, 3.0, 7.0)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# (options, student, teacher) whose gradients go beyond 1 in units of their factors; the first two are [4.13,
# -4.13] and [-10, 10] or so
STEEP = {
    "reverse KL": ({"divergence": "reverse_kl"}, [1, 0], [0, 20]),
    "a scale": (
        {"student_transform": LogitTransform(10.0), "teacher_transform": LogitTransform(10.0)},
        [1, 0],
        [0, 1],
    ),
    "a large scale": ({"student_transform": LogitTransform(200.0)}, [0.01, 0], [0, 1]),
    "a scale and a softcap": ({"student_transform": LogitTransform(16.0, 30.0)}, [1, 0, 3], [0, 1, 1]),
    "alpha(3)": ({"divergence": "alpha(3)"}, [0, 3, 1], [3, 0, 1]),
    "alpha(-1)": ({"divergence": "alpha(-1)"}, [0, 5, 1], [3, 0, 1]),
    "alpha(0.01)": ({"divergence": "alpha(0.01)"}, [0, 9, 1], [9, 0, 1]),
    "reverse_renyi(0.99)": ({"divergence": "reverse_renyi(0.99)"}, [0, 9, 1], [9, 0, 1]),
    "skew_reverse_kl(1e-9)": ({"divergence": "skew_reverse_kl(1e-9)"}, [9, 0, 1], [0, 20, 1]),
    "the z-loss": ({"hard_weight": 1.0, "z_loss": 1.0}, [60, 0, 1], [3, 0, 1]),
    "infinite temperature": ({"temperature": math.inf, "t_squared": True}, [300, 0, 1], [0, -300, 1]),
    "the teacher's of KL": ({"teacher_grad": True}, [0, 30], [1, 0]),
}
HEADS = torch.eye(4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("way", ["logits", "logits in place", "hidden states", "compiled"])
@pytest.mark.parametrize("name", STEEP)
def test_fp16_gradients_were_infinite_where_the_right_ones_are_not(name, way, backend, reduction):
    """Whatever the loss scale: what fp16 can hold is there, to its rounding."""
    options, student, teacher = STEEP[name]
    if "in place" in way and options.get("teacher_grad") and reduction == "none":
        pytest.skip("no such call")
    if way == "compiled" and (backend == "eager" or reduction != "mean"):
        pytest.skip("the same operators")
    rows = [
        torch.tensor([x, [float(y) for y in reversed(x)]], dtype=torch.float16) for x in (student, teacher)
    ]
    y = torch.tensor([0, 1])
    head = HEADS[: rows[0].shape[1], : rows[0].shape[1]]

    def gradients(dtype, scale, **chosen):
        z, v = (x.to(dtype, copy=True).requires_grad_() for x in rows)
        v.requires_grad_(options.get("teacher_grad", False))
        call = options | dict(reduction=reduction) | chosen
        if way == "hidden states":
            loss = fused_linear_kd_loss(
                z, head.to(dtype), v, head.to(dtype), y, memory_budget=8 * len(head), **call
            )
        else:
            f = torch.compile(fused_kd_loss, backend="aot_eager") if way == "compiled" else fused_kd_loss
            loss = f(z * 1, v, y, inplace="in place" in way and backend != "eager", **call)
        (loss.sum() * scale).backward()
        return [x.grad.double() for x in (z, v) if x.grad is not None]

    for scale in (1.0, 16.0):
        exact = (
            gradients(torch.float64, scale, backend="eager")
            if way != "hidden states"
            else gradients(torch.float64, scale)
        )
        found = gradients(torch.float16, scale, **({} if way == "hidden states" else {"backend": backend}))
        for g, right in zip(found, exact, strict=True):
            room = right.abs() * 2**-10 * (4 if way == "hidden states" else 1) + 1e-6 * scale
            assert right.abs().max() > 1e-4 and ((g - right).abs() <= room).all(), (g, right)


TRAINED = [
    {"divergence": x}
    for x in (
        "kl",
        "cross_entropy",
        "reverse_kl",
        "renyi(0.3)",
        "renyi(3)",
        "reverse_renyi(0.9)",
        "alpha(0.3)",
    )
]
TRAINED += [
    {"divergence": x}
    for x in ("alpha(2)", "alpha(-0.5)", "jsd(0.3)", "skew_kl(0.1)", "skew_reverse_kl(0.1)", "tvd")
]
TRAINED += [
    {"temperature": math.inf, "t_squared": True},
    {"temperature": 20.0, "t_squared": True},
    {"hard_weight": 0.5, "z_loss": 0.1},
]
TRAINED += [{"divergence": x, "student_transform": LogitTransform(16.0, 30.0)} for x in ("kl", "reverse_kl")]


@pytest.mark.parametrize("way", ["logits", "hidden states"])
@pytest.mark.parametrize("options", TRAINED, ids=str)
def test_a_grad_scaler_could_not_train_in_fp16(options, way):
    """Twenty steps move the weights as fp32 does, and the loss scale ends where it began or above."""
    g = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(64, 8, generator=g), torch.randint(300, (64,), generator=g)
    start, teacher = torch.randn(300, 8, generator=g) * 0.2, torch.randn(300, 8, generator=g) * 0.3
    if "student_transform" in options:
        start = start / 16

    def train(half: bool) -> tuple[torch.Tensor, float]:
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=0.1 if "student_transform" not in options else 1e-3)
        scaler = torch.amp.GradScaler("cpu", enabled=half, init_scale=2.0**12)
        for _ in range(20):
            with torch.autocast("cpu", dtype=torch.float16, enabled=half):
                if way == "hidden states":
                    loss = fused_linear_kd_loss(
                        inputs, weight, inputs, teacher, labels, memory_budget=300 * 8 * 20, **options
                    )
                else:
                    loss = fused_kd_loss(inputs @ weight.t(), inputs @ teacher.t(), labels, **options)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return weight.detach() - start, scaler.get_scale()

    (right, _), (found, scale) = train(False), train(True)
    assert scale >= 2.0**12 and right.norm() > 1e-3
    assert float((found - right).norm() / right.norm()) < 0.02


# ---------------------------------------------------------------- what is known and not mended


class NoDoubles(torch.utils._python_dispatch.TorchDispatchMode):
    """A device without fp64, as Apple's: an operator that makes such a tensor fails."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                raise RuntimeError(f"{function}: no fp64 here")
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["kl", "renyi(0.5)", "jsd(0.5)", "reverse_kl", "tvd", "alpha(2)"])
def test_eager_needs_a_device_with_fp64(monkeypatch, divergence, reduction):
    z, v = make_rows("plain", 4, 300)
    labels, weight = torch.tensor([1, 2, -100, 3]), torch.tensor([0.5, 1.0, 1.0, 2.0])
    options = dict(
        divergence=divergence, temperature=2.0, hard_weight=0.5, label_smoothing=0.1, reduction=reduction
    )

    def all_of_it():
        x, y = z.clone().requires_grad_(), v.clone().requires_grad_()
        more = dict(teacher_grad=True, token_weight=weight, return_stats=True, backend="eager")
        loss, stats = fused_kd_loss(x, y, labels, **options, **more)
        found = torch.autograd.grad(loss.sum(), (x, y))
        h, head = (t.clone().requires_grad_() for t in (z[:, :4], v.T))
        linear_loss = fused_linear_kd_loss(h, head, v[:, :4], z.T, labels, **options, backend="eager")
        found += loss, linear_loss, *torch.autograd.grad(linear_loss.sum(), (h, head))
        return *(t.detach() for t in found), stats.student_entropy[stats.mask]

    expected = all_of_it()
    for module in (call, chunks, folding, linear_ops, ops, eager, row):
        monkeypatch.setattr(module, "row_dtype", lambda device: torch.float32)
    with NoDoubles():
        found = all_of_it()
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "alpha(2)", "jsd(0.5)"])
def test_a_second_derivative_of_eager_depends_on_the_dtype(divergence, dtype, reduction):
    """Where no factor bounds an fp16 gradient, its fp32 copy was taken for the gradient's memory."""
    z, v = make_rows("plain", 2, 30, dtype)

    def second(x):
        x = x.clone().requires_grad_()
        options = dict(divergence=divergence, temperature=2.0, reduction=reduction, backend="eager")
        loss = fused_kd_loss(x, v.to(x.dtype), **options)
        (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum() * 100, x)[0]

    exact = second(z.double())
    assert (second(z).double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


Z, V = make_rows("plain", 6, 300)
Y = torch.tensor([0, 1, 2, 3, -100, 5])
LEAVES = [x.double().requires_grad_() for x in (Z, V, Z[:, :8])]


def of_logits(n, both=False, **options):
    z, v, _ = LEAVES
    found = fused_kd_loss(z * 1, v if both else v.detach(), Y, teacher_grad=both, **options)
    return (found[0] if isinstance(found, tuple) else found).sum()


def of_heads(n, **options):
    weight, teacher, of_teacher = Z.T[:, :6].double(), V[:, :9].double(), V.T[:, :6].double()
    heads = weight.repeat(1, 2)[:, :8], teacher, of_teacher.repeat(1, 2)[:, :9]
    return fused_linear_kd_loss(LEAVES[2], *heads, temperature=n, divergence=Renyi(n), **options).sum()


SCHEDULES = {
    "weights and beta": lambda n: of_logits(
        n, temperature=n, soft_weight=1 - n / 10, hard_weight=n / 10, divergence=JSD(n / 4)
    ),
    "of the hard term": lambda n: of_logits(n, hard_weight=1.0, label_smoothing=n / 10, z_loss=n / 10),
    "both gradients": lambda n: of_logits(
        n, True, temperature=n, divergence=SkewKL(n / 10), return_stats=True
    ),
    "by row": lambda n: of_logits(n, temperature=n, reduction="none"),
    "in place": lambda n: of_logits(n, temperature=n, inplace=True),
    "of transforms": lambda n: of_logits(n, student_transform=LogitTransform(n, 30.0)),
    "hidden states": of_heads,
    "hidden states by row": lambda n: of_heads(n, reduction="none"),
    "log-softmax": lambda n: tempered_log_softmax(LEAVES[0] * 1, n).square().sum(),
}


# torch 2.10 takes every compiled call for an exported one, whose backward cannot ask for numbers at run time
EXPORTED = pytest.mark.xfail(
    torch.__version__ < "2.11", reason="torch 2.10: is_exporting is true under torch.compile"
)
WAYS = [
    pytest.param(x, marks=EXPORTED if x in ("of the hard term", "both gradients") else []) for x in SCHEDULES
]


@pytest.mark.parametrize("way", WAYS)
def test_a_schedule_of_numbers_compiles_again_and_again(way):
    """torch.compile took a number of an operator for a constant, and gave up at the ninth."""
    graphs, step = CompileCounterWithBackend("aot_eager"), SCHEDULES[way]
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    for n in [0.25 + 0.05 * i for i in range(50 if way == "weights and beta" else 10)]:
        grads = [torch.autograd.grad(run(n), LEAVES, allow_unused=True) for run in (compiled, step)]
        assert any(x is not None for x in grads[0])
        for found, right in zip(*grads, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-15)
    assert graphs.frame_count <= 2


def test_divergences_made_outside_are_a_schedule_as_well():
    graphs = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    step = torch.compile(lambda d: fused_kd_loss(Z, V, divergence=d), backend=graphs, fullgraph=True)
    for n in range(1, 12):
        divergence = SkewKL(0.05 * n)
        right = fused_kd_loss(Z, V, divergence=divergence)
        torch.testing.assert_close(step(divergence), right, rtol=1e-6, atol=0)
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_number_that_is_known_is_no_tensor(temperature):
    """What does not change stays out of the graph, which on a GPU would have a tensor of the CPU's in it."""
    graphs = EagerAndRecordGraphs()
    torch._dynamo.reset()
    torch.compile(lambda: fused_kd_loss(Z, V, temperature=temperature), backend=graphs, fullgraph=True)()
    calls = [node for node in graphs.graphs[0].graph.nodes if "kdkernels" in str(node.target)]
    assert len(calls) == 1 and calls[0].args[6][0] == temperature and calls[0].args[7] is None


def test_another_number_of_programs_to_a_row_compiles_nothing():
    pytest.importorskip("triton")
    from kdkernels.backends import triton as backend
    from kdkernels.backends.triton.plan import Device

    def compiled(rows):
        z = torch.empty(rows, 128256, dtype=torch.bfloat16, device="meta")
        launches, _ = backend.launches(raw.call(z, z), torch.empty(rows, device="meta"), Device(132))
        return launches[0].arguments["parts"], launches[0].arguments["SPEC"]

    (few, spec), (many, other) = compiled(4096), compiled(8)
    assert few != many and dataclasses.replace(spec, phase=other.phase) == other
