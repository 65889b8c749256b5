"""The counters of rows that several programs share: zeros after every call, and kept where no other call can
come upon them."""

import math
import threading

import pytest
import raw
import torch
from rows import make_rows

pytest.importorskip("triton")

from kdkernels import LinearKDLoss, fused_kd_loss, fused_linear_kd_loss
from kdkernels.backends import triton as backend
from kdkernels.backends.triton import counters
from kdkernels.backends.triton.plan import Device

HERE = torch.device("cpu"), 0
VOCAB = 9000  # two programs to a row of bf16
EXACT = "renyi(0.9)"  # counts in its second sweep; of the interpreter's, no other does


@pytest.fixture(autouse=True)
def nothing_kept():
    counters._kept.clear()
    yield
    counters._kept.clear()


def of_call(**options):
    """(losses, launches, counters) of four rows: one is lost and one is not read."""
    z, v = make_rows("plain", 4, VOCAB)
    z[1, 5] = math.nan
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    out = torch.empty(4, dtype=torch.float64)
    call = raw.call(z, v, None, weight, EXACT, **options)
    found, tensors = backend.launches(call, out, Device(2, in_turn=True), HERE)
    return out, found, tensors


def test_what_one_kernel_counts_another_sets_back():
    out, (*fast, careful), tensors = of_call()
    assert fast[0].arguments["parts"] > 1
    for x in fast:
        x.run(tensors)
    assert (tensors[-1].view(torch.int32).view(4, 2) != 0).any(1).tolist() == [True, False, False, True]
    careful.run(tensors)
    assert (tensors[-1] == 0).all() and out.isnan().tolist() == [False, True, False, False]


def loss(rows=1):
    z, v = make_rows("plain", rows, VOCAB)
    return fused_kd_loss(z, v, divergence=EXACT, reduction="none", backend="triton")


def test_one_call_s_zeros_serve_the_next():
    right, (kept,) = loss(2), counters._kept.values()
    assert (kept == 0).all() and kept.numel() == 2
    assert torch.equal(loss(2), right)
    loss(1)  # takes the first of them
    assert counters._kept == {HERE: kept} and (kept == 0).all()
    loss(3)
    assert counters._kept[HERE].numel() == 3


def test_a_row_to_a_program_needs_none():
    z, v = make_rows("plain", 3, 100)
    fused_kd_loss(z, v, backend="triton")
    assert not counters._kept


def test_a_call_that_fails_between_its_launches_gives_nothing_back(monkeypatch):
    right, run = loss(), backend.Launch.run

    def fail(self, tensors):
        if self.kernel == "careful_rows":
            raise KeyboardInterrupt
        run(self, tensors)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(backend.Launch, "run", fail)
        loss()
    assert not counters._kept
    assert torch.equal(loss(), right)


def test_calls_at_one_time_have_counters_of_their_own():
    """Another thread on the same stream, in the middle of this one's call."""
    first = counters.take(torch.zeros(4), HERE)
    counters.give(first, HERE)
    mine, found = counters.take(torch.zeros(4), HERE), []
    thread = threading.Thread(target=lambda: found.append(counters.take(torch.zeros(4), HERE)))
    thread.start()
    thread.join()
    assert mine is first and found[0].data_ptr() != mine.data_ptr()


def test_nothing_is_kept_where_a_compiler_plans_memory():
    """The operators, as a compiled graph runs them, whose CUDA graphs' pools are to be empty after a step."""
    z, v = make_rows("plain", 1, VOCAB)
    arguments = raw.call(z, v, divergence=EXACT).flat("triton")[:-2]
    torch.ops.kdkernels.loss.default(*arguments, True, False)
    torch.ops.kdkernels.loss_into.default(*arguments, None, None)
    assert not counters._kept
    linear = torch.randn(1, 8), torch.randn(VOCAB, 8)
    options = dict(divergence=EXACT, backend="triton")
    torch.compile(fused_linear_kd_loss, backend="eager", fullgraph=True)(*linear, *linear, **options)
    assert not counters._kept
    exported = torch.export.export(LinearKDLoss(**options), (*linear, *linear))
    exported.module()(*linear, *linear)
    assert not counters._kept
    fused_linear_kd_loss(*linear, *linear, **options)
    assert counters._kept


def test_a_stream_that_records_a_graph_keeps_none(monkeypatch):
    """And every other has its own."""
    device, stream, capturing = torch.device("cuda", 1), 7, False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: (index, stream), raising=False)
    first = counters.place(device)
    stream = 8
    assert first == (device, (1, 7)) and counters.place(device) == (device, (1, 8))
    capturing = True
    assert counters.place(device) is None and counters.place(torch.device("xpu", 0)) is None
    a, b = (counters.take(torch.zeros(4), None) for _ in range(2))
    counters.give(a, None)
    assert not counters._kept and a is not b and (a == 0).all()
