"""CUDA kernels of ours (csrc/cuda.cu) behind ctypes: NVIDIA GPUs from compute capability 8.0.

Everything is put on the current stream of the tensors' device; nothing waits for it, and the workspace is
torch's, so that a call can be captured into a graph.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from ..call import Call
from . import abi

name = "cuda"

LIBRARY = Path(__file__).parent.parent / "_cuda.so"


@functools.cache
def library() -> abi.Library | str:
    """The CUDA library, or why there is none."""
    if not LIBRARY.exists():
        reason = abi.build_record().get("cuda error", "the CUDA library was not built")
        return f"{reason}; reinstall kdkernels with KDKERNELS_CUDA=1 and nvcc 12.8 or later on PATH"
    try:
        return abi.Library(LIBRARY, "cuda")
    except OSError as error:
        return str(error)


@functools.lru_cache(maxsize=16)
def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...] = ()) -> str | None:
    """Why this backend cannot run on a device for such logits; None when it can."""
    if device.type != "cuda" or torch.version.hip:
        return f"it takes CUDA tensors, not {'ROCm' if device.type == 'cuda' else device.type}"
    if torch.float64 in dtypes:
        return "it computes in fp32, and float64 logits ask for more"
    found = library()
    if isinstance(found, str):
        return found
    reason = found.c.kd_unavailable(device.index or 0)
    return reason and reason.decode()


def _where(device: torch.device) -> dict:
    """The device and its current stream, as a call takes them."""
    if device.type != "cuda":  # tests run the kernels on host threads
        return {}
    index = torch.cuda.current_device() if device.index is None else device.index
    return {"device": index, "stream": torch.cuda.current_stream(index).cuda_stream}


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"CUDA backend: {library().c.kd_error(status).decode()} (status {status})")


def loss(call: Call) -> Tensor:
    """The contract of `Call`. The kernels write the student's dtype: another one goes through a copy."""
    grad = call.grad
    if grad is not None and grad.dtype != call.student.dtype:
        student = call.student.to(torch.promote_types(call.student.dtype, grad.dtype))
        copy = torch.empty_like(student)
        out = loss(call._replace(student=student, grad=copy))
        grad.copy_(copy)
        return out
    lib = library()
    c, out, alive = abi.loss_call(call, **_where(call.student.device))
    c.workspace_size = lib.c.kd_workspace(ctypes.byref(c))
    if c.workspace_size < 0:
        _check(-c.workspace_size)
    if c.workspace_size:
        workspace = torch.empty(c.workspace_size, dtype=torch.uint8, device=call.student.device)
        c.workspace = workspace.data_ptr()
    _check(lib.loss(ctypes.byref(c)))
    return out


def log_softmax(logits: Tensor, upstream: Tensor | None, temperature: float) -> Tensor:
    """The operator's contract (ops.py)."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if out.numel() == 0:
        return out
    if upstream is not None and math.isinf(temperature):
        return out.zero_()
    call, alive = abi.log_softmax_call(logits, upstream, out, temperature, **_where(logits.device))
    _check(library().log_softmax(ctypes.byref(call)))
    return out


def scale_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, 0-d on its device, without waiting for it; nothing is moved where it is 1."""
    if not grad.is_contiguous() or grad.dtype == torch.float64:
        grad.mul_(factor)
        return
    where = _where(grad.device)
    sizes = grad.numel(), abi.DTYPES[grad.dtype], abi.DTYPES[factor.dtype], where.get("device", 0), 0
    call = abi.Scale(grad.data_ptr(), factor.data_ptr(), where.get("stream"), *sizes)
    _check(library().c.kd_scale(ctypes.byref(call)))
