"""The C++ library behind ctypes: one struct per call (csrc/api.h), no torch and no Python in its build.

Loading checks that the library speaks the same language as this package: the size of each struct and the list of divergences.
"""

from __future__ import annotations

import ctypes
import functools
import math
from ctypes import c_double, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from .. import divergence as math_of

name = "cpu"

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
LIBRARY = Path(__file__).parent.parent / "_cpu.so"
BUILD_RECORD = Path(__file__).parent.parent / "_build.txt"
_BAD_LABEL = 1


class Call(ctypes.Structure):
    """kd_call of csrc/api.h."""

    _fields_ = [
        *((x, c_void_p) for x in ("student", "teacher", "grad", "labels", "weight", "loss")),
        *((x, c_int64) for x in ("rows", "inner", "vocab", "grad_width")),
        *((x, c_int64 * 2) for x in ("student_stride", "teacher_stride", "grad_stride")),
        *((x, c_int32) for x in ("student_dtype", "teacher_dtype", "divergence", "threads", "fresh", "reserved")),
        *((x, c_double) for x in ("order", "temperature", "value_scale", "grad_scale", "hard_scale", "hard_grad_scale")),
        ("bad_row", c_int64),
    ]


class LogSoftmaxCall(ctypes.Structure):
    """kd_log_softmax_call of csrc/api.h."""

    _fields_ = [
        *((x, c_void_p) for x in ("logits", "upstream", "out")),
        *((x, c_int64) for x in ("rows", "vocab", "logits_stride", "upstream_stride", "out_stride")),
        *((x, c_int32) for x in ("dtype", "threads")),
        ("temperature", c_double),
    ]


class Library:
    """A loaded library and what it says of itself; OSError with a remedy when it is not this package's."""

    def __init__(self, path: Path):
        lib = ctypes.CDLL(str(path))
        for symbol, result in {
            "kd_call_size": c_int64,
            "kd_log_softmax_call_size": c_int64,
            "kd_divergences": ctypes.c_char_p,
            "kd_isa": ctypes.c_char_p,
            "kd_openmp": ctypes.c_int,
        }.items():
            getattr(lib, symbol).restype = result
        sizes = {"kd_call": (lib.kd_call_size(), Call), "kd_log_softmax_call": (lib.kd_log_softmax_call_size(), LogSoftmaxCall)}
        for struct, (size, cls) in sizes.items():
            if size != ctypes.sizeof(cls):
                raise OSError(f"{path.name}: {struct} has {size} bytes, this package's {ctypes.sizeof(cls)}; reinstall kdkernels")
        names = lib.kd_divergences().decode()
        if names != ",".join(math_of.REGISTRY):
            raise OSError(f"{path.name}: its divergences are {names}, this package's {','.join(math_of.REGISTRY)}; reinstall kdkernels")
        self.isa, self.openmp = lib.kd_isa().decode(), bool(lib.kd_openmp())
        self.loss, self.log_softmax = lib.kd_loss, lib.kd_log_softmax
        self.loss.argtypes, self.log_softmax.argtypes = [c_void_p], [c_void_p]


@functools.cache
def library() -> Library | str:
    """The CPU library, or why there is none."""
    if not LIBRARY.exists():
        lines = BUILD_RECORD.read_text().splitlines() if BUILD_RECORD.exists() else []
        reason = dict(line.split(": ", 1) for line in lines if ": " in line).get("error", "the C++ library was not built")
        return f"{reason}; install a C++ compiler and reinstall kdkernels"
    try:
        found = Library(LIBRARY)
    except OSError as error:
        return str(error)
    return found if found.isa != "none" else "the processor has none of the instruction sets the library was built for"


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...] = ()) -> str | None:
    """Why this backend cannot run on a device for such logits; None when it can."""
    if device.type != "cpu":
        return f"it takes CPU tensors, not {device.type}"
    found = library()
    return found if isinstance(found, str) else None


@functools.lru_cache(maxsize=256)
def _divergence(text: str) -> tuple[int, float]:
    """(index in the library's list, order) of a text form."""
    which = math_of.parse(text)
    return list(math_of.REGISTRY).index(which.name), which.order


def _layout(x: Tensor) -> tuple[Tensor, int, tuple[int, int]]:
    """(x, inner, (outer stride, inner stride)): rows as pairs of indices; x is copied where two strides cannot say it."""
    if x.dim() == 2:
        return x, max(1, x.shape[0]), (0, x.stride(0))
    if x.dim() == 1:
        return x, 1, (0, 0)
    if x.dim() == 3:
        return x, max(1, x.shape[1]), (x.stride(0), x.stride(1))
    x = x.flatten(0, -3)
    return x, max(1, x.shape[1]), (x.stride(0), x.stride(1))


def loss(student, teacher, labels, weight, grad, divergence, temperature, value_scale, grad_scale, hard_scale, hard_grad_scale, vocab):
    """The operator's contract (ops.py)."""
    lib = library()
    student, inner, student_stride = _layout(student)
    teacher, _, teacher_stride = _layout(teacher)
    width = student.shape[-1]
    rows = student.numel() // width
    out = torch.empty(rows, dtype=torch.float64)
    grad_pointer, grad_stride = None, (0, 0)
    if grad is not None:
        grad_pointer, (_, _, grad_stride) = grad.data_ptr(), _layout(grad)
    index, order = _divergence(divergence)
    labels = labels if labels is None else labels.contiguous()
    weight = weight if weight is None else weight.contiguous()
    call = Call(
        student.data_ptr(),
        teacher.data_ptr(),
        grad_pointer,
        None if labels is None else labels.data_ptr(),
        None if weight is None else weight.data_ptr(),
        out.data_ptr(),
        rows,
        inner,
        vocab,
        width,
        student_stride,
        teacher_stride,
        grad_stride,
        DTYPES[student.dtype],
        DTYPES[teacher.dtype],
        index,
        torch.get_num_threads(),
        grad_pointer is not None and grad_pointer != student.data_ptr() and grad.is_contiguous(),
        0,
        order,
        temperature,
        value_scale,
        grad_scale,
        hard_scale,
        hard_grad_scale,
        0,
    )
    status = lib.loss(ctypes.byref(call))
    if status == _BAD_LABEL:
        label = labels.view(-1)[call.bad_row].item()
        raise ValueError(f"labels: row {call.bad_row} has label {label}; labels are in [0, {vocab}) or ignore_index")
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
    width = logits.shape[-1]
    logits = logits.contiguous()
    upstream = upstream if upstream is None else upstream.contiguous()
    call = LogSoftmaxCall(
        logits.data_ptr(),
        None if upstream is None else upstream.data_ptr(),
        out.data_ptr(),
        logits.numel() // width,
        width,
        width,
        width,
        width,
        DTYPES[logits.dtype],
        torch.get_num_threads(),
        temperature,
    )
    library().log_softmax(ctypes.byref(call))
    return out
