"""Gradients in recycled memory: never shared while alive, found again when not, and given up under
pressure."""

import gc
import mmap
import os
import subprocess
import sys
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
    # the larger block serves what is much smaller too, or that would never be recycled again
    assert first == second
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


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system for the pages back as Linux does")
def test_a_gradient_that_is_alive_at_the_interpreters_exit_keeps_its_values():
    """Whoever registered with atexit before us runs after us; then the system takes all memory that it may
    (MADV_PAGEOUT = 21)."""
    done = run(
        "import atexit, ctypes\n"
        "kept = []\n"
        "@atexit.register\n"
        "def look():\n"
        "    grad, before = kept\n"
        "    ctypes.CDLL(None).madvise(ctypes.c_void_p(grad.data_ptr()), ctypes.c_size_t(4 * "
        "grad.numel()), 21)\n"
        "    print(torch.equal(grad, before))\n"
        "import torch\n"
        "from kdkernels import fused_kd_loss, recycle\n"
        f"x = torch.randn({ROWS}, {VOCAB}, requires_grad=True)\n"
        f"fused_kd_loss(x, torch.randn({ROWS}, {VOCAB})).backward()\n"
        "kept += [x.grad, x.grad.clone()]\n"
    )
    assert done == ["True"]


# more than there are addresses, more than a size can say
@pytest.mark.parametrize("classes", [1 << 46, 1 << 62])
def test_no_memory_is_torchs_error(classes):
    recycle.empty(torch.empty(ROWS, VOCAB))
    assert recycle._kept
    with pytest.raises(RuntimeError, match="allocate|overflow"):
        recycle.empty(torch.empty(1).expand(classes))
    assert not recycle._kept  # given back before the second attempt


def test_no_recycled_memory_is_plain_memory(monkeypatch):
    """Where the mapping fails and torch's allocator still finds some."""
    z, v = make_rows("plain", ROWS, VOCAB)
    expected = gradient(z, v)

    def none_left(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(recycle, "_kept", [])
    monkeypatch.setattr(recycle.mmap, "mmap", none_left)
    assert torch.equal(gradient(z, v), expected)


def test_memory_that_cannot_be_marked_is_not_kept():
    """As under mlockall; a finalizer's error would be printed."""

    class Locked(mmap.mmap):
        def madvise(self, *args):
            raise OSError(22, "Invalid argument")

    recycle._release(Locked(-1, recycle.SMALLEST))
    assert not recycle._kept


def test_what_a_recycled_gradient_can_do():
    """All but a resized storage, which is torch's own error; it is plain memory where recycling is turned
    off."""
    z, v = make_rows("plain", ROWS, VOCAB)
    grad = gradient(z, v)
    expected = grad.clone()
    with pytest.raises(RuntimeError, match="not resizable"):
        grad.untyped_storage().resize_(0)
    assert torch.equal(grad, expected)
    assert torch.equal(grad.share_memory_(), expected) and grad.is_shared()
    code = (
        "import torch\n"
        "from kdkernels import recycle\n"
        f"x = recycle.empty(torch.empty({ROWS}, {VOCAB}))\n"
        "x.untyped_storage().resize_(0)\n"
        "print(x.untyped_storage().size())\n"
    )
    env = {**os.environ, "KDKERNELS_RECYCLE": "0"}
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout == "0\n"
    )
