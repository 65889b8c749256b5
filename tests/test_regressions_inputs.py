"""What people pass: numbers of numpy and tensors, masks, wrong labels, memory that is shared, modes of torch.
Each was wrong or unclear."""

import contextlib
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from rows import BACKENDS, make_rows

from kdkernels import (
    KDLoss,
    LinearKDLoss,
    LogitTransform,
    decoupled_kd_loss,
    folding,
    fused_kd_loss,
    fused_linear_kd_loss,
    inputs,
    logit_matching_loss,
    standardize_logits,
    tempered_log_softmax,
)

ROWS, VOCAB = 4, 7
Z, V = make_rows("plain", ROWS, VOCAB)
Y = torch.tensor([1, 0, 6, 3])
g = torch.Generator().manual_seed(0)
H, W, TH, TW = (torch.randn(n, 5, generator=g) for n in (ROWS, VOCAB, ROWS, VOCAB))


def linear(z, v, labels=None, **options):
    """The loss from hidden states whose logits are z: the head is an identity."""
    return fused_linear_kd_loss(
        z, torch.eye(VOCAB, dtype=z.dtype), labels=labels, teacher_logits=v, **options
    )


def matching(z, v, labels=None, **options):
    return logit_matching_loss(z, v, labels=labels, **options)


def decoupled(z, v, labels=None, **options):
    return decoupled_kd_loss(z, v, Y if labels is None else labels, **{"hard_weight": 0.0} | options)


def module(z, v, labels=None, token_weight=None, num_items=None, **options):
    return KDLoss(**options)(z, v, labels, token_weight=token_weight, num_items=num_items)


def linear_module(z, v, labels=None, token_weight=None, num_items=None, **options):
    more = dict(teacher_logits=v, token_weight=token_weight, num_items=num_items)
    return LinearKDLoss(**options)(z, torch.eye(VOCAB), labels=labels, **more)


def compiled(z, v, labels=None, **options):
    torch._dynamo.reset()
    return torch.compile(lambda z, v, labels: fused_kd_loss(z, v, labels, **options), backend="aot_eager")(
        z, v, labels
    )


PLAIN = {"fused": fused_kd_loss, "linear": linear, "matching": matching, "decoupled": decoupled}
LOSSES = PLAIN | {"module": module, "linear_module": linear_module}
ALL = LOSSES | {"compiled": compiled}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
everywhere = pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
backends = pytest.mark.parametrize("backend", BACKENDS)


def with_gradient(loss, z, v, *args, **options):
    x = z.clone().requires_grad_()
    value = loss(x, v, *args, **options)
    value.sum().backward()
    return value.detach(), x.grad


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------- numbers


@everywhere
@pytest.mark.parametrize("zero", [0, 0.0, np.int64(0), torch.tensor(0), torch.tensor([0.0])], ids=repr)
def test_num_items_of_zero_is_a_loss_of_zero(loss, zero):
    """A rank without a counted token adds nothing; what is counted all the same is divided by 1, whatever
    makes the 0."""
    labels = torch.full((ROWS,), -100)
    value, grad = with_gradient(loss, Z, V, labels, num_items=zero)
    assert float(value) == 0 and not grad.any()
    assert_same(with_gradient(loss, Z, V, Y, num_items=zero), with_gradient(loss, Z, V, Y, num_items=1))


SEVENS = [
    np.int64(7),
    np.int32(7),
    np.float32(7),
    np.float64(7),
    torch.tensor(7),
    torch.tensor([7.0]),
    torch.tensor(7, dtype=torch.int32),
]


@everywhere
@pytest.mark.parametrize("seven", SEVENS, ids=repr)
def test_num_items_of_any_make(loss, seven):
    assert_same(with_gradient(loss, Z, V, num_items=seven), with_gradient(loss, Z, V, num_items=7))


@losses
@pytest.mark.parametrize(
    "wrong",
    [-1, -0.5, np.int64(-1), torch.tensor(-1), torch.tensor([-2.0]), math.nan, math.inf, 10**400],
    ids=str,
)
def test_num_items_that_are_negative_or_no_number_pass(loss, wrong):
    with pytest.raises(ValueError, match="num_items: must be finite and not negative, got"):
        loss(Z, V, num_items=wrong)


@losses
@pytest.mark.parametrize(
    "wrong",
    [True, 1j, "7", np.bool_(True), np.complex64(1), torch.tensor(True), torch.tensor(1j), [7]],
    ids=repr,
)
def test_num_items_of_another_kind_meet_a_foreign_error(loss, wrong):
    with pytest.raises(TypeError, match="num_items: must be a number"):
        loss(Z, V, num_items=wrong)


NUMBERS = [np.float32, np.float64, lambda x: torch.tensor(x), lambda x: torch.tensor(x, dtype=torch.float64)]


