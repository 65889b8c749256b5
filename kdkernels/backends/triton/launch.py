"""From a call to its launches: what is compiled (`Spec`), the geometry, and the arguments of each kernel.

Everything that depends on a temperature, an order or a weight is a number computed here, in fp64, and handed
over at run time. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ...call import Call
from .numbers import is_exact, numbers
from .plan import Device, Plan, plan, run_of
from .spec import (
    AGAIN,
    ALL,
    CAPPED,
    CROSS_ENTROPY,
    EVEN,
    FAMILIES,
    FIRST,
    LAST,
    MIDDLE,
    SCALAR,
    SCALED,
    SMOOTHED,
    WINDOW,
    Spec,
)

CAREFUL_ROWS = 16  # rows whose losses a program of the second kernel looks at
CAREFUL_BLOCK, CAREFUL_WARPS = 512, 8
MOST_REGISTERS = 168  # of a thread of the exact form and of careful rows: the compiler's own choice spills


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _rows(x: Tensor) -> tuple[Tensor, int, tuple[int, int]]:
    """(x, inner, (outer stride, inner stride)): row = outer * inner + i; inner is the same for any number of
    rows where it can be."""
    if x.dim() > 3:
        x = x.flatten(0, -3)
    if x.dim() == 3 and x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1):
        return x, x.shape[1], (x.stride(0), x.stride(1))
    return x, 2**31 - 1, (0, x.stride(-2) if x.dim() > 1 else 0)


def _layout(tensors: list[Tensor], R: int, vocab: int) -> tuple[int, int, list[int]]:
    """(inner, access, outer and inner strides of each tensor): how their rows lie, and whether 16 bytes can
    be taken at a time."""
    found = [_rows(x) for x in tensors]
    inner = min(n for _, n, _ in found)
    strides = [s if n == inner else (inner * s[1], s[1]) for _, n, s in found]
    if inner == 2**31 - 1:
        strides = [(0, s[1]) for s in strides]
    aligned = all(x.data_ptr() % (R * x.element_size()) == 0 for x in tensors)
    alike = len({(s[0] % R, s[1] % R) for s in strides}) == 1
    access = (
        SCALAR
        if not (aligned and alike)
        else EVEN
        if vocab % R == 0 and not any(strides[0][i] % R for i in (0, 1))
        else WINDOW
    )
    return inner, access, [x for s in strides for x in s]


def on(device: torch.device):
    """Kernels are launched on the current device and its current stream."""
    return contextlib.nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


def kernel(name: str):
    """The jitted function of a name; triton is imported when the first is asked for."""
    from . import careful, kernels, softmax

    where = dict(loss_rows=kernels, careful_rows=careful).get(name, softmax)
    return getattr(where, name)


@functools.cache
def parameters(name: str) -> tuple[str, ...]:
    """Of a kernel, in their order."""
    return tuple(kernel(name).arg_names)


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments."""

    kernel: str
    grid: int
    arguments: dict
    warps: int
    registers: int | None = (
        None  # the most that a thread gets on NVIDIA's, where the compiler's choice is bad
    )

    @property
    def options(self) -> dict:
        """What the compiler is told; the default of enable_fp_fusion is not the same in every version."""
        limit = dict(maxnreg=self.registers) if self.registers else {}
        return dict(num_warps=self.warps, enable_fp_fusion=True, **limit)

    def run(self) -> None:
        taken = (self.arguments[x] for x in parameters(self.kernel))
        kernel(self.kernel)[(self.grid,)](*taken, **self.options)


def _spec(call: Call, access: int, geometry: Plan, device: Device) -> Spec:
    n, m = numbers(call.divergence, call.numbers.temperature), call.numbers.modifiers
    capped, scaled = m.student_softcap or m.teacher_softcap, (m.student_scale, m.teacher_scale) != (1.0, 1.0)
    return Spec(
        family=FAMILIES.index(n.family),
        base=n.base,
        exact=is_exact(call),
        hard=(SMOOTHED if m.label_smoothing else CROSS_ENTROPY) if _hard(call) else 0,
        grad=call.grad is not None,
        weighted=call.weight is not None,
        transform=CAPPED if capped else SCALED if scaled else 0,
        stats=call.stats is not None,
        carry=bool(capped or scaled) or torch.float32 in (call.student.dtype, call.teacher.dtype),
        fast_log2=device.nvidia and n.family in ("MIXTURE", "SKEWED"),
        centered=n.centered,
        access=access,
        alone=geometry.parts == 1,
        phase=ALL,
        lanes=geometry.lanes,
        run=geometry.run,
    )


