"""The CUDA kernels on host threads (tests/simt): every geometry, family, dtype and layout against the oracle,
and under sanitizers.

The bodies are those of csrc/cuda, compiled by g++ with small blocks; the backend over them is the package's
own, on CPU tensors. The device is what a test says it is, and its figures decide on the kernel. `make simt`
runs every combination.
"""

import ctypes
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import raw
import torch
from bounds import cast_bound, gradient_bound, spread_of, value_bound
from names import APART, USUAL
from oracle import divergence_row
from rows import KINDS, make_rows, with_masks
from test_options import MODIFIERS, SIDES
from test_triton import OPTIONS, expected

from kdkernels import LogitTransform, fused_kd_loss, tempered_log_softmax
from kdkernels.backends import abi, cuda
from kdkernels.divergence import parse
from kdkernels.stats import MEANS

sys.path.insert(0, str(Path(__file__).parent / "simt"))
import build  # noqa: E402

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")

SHARED = 227 << 10  # bytes to a block
ALL_SHARED = 228 << 10  # to a multiprocessor
CAREFUL, WARPS, BLOCKS, CLUSTER, WIDE = range(5)
# name -> (classes, rows, kind of kernel, blocks to a row, tiles to a block, tiles of logits in shared memory,
#          (compute capability, multiprocessors, shared memory of a block and of all blocks, clusters that
#          fit)); a tile is 512 classes
GEOMETRIES = {
    "warps": (203, 5, WARPS, 1, 1, 1, (80, 2, SHARED, ALL_SHARED, 1)),
    "block": (500, 3, BLOCKS, 1, 1, 1, (80, 2, SHARED, ALL_SHARED, 1)),
    "tiles": (2001, 2, BLOCKS, 1, 4, 2, (80, 2, SHARED, ALL_SHARED, 1)),
    "blocks": (1503, 3, BLOCKS, 3, 1, 1, (89, 8, SHARED, ALL_SHARED, 1)),
    "blocks, tiles": (3001, 3, BLOCKS, 2, 3, 2, (120, 4, SHARED, ALL_SHARED, 1)),
    "no room ahead": (2001, 2, BLOCKS, 2, 2, 1, (120, 4, 6 << 10, 36 << 10, 1)),
    "cluster of 1": (500, 5, CLUSTER, 1, 1, 3, (90, 8, SHARED, ALL_SHARED, 2)),
    "cluster of 2": (1003, 5, CLUSTER, 1, 1, 3, (100, 8, SHARED, ALL_SHARED, 2)),
    "cluster of 4": (2000, 3, CLUSTER, 1, 1, 3, (90, 8, SHARED, ALL_SHARED, 1)),
    "ring of 2": (2000, 4, CLUSTER, 1, 1, 2, (90, 8, 14 << 10, ALL_SHARED, 1)),
    "wide cluster": (3999, 2, WIDE, 1, 1, 3, (90, 8, SHARED, ALL_SHARED, 1)),
}


@pytest.fixture(scope="module", autouse=True)
def on_host_threads():
    """backend="cuda" is the library for host threads."""
    with build.in_place_of_cuda():
        yield


def on(name: str, z: torch.Tensor, v: torch.Tensor, divergence: str = "kl", T: float = 1.0) -> None:
    """Make the device that of a geometry, and see that it is the geometry that runs."""
    *_, figures = GEOMETRIES[name]
    _, _, kind, blocks, tiles, stages, _ = GEOMETRIES[name]
    lib = cuda.library().c
    lib.kd_simt_device((ctypes.c_int * 5)(*figures))
    out = torch.empty_like(z)
    call, _, alive = abi.loss_call(raw.call(z, v, None, None, divergence, T, grad=out))
    found = (ctypes.c_int32 * 10)()
    assert lib.kd_plan(ctypes.byref(call), (ctypes.c_int32 * 4)(*figures[:4]), found) == 0
    if found[0] != CAREFUL:
        assert list(found[:4]) == [kind, blocks, tiles, stages], (name, list(found))


def with_room(name: str) -> None:
    """The device of a geometry, with room for a tile of fp32 at least."""
    *_, (*device, room, all_room, clusters) = GEOMETRIES[name]
    cuda.library().c.kd_simt_device((ctypes.c_int * 5)(*device, max(room, 9 << 10), all_room, clusters))


