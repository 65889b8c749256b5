"""fused_linear_kd_loss: the loss of full logits and its gradient, without the logits. The reference projects
all tokens in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from names import ONE_EACH
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kdkernels import KL, LinearKDLoss, LogitTransform, fused_kd_loss, fused_linear_kd_loss, ops
from kdkernels.bench.measure import resident_peak
from kdkernels.call import Asked, Numbers
from kdkernels.chunks import chunk_tokens, counted

T16 = (torch.bfloat16, torch.float16)
# every divergence, and orders with a kernel of their own
DIVERGENCES = [*ONE_EACH, "reverse_renyi(0.3)", "jsd(0.3)"]


def models(tokens=(3, 30), vocab=97, width=12, teacher_width=20, dtype=torch.float64, seed=0):
    """(hidden, weight, bias) of student and teacher, with logits of some size, and labels of which a third
    are ignored."""
    g = torch.Generator().manual_seed(seed)

    def model(width):
        hidden, weight = (
            torch.randn(*tokens, width, generator=g),
            torch.randn(vocab, width, generator=g) * 2 * width**-0.5,
        )
        return [x.to(dtype) for x in (hidden, weight, torch.randn(vocab, generator=g))]

    labels = torch.randint(vocab, tokens, generator=g)
    labels.view(-1)[::3] = -100
    return [x.requires_grad_() for x in model(width)], model(teacher_width), labels


def chunked(student, teacher, labels=None, tokens=32, **options):
    """The loss in chunks of that many tokens."""
    itemsize = student[0].element_size()
    width = max(4, itemsize) if options.get("logits_dtype", torch.float32) else itemsize
    budget = 2 * tokens * options.get("vocab_size", len(student[1])) * width
    (h, w, b), (th, tw, tb) = student, teacher
    return fused_linear_kd_loss(
        h, w, th, tw, labels, student_bias=b, teacher_bias=tb, memory_budget=budget, **options
    )


def in_full(student, teacher, labels=None, **options):
    """(loss, gradients) of the full logits in fp64."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in student]
    z, v = F.linear(*leaves), F.linear(*(None if x is None else x.detach().double() for x in teacher))
    loss = fused_kd_loss(z, v, labels, **options)
    loss.sum().backward()
    return loss.detach(), [None if x is None else x.grad for x in leaves]