def _hard(call: Call) -> bool:
    asked = call.numbers
    wanted = asked.hard_scale != 0 or asked.hard_grad_scale != 0 or call.stats is not None
    return call.labels is not None and wanted


def _arguments(call: Call, out: Tensor, inner: int, strides: list[int]) -> dict:
    """What the kernels take of a call by name, but for their geometry."""
    asked, m = call.numbers, call.numbers.modifiers
    n = numbers(call.divergence, asked.temperature)
    # the value's factor, T^2 in it, as two numbers that a float holds
    value_scale = asked.value_scale * n.value
    value_unit = 2.0 ** (math.frexp(value_scale)[1] // 2) if math.isfinite(value_scale) else 1.0
    where = ("z_outer", "z_inner", "v_outer", "v_inner", "g_outer", "g_inner")
    return dict(
        Z=call.student,
        V=call.teacher,
        G=call.student if call.grad is None else call.grad,
        LABELS=call.labels.contiguous() if _hard(call) else out,
        WEIGHTS=out if call.weight is None else call.weight.contiguous(),
        LOSS=out,
        STATS=out if call.stats is None else call.stats,
        rows=out.numel(),
        inner=inner,
        **dict(zip(where, strides, strict=True)),
        vocab=call.vocab,
        width=call.student.shape[-1],
        c=n.c,
        k=n.k,
        tilt=n.tilt,
        inverse_tilt=n.inverse_tilt,
        base_share=n.base_share,
        other_share=n.other_share,
        value_scale=value_scale / value_unit,
        value_unit=value_unit,
        grad_scale=asked.grad_scale * n.grad * m.student_scale,
        hard_scale=asked.hard_scale,
        hard_grad_scale=asked.hard_grad_scale * m.student_scale,
        smoothing=m.label_smoothing,
        z_loss=m.z_loss,
        z_scale=m.student_scale,
        z_softcap=-m.student_softcap,
        z_steepness=-2 / m.student_softcap if m.student_softcap else 0.0,
        v_scale=m.teacher_scale,
        v_softcap=-m.teacher_softcap,
        v_steepness=-2 / m.teacher_softcap if m.teacher_softcap else 0.0,
        factor=n.value,
    )


def _careful(spec: Spec, arguments: dict, every: bool, registers: int | None) -> Launch:
    """The kernel for every row, or for those that others have lost."""
    # of what is compiled, what it does not know: the same for all calls, so that they share a kernel
    same = dict(exact=True, carry=False, fast_log2=False, access=EVEN, alone=True, phase=ALL, lanes=1, run=1)
    rows, several = arguments["rows"], 1 if every else CAREFUL_ROWS
    more = dict(SPEC=dataclasses.replace(spec, **same), EVERY=every, ROWS=several, BLOCK=CAREFUL_BLOCK)
    return Launch("careful_rows", -(-rows // several), arguments | more, CAREFUL_WARPS, registers)


def launches(call: Call, out: Tensor, device: Device) -> list[Launch]:
    """What `loss` launches, in its order, on a device of such figures; out: the losses to be written."""
    student, teacher, rows = call.student, call.teacher, out.numel()
    sizes = student.element_size(), teacher.element_size()
    G = student if call.grad is None else call.grad
    inner, access, strides = _layout([student, teacher, G], run_of(*sizes), call.vocab)
    geometry = plan(rows, call.vocab, *sizes, device, access != EVEN)
    spec = _spec(call, access, geometry, device)
    most = MOST_REGISTERS if device.nvidia else None
    arguments = _arguments(call, out, inner, strides)
    if FAMILIES[spec.family] in ("SUPPORT", "EXTREME", "MOMENTS"):  # no sums of terms, or rare: all for fp64
        return [_careful(spec, arguments, True, most)]
    mine = dict(parts=geometry.parts, size=geometry.size, STATE=out, COUNT=out)
    phases = (ALL,)
    if not spec.alone:
        # programs that run one after another cannot wait for each other
        again, middle = ([AGAIN] if spec.exact else []), ([MIDDLE] if spec.mixes else [])
        phases = (FIRST, *again, *middle, LAST) if interpreting() else (ALL,)
        state = dataclasses.replace(spec, phase=phases[0]).state
        mine["STATE"] = torch.empty(rows * geometry.parts * state, dtype=torch.float64, device=out.device)
        mine["COUNT"] = torch.zeros(2 * rows, dtype=torch.int32, device=out.device)
    each = (arguments | mine | dict(SPEC=dataclasses.replace(spec, phase=x)) for x in phases)
    registers = most if spec.exact else None
    fast = [Launch("loss_rows", rows * geometry.parts, x, geometry.warps, registers) for x in each]
    return [*fast, _careful(spec, arguments, False, most)]