@everywhere
@pytest.mark.parametrize("make", NUMBERS, ids=["float32", "float64", "tensor", "double tensor"])
def test_numbers_of_numpy_and_tensors_are_refused(loss, make):
    options = dict(soft_weight=0.5, hard_weight=0.25)
    if loss not in (matching, decoupled):
        options |= dict(temperature=2.0, label_smoothing=0.125, z_loss=0.5)
    if loss is decoupled:
        options = dict(temperature=2.0, target_weight=0.5, non_target_weight=2.0, hard_weight=0.25)
    mine = {name: make(x) for name, x in options.items()}
    assert_same(
        with_gradient(loss, Z, V, Y, t_squared=True, **mine)
        if loss is not matching
        else with_gradient(loss, Z, V, Y, **mine),
        with_gradient(loss, Z, V, Y, t_squared=True, **options)
        if loss is not matching
        else with_gradient(loss, Z, V, Y, **options),
    )


def test_numbers_of_numpy_where_integers_and_transforms_take_them():
    labels = torch.tensor([1, 0, -7, 3])
    mine = dict(
        ignore_index=np.int64(-7),
        vocab_size=np.int32(6),
        student_transform=LogitTransform(np.float32(0.5), torch.tensor(4.0)),
    )
    plain = dict(ignore_index=-7, vocab_size=6, student_transform=LogitTransform(0.5, 4.0))
    for loss in (fused_kd_loss, linear, module, linear_module):
        assert_same(with_gradient(loss, Z, V, labels, **mine), with_gradient(loss, Z, V, labels, **plain))
    assert float(tempered_log_softmax(Z, np.float32(2.0))[0, 0]) == float(tempered_log_softmax(Z, 2.0)[0, 0])
    assert repr(KDLoss(**mine)) == repr(KDLoss(**plain)) and hash(mine["student_transform"]) == hash(
        plain["student_transform"]
    )
    budget = np.int64(1 << 20)
    assert fused_linear_kd_loss(
        H, W, TH, TW, memory_budget=budget, num_counted=np.int64(ROWS)
    ) == fused_linear_kd_loss(H, W, TH, TW)


@losses
@pytest.mark.parametrize(
    "name", ["temperature", "soft_weight", "hard_weight", "label_smoothing", "z_loss", "target_weight"]
)
def test_numbers_that_are_none_or_too_large_meet_a_foreign_error(loss, name):
    takes = {
        matching: ("soft_weight", "hard_weight"),
        decoupled: ("temperature", "hard_weight", "target_weight"),
    }
    if name not in takes.get(
        loss, ("temperature", "soft_weight", "hard_weight", "label_smoothing", "z_loss")
    ):
        pytest.skip("no such option")
    for wrong in (10**400, 10**10000, math.nan, torch.tensor(math.nan), np.float64("nan")):
        with pytest.raises(ValueError, match=f"{name}: must be"):
            loss(Z, V, Y, **{name: wrong})
    for wrong in (
        1j,
        True,
        "2",
        None,
        np.bool_(True),
        torch.ones(2),
        torch.tensor(True),
        torch.tensor(1.0, device="meta"),
        [2.0],
    ):
        if name == "temperature" and loss in (fused_kd_loss, linear) and getattr(wrong, "shape", ()):
            continue  # temperatures of the rows: test_row_temperature.py
        with pytest.raises(TypeError, match=f"{name}: must be a number"):
            loss(Z, V, Y, **{name: wrong})
    with pytest.raises(ValueError, match=f"{name}: receives (no|a) gradient"):
        loss(Z, V, Y, **{name: torch.tensor(1.0, requires_grad=True)})


def test_a_weight_that_is_infinite_times_t_squared():
    with pytest.raises(ValueError, match="soft_weight times T.2: must be finite"):
        fused_kd_loss(Z, V, soft_weight=1e300, temperature=1e10, t_squared=True)


@pytest.mark.parametrize(
    "T", [0.0, -1.0, 1e-39, 1e-20, 9e-5, 1.1e12, 1e30, 1e200, 10**400, -math.inf, math.nan]
)
def test_temperatures_beyond_a_floats_range_give_zero_and_nan(T):
    for call in (fused_kd_loss, linear, decoupled, module, linear_module):
        with pytest.raises(ValueError, match=r"temperature: must be in \[0.0001, 1e\+12\], or inf"):
            call(Z, V, Y, temperature=T)
    with pytest.raises(ValueError, match=r"temperature: must be in \[0.0001, 1e\+12\], or inf"):
        tempered_log_softmax(Z, T)


DIVERGENCES = (
    "kl",
    "cross_entropy",
    "reverse_kl",
    "renyi(0.5)",
    "reverse_renyi(3)",
    "alpha(0.5)",
    "jsd(0.3)",
    "skew_kl(0.2)",
    "tvd",
)


