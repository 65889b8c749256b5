"""Gradients in recycled memory: never shared while alive, found again when not, and given up under pressure."""

import gc
import threading

import pytest
import torch
from rows import make_rows

from kdkernels import fused_kd_loss, recycle

pytestmark = pytest.mark.skipif(not recycle._possible, reason="no MADV_FREE")
ROWS, VOCAB = 64, 40000  # 10 MB in fp32


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(recycle, "_kept", [])


def gradient(z, v):
    x = z.clone().requires_grad_()
    fused_kd_loss(x, v, temperature=2.0).backward()
    return x.grad


def test_memory_is_found_again_but_never_shared():
    z, v = make_rows("plain", ROWS, VOCAB)
    first = gradient(z, v)
    second = gradient(z, v)
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    pointer, expected = second.data_ptr(), second.clone()
    row = second[3]  # a view keeps the block
    del second
    gc.collect()
    third = gradient(z, v)
    assert third.data_ptr() != pointer and torch.equal(row, expected[3])
    del row
    fourth = gradient(z, v)
    assert fourth.data_ptr() == pointer and torch.equal(fourth, expected)


def test_sizes():
    like = torch.empty(ROWS, VOCAB)
    block = recycle.empty(like)
    assert block.shape == like.shape and block.is_contiguous() and block.dtype == like.dtype
    pointer = block.data_ptr()
    del block
    assert recycle.empty(like[: ROWS - 1]).data_ptr() == pointer  # a little smaller: reused
    assert recycle.empty(torch.empty(4 * ROWS, VOCAB)).data_ptr() != pointer
    first, second = [recycle.empty(like).data_ptr() for _ in range(2)]
    assert first == second  # the larger block serves what is much smaller too, or that would never be recycled again
    assert recycle.empty(torch.empty(3, 5)).shape == (3, 5)
    assert recycle.empty(like.bfloat16()).dtype == torch.bfloat16


def test_threads():
    z, v = make_rows("plain", ROWS, VOCAB)
    expected, wrong = gradient(z, v), []

    def work():
        for _ in range(5):
            if not torch.equal(gradient(z, v), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_finalizer_in_the_middle():
    """A block that comes back while one is looked for."""

    class Interrupted(type(recycle._take(recycle.SMALLEST))):
        def __len__(self):
            if self.back is not None:
                back, self.back = self.back, None
                recycle._release(back)
            return super().__len__()

    block = Interrupted(-1, 3 * recycle.SMALLEST)
    block.back = recycle._take(2 * recycle.SMALLEST)
    recycle._kept.append(block)
    assert len(recycle._take(int(2.5 * recycle.SMALLEST))) >= 2.5 * recycle.SMALLEST