H100, B200 = (90, 132, SHARED, ALL_SHARED), (100, 148, SHARED, ALL_SHARED)
A100, RTX_5090 = (80, 108, 163 << 10, 164 << 10), (120, 170, 99 << 10, 100 << 10)
BF16, FP32 = torch.bfloat16, torch.float32
# (device, rows, classes, dtype, divergence) -> (kind, blocks to a row, tiles to a block, tiles of logits in
# shared memory)
PLANS = [
    ((H100, 4096, 1000, BF16, "kl"), (WARPS, 1, 1, 1)),
    ((H100, 4096, 32768, BF16, "kl"), (CLUSTER, 4, 1, 3)),
    ((H100, 4096, 50257, BF16, "kl"), (CLUSTER, 8, 1, 3)),
    ((H100, 4096, 128256, BF16, "kl"), (CLUSTER, 16, 1, 3)),
    ((H100, 4096, 128256, FP32, "kl"), (CLUSTER, 16, 1, 3)),  # one block to a multiprocessor
    ((B200, 4096, 128256, BF16, "renyi(2)"), (WIDE, 16, 1, 3)),
    ((H100, 4096, 128256, BF16, "jsd(0.5)"), (CLUSTER, 16, 1, 3)),
    ((RTX_5090, 4096, 262144, BF16, "tvd"), (BLOCKS, 32, 1, 1)),
    ((H100, 4096, 151936, BF16, "kl"), (WIDE, 16, 1, 3)),
    ((H100, 4096, 262144, BF16, "kl"), (WIDE, 16, 1, 3)),
    # a slice does not fit twice: blocks, from the second-level cache
    ((H100, 4096, 262144, FP32, "kl"), (BLOCKS, 32, 1, 1)),
    ((H100, 1, 32768, BF16, "kl"), (CLUSTER, 16, 1, 3)),  # few rows: more blocks to each
    ((A100, 4096, 4096, BF16, "kl"), (BLOCKS, 1, 1, 1)),
    ((A100, 4096, 128256, BF16, "kl"), (BLOCKS, 16, 1, 1)),
    ((A100, 2, 32768, BF16, "kl"), (BLOCKS, 16, 1, 1)),
    ((RTX_5090, 4096, 262144, BF16, "renyi(2)"), (BLOCKS, 32, 2, 2)),
    ((RTX_5090, 4096, 262144, FP32, "kl"), (BLOCKS, 32, 1, 1)),
    ((H100, 4096, 128256, BF16, "renyi(inf)"), (CAREFUL, 0, 0, 0)),
]


@pytest.fixture(scope="module")
def planner():
    return abi.Library(build.planner()).c


@pytest.mark.parametrize(("call", "geometry"), PLANS, ids=str)
def test_plans_of_real_devices(call, geometry, planner):
    """The geometry that plan.h chooses, with the blocks that GPUs get."""
    figures, rows, vocab, dtype, divergence = call
    z = torch.empty(rows, vocab, dtype=dtype, device="meta")
    c, _, alive = abi.loss_call(raw.call(z, z, divergence=divergence, grad=z))
    found = (ctypes.c_int32 * 10)()
    assert planner.kd_plan(ctypes.byref(c), (ctypes.c_int32 * 4)(*figures), found) == 0
    kind, parts, tiles, stages, cluster, _, shared, *_ = found
    assert (kind, max(parts, cluster if kind >= CLUSTER else 0), tiles, stages) == geometry
    assert shared <= figures[2]


# (wide, stages) -> (kind, blocks to a row, tiles of logits in shared memory), of 128256 classes on an H100
@pytest.mark.parametrize(
    ("tuning", "geometry"),
    {(1, 0): (WIDE, 8, 3), (0, 2): (CLUSTER, 16, 2), (1, 2): (WIDE, 8, 2)}.items(),
    ids=str,
)
def test_a_measurement_may_choose(tuning, geometry, planner):
    z = torch.empty(4096, 128256, dtype=BF16, device="meta")
    c, _, alive = abi.loss_call(raw.call(z, z, grad=z))
    found, own, again = ((ctypes.c_int32 * 10)() for _ in range(3))

    def plan(to):
        assert planner.kd_plan(ctypes.byref(c), (ctypes.c_int32 * 4)(*H100), to) == 0

    plan(own)
    try:
        planner.kd_tune(*tuning)
        plan(found)
    finally:
        planner.kd_tune(0, 0)
    plan(again)
    assert (found[0], found[4], found[3]) == geometry and list(own) == list(again)


def test_a_vocabulary_beyond_every_geometry(planner):
    z = torch.empty(1, 2**24, dtype=BF16, device="meta")
    c, _, alive = abi.loss_call(raw.call(z, z, grad=z))
    # a refusal, not a launch
    assert planner.kd_plan(ctypes.byref(c), (ctypes.c_int32 * 4)(*A100), (ctypes.c_int32 * 10)()) == 2