@backends
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("T", [1e-4, 1e12])
def test_the_ends_of_the_temperatures_are_held(backend, divergence, T):
    """Against fp64, with logits as large as T where T is small, so that no row is one-hot. Gradients are T
    dD/dz."""
    z, v = (x * min(T, 1.0) for x in make_rows("plain", 2, 60))
    options = dict(
        divergence=divergence,
        temperature=T,
        soft_weight=min(T, T**2) if T < 1 else 1.0,
        t_squared=T > 1,
        reduction="sum",
    )
    if divergence in ("cross_entropy", "tvd") and T > 1:
        options |= dict(t_squared=False, soft_weight=T)
    value, grad = with_gradient(fused_kd_loss, z, v, backend=backend, **options)
    exact, right = with_gradient(fused_kd_loss, z.double(), v.double(), backend="eager", **options)
    assert float(value) == pytest.approx(float(exact), rel=2e-5) and float(exact) != 0
    assert float((grad - right).norm()) <= 2e-5 * float(right.norm())


# ---------------------------------------------------------------- masks, labels


MASK = torch.tensor([1, 0, 1, 1])


@everywhere
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_a_token_weight_that_is_a_mask_is_refused(loss, dtype):
    mask = MASK.to(dtype)
    for reduction in ("mean", "sum", "none"):
        mine = with_gradient(loss, Z, V, Y, token_weight=mask, reduction=reduction)
        assert_same(mine, with_gradient(loss, Z, V, Y, token_weight=MASK.float(), reduction=reduction))
        assert not mine[1][1].any()


@losses
def test_a_token_weight_that_is_no_number_is_refused(loss):
    with pytest.raises(
        TypeError, match="token_weight: must be a floating-point, integer or bool tensor, got torch.complex64"
    ):
        loss(Z, V, Y, token_weight=MASK.to(torch.complex64))


@backends
@pytest.mark.parametrize("loss", [*PLAIN.values(), compiled], ids=[*PLAIN, "compiled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_wrong_label_without_a_hard_term_counts_as_a_token(loss, reduction, backend):
    """The same error with a hard term and without."""
    if loss is compiled and backend == "triton":
        pytest.skip("the interpreter has no graph")
    for wrong, hard_weight in itertools.product((-1, VOCAB), (0.0, 0.5)):
        labels = torch.tensor([1, wrong, -100, 2])
        with pytest.raises(
            ValueError,
            match=rf"labels: row 1 has label {wrong}; labels are in \[0, {VOCAB}\) or ignore_index",
        ):
            loss(Z, V, labels, hard_weight=hard_weight, backend=backend, reduction=reduction)
        loss(
            Z,
            V,
            labels,
            hard_weight=hard_weight,
            backend=backend,
            token_weight=torch.tensor([1.0, 0.0, 1.0, 1.0]),
        )
    with pytest.raises(
        ValueError, match=rf"labels: row 0 has label {VOCAB - 1}; labels are in \[0, {VOCAB - 1}\)"
    ):
        loss(Z, V, Y + (VOCAB - 1 - Y[0]), vocab_size=VOCAB - 1, backend=backend, reduction=reduction)


def test_a_wrong_label_on_a_device_is_a_row_of_nan():
    """What a hard term makes of it where nobody waits to see: that row's weight is nan, and no other's."""
    weight = folding.nan_at_wrong(
        torch.tensor([1, -1, -100, 7, 9]), torch.tensor([1.0, 2.0, 0.0, 1.0, 0.0]).double(), 7
    )
    assert weight.isnan().tolist() == [False, True, False, True, False] and weight[0] == 1 and weight[2] == 0
    z, v = make_rows("plain", 5, 7)
    for backend in ("cpu", "eager"):
        x = z.clone().requires_grad_()
        rows = fused_kd_loss(x, v, token_weight=weight, reduction="none", backend=backend)
        rows.sum().backward()
        assert rows.isnan().tolist() == x.grad.isnan().all(-1).tolist() == [False, True, False, True, False]


def test_statistics_have_no_cross_entropy_without_a_hard_term():
    _, stats = fused_kd_loss(Z, V, Y, return_stats=True)
    assert stats.cross_entropy is None and stats.correct is not None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [255, VOCAB, -100, -1])
def test_decoupled_with_an_ignore_index_beyond_the_vocabulary_is_out_of_bounds(ignore_index, reduction):
    """Segmentation ignores 255."""
    labels, counted = Y.clone(), Y != 6
    labels[2] = ignore_index
    value, grad = with_gradient(
        decoupled_kd_loss, Z, V, labels, ignore_index=ignore_index, reduction=reduction
    )
    expected, right = with_gradient(
        decoupled_kd_loss, Z[counted], V[counted], Y[counted], reduction=reduction
    )
    torch.testing.assert_close(value[counted] if reduction == "none" else value, expected)
    torch.testing.assert_close(grad[counted], right)
    assert not grad[2].any()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_decoupled_with_a_broken_row_of_no_weight_is_nan(broken, backend, side):
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    expected, right = with_gradient(decoupled_kd_loss, Z, V, Y, token_weight=weight, backend=backend)
    z, v = Z.clone(), V.clone()
    (z if side == "student" else v)[1] = broken
    for labels in (Y, torch.tensor([1, -100, 6, 3])):
        value, grad = with_gradient(decoupled_kd_loss, z, v, labels, token_weight=weight, backend=backend)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, right)
    assert decoupled_kd_loss(z, v, Y, token_weight=weight + 1, backend=backend).isnan()  # one that counts is


