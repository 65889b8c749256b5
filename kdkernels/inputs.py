"""What a person passes: numbers of any make become Python's, and what no backend can take is refused by
name."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

P, R = ParamSpec("P"), TypeVar("R")
LARGEST = sys.float_info.max


# ---------------------------------------------------------------- numbers


def number(name: str, x: Any) -> float | int:
    """x as a Python number, also of numpy or a 0-d tensor (which the host waits for); TypeError for what is
    none."""
    kind = type(x)
    if kind is float or kind is int:
        return x
    if isinstance(x, Tensor):
        if x.dim() or x.dtype == torch.bool or x.is_complex() or x.device.type == "meta":
            raise TypeError(
                f"{name}: must be a number or a 0-d tensor of one, got a tensor {tuple(x.shape)} of "
                f"{x.dtype} on {x.device}"
            )
        if x.requires_grad:
            raise ValueError(f"{name}: receives no gradient; pass {name}.detach()")
        x = x.item()
    elif getattr(x, "shape", None) == () and hasattr(x, "item"):  # numpy's
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name}: must be a number, got {shown(x)}")
    return x


def check_finite(name: str, x: float | int) -> None:
    """Raise for nan, and what is out of a float's range."""
    if not -LARGEST <= x <= LARGEST:
        raise ValueError(f"{name}: must be finite, got {shown(x)}")


def integer(x: Any) -> int | None:
    """x as a Python integer, also of numpy; None for what is none."""
    if isinstance(x, (int, torch.SymInt)):
        return None if isinstance(x, bool) else x
    x = (
        x.item()
        if getattr(x, "shape", None) == () and not isinstance(x, Tensor) and hasattr(x, "item")
        else None
    )
    return x if isinstance(x, int) and not isinstance(x, bool) else None


def shown(x: Any) -> str:
    """How an error shows a value: its beginning, where that is long."""
    if isinstance(x, int) and abs(x) > LARGEST:
        return f"an integer of {x.bit_length()} bits"
    text = repr(x)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---------------------------------------------------------------- tensors


def check_dense(name: str, x: Tensor) -> None:
    """Raise for a tensor that does not lie in this process's memory as sizes and strides say."""
    if type(x) is not Tensor and hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name}: must not be a DTensor. Of logits that every rank compares whole, pass "
            f"{name}.full_tensor(); of tokens split between "
            "ranks, each rank its own (to_local()); the gradient in a head split between ranks would "
            "be wrong either way"
        )
    if x.is_nested:
        raise TypeError(
            f"{name}: must not be a nested tensor; pass a padded one, with the padding left out by "
            "labels or token_weight"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: must be dense, got the layout {x.layout}; pass {name}.to_dense()")


def readable(x: Tensor) -> bool:
    """Whether the values of x can be looked at without waiting for a device: not those of a fake or a
    torch.func tensor."""
    return x.is_cpu and not _is_fake(x) and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _is_fake(x: Tensor) -> bool:
    return type(x) is not Tensor and isinstance(x, torch._subclasses.FakeTensor)


def differentiated(x: Tensor) -> bool:
    """Whether a derivative in x is asked for, backward or forward."""
    return x.requires_grad or (forward_ad._current_level >= 0 and has_tangent(x))


def leaf_detached(x: Any) -> Any:
    """x without its requires_grad where it is a parameter that nobody asks a gradient of here; what a graph
    stands behind stays as it is, since detaching it would cut the graph unseen."""
    return x.detach() if isinstance(x, Tensor) and x.requires_grad and x.is_leaf else x


def has_tangent(x: Tensor) -> bool:
    """Whether x has a tangent of forward-mode differentiation, which asks for no requires_grad."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def check_mode(
    function: str, tensors: Iterable[Tensor | None], by_autograd: bool, instead: str = 'backend="eager"'
) -> None:
    """Raise under a mode of torch in which the result or its derivative would be wrong; not for graphs of
    torch.compile.

    by_autograd: nothing but PyTorch runs.
    """
    if torch._C._is_tracing():
        raise RuntimeError(
            f"{function}: torch.jit.trace would keep this call's sizes for all others; use "
            "torch.compile or torch.export"
        )
    if by_autograd:
        return
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{function}: torch.func transforms need {instead}")
    if forward_ad._current_level >= 0 and any(isinstance(x, Tensor) and has_tangent(x) for x in tensors):
        raise RuntimeError(f"{function}: forward-mode derivatives need {instead}")


def is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which know PyTorch's own steps alone."""
    return torch._C._are_functorch_transforms_active() or any(has_tangent(x) for x in tensors)


def is_batched(upstream: Tensor) -> bool:
    """Whether an upstream gradient is many at once."""
    # first what is quick to ask: a plain tensor has a storage, a batched one has none
    return (
        not torch.compiler.is_compiling()
        and not torch._C._has_storage(upstream)
        and "Batched" in str(torch._C._dispatch_keys(upstream))
    )


def check_upstream(function: str, upstream: Tensor) -> None:
    """Raise for many upstream gradients at once: the gradient is written over, or the operator run again, for
    one."""
    if is_batched(upstream):
        raise RuntimeError(f'{function}: is_grads_batched needs fused_kd_loss(backend="eager")')


def saveable(x: Any) -> Any:
    """x, or where it was made under torch.inference_mode the same memory as a tensor that autograd saves for
    a backward."""
    if not isinstance(x, Tensor) or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(
        x.untyped_storage(), x.storage_offset(), x.shape, x.stride()
    )


def rows_overlap(x: Tensor) -> bool:
    """Whether elements of x share memory with each other, as those of an expanded tensor do."""
    if torch.compiler.is_compiling():  # where strides may be symbols
        return any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))
    span = 0  # of the dimensions with smaller strides
    for stride, size in sorted(
        (stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1
    ):
        if stride <= span:
            return x.numel() > 0
        span += stride * (size - 1)
    return False


def overlap(x: Tensor, y: Tensor) -> bool:
    """Whether x and y share memory; rows of y are taken to reach from their first to their last element."""
    if x.device.type == "meta" or x.device != y.device or _is_fake(x) or not x.numel() or not y.numel():
        return False
    ends = [(t.data_ptr(), t.data_ptr() + _span(t.shape, t.stride()) * t.element_size()) for t in (x, y)]
    if ends[0][1] <= ends[1][0] or ends[1][1] <= ends[0][0]:
        return False
    # of the rows of x, which are apart from each other, the last that begins before a row of y ends
    (starts, stops), (first, last) = _rows(x), _rows(y)
    starts, stops = starts.sort().values, stops.sort().values
    before = torch.searchsorted(starts, last) - 1
    return bool(((before >= 0) & (stops[before.clamp_min(0)] > first)).any())


def _span(shape: Iterable[int], strides: Iterable[int]) -> int:
    return 1 + sum(stride * (size - 1) for size, stride in zip(shape, strides, strict=True))


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Addresses at which the rows of x begin and end; a broadcast row is one."""
    start = torch.full((1,), x.data_ptr())
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if stride:
            start = (start[:, None] + torch.arange(size) * (stride * x.element_size())).flatten()
    return start, start + _span(x.shape[-1:], x.stride()[-1:]) * x.element_size()


# ---------------------------------------------------------------- names


def check_names(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise for the first name that is not known, with the nearest that is."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def names_checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which says of an unknown keyword argument what the nearest one is (as Python itself does
    from 3.13 on)."""
    known = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not known.issuperset(kwargs):
            check_names(function.__name__, kwargs, known)
        return function(*args, **kwargs)

    return call
