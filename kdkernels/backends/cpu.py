"""The CPU library (csrc/cpu.cpp) behind ctypes."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from ..call import Call
from . import abi

name = "cpu"

LIBRARY = Path(__file__).parent.parent / "_cpu.so"
_BAD_LABEL = 1


@functools.cache
def library() -> abi.Library | str:
    """The CPU library, or why there is none."""
    if not LIBRARY.exists():
        reason = abi.build_record().get("error", f"there is no {LIBRARY.name} in the package")
        return f"{reason}; install a C++ compiler and reinstall kdkernels (CXX names the one to take)"
    try:
        found = abi.Library(LIBRARY, "cpu")
    except OSError as error:
        return str(error)
    return (
        found
        if found.isa != "none"
        else "the processor has none of the instruction sets the library was built for"
    )


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...] = ()) -> str | None:
    """Why this backend cannot run on a device for such logits; None when it can."""
    if device.type != "cpu":
        return f"it takes CPU tensors, not {device.type}"
    found = library()
    return found if isinstance(found, str) else None


def loss(call: Call) -> Tensor:
    """The contract of `Call`."""
    c, out, alive = abi.loss_call(call, threads=torch.get_num_threads())
    status = library().loss(ctypes.byref(c))
    if status == _BAD_LABEL:
        label = alive[2].view(-1)[c.bad_row].item()
        raise ValueError(
            f"labels: row {c.bad_row} has label {label}; labels are in [0, {c.vocab}) or ignore_index"
        )
    if status:
        raise RuntimeError(f"kd_loss refused the call (status {status})")
    return out


def log_softmax(logits: Tensor, upstream: Tensor | None, temperature: float) -> Tensor:
    """The operator's contract (ops.py)."""
    out = torch.empty(logits.shape, dtype=logits.dtype)
    if out.numel() == 0:
        return out
    if upstream is not None and math.isinf(temperature):
        return out.zero_()
    call, alive = abi.log_softmax_call(logits, upstream, out, temperature, threads=torch.get_num_threads())
    library().log_softmax(ctypes.byref(call))
    return out