# ---------------------------------------------------------------- memory


def inferred(*tensors):
    with torch.inference_mode():
        return [x * 1 for x in tensors]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@losses
def test_a_teacher_of_inference_mode_cannot_be_saved(loss, dtype, reduction):
    """Not in a graph of torch.compile, which saves its own inputs, and refuses these itself."""
    if loss is linear_module and dtype == torch.float64:
        pytest.skip("the head is fp32")
    z, v, weight = Z.to(dtype), V.to(dtype), torch.rand(ROWS).double()
    mine = inferred(v, Y, weight)
    results = []
    for teacher, labels, w in ((v, Y, weight), mine):
        results.append(
            with_gradient(loss, z, teacher, labels, hard_weight=0.3, token_weight=w, reduction=reduction)
        )
    assert_same(*results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_heads_and_hidden_states_of_inference_mode_cannot_be_saved(reduction):
    hidden, head = inferred(TH, TW)
    h = H.clone().requires_grad_()
    for teacher in ((TH, TW), (hidden, head)):
        fused_linear_kd_loss(
            h, W, *teacher, student_bias=inferred(torch.ones(VOCAB))[0], reduction=reduction
        ).sum().backward()
    mine, h.grad = h.grad, None
    fused_linear_kd_loss(h, W, TH, TW, student_bias=torch.ones(VOCAB), reduction=reduction).sum().backward()
    torch.testing.assert_close(mine, 2 * h.grad)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_other_callers_of_inference_tensors(backend, reduction):
    student, v = inferred(Z.double(), V.double())
    teacher = V.double().requires_grad_()  # the one that learns
    fused_kd_loss(student, teacher, teacher_grad=True, reduction=reduction, backend=backend).sum().backward()
    mine, teacher.grad = teacher.grad, None
    fused_kd_loss(
        Z.double(), teacher, teacher_grad=True, reduction=reduction, backend=backend
    ).sum().backward()
    torch.testing.assert_close(mine, teacher.grad)
    x = Z.clone().requires_grad_()
    loss = fused_kd_loss(x * 1, v, inplace=True, reduction=reduction, backend=backend)
    loss.sum().backward()
    assert x.grad.any()
    assert tempered_log_softmax(v, 2.0, backend=backend).isfinite().all()
    with torch.inference_mode():
        assert (
            fused_kd_loss(student, v, Y, hard_weight=0.1, reduction=reduction, backend=backend)
            .isfinite()
            .all()
        )


@pytest.mark.parametrize("loss", [fused_kd_loss, matching, module])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place_with_a_teacher_in_the_same_memory_is_wrong(loss, reduction):
    buffer = torch.randn(ROWS + 1, VOCAB)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    for teacher in (
        buffer[:-1],
        buffer[1:],
        buffer[1:2].expand(ROWS, VOCAB),
        torch.from_numpy(buffer.numpy())[:-1],
    ):
        with pytest.raises(ValueError, match="inplace: teacher_logits shares memory with student_logits"):
            loss(buffer[1:], teacher, inplace=True, reduction=reduction)
    storage = torch.randn(8 * ROWS * VOCAB)
    student = storage[: ROWS * VOCAB].view(ROWS, VOCAB)
    with pytest.raises(ValueError, match="inplace: labels shares memory"):
        loss(student, V, storage.view(torch.int64)[2 : 2 + ROWS], inplace=True, reduction=reduction)
    with pytest.raises(ValueError, match="inplace: token_weight shares memory"):
        loss(student, V, labels, token_weight=student[:, 0], inplace=True, reduction=reduction)
    with pytest.raises(ValueError, match="inplace: student_logits is expanded; its rows share storage"):
        loss(storage.as_strided((ROWS, VOCAB), (VOCAB - 1, 1)), V, inplace=True, reduction=reduction)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_in_place_beside_a_teacher_in_the_same_storage(backend):
    """Models whose rows take turns in one buffer share no element."""
    both = torch.stack([Z, V], 1)
    wide = torch.cat([V, Z, V], 1)
    pairs = [
        (both[:, 0], both[:, 1]),
        (wide[:, VOCAB:-VOCAB], wide[:, -VOCAB:]),
        (wide[:, VOCAB:-VOCAB], wide[:, :VOCAB]),
    ]
    pairs.append((torch.cat([Z, V])[:ROWS], torch.cat([Z, V])[ROWS:]))
    expected = fused_kd_loss(Z, V, backend=backend)
    for z, v in pairs:
        torch.testing.assert_close(fused_kd_loss(z, v, inplace=True, backend=backend), expected)


def test_whose_memory_overlaps():
    x = torch.randn(4, 6)
    flat = x.view(-1)
    assert (
        inputs.overlap(x, x)
        and inputs.overlap(x[1:], x[:-1])
        and inputs.overlap(x[:, :4], x[:, 3:])
        and inputs.overlap(x[1:3], flat)
    )
    assert inputs.overlap(flat[3:9].view(1, 6), x[0].view(torch.int64)) and inputs.overlap(
        x[2], x[:, :1].expand(4, 9)
    )
    assert (
        not inputs.overlap(x[::2], x[1::2])
        and not inputs.overlap(x[:, :3], x[:, 3:])
        and not inputs.overlap(x, x.clone())
    )
    assert not inputs.overlap(x[:0], x) and not inputs.overlap(x.to("meta"), x.to("meta"))
    assert (
        inputs.rows_overlap(x.unfold(1, 3, 1))
        and inputs.rows_overlap(x[:1].expand(3, 6))
        and not inputs.rows_overlap(x.t())
    )


def test_in_place_on_nothing_is_not_expanded():
    for student in (
        torch.empty(0, VOCAB),
        torch.empty(1, VOCAB).expand(3, VOCAB)[:, None][:, :0],
        torch.empty(2, 1, VOCAB)[:, :0],
    ):
        x = student.expand(*student.shape)
        loss = fused_kd_loss(x, torch.empty(*x.shape), inplace=True)
        assert (
            float(loss) == 0
            and fused_kd_loss(x, torch.empty(*x.shape), inplace=True, reduction="none").shape == x.shape[:-1]
        )


# ---------------------------------------------------------------- tensors that no backend reads


def nested(x):
    return torch.nested.nested_tensor([x, x[:2]])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (torch.Tensor.to_sparse, "must be dense, got the layout torch.sparse_coo"),
        (torch.Tensor.to_sparse_csr, "must be dense, got the layout torch.sparse_csr"),
        (torch.Tensor.to_mkldnn, "must be dense, got the layout torch._mkldnn"),
        (nested, "must not be a nested tensor"),
        (
            lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
            "must not be a nested tensor",
        ),
    ],
    ids=["coo", "csr", "mkldnn", "nested", "jagged"],
)
def test_sparse_mkldnn_and_nested_tensors_meet_a_foreign_error(make, match):
    for loss in LOSSES.values():
        student = "student_hidden" if loss in (linear, linear_module) else "student_logits"
        for arguments, name in (((make(Z), V), student), ((Z, make(V)), "teacher_logits")):
            with pytest.raises(TypeError, match=f"{name}: {match}"):
                loss(*arguments, Y)
    for i, name in enumerate(("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")):
        tensors = [H, W, TH, TW]
        tensors[i] = make(tensors[i])
        with pytest.raises(TypeError, match=f"{name}: {match}"):
            fused_linear_kd_loss(*tensors)
    with pytest.raises(TypeError, match=match):
        fused_linear_kd_loss(H, W, teacher_logits=lambda start, stop: make(V[start:stop]))
    with pytest.raises(TypeError, match=f"logits: {match}"):
        tempered_log_softmax(make(Z))
    with pytest.raises(TypeError, match=f"logits: {match}"):
        standardize_logits(make(Z))