def distance(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def assert_same(
    student, teacher, labels=None, value=1e-12, gradient=1e-12, tokens=32, upstream=None, **options
):
    for x in student:
        if x is not None:
            x.grad = None
    reference = {k: x for k, x in options.items() if k not in ("logits_dtype", "num_counted", "backend")}
    expected, grads = in_full(student, teacher, labels, **reference)
    loss = chunked(student, teacher, labels, tokens, **options)
    assert loss.shape == expected.shape
    loss.sum().backward()
    assert distance(loss, expected) <= value
    for x, g in zip(student, grads, strict=True):
        if x is not None:
            assert x.grad.dtype == x.dtype and distance(x.grad, g) <= gradient


# ---------------------------------------------------------------- the same loss


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence(divergence):
    """Loss and gradients in hidden states, weight and bias, with masks, weights, a partial chunk, and hidden
    sizes that differ."""
    student, teacher, labels = models()
    assert_same(
        student, teacher, labels, divergence=divergence, temperature=2.0, t_squared=True, hard_weight=0.3
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_gradcheck(reduction, backend):
    student, (th, tw, tb), labels = models((5,), 7, 3, 4)
    options = dict(
        reduction=reduction,
        backend=backend,
        temperature=2.0,
        hard_weight=0.3,
        memory_budget=2 * 2 * 7 * 8,
        teacher_bias=tb,
    )

    def loss(h, w, b):
        return fused_linear_kd_loss(h, w, th, tw, labels, student_bias=b, **options)

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize("tokens", [1, 16, 64, 90, 1000])
def test_chunks_make_no_difference(tokens):
    """One token, a divisor, a partial last chunk, all; the rows' losses bit for bit."""
    student, teacher, labels = models(dtype=torch.float32)
    whole = chunked(student, teacher, labels, 1000, hard_weight=0.2, reduction="none")
    assert torch.allclose(
        chunked(student, teacher, labels, tokens, hard_weight=0.2, reduction="none"), whole, rtol=1e-6
    )
    assert_same(student, teacher, labels, 1e-6, 1e-6, tokens, hard_weight=0.2)


def test_chunk_size():
    """Within the budget, in 64s, evened out; a token at least."""
    size = chunk_tokens
    assert size(8192, 262144, 4, 1 << 30) == 1024 and size(8192, 32768, 4, 1 << 30) == 8192
    assert (
        size(1025, 1000, 4, 4000 * 1024) == 576
        and size(100, 1000, 4, 4000 * 70) == 64
        and size(100, 1000, 4, 4000 * 30) == 30
    )
    assert size(10, 1000, 4, 1) == 1 and size(0, 1000, 4, 1 << 20) == 1


# of the gradients' norm: 16-bit logits are rounded before the loss, and the gradient before the products
@pytest.mark.parametrize(
    "dtype, logits_dtype, value, gradient",
    [
        (torch.float32, None, 1e-6, 2e-6),
        (torch.bfloat16, None, 2e-3, 1.5e-2),
        (torch.bfloat16, torch.float32, 2e-6, 4e-3),
        (torch.float16, None, 2e-4, 2e-3),
        (torch.float16, torch.float32, 2e-6, 6e-4),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dtypes(dtype, logits_dtype, value, gradient, reduction):
    student, teacher, labels = models((200,), 500, 64, 64, dtype)
    value *= 4 if reduction == "none" else 1
    assert_same(
        student,
        teacher,
        labels,
        value,
        gradient,
        64,
        logits_dtype=logits_dtype,
        reduction=reduction,
        hard_weight=0.1,
    )


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_logits_of_a_single_teacher_row_lay_apart(backend):
    """(V) logits that are not contiguous were an IndexError."""
    h, w, v = torch.randn(8), torch.randn(5, 8), torch.randn(10)[::2]
    expected = fused_kd_loss(h @ w.t(), v.contiguous(), backend=backend)
    torch.testing.assert_close(fused_linear_kd_loss(h, w, teacher_logits=v, backend=backend), expected)


@pytest.mark.parametrize("dtype, gradient", [(torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_logits_are_not_rounded_by_default(dtype, gradient):
    """A student near its teacher, of whose gradient the rounding of bf16 logits is 5 %: by the function and
    by the module."""
    (h, w, b), _, labels = models((200,), 500, 64, 64, dtype)
    near = (
        h.detach() + 0.1 * torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).to(dtype),
        w.detach(),
        b.detach(),
    )
    assert_same((h, w, b), near, labels, 2e-5, gradient, 64)
    with pytest.raises(AssertionError):
        assert_same((h, w, b), near, labels, 2e-5, gradient, 64, logits_dtype=None)
    values = []
    for options in ({}, {"logits_dtype": None}):  # which the module once took for not given
        call = dict(student_bias=b, teacher_bias=near[2])
        values.append(fused_linear_kd_loss(h, w, *near[:2], **call, **options).item())
        assert LinearKDLoss(**options)(h, w, *near[:2], **call).item() == values[-1]
    assert values[0] != values[1]


@pytest.mark.parametrize("dtype", T16)
def test_weight_gradient_is_summed_in_fp32(dtype):
    """512 chunks whose gradients all point one way: a 16-bit sum would stop growing, at 2^8 or 2^11
    addends."""
    h, w = torch.ones(4096, 8, dtype=dtype), torch.zeros(32, 8, dtype=dtype, requires_grad=True)
    v = torch.full((4096, 32), -20.0)
    v[:, 0] = 0
    fused_linear_kd_loss(
        h, w, teacher_logits=v, reduction="sum", memory_budget=32 * dtype.itemsize * 8
    ).backward()
    torch.testing.assert_close(
        w.grad[1:].double(), torch.full((31, 8), 4096 / 32).double(), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp16_gradients_survive(reduction):
    """Divided by the number of tokens before the loss scale multiplies it, an fp16 gradient would underflow;
    scaled first, overflow."""
    student, teacher, _ = models((3000,), 50, 8, 8, torch.float16)
    loss = chunked(student, teacher, reduction=reduction, tokens=256)
    if reduction == "none":
        loss = loss.mean()
    (loss * 65536).backward()
    _, grads = in_full(student, teacher)
    for x, g in zip(student, grads, strict=True):
        assert distance(x.grad.double() / 65536, g) < 3e-3


@pytest.mark.parametrize(
    "options",
    [
        dict(
            student_transform=LogitTransform(scale=0.5, softcap=5.0),
            teacher_transform=LogitTransform(softcap=8.0),
        ),
        dict(hard_weight=0.5, label_smoothing=0.1, z_loss=1e-3),
        dict(temperature=math.inf, t_squared=True),
        dict(soft_weight=0.0, hard_weight=1.0),
        dict(num_items=torch.tensor(40.0)),
        dict(num_items=40, reduction="mean"),
        dict(token_weight=torch.linspace(0, 2, 90).view(3, 30), hard_weight=0.2),
        dict(token_weight=torch.linspace(0, 2, 90).view(3, 30), reduction="none"),
        dict(vocab_size=90),
        dict(vocab_size=90, reduction="none", hard_weight=0.1),
    ],
    ids=lambda o: "-".join(o),
)
def test_options(options):
    student, teacher, labels = models()
    if "vocab_size" in options:
        labels = labels.clamp_max(80)
        teacher = [teacher[0], torch.cat((teacher[1], teacher[1])), torch.cat((teacher[2], teacher[2]))]
    assert_same(student, teacher, labels, **options)


def test_statistics():
    student, teacher, labels = models()
    for reduction in ("mean", "none"):
        options = dict(hard_weight=0.2, return_stats=True, reduction=reduction)
        loss, stats = chunked(student, teacher, labels, **options)
        z, v = F.linear(*student), F.linear(*teacher)
        expected, figures = fused_kd_loss(z, v, labels, **options)
        torch.testing.assert_close(loss, expected)
        for name, x in vars(figures).items():
            torch.testing.assert_close(getattr(stats, name), x, equal_nan=True, msg=name)


def test_missing_parts_of_a_head():
    """Without biases; without labels; hidden states of one token and of none; a view that is not
    contiguous."""
    (h, w, b), (th, tw, tb), _ = models()
    assert_same([h, w, None], [th, tw, None])
    assert_same([h, w, b], [th, tw, None])
    assert_same([h.detach()[0, 0].requires_grad_(), w, b], [th[0, 0], tw, tb])
    transposed = [
        h.detach().transpose(0, 1).requires_grad_(),
        w.detach().t().contiguous().t().requires_grad_(),
        b,
    ]
    assert_same(transposed, [th.transpose(0, 1), tw, tb])
    for reduction in ("mean", "none"):
        loss = chunked([h[:0], w, b], [th[:0], tw, tb], reduction=reduction)
        w.grad = None
        loss.sum().backward()
        assert loss.sum() == 0 and not w.grad.any()


def test_all_ignored():
    student, teacher, labels = models()
    loss = chunked(student, teacher, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and not any(x.grad.any() for x in student)


def test_triton():
    pytest.importorskip("triton")
    student, teacher, labels = models((6,), 40, 8, 8, torch.float32)
    assert_same(student, teacher, labels, 1e-6, 2e-6, 4, hard_weight=0.2, backend="triton")


# ---------------------------------------------------------------- the teacher


def test_teacher_as_logits_and_as_a_callable():
    """In any layout and dtype; a callable sees the flattened tokens in order, each once in a forward."""
    student, teacher, labels = models()
    v = F.linear(*teacher)
    expected, grads = in_full(student, teacher, labels, hard_weight=0.2)
    asked = []

    def by_chunk(start, stop):
        asked.append((start, stop))
        return v.reshape(90, -1)[start:stop]

    layouts = [v, v.transpose(0, 1).contiguous().transpose(0, 1), v.mT.contiguous().mT, by_chunk]
    for y in (labels, labels.clamp_min(0)):
        expected, grads = in_full(student, teacher, y, hard_weight=0.2)
        for reduction in ("mean", "none"):
            for logits in layouts:
                for x in student:
                    x.grad = None
                h, w, b = student
                options = dict(
                    hard_weight=0.2, teacher_logits=logits, memory_budget=2 * 32 * 97 * 8, reduction=reduction
                )
                loss = fused_linear_kd_loss(h, w, labels=y, student_bias=b, **options)
                if callable(logits):
                    ends = [0, *(stop for _, stop in asked)]
                    assert asked == list(zip(ends, ends[1:], strict=False)) and ends[-1] == 90
                loss = loss if reduction == "mean" else loss.sum() / (y != -100).sum()
                loss.backward()
                asked.clear()
                assert distance(loss, expected) < 1e-12
                assert all(distance(x.grad, g) < 1e-12 for x, g in zip(student, grads, strict=True))
    half = fused_linear_kd_loss(*student[:2], teacher_logits=v.bfloat16())
    torch.testing.assert_close(half, fused_kd_loss(F.linear(*student[:2]), v.bfloat16()))


def test_a_callable_is_checked():
    h, w = torch.randn(4, 3), torch.randn(7, 3)
    for wrong, error, says in (
        (
            lambda a, b: torch.randn(b - a, 6),
            ValueError,
            r"must return \(4, 7 or more\) logits, got \(4, 6\)",
        ),
        (lambda a, b: torch.randn(b - a + 1, 7), ValueError, "must return"),
        (lambda a, b: torch.ones(b - a, 7, dtype=torch.int64), TypeError, "int64"),
        (lambda a, b: None, TypeError, "NoneType"),
    ):
        with pytest.raises(error, match=says):
            fused_linear_kd_loss(h, w, teacher_logits=wrong)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["kl", "renyi(0.3)", "jsd(0.2)"])
def test_teacher_grad(divergence, reduction):
    """Of both models, or of the teacher alone, from one projection of each."""
    student, teacher, labels = models()
    options = dict(
        divergence=divergence, temperature=2.0, hard_weight=0.3, teacher_grad=True, reduction=reduction
    )
    leaves = [*student, *(x.requires_grad_() for x in teacher)]
    with Watch() as watch:
        grads = torch.autograd.grad(chunked(student, teacher, labels, **options).sum(), leaves)
    expected = torch.autograd.grad(
        fused_kd_loss(F.linear(*student), F.linear(*teacher), labels, **options).sum(), leaves
    )
    if reduction == "mean":
        projections = sum(shape[-1] == len(student[1]) for shape in watch.products)
        assert projections > 2 and len(watch.products) == 3 * projections
    for a, b in zip(grads, expected, strict=True):
        assert distance(a, b) < 1e-12
    alone = torch.autograd.grad(
        chunked([x.detach() for x in student], teacher, labels, **options).sum(), teacher
    )
    assert all(distance(a, b) < 1e-12 for a, b in zip(alone, expected[3:], strict=True))


# ---------------------------------------------------------------- what is computed, and what is not


class Watch(TorchDispatchMode):
    """The most elements that a tensor has had, and the products there were."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.products.append(out.shape)
        return out


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
def test_no_tensor_of_tokens_times_vocabulary(reduction, dtype, logits_dtype):
    """Neither among PyTorch's results nor in the operator, which writes its gradient where the logits are."""
    tokens, vocab = 512, 300
    student, teacher, labels = models((tokens,), vocab, 16, 16, dtype)
    with Watch() as watch:
        options = dict(hard_weight=0.1, reduction=reduction, return_stats=True, logits_dtype=logits_dtype)
        chunked(student, teacher, labels, 64, **options)[0].sum().backward()
    # in elements: a chunk as bytes
    assert 64 * vocab <= watch.largest <= 64 * vocab * 4 < tokens * vocab
    with Watch() as watch:
        fused_kd_loss(F.linear(*student), F.linear(*teacher)).backward()
    assert watch.largest == tokens * vocab


def test_two_buffers_for_all_chunks(monkeypatch):
    """Every chunk's logits and gradient lie where the first one's did."""
    seen, run = set(), ops.loss_into

    def look(z, v, *rest):
        _, _, grad, *_ = rest
        assert grad.data_ptr() == z.data_ptr()
        seen.add((z.data_ptr(), v.data_ptr()))
        return run(z, v, *rest)

    monkeypatch.setattr(ops, "loss_into", look)
    student, teacher, labels = models()
    chunked(student, teacher, labels, 16).backward()
    assert len(seen) == 1


def test_memory():
    """Two chunks of logits and the gradients that must exist, where full logits would be 16 chunks."""
    tokens, vocab, width, chunk = 2048, 20000, 16, 128
    student, teacher, labels = models((tokens,), vocab, width, width, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step = lambda: chunked(student, teacher, labels.clamp_min(0), chunk, hard_weight=0.1).backward()  # noqa: E731
        step()
        for x in student:
            x.grad = None
        peak = resident_peak(step)
    finally:
        torch.set_num_threads(threads)
    if peak is None:
        pytest.skip("this system does not tell")
    promise = 4 * (2 * chunk * vocab + sum(x.numel() for x in student))
    assert peak < promise * 1.2 + (4 << 20) < 4 * tokens * vocab / 4


@pytest.mark.parametrize("frozen", [(1,), (0,), (2,), (0, 1), (0, 1, 2)])
def test_frozen_parts_cost_nothing(frozen):
    student, teacher, _ = models((64,))
    for i in frozen:
        student[i].requires_grad_(False)
    with Watch() as watch:
        loss = chunked(student, teacher, reduction="sum")
        if len(frozen) < 3:
            loss.backward()
    assert len(watch.products) == 2 * (4 - len({0, 1} & set(frozen)))  # two chunks
    _, grads = in_full([x.detach() for x in student], teacher, reduction="sum")
    for i, (x, g) in enumerate(zip(student, grads, strict=True)):
        assert x.grad is None if i in frozen else distance(x.grad, g) < 1e-12
    with torch.no_grad():
        assert distance(chunked(student, teacher, reduction="sum"), loss.detach()) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_tokens_are_dropped(reduction):
    """Before the projections: their hidden states may be nan, and four chunks become three."""
    student, teacher, labels = models((128,))
    counted = int((labels != -100).sum())
    assert_same(student, teacher, labels, num_counted=counted, reduction=reduction, hard_weight=0.3)
    dirty = [x.detach().clone() for x in (student[0], teacher[0])]
    for x in dirty:
        x[::3] = math.nan
    with Watch() as watch:
        student[0] = dirty[0].requires_grad_()
        chunked(student, [dirty[0 + 1], *teacher[1:]], labels, reduction=reduction).sum().backward()
    assert student[0].grad.isfinite().all() and not student[0].grad[::3].any()
    passes = 1 if reduction == "mean" else 1.5
    assert (
        len(watch.products) == 3 * 4 * passes
        and max(shape[0] for shape in watch.products if shape[1] == 97) == 32
    )


def test_num_counted_beyond_the_cpu():
    """What a GPU does with it: the indices come without waiting, and a wrong number is nan."""
    weight, device = torch.tensor([0.0, 2.0, 0.0, 1.0]).double(), torch.device("cuda")
    index, total = counted(weight, None, 2, device, in_place=False)
    assert index.tolist() == [1, 3] and total.tolist() == weight.tolist()
    upstream = torch.tensor([1.0, 0.0, 1.0, 3.0]).double()
    index, total = counted(weight, upstream, 2, device, in_place=False)
    assert index.tolist() == [1, 3] and total.tolist() == [0, 0, 0, 3]
    for wrong in (1, 3):
        assert counted(weight, None, wrong, device, in_place=False)[1].isnan().all()
    assert counted(weight, None, None, device, in_place=False)[0] is None


# ---------------------------------------------------------------- in a training step


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction):
    """One node in a full graph, for any number of tokens."""
    options = dict(
        temperature=2.0,
        hard_weight=0.3,
        reduction=reduction,
        return_stats=True,
        memory_budget=2 * 64 * 97 * 8,
    )

    def step(h, w, b, th, tw, tb, y, counted):
        loss, stats = fused_linear_kd_loss(
            h * 1, w, th, tw, y, student_bias=b, teacher_bias=tb, num_counted=counted, **options
        )
        return loss.sum() * 2, stats.student_entropy

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (200, 90):
        compilations = counter.frame_count
        student, teacher, labels = models((tokens,))
        results = []
        for f in (step, compiled):
            loss, entropy = f(*student, *teacher, labels, tokens - -(-tokens // 3))
            results.append((loss.detach(), entropy, *torch.autograd.grad(loss, student)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
    assert counter.frame_count == compilations
    with pytest.raises(torch._dynamo.exc.Unsupported, match="callable"):
        torch.compile(lambda h, w: fused_linear_kd_loss(h, w, teacher_logits=lambda a, b: h), fullgraph=True)(
            *student[:2]
        )


def test_operator():
    student, teacher, labels = models((40,), dtype=torch.float32)
    labels, weight = labels.clamp_min(0), torch.linspace(1, 2, 40).double()
    asked = Asked.of(KL(), Numbers(2.0, 1.0, 0.5, 0.1, 0.1), 97, "auto")
    for needs in ([True] * 3 + [False] * 3, [False, True, False] * 2):
        setup = (needs, torch.float32, torch.float32, None, 8000, None, True, False)
        tensors = [x.detach() for x in (*student, *teacher)]
        arguments = (*tensors, None, labels, weight, weight + 1, None, *setup, *asked)
        torch.library.opcheck(torch.ops.kdkernels.linear_loss.default, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction):
    """Products in bf16, gradients in the parameters' fp32."""
    student, teacher, labels = models((200,), 300, 32, 32, torch.float32)
    (h, w, b), (th, tw, tb) = student, [teacher[0].bfloat16(), *teacher[1:]]
    with torch.autocast("cpu", torch.bfloat16):
        budget = dict(memory_budget=2 * 64 * 300 * 2, reduction=reduction)
        loss = fused_linear_kd_loss(h, w, th, tw, labels, student_bias=b, teacher_bias=tb, **budget)
    loss.sum().backward()
    half = [x.detach().bfloat16().requires_grad_() for x in student]
    expected, grads = in_full(half, [x.bfloat16() for x in teacher], labels, reduction=reduction)
    assert loss.dtype == torch.float32 and distance(loss, expected) < 1e-2
    assert all(
        x.grad.dtype == torch.float32 and distance(x.grad, g) < 1.5e-2
        for x, g in zip(student, grads, strict=True)
    )
    with pytest.raises(
        TypeError,
        match=(
            "student_weight: must be torch.bfloat16, as student_hidden is, or under autocast; got "
            "torch.float32"
        ),
    ):
        fused_linear_kd_loss(h.bfloat16(), w, th, tw)


class Tiny(torch.nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.checkpointed = (
            torch.nn.Embedding(50, 8),
            torch.nn.Linear(8, 8),
            checkpointed,
        )

    def forward(self, tokens):
        return self.body(self.embedding(tokens)).tanh()

    def loss(self, tokens, loss):
        if self.checkpointed:
            return checkpoint(
                lambda t: loss(self(t), self.embedding.weight),
                tokens,
                use_reentrant=self.checkpointed == "reentrant",
            )
        return loss(self(tokens), self.embedding.weight)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tied_embeddings_checkpoints_and_accumulation(checkpointed, reduction):
    """Two steps' gradients into the same parameters, the head's among the embedding's, are the full
    logits'."""
    tokens = torch.randint(50, (4, 20), generator=torch.Generator().manual_seed(1))
    teacher = torch.randn(4, 20, 50, generator=torch.Generator().manual_seed(2)) * 2
    model, plain = Tiny(checkpointed).double(), Tiny().double()
    options = dict(temperature=2.0, reduction=reduction) | (dict(num_items=60) if reduction == "mean" else {})

    def fused(v):
        return lambda h, w: fused_linear_kd_loss(
            h, w, teacher_logits=v, memory_budget=8 * 50 * 16, **options
        ).sum()

    def full(v):
        return lambda h, w: fused_kd_loss(h @ w.t(), v, **options).sum()

    for part in (slice(0, 1), slice(1, 4)):
        model.loss(tokens[part], fused(teacher[part])).backward()
        plain.loss(tokens[part], full(teacher[part])).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert distance(a.grad, b.grad) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backwards_of_every_kind(dtype, reduction):
    """retain_graph and upstream factors do not disturb each other; a second derivative is an error."""
    student, teacher, labels = models((40,), dtype=dtype)
    _, unit = in_full(student, teacher, labels)
    loss = chunked(student, teacher, labels, reduction=reduction)
    loss = loss if reduction == "mean" else loss.sum() / (labels != -100).sum()
    kept = []
    for scale in (2.0, 5.0, 1.0):
        grads = torch.autograd.grad(loss, student, torch.tensor(scale), retain_graph=True)
        kept.append([g.clone() for g in grads] + [grads])
        for g, u in zip(grads, unit, strict=True):
            assert distance(g, scale * u) < (3e-3 if dtype == torch.float16 else 3e-6)
    assert all(torch.equal(a, b) for *copies, grads in kept for a, b in zip(copies, grads, strict=True))
    (g,) = torch.autograd.grad(loss, student[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        g.sum().backward()


# ---------------------------------------------------------------- bad input

H, W, TH, TW, B = (
    torch.randn(2, 3, 4),
    torch.randn(7, 4),
    torch.randn(2, 3, 5),
    torch.randn(7, 5),
    torch.randn(7),
)
Y = torch.zeros(2, 3, dtype=torch.int64)
ERRORS = [
    ((H.tolist(), W, TH, TW), {}, TypeError, "student_hidden: must be a tensor, got list"),
    ((H.long(), W, TH, TW), {}, TypeError, "student_hidden.*int64"),
    ((H, W.double(), TH, TW), {}, TypeError, "student_weight: must be torch.float32"),
    ((H, W, TH, TW.half()), {}, TypeError, "teacher_weight: must be torch.float32"),
    (
        (H, W.t(), TH, TW),
        {},
        ValueError,
        r"student_hidden and student_weight: must be \(..., H\) and \(V, H\)",
    ),
    ((H, W, TH, TW[:, :4]), {}, ValueError, "teacher_hidden and teacher_weight: must be"),
    ((H, W, TH[:1], TW), {}, ValueError, "teacher_hidden: must have the leading shape of student_hidden"),
    ((H, W, TH.to("meta"), TW.to("meta")), {}, ValueError, "teacher_hidden: must be on the student's device"),
    ((H, W.to("meta"), TH, TW), {}, ValueError, "student_weight: must be on the device of student_hidden"),
    ((H, W, TH, TW), {"student_bias": B[:3]}, ValueError, r"student_bias: must be \(7,\)"),
    ((H, W, TH, TW), {"teacher_bias": B.double()}, TypeError, "teacher_bias: must be torch.float32"),
    ((H, W, TH, TW[:6]), {}, ValueError, "vocab_size: required"),
    ((H, W, TH, TW[:6]), {"vocab_size": 7}, ValueError, "vocab_size: 7 is more"),
    ((H, W[:0], TH, TW[:0]), {}, ValueError, "empty"),
    ((H, W, TH), {}, ValueError, "teacher_hidden and teacher_weight: both, or teacher_logits"),
    ((H, W), {}, ValueError, "both, or teacher_logits"),
    ((H, W, TH, TW), {"teacher_logits": torch.randn(2, 3, 7)}, ValueError, "takes the place of"),
    (
        (H, W),
        {"teacher_logits": torch.randn(6, 7)},
        ValueError,
        "teacher_logits: must have the leading shape",
    ),
    ((H, W), {"teacher_logits": torch.ones(2, 3, 7).long()}, TypeError, "teacher_logits.*int64"),
    ((H, W), {"teacher_logits": 3}, TypeError, "tensor or a callable"),
    (
        (H, W),
        {"teacher_logits": torch.randn(2, 3, 7), "teacher_grad": True},
        ValueError,
        "teacher_grad: goes to teacher_hidden",
    ),
    (
        (H, W, TH.clone().requires_grad_(), TW),
        {},
        ValueError,
        "teacher_hidden: receives a gradient only with teacher_grad",
    ),
    ((H, W, TH, TW.clone().requires_grad_() * 1), {}, ValueError, "teacher_weight: receives a gradient only"),
    (
        (H, W, TH, TW),
        {"teacher_bias": torch.zeros(len(TW), requires_grad=True) * 1},
        ValueError,
        "teacher_bias: receives a gradient only",
    ),
    ((H, W, TH, TW), {"hard_weight": 0.5}, ValueError, "hard_weight.*labels"),
    ((H, W, TH, TW, Y.int()), {}, TypeError, "labels.*int32"),
    ((H, W, TH, TW, Y[0]), {}, ValueError, r"labels: must be \(2, 3\), the hidden states' leading shape"),
    (
        (H, W, TH, TW, Y + 7),
        {"hard_weight": 0.5},
        ValueError,
        r"labels: row 0 has label 7; labels are in \[0, 7\)",
    ),
    ((H, W, TH, TW), {"token_weight": torch.ones(2, 3).to(torch.complex64)}, TypeError, "token_weight"),
    ((H, W, TH, TW), {"num_items": -1}, ValueError, "num_items"),
    (
        (H, W, TH, TW, Y),
        {"num_counted": 7},
        ValueError,
        "num_counted: must be between 0 and the number of tokens, 6",
    ),
    ((H, W, TH, TW, Y), {"num_counted": torch.tensor(3)}, TypeError, "num_counted"),
    ((H, W, TH, TW, Y), {"num_counted": 5}, ValueError, "num_counted: 5 tokens are said to count, and 6 do"),
    ((H, W, TH, TW), {"num_counted": 5}, ValueError, "num_counted: all 6 tokens count"),
    ((H, W, TH, TW), {"memory_budget": 0}, ValueError, "memory_budget"),
    ((H, W, TH, TW), {"memory_budget": 1e9}, TypeError, "memory_budget"),
    ((H, W, TH, TW), {"logits_dtype": torch.float64}, ValueError, "logits_dtype"),
    ((H, W, TH, TW), {"temperature": 0.0}, ValueError, "temperature"),
    ((H, W, TH, TW), {"backend": "cuda"}, RuntimeError, "cuda"),
]


@pytest.mark.parametrize("arguments, options, error, says", ERRORS)
def test_bad_input(arguments, options, error, says):
    with pytest.raises(error, match=says):
        fused_linear_kd_loss(*arguments, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_parameters_of_a_teacher_need_not_be_frozen(reduction):
    """A head's weight and bias require a gradient unless somebody has said otherwise: they get none."""
    student, teacher, labels = models()
    expected = chunked(student, teacher, labels, hard_weight=0.5, reduction=reduction)
    unfrozen = [teacher[0], *(x.clone().requires_grad_() for x in teacher[1:])]
    found = chunked(student, unfrozen, labels, hard_weight=0.5, reduction=reduction)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert student[1].grad.any() and unfrozen[1].grad is None and unfrozen[2].grad is None


def test_parameters_of_a_teacher_under_compile():
    student, (hidden, weight, bias), _ = models()
    unfrozen = torch.nn.Parameter(weight)
    compiled = torch.compile(fused_linear_kd_loss, fullgraph=True, backend="aot_eager")
    h, w, b = student
    options = dict(student_bias=b, teacher_bias=bias)
    found = compiled(h, w, hidden, unfrozen, **options)
    torch.testing.assert_close(found, fused_linear_kd_loss(h, w, hidden, weight, **options))
    found.backward()
    assert unfrozen.grad is None and w.grad.any()


def test_func_transforms_are_refused():
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.grad(lambda h: fused_linear_kd_loss(h, W, TH, TW))(H)


def test_module_is_the_function():
    student, teacher, labels = models()
    options = dict(divergence="jsd(0.3)", hard_weight=0.2, memory_budget=100_000, logits_dtype=torch.float32)
    module = LinearKDLoss(**options)
    (h, w, b), (th, tw, tb) = student, teacher
    more = dict(student_bias=b, teacher_bias=tb, num_items=50)
    assert torch.equal(
        module(h, w, th, tw, labels, **more), fused_linear_kd_loss(h, w, th, tw, labels, **more, **options)
    )
    assert "jsd(0.3)" in repr(module) and "memory_budget=100000" in repr(module)
    for wrong, error in (
        (dict(temperature=0.0), ValueError),
        (dict(memory_budget=-1), ValueError),
        (dict(inplace=True), TypeError),
    ):
        with pytest.raises(error, match=next(iter(wrong))):
            LinearKDLoss(**wrong)


def test_docstring_example():
    lines = [
        line.strip()[4:]
        for line in fused_linear_kd_loss.__doc__.splitlines()
        if line.strip().startswith(">>> ")
    ]
    scope: dict = {}
    exec("\n".join(lines), scope)
    assert scope["weight"].grad.isfinite().all()
