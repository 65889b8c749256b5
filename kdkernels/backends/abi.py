"""The C ABI of csrc/api.h through ctypes, for the CPU library and CUDA's: one struct per call, no torch and
no Python in their build.

Loading checks that a library is whole and speaks the same language as this package: its version, the size of
each struct, the list of families.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from ctypes import c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from .. import divergence as math_of
from ..call import Call, Numbers
from ..transforms import Modifiers

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
VERSION = 2  # KD_ABI_VERSION of csrc/api.h
BUILD_RECORD = Path(__file__).parent.parent / "_build.txt"


class Loss(ctypes.Structure):
    """kd_call."""

    _fields_ = [
        *((x, c_void_p) for x in ("student", "teacher", "grad", "labels", "weight", "temperatures", "loss")),
        *((x, c_int64) for x in ("rows", "inner", "vocab", "grad_width")),
        # an array as a field takes ten times as long to set
        *((f"{x}_{y}_stride", c_int64) for x in ("student", "teacher", "grad") for y in ("outer", "inner")),
        *(
            (x, c_int32)
            for x in (
                "student_dtype",
                "teacher_dtype",
                "family",
                "reverse",
                "threads",
                "fresh",
                "device",
                "grad_dtype",
                "squared",
                "reserved",
            )
        ),
        *((x, c_double) for x in ("order", "factor", "mix", "teacher_part", "student_part", "limit")),
        *(
            (x, c_double)
            for x in ("temperature", "value_scale", "grad_scale", "hard_scale", "hard_grad_scale")
        ),
        *((x, c_double) for x in Modifiers._fields),
        ("stats", c_void_p),
        ("bad_row", c_int64),
        *((x, c_void_p) for x in ("stream", "workspace")),
        ("workspace_size", c_int64),
    ]


class LogSoftmax(ctypes.Structure):
    """kd_log_softmax_call."""

    _fields_ = [
        *((x, c_void_p) for x in ("logits", "upstream", "out")),
        *((x, c_int64) for x in ("rows", "vocab", "logits_stride", "upstream_stride", "out_stride")),
        *((x, c_int32) for x in ("dtype", "threads", "device", "reserved")),
        ("temperature", c_double),
        ("stream", c_void_p),
    ]


class Scale(ctypes.Structure):
    """kd_scale_call, of CUDA."""

    _fields_ = [
        *((x, c_void_p) for x in ("x", "factor", "stream")),
        ("count", c_int64),
        *((x, c_int32) for x in ("dtype", "factor_dtype", "device", "reserved")),
    ]


class Library:
    """A loaded library and what it says of itself; OSError with a remedy when it is not this package's, or
    not of the backend's kind."""

    def __init__(self, path: Path, kind: str | None = None):
        if truncated(path):
            raise OSError(f"{path.name}: the file is damaged, its end is missing; reinstall kdkernels")
        try:
            self.c = ctypes.CDLL(str(path))
        except OSError as error:
            raise OSError(f"{path.name}: {error}; reinstall kdkernels") from error
        try:
            self._introduce(path.name, kind)
        except AttributeError as error:
            raise OSError(
                f"{path.name}: not a library of this version of kdkernels ({error}); reinstall kdkernels"
            ) from error

    def _introduce(self, name: str, kind: str | None) -> None:
        lib = self.c
        if (found := lib.kd_abi_version()) != VERSION:
            raise OSError(
                f"{name}: its ABI has version {found}, this package's {VERSION}; reinstall kdkernels"
            )
        structs = {"kd_call": Loss, "kd_log_softmax_call": LogSoftmax}
        cuda = hasattr(lib, "kd_scale")
        if kind is not None and cuda != (kind == "cuda"):
            raise OSError(f"{name}: it is the {'CUDA' if cuda else 'CPU'} library; reinstall kdkernels")
        if cuda:
            structs["kd_scale_call"] = Scale
            lib.kd_workspace.argtypes, lib.kd_workspace.restype = [c_void_p], c_int64
            lib.kd_scale.argtypes = [c_void_p]
            lib.kd_error.restype = lib.kd_unavailable.restype = c_char_p
        for struct_name, cls in structs.items():
            size = getattr(lib, f"{struct_name}_size")
            size.restype = c_int64
            if size() != ctypes.sizeof(cls):
                raise OSError(
                    f"{name}: {struct_name} has {size()} bytes, this package's {ctypes.sizeof(cls)}; "
                    "reinstall kdkernels"
                )
        lib.kd_families.restype = lib.kd_isa.restype = c_char_p
        names = lib.kd_families().decode()
        if names != ",".join(math_of.FAMILIES):
            raise OSError(
                f"{name}: its families are {names}, this package's {','.join(math_of.FAMILIES)}; "
                "reinstall kdkernels"
            )
        self.isa, self.openmp = lib.kd_isa().decode(), bool(lib.kd_openmp())
        self.loss, self.log_softmax = lib.kd_loss, lib.kd_log_softmax
        self.loss.argtypes, self.log_softmax.argtypes = [c_void_p], [c_void_p]


