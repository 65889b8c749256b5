"""Triton: CUDA, ROCm and XPU from one source; CPU tensors under its interpreter, for tests.

`loss` goes through launch.py (a call's launches), plan.py (their geometry), counters.py (zeros to wait at)
and kernels.py (what is launched). Rows go from stage to stage: sums.py, close.py, gradient.py; mixture.py has
two stages of its own, careful.py the rows that are out of a float's range.
"""

from __future__ import annotations

import functools
import importlib.util
import math

import torch
from torch import Tensor

from ...call import Call
from . import counters
from .launch import Launch, interpreting, launches, on
from .launch import kernel as kernel
from .numbers import single
from .plan import ACCESS, Device

name = "triton"

SOFTMAX_BLOCK = 2048
SCALE_BLOCK = 8192
SCALE_PROGRAMS = 8  # of `scale_all`, on a multiprocessor


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...] = ()) -> str | None:
    """Why this backend cannot run on a device for such logits; None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install kdkernels[triton]"
    if device.type not in ("cuda", "xpu", "cpu"):
        return f"triton has no {device.type} device"
    if device.type == "cpu" and not interpreting():
        return "CPU tensors run under triton's interpreter only: TRITON_INTERPRET=1, for tests"
    if torch.float64 in dtypes:
        return "it computes in fp32, and float64 logits ask for more"
    return None


@functools.lru_cache(maxsize=16)
def figures(device: torch.device) -> Device:
    """What the plan needs to know of a device."""
    if device.type == "cpu":
        return Device(processors=2, in_turn=True)
    properties = getattr(torch, device.type).get_device_properties(device)
    known = [getattr(properties, x, None) for x in ("multi_processor_count", "gpu_subslice_count")]
    nvidia = device.type == "cuda" and not torch.version.hip
    warp, major = getattr(properties, "warp_size", None) or 32, properties.major if nvidia else 0
    return Device(next((x for x in known if x), 64), warp, nvidia, major=major)


def loss(call: Call) -> Tensor:
    """The contract of `Call`."""
    if call.stats is not None:
        call.stats.fill_(math.nan)  # of rows that count for nothing
    device = call.student.device
    out = call.student.new_empty(math.prod(call.student.shape[:-1]), dtype=torch.float64)
    if len(out):
        with on(device):
            at = counters.place(device) if call.keeps else None
            found, tensors = launches(call, out, figures(device), at)
            for launch in found:
                launch.run(tensors)
            counts = tensors[-1]
            if counts is not out:
                counters.give(counts, at)
    return out


def log_softmax(logits: Tensor, upstream: Tensor | None, temperature: float) -> Tensor:
    """The operator's contract (ops.py)."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    vocab = logits.shape[-1]
    if out.numel() == 0:
        return out
    if math.isinf(temperature):  # uniform over the classes that are not masked
        x = logits.float()
        return (
            out.zero_()
            if upstream is not None
            else torch.where(x > -math.inf, x - x, x).log_softmax(-1).to(logits.dtype)
        )
    x, u = logits.contiguous(), out if upstream is None else upstream.contiguous()
    k = single(1 / temperature)
    arguments = dict(vocab=vocab, k=k, k_low=1 / temperature - k)
    arguments |= dict(BACKWARD=upstream is not None, BLOCK=SOFTMAX_BLOCK)
    with on(logits.device):
        Launch("log_softmax_rows", out.numel() // vocab, arguments, 8).run((x, u, out))
    return out


def scale_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, 0-d on its device, without waiting for it; nothing is moved where it is 1."""
    count = grad.numel()
    if not grad.is_contiguous():
        grad.mul_(factor)
    elif count:
        with on(grad.device):
            aligned = grad.data_ptr() % ACCESS == 0
            launch = _scaling(count, figures(grad.device).processors, aligned, grad.dtype, factor.dtype)
            launch.run((grad, factor))


@functools.lru_cache(maxsize=64)
def _scaling(count: int, processors: int, *_) -> Launch:
    """What `scale_` launches for such a gradient and factor."""
    grid = min(-(-count // SCALE_BLOCK), SCALE_PROGRAMS * processors)
    return Launch("scale_all", grid, dict(count=count, BLOCK=SCALE_BLOCK), 8)