def run(z, v, y=None, **options):
    x = z.clone().requires_grad_()
    loss = fused_kd_loss(x * 1 if options.get("inplace") else x, v, y, backend="cuda", **options)
    loss.backward(torch.ones_like(loss))
    return loss.detach(), x.grad


def dtypes_of(name: str) -> list[torch.dtype]:
    return [torch.bfloat16] if GEOMETRIES[name][-1][2] < SHARED else [torch.float32, torch.bfloat16]


def check(geometry: str, name: str, dtype: torch.dtype) -> None:
    vocab, rows, *_ = GEOMETRIES[geometry]
    options = OPTIONS[name]
    z, v = make_rows("plain", rows, vocab, dtype)
    T = options.get("temperature", 1.0)
    on(geometry, z, v, options.get("divergence", "kl"), T)
    y = torch.arange(rows) * (vocab // 8) if "hard_weight" in options else None
    exact, exact_grad = expected(z, v, y, options)
    loss, grad = run(z, v, y, reduction="none", **options)
    total, in_place = run(z, v, y, reduction="sum", inplace=True, **options)
    order = 1 if options.get("divergence", "kl") in ("kl", "cross_entropy") else 2
    assert total.item() == pytest.approx(exact.sum().item(), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
    for i in range(rows):
        D = float(exact[i])
        assert abs(float(loss[i]) - D) <= value_bound(order, vocab, T, spread_of(z[i], v[i], T), D) + (
            2**-8 * D if loss.dtype == dtype != torch.float32 else 0
        )
        for g in (grad[i].double(), in_place[i].double()):
            slack = gradient_bound(order, float(exact_grad[i].norm()))
            if dtype == torch.float32:
                assert float((g - exact_grad[i]).norm()) <= slack
            else:
                assert ((g - exact_grad[i]).abs() <= cast_bound(dtype, exact_grad[i]) + slack).all()


ALL = [(g, n, d) for g in GEOMETRIES for n in OPTIONS for d in dtypes_of(g)]


# every seventh, and each of the smallest devices
QUICK = ALL[::7] + [
    (g, n, torch.bfloat16) for g in ("no room ahead", "ring of 2") for n in ("kl", "hard, order")
]


@pytest.mark.parametrize(("geometry", "name", "dtype"), QUICK, ids=str)
def test_geometries(geometry, name, dtype):
    """Value and gradient, through "none", whose backward has weights, and in place: geometry by family and
    dtype, a covering set."""
    check(geometry, name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("geometry", "name", "dtype"), ALL, ids=str)
def test_all_geometries(geometry, name, dtype):
    check(geometry, name, dtype)


# the families beside KL's and Renyi's, from both bases: mixtures with JSD's weights and skewed ones, without
# a mixture, TVD, orders below 0
FAMILIES = (
    *(x for x in APART if x not in ("kl", "cross_entropy") and not x.startswith("renyi")),
    *("jsd(0.2)", "skew_kl(0.7)", "skew_reverse_kl(0.7)", "alpha(0.4)", "alpha(2.5)"),
    *("reverse_renyi(0.3)", "reverse_renyi(3)"),
)


def eager(z, v, y=None, **options):
    """Row losses and their gradients from the eager backend, float64."""
    x = z.double().requires_grad_()
    loss = fused_kd_loss(x, v.double(), y, backend="eager", reduction="none", **options)
    loss.sum().backward()
    return loss.detach(), x.grad


def assert_close(z, found, exact, relative=3e-6, floor=1e-12) -> None:
    """(losses, gradients): relative to each, gradients of 16 bits within a rounding of theirs."""
    torch.testing.assert_close(
        found[0].double(),
        exact[0],
        rtol=relative + (2**-8 if found[0].dtype.itemsize == 2 else 0),
        atol=1e-30,
    )
    for g, exact_g in zip(found[1].double(), exact[1], strict=True):
        slack = relative * float(exact_g.norm()) + floor
        if z.dtype == torch.float32:
            assert float((g - exact_g).norm()) <= slack
        else:
            assert ((g - exact_g).abs() <= cast_bound(z.dtype, exact_g) + slack).all()


def check_family(
    geometry: str, divergence: str, dtype: torch.dtype, kind: str = "plain", T: float = 1.0
) -> None:
    vocab, rows, *_ = GEOMETRIES[geometry]
    z, v = make_rows(kind, rows, vocab, dtype)
    on(geometry, z, v, divergence, T)
    y = torch.arange(rows) * (vocab // 8)
    options = {"divergence": divergence, "temperature": T, "soft_weight": T, "hard_weight": 0.5}
    assert_close(z, run(z, v, y, reduction="none", **options), eager(z, v, y, **options))
    options = {"divergence": divergence, "temperature": T, "soft_weight": T * T}
    loss, grad = run(z, v, reduction="sum", inplace=True, **options)
    exact = eager(z, v, **options)
    assert_close(z, (exact[0], grad), exact)
    assert loss.item() == pytest.approx(exact[0].sum().item(), rel=1e-2 if dtype == torch.bfloat16 else 3e-6)


FAMILY_GRID = [(g, n, d) for g in GEOMETRIES for n in FAMILIES for d in dtypes_of(g)]


@pytest.mark.parametrize(("geometry", "divergence", "dtype"), FAMILY_GRID[::11], ids=str)
def test_families(geometry, divergence, dtype):
    """Value and gradient with labels and in place: a covering set."""
    check_family(geometry, divergence, dtype)


@pytest.mark.parametrize("divergence", USUAL)
def test_every_divergence(divergence):
    """Against the oracle, of a warp to a row and of several blocks."""
    for geometry, T in (("warps", 1.0), ("blocks", 4.0)):
        z, v = make_rows("plain", 2, GEOMETRIES[geometry][0])
        on(geometry, z, v, divergence, T)
        exact = expected(z, v, None, {"divergence": divergence, "temperature": T})
        assert_close(z, run(z, v, divergence=divergence, temperature=T, reduction="none"), exact)


@pytest.mark.parametrize("divergence", ["skew_kl(0.99)", "skew_reverse_kl(0.99)"])
def test_skews_of_little_weight(divergence):
    """D is as small as a weight's square."""
    z, v = make_rows("plain", 4, 1024)
    for T in (2.0, 30.0, 1e4):
        options = {"divergence": divergence, "temperature": T, "soft_weight": T * T}
        assert_close(z, run(z, v, reduction="none", **options), eager(z, v, **options), relative=1.2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("geometry", "divergence", "dtype"), FAMILY_GRID, ids=str)
@pytest.mark.parametrize(("kind", "T"), [("plain", 1.0), ("close", 30.0), ("offset", 2.0)])
def test_all_families(geometry, divergence, dtype, kind, T):
    check_family(geometry, divergence, dtype, kind, T)


@pytest.mark.parametrize("geometry", ["warps", "blocks, tiles", "cluster of 2"])
@pytest.mark.parametrize(
    "divergence", ["jsd(0.5)", "skew_kl(0.1)", "skew_reverse_kl(0.3)", "reverse_kl", "tvd", "alpha(-1)"]
)
def test_a_student_that_is_the_teacher(geometry, divergence):
    z, _ = make_rows("plain", 2, GEOMETRIES[geometry][0])
    on(geometry, z, z, divergence)
    loss, grad = run(z, z, divergence=divergence, reduction="none")
    assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize(
    "divergence", ["jsd(0.5)", "skew_kl(0.1)", "reverse_kl", "alpha(3)", "reverse_renyi(3)", "logit_matching"]
)
def test_limits_of_families(divergence):
    for geometry in ("block", "cluster of 2"):
        z, v = make_rows("plain", 2, GEOMETRIES[geometry][0])
        on(geometry, z, v, divergence, math.inf)
        options = {"divergence": divergence, "temperature": math.inf, "t_squared": True}
        assert_close(z, run(z, v, reduction="none", **options), eager(z, v, **options))


def test_golden_numbers():
    """Of nine classes, which do not average roundings out."""
    golden = json.loads(Path(__file__).with_name("golden.json").read_text())
    z, v = (torch.tensor(golden[x]) for x in ("student_logits", "teacher_logits"))  # exact in bf16
    for name, values in golden["values"].items():
        for (T, exact), dtype in zip(values.items(), (FP32, BF16, BF16, FP32), strict=True):
            loss = fused_kd_loss(
                z.to(dtype),
                v.to(dtype),
                divergence=name,
                temperature=float(T),
                reduction="none",
                backend="cuda",
            )
            torch.testing.assert_close(
                loss.double(), torch.tensor(exact, dtype=torch.float64), rtol=1e-6, atol=0
            )


@pytest.mark.parametrize("divergence", ["jsd(0.5)", "skew_kl(0.1)", "reverse_kl", "tvd"])
def test_rows_beyond_a_second_sweep(divergence):
    """Differences that a float's range does not hold, in some blocks of the row: it is left to fp64."""
    for geometry in ("tiles", "cluster of 4"):
        z, v = (x.clone() for x in make_rows("plain", 3, GEOMETRIES[geometry][0]))
        z[1, 7], v[2, 1600] = 100.0, -90.0
        on(geometry, z, v, divergence)
        options = {"divergence": divergence, "temperature": 1.0}
        assert_close(z, run(z, v, reduction="none", **options), eager(z, v, **options))


PAIRS = [
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
]


@pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=str)
@pytest.mark.parametrize("order", [1.0, 0.3, 3.0])
def test_mixed_dtypes(student, teacher, order):
    for geometry in ("blocks", "cluster of 2"):
        vocab = GEOMETRIES[geometry][0]
        z, v = make_rows("plain", 2, vocab, student, teacher)
        on(geometry, z, v, f"renyi({order})")
        loss, grad = run(z, v, divergence=f"renyi({order})", reduction="none")
        for i in range(2):
            D, g = divergence_row(
                z[i].double().numpy(), v[i].double().numpy(), f"renyi({order})" if order != 1 else "kl", 1.0
            )
            g = torch.from_numpy(g.astype(float))
            slack = gradient_bound(order, float(g.norm()))
            assert abs(float(loss[i]) - float(D)) <= value_bound(
                order, vocab, 1.0, spread_of(z[i], v[i], 1.0), float(D)
            )
            assert (
                (grad[i].double() - g).abs()
                <= (cast_bound(student, g) if student != torch.float32 else 0) + slack
            ).all()


@pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=str)
def test_dtypes_of_mixtures(student, teacher):
    for geometry, divergence in (
        ("blocks", "jsd(0.2)"),
        ("cluster of 2", "jsd(0.5)"),
        ("cluster of 2", "tvd"),
    ):
        z, v = make_rows("plain", 2, GEOMETRIES[geometry][0], student, teacher)
        on(geometry, z, v, divergence)
        assert_close(
            z, run(z, v, divergence=divergence, reduction="none"), eager(z, v, divergence=divergence)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", ["tiles", "cluster of 4"])
def test_kinds_of_rows(kind, geometry):
    """Offsets, outliers, peaked teachers, at low and high temperature: carried roundings, second sweeps, rows
    in fp64."""
    vocab = GEOMETRIES[geometry][0]
    z, v = make_rows(kind, 2, vocab)
    on(geometry, z, v)
    for T, order in ((0.05, 1.0), (1.0, 0.5), (1e4, 1.0)):
        name = "kl" if order == 1 else f"renyi({order})"
        loss, grad = run(z, v, divergence=name, temperature=T, soft_weight=T, reduction="none")
        for i in range(2):
            D, g = divergence_row(z[i].double().numpy(), v[i].double().numpy(), name, T)
            g = torch.from_numpy(g.astype(float))
            assert abs(float(loss[i]) - T * float(D)) <= T * value_bound(
                order, vocab, T, spread_of(z[i], v[i], T), float(D), kind.startswith("outlier")
            )
            assert float((grad[i].double() - g).norm()) <= gradient_bound(order, float(g.norm()))


@pytest.mark.parametrize("geometry", ["warps", "blocks", "cluster of 2"])
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_masks(geometry, where):
    vocab = GEOMETRIES[geometry][0]
    z, v = with_masks(*make_rows("plain", 2, vocab), where)
    on(geometry, z, v)
    for divergence in ("kl", "renyi(0.3)", "renyi(3)", "renyi(0)", "renyi(inf)"):
        loss, grad = run(z, v, divergence=divergence, reduction="none")
        x = z.double().requires_grad_()
        exact = fused_kd_loss(x, v.double(), divergence=divergence, reduction="none", backend="eager")
        exact.sum().backward()
        torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(grad.double(), x.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("geometry", ["blocks", "cluster of 2"])
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_masks_of_families(geometry, where):
    z, v = with_masks(*make_rows("plain", 2, GEOMETRIES[geometry][0]), where)
    y = torch.tensor([0, 1])
    on(geometry, z, v, "jsd(0.5)")
    for divergence in (
        "jsd(0.5)",
        "skew_kl(0.1)",
        "skew_reverse_kl(0.1)",
        "reverse_kl",
        "tvd",
        "alpha(-1)",
        "reverse_renyi(2)",
        "reverse_renyi(inf)",
    ):
        options = {"divergence": divergence, "hard_weight": 0.1 if where == "both" else 0.0}
        loss, grad = run(z, v, y if where == "both" else None, reduction="none", **options)
        exact, exact_grad = eager(z, v, y if where == "both" else None, **options)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
        if exact.isfinite().all():
            torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("geometry", ["warps", "blocks", "blocks, tiles", "cluster of 2"])
def test_rows_that_are_their_own(geometry):
    """nan, +inf, all masked, a label out of range, weight 0: each is one row's matter, and a row that does
    not count is not read."""
    vocab, rows = GEOMETRIES[geometry][0], 7
    z, v = make_rows("plain", rows, vocab)
    z[1, vocab // 2], v[2, vocab - 1], z[3] = math.nan, math.inf, -math.inf
    y = torch.zeros(rows, dtype=torch.int64)
    weight = torch.ones(rows, dtype=torch.float64)
    weight[5], z[5], y[5] = 0, math.nan, vocab + 5
    on(geometry, z, v)
    for y4 in (vocab, -1, 2**40):
        y[4] = y4
        grad = torch.full_like(z, 7.0)
        loss = cuda.loss(raw.call(z, v, y, weight, hard=0.5, grad=grad))
        assert loss[[1, 2, 3, 4]].isnan().all() and grad[[1, 2, 4]].isnan().all()
        assert loss[5] == 0 and (grad[5] == 0).all()
    exact, exact_grad = expected(z[[0, 6]], v[[0, 6]], y[[0, 6]], {"soft_weight": 1.0, "hard_weight": 0.5})
    torch.testing.assert_close(loss[[0, 6]], exact, rtol=1e-6, atol=0)
    assert ((grad[[0, 6]].double() - exact_grad).norm(dim=-1) <= 1e-6 * exact_grad.norm(dim=-1)).all()


@pytest.mark.parametrize("geometry", ["warps", "blocks", "cluster of 2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(geometry, dtype):
    """Shifted and strided rows of student, teacher and gradient, a vocabulary narrower than the logits: the
    same numbers, zeros beside."""
    vocab, rows = GEOMETRIES[geometry][0], 4
    z, v = make_rows("plain", rows, vocab, dtype)
    on(geometry, z, v)
    grad = torch.empty_like(z)
    loss = cuda.loss(raw.call(z, v, T=2.0, grad=grad))
    width = vocab + 24
    for shift_z, shift_v, shift_g in ((8, 8, 8), (1, 1, 1), (3, 3, 0), (0, 5, 0), (2, 7, 4)):
        spread = [torch.full((2, rows // 2 + 1, width + 8 * i), math.nan, dtype=dtype) for i in (1, 2, 3)]
        a, b, g = (
            x[:, :-1, s : s + vocab + (16 if i != 1 else 0)]
            for i, (x, s) in enumerate(zip(spread, (shift_z, shift_v, shift_g), strict=True))
        )
        a[..., :vocab], b[...] = z.view(2, rows // 2, vocab), v.view(2, rows // 2, vocab)
        outside = spread[2].clone()
        again = cuda.loss(raw.call(a, b, T=2.0, vocab=vocab, grad=g))
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            g[..., :vocab].reshape(rows, vocab),
            grad,
            rtol=2**-7 if dtype == torch.bfloat16 else 1e-5,
            atol=1e-7,
        )
        assert (g[..., vocab:] == 0).all()
        outside[:, :-1, shift_g : shift_g + vocab + 16] = g
        assert torch.equal(spread[2].isnan(), outside.isnan())  # nothing else was written


@pytest.mark.parametrize("geometry", ["blocks", "blocks, tiles", "cluster of 2"])
@pytest.mark.parametrize("divergence", ["renyi(0.7)", "jsd(0.5)"])
def test_repeats_are_the_same_bits(geometry, divergence):
    z, v = make_rows("plain", 4, GEOMETRIES[geometry][0])
    on(geometry, z, v, divergence)
    expected_loss, expected_grad = run(z, v, divergence=divergence, reduction="none")
    for _ in range(3):
        loss, grad = run(z, v, divergence=divergence, reduction="none")
        assert torch.equal(loss, expected_loss) and torch.equal(grad, expected_grad)


def test_clusters_that_do_not_fit():
    """A device that holds none of the clusters takes blocks."""
    z, v = make_rows("plain", 2, 2000)
    on("cluster of 4", z, v)
    expected_loss, _ = run(z, v, reduction="none")
    cuda.library().c.kd_simt_device((ctypes.c_int * 5)(90, 8, SHARED, ALL_SHARED, 0))
    loss, _ = run(z, v, reduction="none")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)


def test_values_that_cancel_are_swept_again():
    """References that say nothing of the row's mean difference: one class has nearly everything, at another
    difference."""
    for geometry, order in itertools.product(("tiles", "blocks", "cluster of 4"), (1.0, 0.3, 3.0)):
        vocab = GEOMETRIES[geometry][0]
        z, v = (x.clone() for x in make_rows("close", 2, vocab))
        z[:, vocab // 3 :: 7] += 3
        v[:, vocab // 3 :: 7] += 3.001
        z[:, vocab // 2 + 40], v[:, vocab // 2 + 40] = 40.0, 43.0
        on(geometry, z, v, f"renyi({order})")
        loss, grad = run(z, v, divergence=f"renyi({order})", temperature=20.0, reduction="none")
        for i in range(2):
            D, g = divergence_row(
                z[i].double().numpy(), v[i].double().numpy(), f"renyi({order})" if order != 1 else "kl", 20.0
            )
            assert abs(float(loss[i]) - float(D)) <= value_bound(order, vocab, 20.0, 3.0, float(D))
            g = torch.from_numpy(g.astype(float)) / 20
            assert float((grad[i].double() - g).norm()) <= gradient_bound(order, float(g.norm()))


def test_log_softmax_and_scale():
    for vocab, T, dtype in itertools.product(
        (5, 9001), (0.5, 2.0, math.inf), (torch.float32, torch.bfloat16)
    ):
        x = (3 * torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab))).to(dtype)
        x[0, 1] = 60.0
        x[1, 2] = -math.inf
        u = torch.randn(3, vocab, generator=torch.Generator().manual_seed(1)).to(dtype)
        y = x.double().requires_grad_()
        exact = tempered_log_softmax(y, T, backend="eager")
        exact.backward(u.double())
        room = {"rtol": 2e-6, "atol": 1e-9} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
        torch.testing.assert_close(cuda.log_softmax(x, None, T).double(), exact.detach(), **room)
        if math.isinf(T):  # nothing of x is left
            assert (cuda.log_softmax(x, u, T) == 0).all()
            continue
        torch.testing.assert_close(
            cuda.log_softmax(x, u, T).double(),
            y.grad,
            rtol=room["rtol"],
            atol=4e-5 if dtype == torch.bfloat16 else 1e-6,
        )
    x = torch.randn(3, 77, generator=torch.Generator().manual_seed(0))
    for y, factor in itertools.product(
        (x.clone(), x.bfloat16(), x.half(), x.flatten()[1:].clone()), (1.0, -3.0)
    ):
        exact = (y.float() * factor).to(y.dtype)
        cuda.scale_(y, torch.tensor(factor))
        assert torch.equal(y, exact)


# a softcap on either side, scales alone; the hard term's own, without a transform
MODIFIED = [
    *MODIFIERS,
    dict(student_transform=LogitTransform(0.5), teacher_transform=LogitTransform(0.25)),
    dict(label_smoothing=0.1, z_loss=1e-2),
]


def check_modifiers(geometry: str, divergence: str, dtypes, modifiers: dict, T: float) -> None:
    """A plain row, one with masks, one of a dominant class, one that does not count; "none", whose backward
    has weights, and in place."""
    vocab = GEOMETRIES[geometry][0]
    z, v = (
        torch.cat([make_rows(kind, 1, vocab)[side] for kind in ("plain", "close", "dominant", "plain")])
        for side in (0, 1)
    )
    z[1, 1::3] = v[1, 1::3] = -math.inf
    z, v, y = (
        z.to(dtypes[0]),
        v.to(dtypes[1]),
        torch.tensor([3, vocab - 1 - (vocab % 3 == 2), vocab // 3, -100]),
    )
    with_room(geometry)
    options = {
        "divergence": divergence,
        "temperature": T,
        "t_squared": math.isinf(T),
        "hard_weight": 0.7,
        **modifiers,
    }
    exact = eager(z, v, y, **options)
    found = run(z, v, y, reduction="none", **options)
    total, in_place = run(z, v, y, reduction="sum", inplace=True, **options)
    # transformed logits are rounded to fp32
    floor = 3e-7 if modifiers.get("student_transform") else 1e-12
    assert_close(z, found, exact, floor=floor)
    assert_close(z, (exact[0], in_place), exact, floor=floor)


TRIPLES = itertools.product(
    GEOMETRIES,
    SIDES,
    ((FP32, FP32), (BF16, BF16), (FP32, torch.float16), (BF16, FP32)),
    MODIFIED,
    (0.5, math.inf),
)
MODIFIER_GRID = [x for x in TRIPLES if x[-1] != math.inf or parse(x[1]).form.limit is not None]


@pytest.mark.parametrize("call", MODIFIER_GRID[::97], ids=lambda x: "-".join(map(str, x[:3])))
def test_modifiers(call):
    """Transforms, label smoothing and z-loss against the eager backend in fp64: a covering set."""
    check_modifiers(*call)


@pytest.mark.slow
@pytest.mark.parametrize("call", MODIFIER_GRID[::7], ids=lambda x: "-".join(map(str, x[:3])))
def test_more_modifiers(call):
    check_modifiers(*call)


def check_stats(geometry: str, divergence: str, dtype: torch.dtype, modifiers: dict, T: float) -> None:
    """As the eager backend in fp64 has them: rows plain, masked, for fp64 alone, without weight, broken. The
    loss is what it was."""
    vocab = GEOMETRIES[geometry][0]
    kinds = ("plain", "close", "outlier", "plain", "plain")
    z, v = (torch.cat([make_rows(kind, 1, vocab)[side] for kind in kinds]) for side in (0, 1))
    z[1, 1::3] = v[1, 1::3] = -math.inf
    z[0, [vocab // 2, vocab // 2 + 1]] = 20.0  # the first of two
    v[0, [3, vocab - 1]] = 20.0
    z[4, 0] = math.nan
    z, v, y = z.to(dtype), v.to(dtype), torch.tensor([3, 0, 1, -100, 2])
    with_room(geometry)
    options = {
        "divergence": divergence,
        "temperature": T,
        "t_squared": math.isinf(T),
        "hard_weight": 0.7,
        "reduction": "none",
        **modifiers,
    }
    x, w = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss, stats = fused_kd_loss(x, v, y, backend="cuda", return_stats=True, **options)
    alone = fused_kd_loss(w, v, y, backend="cuda", **options)
    loss.sum().backward(), alone.sum().backward()
    torch.testing.assert_close(loss, alone, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.grad, w.grad, rtol=0, atol=0, equal_nan=True)
    _, exact = fused_kd_loss(z.double(), v.double(), y, backend="eager", return_stats=True, **options)
    for name in MEANS[:6]:  # agree and correct are of the classes, which follow
        found, wanted = getattr(stats, name), getattr(exact, name).float()
        torch.testing.assert_close(
            found[:3], wanted[:3], rtol=3e-6, atol=1e-6, msg=lambda x, name=name: f"{name}: {x}"
        )
        assert found[3:].isnan().all(), name
    assert torch.equal(stats.student_top1, exact.student_top1) and torch.equal(
        stats.teacher_top1, exact.teacher_top1
    )


STATS_GRID = [
    x
    for x in itertools.product(GEOMETRIES, SIDES, (FP32, BF16), ({}, *MODIFIED[::3]), (1.0, math.inf))
    if x[-1] == 1.0 or parse(x[1]).form.limit
]


@pytest.mark.parametrize("call", STATS_GRID[::43], ids=lambda x: "-".join(map(str, x[:3])))
def test_stats_from_the_sweeps(call):
    check_stats(*call)


@pytest.mark.slow
@pytest.mark.parametrize("call", STATS_GRID[::3], ids=lambda x: "-".join(map(str, x[:3])))
def test_more_stats(call):
    check_stats(*call)


@pytest.mark.parametrize("geometry", ["cluster of 1", "block"])
def test_masked_rows_that_are_measured_again(geometry):
    """The second time from the start: what the first left in registers is none of their gradient."""
    vocab, rows = GEOMETRIES[geometry][:2]
    with_room(geometry)
    for name, where in (("renyi(0.5)", "both"), ("jsd(0.3)", "student"), ("alpha(-0.5)", "student")):
        raw.check("cuda", *with_masks(*make_rows("plain", rows, vocab), where), name, 1.5)


# ---------------------------------------------------------------- sanitizers


@pytest.fixture(scope="module")
def walks():
    try:
        return {x: build.walk(x) for x in ("address", "thread")}
    except AssertionError as error:
        if "cannot find -l" in str(error):
            pytest.skip("g++ has no sanitizers")
        raise


def walk(path, *fault):
    return subprocess.run([path, *fault], capture_output=True, text=True)


@pytest.mark.slow
def test_no_access_out_of_bounds(walks):
    done = walk(walks["address"])
    assert done.returncode == 0 and "walked" in done.stdout and "ERROR" not in done.stderr, done.stderr[
        -3000:
    ]


@pytest.mark.slow
def test_no_race(walks):
    done = walk(walks["thread"])
    assert done.returncode == 0 and "walked" in done.stdout and "WARNING" not in done.stderr, done.stderr[
        -3000:
    ]


@pytest.mark.slow
def test_planted_faults_are_reported(walks):
    race, overrun = walk(walks["thread"], "race"), walk(walks["address"], "overrun")
    assert race.returncode != 0 and "data race" in race.stderr and "cuda/reference.h" in race.stderr
    assert (
        overrun.returncode != 0 and "heap-buffer-overflow" in overrun.stderr and "copy_bulk" in overrun.stderr
    )