def truncated(path: Path) -> bool:
    """Whether a 64-bit ELF file ends before its segments or its table of sections do: it would load, and kill
    the process when it is used.

    Not a checksum: tools that package a library may strip it or change its search path.
    """
    with path.open("rb") as file:
        head = file.read(64)
        if head[:5] != b"\x7fELF\x02":
            return False  # the loader looks at other kinds itself
        if len(head) < 64:
            return True
        order = "<" if head[5] == 1 else ">"
        segments, sections = struct.unpack_from(order + "QQ", head, 32)
        segment_size, segment_count, section_size, section_count = struct.unpack_from(order + "4H", head, 54)
        file.seek(segments)
        table = file.read(segment_size * segment_count)
    ends = [segments + segment_size * segment_count, sections + section_size * section_count]
    for at in range(0, len(table) - 55, segment_size or 56):
        start, _, _, length = struct.unpack_from(order + "4Q", table, at + 8)
        ends.append(start + length)
    return max(ends) > path.stat().st_size


def build_record() -> dict[str, str]:
    """What setup.py found, by name: the reason why a library is not there, among others."""
    lines = BUILD_RECORD.read_text().splitlines() if BUILD_RECORD.exists() else []
    return dict(line.split(": ", 1) for line in lines if ": " in line)


@functools.lru_cache(maxsize=256)
def _without_tensors(
    divergence: math_of.Divergence, numbers: Numbers, vocab: int, student: torch.dtype, teacher: torch.dtype
) -> bytes:
    """A call but for its tensors. A struct takes long to fill field by field."""
    form = divergence.form
    return bytes(
        Loss(
            vocab=vocab,
            student_dtype=DTYPES[student],
            teacher_dtype=DTYPES[teacher],
            family=math_of.FAMILIES.index(form.family),
            reverse=form.reverse,
            order=form.order,
            factor=form.factor,
            mix=form.mix,
            teacher_part=form.teacher,
            student_part=form.student,
            limit=form.limit or 0.0,
            squared=numbers.squared,
            temperature=numbers.temperature,
            value_scale=numbers.value_scale,
            grad_scale=numbers.grad_scale,
            hard_scale=numbers.hard_scale,
            hard_grad_scale=numbers.hard_grad_scale,
            **numbers.modifiers._asdict(),
        )
    )


def _layout(x: Tensor) -> tuple[Tensor, int, tuple[int, int]]:
    """(x, inner, (outer stride, inner stride)): rows as pairs of indices; x is copied where two strides
    cannot say it."""
    dim = x.dim()
    if dim == 2:
        return x, x.shape[0] or 1, (0, x.stride(0))
    if dim == 1:
        return x, 1, (0, 0)
    if dim > 3:
        x = x.flatten(0, -3)
    return x, x.shape[1] or 1, x.stride()[:2]


def loss_call(call: Call, threads: int = 1, device: int = 0, stream=None) -> tuple[Loss, Tensor, tuple]:
    """(the library's call, the rows' losses to be written, what the call points to and must live as long)."""
    student, inner, (student_outer, student_inner) = _layout(call.student)
    teacher, _, (teacher_outer, teacher_inner) = _layout(call.teacher)
    labels, weight, temperatures = (
        x if x is None else x.contiguous() for x in (call.labels, call.weight, call.temperature)
    )
    width = student.shape[-1]
    rows = student.numel() // width
    out = student.new_empty(rows, dtype=torch.float64)
    fixed = _without_tensors(call.divergence, call.numbers, call.vocab, student.dtype, teacher.dtype)
    c = Loss.from_buffer_copy(fixed)
    c.student, c.teacher, c.loss = student.data_ptr(), teacher.data_ptr(), out.data_ptr()
    c.rows, c.inner, c.grad_width = rows, inner, width
    c.student_outer_stride, c.student_inner_stride = student_outer, student_inner
    c.teacher_outer_stride, c.teacher_inner_stride = teacher_outer, teacher_inner
    c.threads, c.device, c.stream = threads, device, stream
    if call.grad is not None:
        c.grad, (_, _, outer_inner) = call.grad.data_ptr(), _layout(call.grad)
        c.grad_outer_stride, c.grad_inner_stride = outer_inner
        c.grad_dtype = DTYPES[call.grad.dtype]
        c.fresh = c.grad != c.student and call.grad.is_contiguous()
    if labels is not None:
        c.labels = labels.data_ptr()
    if weight is not None:
        c.weight = weight.data_ptr()
    if temperatures is not None:
        c.temperatures = temperatures.data_ptr()
    if call.stats is not None:
        c.stats = call.stats.data_ptr()
    return c, out, (student, teacher, labels, weight, temperatures)


def log_softmax_call(
    logits, upstream, out, temperature, *, threads=1, device=0, stream=None
) -> tuple[LogSoftmax, tuple]:
    """(call, what it points to) that fills `out`, which is contiguous."""
    width = logits.shape[-1]
    logits = logits.contiguous()
    upstream = upstream if upstream is None else upstream.contiguous()
    pointers = logits.data_ptr(), None if upstream is None else upstream.data_ptr(), out.data_ptr()
    sizes = logits.numel() // width, width, width, width, width
    return LogSoftmax(*pointers, *sizes, DTYPES[logits.dtype], threads, device, 0, temperature, stream), (
        logits,
        upstream,
    )