@losses
def test_sparse_weights_labels_and_items_meet_a_foreign_error(loss):
    with pytest.raises(TypeError, match="token_weight: must be dense"):
        loss(Z, V, Y, token_weight=torch.ones(ROWS).to_sparse())
    with pytest.raises(TypeError, match="labels: must be dense"):
        loss(Z, V, Y.to_sparse())
    with pytest.raises(TypeError, match="num_items: must be dense"):
        loss(Z, V, Y, num_items=torch.ones(1).to_sparse())


@pytest.fixture
def mesh(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("no gloo")
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_distributed_tensors_train_with_a_wrong_gradient(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    match = r"must not be a DTensor.*full_tensor\(\)"
    for placement in (Shard(0), Replicate()):
        make = functools.partial(distribute_tensor, device_mesh=mesh, placements=[placement])
        for loss in LOSSES.values():
            for arguments in ((make(Z), V, Y), (Z, make(V), Y), (Z, V, make(Y))):
                with pytest.raises(TypeError, match=match):
                    loss(*arguments)
            with pytest.raises(TypeError, match=f"token_weight: {match}"):
                loss(Z, V, Y, token_weight=make(torch.ones(ROWS)))
            with pytest.raises(TypeError, match=f"num_items: {match}"):
                loss(Z, V, Y, num_items=make(torch.ones(1)))
        for i, name in enumerate(("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")):
            tensors = [H, W, TH, TW]
            tensors[i] = torch.nn.Parameter(make(tensors[i])) if i == 1 else make(tensors[i])
            with pytest.raises(TypeError, match=f"{name}: {match}"):
                fused_linear_kd_loss(*tensors)
        with pytest.raises(TypeError, match=match):
            fused_linear_kd_loss(H, W, TH, TW, student_bias=make(torch.ones(VOCAB)))
        with pytest.raises(TypeError, match=match):
            tempered_log_softmax(make(Z))
        torch.testing.assert_close(fused_kd_loss(make(Z).full_tensor(), V), fused_kd_loss(Z, V))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (f, f.__name__)
        for f in (
            fused_kd_loss,
            fused_linear_kd_loss,
            decoupled_kd_loss,
            logit_matching_loss,
            tempered_log_softmax,
        )
    ]
    + [(lambda *_, f=f, **options: f(**options), f.__name__) for f in (KDLoss, LinearKDLoss)],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_an_unknown_option_is_said_of_another_function(function, name):
    wrong, right = (
        ("hard_wieght", "hard_weight") if name == "logit_matching_loss" else ("temprature", "temperature")
    )
    with pytest.raises(
        TypeError,
        match=rf"^{name}\(\) got an unexpected keyword argument '{wrong}'; did you mean '{right}'\?$",
    ):
        function(Z, V, **{wrong: 2.0})
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'qqqq'$"):
        function(Z, V, qqqq=2.0)


def test_names_are_checked_in_a_graph_too():
    torch._dynamo.reset()
    f = torch.compile(lambda z, v: fused_kd_loss(z, v, temperature=2.0), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(f(Z, V), fused_kd_loss(Z, V, temperature=2.0))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ignore_index": None}, TypeError, "ignore_index: must be an integer, got None"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: must be an integer, got 1.5"),
        ({"ignore_index": True}, TypeError, "ignore_index: must be an integer, got True"),
        ({"ignore_index": [1]}, TypeError, "ignore_index: must be an integer"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index: must be an int64"),
        ({"ignore_index": 10**10000}, ValueError, "ignore_index: must be an int64"),
        (
            {"divergence": ["kl"]},
            TypeError,
            r"divergence: must be a Divergence or its text form, got \['kl'\]",
        ),
        ({"divergence": {"kl"}}, TypeError, "divergence: must be"),
        ({"reduction": ["mean"]}, ValueError, "reduction: must be one of"),
        ({"backend": ["cpu"]}, ValueError, "backend: must be one of"),
        ({"vocab_size": [3]}, ValueError, "vocab_size: must be a positive integer"),
        ({"vocab_size": True}, ValueError, "vocab_size: must be a positive integer"),
        ({"student_transform": [2.0]}, TypeError, "student_transform: must be a LogitTransform"),
    ],
)
def test_options_without_a_hash_or_of_a_wrong_type_meet_a_foreign_error(options, error, match):
    for loss in (fused_kd_loss, linear, module, linear_module):
        with pytest.raises(error, match=match):
            loss(Z, V, Y, **options)
    if "ignore_index" in options or "reduction" in options:
        for loss in (decoupled, matching):
            with pytest.raises(error, match=match):
                loss(Z, V, Y, **options)
    with pytest.raises((TypeError, ValueError), match="LogitTransform: scale"):
        LogitTransform(scale=10**400)


