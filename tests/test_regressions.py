"""Each test is named by what once went wrong."""

import threading

import pytest
import torch
from rows import make_rows
from torch.utils.checkpoint import checkpoint

from kdkernels import fused_kd_loss, fused_linear_kd_loss

BACKWARDS = ["logits", "logits in place", "both models", "hidden states"]


def losses(what: str, dtype: torch.dtype, rows: int = 6, vocab: int = 300):
    """(loss of one tensor, that tensor) for a way to a loss."""
    z, v = make_rows("plain", rows, vocab, dtype)
    if what == "hidden states":
        head = torch.randn(vocab, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
        teacher = torch.randn(rows, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
        options = dict(memory_budget=2 * vocab * 8)
        return lambda h: fused_linear_kd_loss(h, head, teacher, head, **options), teacher.roll(1).requires_grad_()
    if what == "both models":
        return lambda x: fused_kd_loss(x, x.detach().roll(1, 0).requires_grad_(), teacher_grad=True), z.requires_grad_()
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
    ("dtype", "small", "large"), [(torch.float16, 1.0, 65536.0), (torch.float32, 1e-38, 1.0), (torch.float32, 0.0, 1.0)]
)
@pytest.mark.parametrize("what", BACKWARDS)
def test_a_backward_with_a_small_upstream_took_the_digits_of_the_next(what, dtype, small, large):
    """As logging the gradient's norm without the loss scale, before the scaled backward; after 0 everything was nan."""
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
        threads = [threading.Thread(target=backward, args=(whole, scale, ready)) for scale in (0.5, 2.0, 3.0, 7.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