# ---------------------------------------------------------------- modes of torch


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_jit_trace_keeps_sizes_or_fails_in_torch(reduction):
    for f in PLAIN.values():
        with pytest.raises(RuntimeError, match="torch.jit.trace would keep"):
            torch.jit.trace(lambda z, v, f=f: f(z, v, reduction=reduction), (Z, V))
    with pytest.raises(RuntimeError, match="tempered_log_softmax: torch.jit.trace"):
        torch.jit.trace(tempered_log_softmax, (Z,))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [False, True])
def test_forward_mode_loses_the_derivative(reduction, trained):
    from torch.autograd import forward_ad

    direction = torch.randn(ROWS, VOCAB)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(Z.clone().requires_grad_(trained), direction)
        for loss in PLAIN.values():
            with pytest.raises(RuntimeError, match="forward-mode derivatives need"):
                loss(dual, V, reduction=reduction)
            with pytest.raises(ValueError, match="teacher_logits: receives? a gradient"):
                loss(Z, forward_ad.make_dual(V, direction), reduction=reduction)
            with pytest.raises(ValueError, match="token_weight: receives no gradient"):
                loss(
                    Z,
                    V,
                    token_weight=forward_ad.make_dual(torch.ones(ROWS), torch.ones(ROWS)),
                    reduction=reduction,
                )
        with pytest.raises(RuntimeError, match="forward-mode derivatives need"):
            fused_kd_loss(dual * 1, V, inplace=True, backend="eager", reduction=reduction)
        with pytest.raises(RuntimeError, match="forward-mode derivatives need"):
            fused_linear_kd_loss(H, forward_ad.make_dual(W, W), TH, TW, reduction=reduction)
        with pytest.raises(RuntimeError, match="tempered_log_softmax: forward-mode derivatives need"):
            tempered_log_softmax(dual)
        for call in (
            tempered_log_softmax,
            lambda z, **options: fused_kd_loss(z, V, reduction=reduction, **options),
        ):
            tangent = forward_ad.unpack_dual(call(dual, backend="eager")).tangent
            x = Z.clone().requires_grad_()
            y = call(x, backend="eager")
            expected = torch.autograd.functional.jvp(
                lambda z, call=call: call(z, backend="eager"), Z, direction
            )[1]
            torch.testing.assert_close(tangent, expected.to(y.dtype))
        both = fused_kd_loss(Z, forward_ad.make_dual(V, direction), teacher_grad=True, backend="eager")
        assert forward_ad.unpack_dual(both).tangent is not None
        fused_kd_loss(Z, V)  # without a tangent nothing is lost


def test_a_torch_func_jvp_loses_the_derivative():
    value, tangent = torch.func.jvp(
        lambda z: fused_kd_loss(z, V, backend="eager"), (Z,), (torch.ones_like(Z),)
    )
    torch.testing.assert_close(value, fused_kd_loss(Z, V))
    assert abs(float(tangent)) < 1e-6
    for call in (
        lambda z: fused_kd_loss(z, V),
        lambda z: fused_kd_loss(z * 1, V, inplace=True, backend="eager"),
        tempered_log_softmax,
    ):
        with pytest.raises(RuntimeError, match='torch.func transforms need backend="eager"'):
            torch.func.jvp(call, (Z,), (torch.ones_like(Z),))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_fake_and_meta_tensors_are_asked_for_their_values(device, hard_weight, backend):
    """Forward, as memory planners and sharding tools run it, of every loss."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() if device == "cpu" else torch.no_grad():
        z, v, h, w, th, tw = (torch.empty(x.shape, device=device) for x in (Z, V, H, W, TH, TW))
        y, weight, items = (
            torch.empty(ROWS, dtype=torch.int64, device=device),
            torch.empty(ROWS, device=device),
            torch.empty((), device=device),
        )
        for reduction in ("mean", "sum", "none"):
            shape = torch.Size([ROWS] if reduction == "none" else [])
            options = dict(reduction=reduction, hard_weight=hard_weight, token_weight=weight, backend=backend)
            options |= dict(num_items=items) if reduction == "mean" else {}
            for loss in (
                fused_kd_loss(z, v, y, **options),
                decoupled_kd_loss(z, v, y, **options),
                matching(z, v, y, **options),
            ):
                assert loss.shape == shape and loss.device.type == device
            assert fused_linear_kd_loss(h, w, th, tw, y, **options).shape == shape
            assert fused_kd_loss(z, v, y, inplace=True, **options).shape == shape


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"hard_weight": 0.3}, {"inplace": True}, {"teacher_grad": True}], ids=str
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_backward_of_fake_tensors_asks_for_a_value(device, options, reduction):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() if device == "cpu" else contextlib.nullcontext():
        h, w, th, tw = (
            torch.empty(x.shape, device=device, requires_grad=i < 2) for i, x in enumerate((H, W, TH, TW))
        )
        z, v = (
            torch.empty(ROWS, VOCAB, device=device, requires_grad=True),
            torch.empty(ROWS, VOCAB, device=device),
        )
        y = torch.empty(ROWS, dtype=torch.int64, device=device) if "hard_weight" in options else None
        if "teacher_grad" in options:
            v.requires_grad_()
        fused_kd_loss(z * 1, v, y, reduction=reduction, **options).sum().backward()
        assert z.grad.shape == z.shape and z.grad.device.type == device
        if "hard_weight" in options or not options:
            fused_linear_kd_loss(h, w, th, tw, y, reduction=reduction, **options).sum().backward()
            assert h.grad.shape == h.shape and w.grad.shape == w.shape


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_upstream_gradients_have_no_rule(reduction):
    x = Z.clone().requires_grad_()
    upstream = torch.randn(2, *([ROWS] if reduction == "none" else []))
    for loss in PLAIN.values():
        value = loss(x, V, reduction=reduction)
        with pytest.raises(RuntimeError, match='is_grads_batched needs fused_kd_loss.backend="eager".'):
            torch.autograd.grad(value, x, upstream.to(value.dtype), is_grads_batched=True)
    calls = (
        lambda z: fused_kd_loss(z, V, reduction=reduction, backend="eager"),
        lambda z: tempered_log_softmax(z, 2.0),
    )
    for call in calls:
        value = call(x)
        u = torch.randn(2, *value.shape)
        mine = torch.autograd.grad(value, x, u, is_grads_batched=True, retain_graph=True)[0]
        torch.testing.assert_close(
            mine, torch.stack([torch.autograd.grad(value, x, a, retain_graph=True)[0] for a in u])
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
def test_the_linear_loss_fails_in_autocast_on_meta(reduction, hard_weight):
    h, w, th, tw = (x.to("meta").requires_grad_(i < 2) for i, x in enumerate((H, W, TH, TW)))
    loss = fused_linear_kd_loss(h, w, th, tw, Y.to("meta"), hard_weight=hard_weight, reduction=reduction)
    loss.sum().backward()
    assert h.grad.shape == h.shape and w.grad.shape == w.shape and h.grad.device.type == "meta"


def test_the_mean_does_not_compile_before_torch_2_13():
    """sym_max takes no plain integer there; here the operator must not be asked of one."""
    assert folding.at_least_one(Z) == ROWS and folding.at_least_one(Z[:0]) == 1
    assert type(folding.at_least_one(Z)) is int


class Exported(torch.nn.Module):
    """A loss as torch.export takes it."""

    def __init__(self, loss, **options):
        super().__init__()
        self.call = functools.partial(loss, **options)

    def forward(self, z, v, labels):
        found = self.call(z * 2, v, labels)
        return found[0] if isinstance(found, tuple) else found


EXPORTED = [
    *({"reduction": r, "hard_weight": w} for r in ("mean", "sum", "none") for w in (0.0, 0.3)),
    {"return_stats": True},
]
ALONE = [
    {"teacher_grad": True},
    {"teacher_grad": True, "reduction": "none"},
    {"inplace": True},
    {"backend": "eager"},
]


@pytest.mark.parametrize(("strict", "dtype"), [(False, torch.float32), (True, torch.float16)])
@pytest.mark.parametrize(
    ("loss", "options"),
    [(f, o) for f in (fused_kd_loss, linear) for o in EXPORTED]
    + [(fused_kd_loss, o) for o in ALONE]
    + [(decoupled, {}), (decoupled, {"reduction": "none"}), (matching, {})],
)
def test_an_exported_loss_has_no_gradient(loss, options, dtype, strict):
    """Exported with inputs that need no gradient, trained through afterwards, with another number of rows."""
    z, v, labels = Z.to(dtype), V.to(dtype), torch.tensor([1, -100, 6, 3])
    n = torch.export.Dim("n")
    exported = torch.export.export(
        Exported(loss, **options), (z, v, labels), dynamic_shapes=({0: n}, {0: n}, {0: n}), strict=strict
    )
    z, v, labels = (torch.cat([x, x.flip(-1)])[:-1] for x in (z, v, labels[:, None]))
    results = []
    for f in (Exported(loss, **options), exported.module()):
        a, b = z.clone().requires_grad_(), v.clone().requires_grad_("teacher_grad" in options)
        value = f(a, b, labels[:, 0])
        (value * torch.linspace(1, 2, value.numel()).view(value.shape)).sum().backward()
        results.append(
            (
                value.detach().double(),
                a.grad.double(),
                b.grad.double() if b.requires_grad else value.detach().double(),
            )
        )
    rtol, atol = (1e-5, 1e-8) if dtype == torch.float32 else (4e-3, 1e-6)
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=rtol, atol=atol)
    assert results[0][1].any()


def test_exported_heads_and_a_log_softmax_have_no_gradient():
    class M(torch.nn.Module):
        def forward(self, h, w, bias, th, tw):
            loss = fused_linear_kd_loss(h, w, th, tw, student_bias=bias, temperature=2.0, teacher_grad=True)
            return loss + tempered_log_softmax(h, 2.0).square().sum()

    tensors = H, W, torch.ones(VOCAB), TH, TW
    results = []
    for f in (M(), torch.export.export(M(), tensors).module()):
        leaves = [x.clone().requires_grad_() for x in tensors]
        results.append(torch.autograd.grad(f(*leaves), leaves))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right)
