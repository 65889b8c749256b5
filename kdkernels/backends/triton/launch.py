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
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ... import divergence as math_of
from ...call import Call, Numbers
from . import counters
from .numbers import is_exact, numbers
from .plan import ACCESS, Device, Plan, plan, run_of
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
    OWN,
    SCALAR,
    SCALED,
    SMOOTHED,
    SQUARED,
    WINDOW,
    Spec,
)

CAREFUL_ROWS = 16  # rows whose losses a program of `careful_rows` looks at
CAREFUL_LANES, CAREFUL_WARPS = 256, 8  # classes of a tile, in fp64: one to a thread
IN_TURN_LANES = 2048  # of the interpreter, whose time goes by tiles
# Of a thread: of careful rows, statistics and transforms, and of the exact form and of labels, where four
# programs fit a multiprocessor but for the families that would spill. The compiler's own choice spills, or
# leaves room for fewer programs.
MOST_REGISTERS, FEWER_REGISTERS, FOUR_PROGRAMS = 168, 144, 128


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class Lie(NamedTuple):
    """How a tensor lies in memory; `off`: by how much its data misses 16 bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    off: int


def lie(x: Tensor) -> tuple:
    """The fields of `Lie`, which a dictionary takes sooner without their names."""
    return x.dtype, x.shape, x.stride(), x.data_ptr() % ACCESS


class Kind(NamedTuple):
    """What a call's launches depend on besides the data: they are the same for the next call of the kind."""

    divergence: math_of.Divergence
    numbers: Numbers
    vocab: int
    student: Lie
    teacher: Lie
    grad: Lie | None
    hard: bool
    weighted: bool
    own: bool  # rows have temperatures of their own
    stats: bool
    device: Device

    @staticmethod
    def read(divergence, numbers, vocab: int, student, teacher, grad, *rest) -> Kind:
        """Of its fields, each `Lie` as `lie` has it."""
        lies = Lie(*student), Lie(*teacher), None if grad is None else Lie(*grad)
        return Kind(divergence, numbers, vocab, *lies, *rest)


def _rows(lie: Lie) -> tuple[int, tuple[int, int]]:
    """(inner, (outer stride, inner stride)): row = outer * inner + i; inner is the same for any number of
    rows where it can be."""
    shape, stride = lie.shape, lie.stride
    if len(shape) > 3:  # leading dimensions fold (call.py)
        shape, stride = (math.prod(shape[:-2]), *shape[-2:]), (stride[-3], *stride[-2:])
    if len(shape) == 3 and shape[0] > 1 and stride[0] != shape[1] * stride[1]:
        return shape[1], (stride[0], stride[1])
    return 2**31 - 1, (0, stride[-2] if len(shape) > 1 else 0)


def _layout(lies: list[Lie], R: int, vocab: int) -> tuple[int, int, list[int]]:
    """(inner, access, outer and inner strides of each tensor): how their rows lie, and whether 16 bytes can
    be taken at a time."""
    found = [_rows(x) for x in lies]
    inner = min(n for n, _ in found)
    strides = [s if n == inner else (inner * s[1], s[1]) for n, s in found]
    if inner == 2**31 - 1:
        strides = [(0, s[1]) for s in strides]
    aligned = all(x.off % min(ACCESS, R * x.dtype.itemsize) == 0 for x in lies)
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


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and its arguments, by name, but for tensors, which come first."""

    kernel: str
    grid: int
    arguments: dict
    warps: int
    registers: int | None = None  # the most that a thread gets, where the compiler's own choice is a bad one
    # what launches it on each device, found by the first run: for tensors of one dtype and alignment it stays
    # the same
    compiled: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def options(self) -> dict:
        """What the compiler is told; the default of enable_fp_fusion is not the same in every version."""
        limit = dict(maxnreg=self.registers) if self.registers else {}
        return dict(num_warps=self.warps, enable_fp_fusion=True, **limit)

    @functools.cached_property
    def _others(self) -> tuple:
        """The arguments after the tensors, in the kernel's order."""
        return tuple(self.arguments[x] for x in kernel(self.kernel).arg_names if x in self.arguments)

    def run(self, tensors: tuple[Tensor, ...]) -> None:
        """With tensors in the kernel's order."""
        device = tensors[0].device
        launcher = self.compiled.get(device)
        if launcher is not None:  # Triton's own look at each argument takes longer than all else here
            launcher(*tensors, *self._others)
            return
        found = kernel(self.kernel)[(self.grid,)](*tensors, *self._others, **self.options)
        if found is not None:  # as it is from the interpreter
            self.compiled[device] = found[(self.grid, 1, 1)]


def _spec(kind: Kind, access: int, geometry: Plan) -> Spec:
    n, m = numbers(kind.divergence, kind.numbers.temperature), kind.numbers.modifiers
    capped, scaled = m.student_softcap or m.teacher_softcap, (m.student_scale, m.teacher_scale) != (1.0, 1.0)
    gradient = (kind.student if kind.grad is None else kind.grad).dtype
    return Spec(
        family=FAMILIES.index(n.family),
        base=n.base,
        exact=is_exact(kind.divergence.form, None if kind.own else kind.numbers.temperature, gradient),
        hard=(SMOOTHED if m.label_smoothing else CROSS_ENTROPY) if kind.hard else 0,
        grad=kind.grad is not None,
        weighted=kind.weighted,
        own=0 if not kind.own else SQUARED if kind.numbers.squared else OWN,
        transform=CAPPED if capped else SCALED if scaled else 0,
        stats=kind.stats,
        carry=bool(capped or scaled) or torch.float32 in (kind.student.dtype, kind.teacher.dtype),
        fast_log2=kind.device.nvidia and n.family in ("MIXTURE", "SKEWED"),
        centered=n.centered,
        access=access,
        alone=geometry.parts == 1,
        phase=ALL,
        lanes=geometry.lanes,
        run=geometry.run,
    )


def _numbers(kind: Kind, inner: int, strides: list[int]) -> dict:
    """What the kernels take of a call by name, but for tensors and geometry."""
    asked, m = kind.numbers, kind.numbers.modifiers
    n = numbers(kind.divergence, asked.temperature)
    # the value's factor, T^2 in it, as two numbers that a float holds
    value_scale = asked.value_scale * n.value
    value_unit = 2.0 ** (math.frexp(value_scale)[1] // 2) if math.isfinite(value_scale) else 1.0
    where = ("z_outer", "z_inner", "v_outer", "v_inner", "g_outer", "g_inner")
    return dict(
        inner=inner,
        **dict(zip(where, strides, strict=True)),
        vocab=kind.vocab,
        width=kind.student.shape[-1],
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


def _careful(kind: Kind, spec: Spec, arguments: dict, every: bool, registers: int | None) -> Launch:
    """The kernel for every row, or for those that others have lost."""
    # fields of Spec that careful_rows does not look at, set alike so that calls share a compiled kernel
    same = dict(exact=True, carry=False, fast_log2=False, access=SCALAR, alone=True, phase=ALL)
    rows, several = arguments["rows"], 1 if every else CAREFUL_ROWS
    lanes = IN_TURN_LANES if kind.device.in_turn else CAREFUL_LANES
    same = dataclasses.replace(spec, lanes=lanes, run=1, **same)
    more = dict(SPEC=same, EVERY=every, ROWS=several)
    return Launch("careful_rows", -(-rows // several), arguments | more, CAREFUL_WARPS, registers)


def _matching(spec: Spec, arguments: dict, warps: int, registers: int | None) -> Launch:
    """T = inf: `careful_rows` too, with the tiles and accesses of `loss_rows`."""
    lanes = spec.lanes
    if spec.hard or spec.stats:  # whose sums are in fp64
        lanes, registers = lanes // 2, registers and 255
    same = dataclasses.replace(spec, exact=True, carry=True, alone=True, lanes=lanes)
    more = dict(SPEC=same, EVERY=True, ROWS=1)
    return Launch("careful_rows", arguments["rows"], arguments | more, warps, registers)


def _registers(spec: Spec, device: Device) -> int | None:
    """The most that a thread of `loss_rows` gets on NVIDIA's GPUs."""
    family = FAMILIES[spec.family]
    long = spec.mixes and (spec.hard or family == "SKEWED")
    if spec.stats or spec.transform or spec.hard == SMOOTHED or (spec.exact and long):
        return MOST_REGISTERS
    if spec.exact and (spec.power or family == "MIXED_KL"):
        return FEWER_REGISTERS
    if spec.exact or spec.hard:
        return FOUR_PROGRAMS
    if device.major == 10:  # 64 spill there, and the compiler's own choice leaves room for six programs
        return None
    return 72 if family == "MIXED_KL" else 64


@functools.lru_cache(maxsize=256)
def _launches(*fields) -> tuple[int, list[Launch]]:
    """(fp64 numbers of STATE, 0 for a program to a row; the launches of a kind of call)."""
    kind = Kind.read(*fields)
    sizes = kind.student.dtype.itemsize, kind.teacher.dtype.itemsize
    lies = [kind.student, kind.teacher, kind.student if kind.grad is None else kind.grad]
    inner, access, strides = _layout(lies, run_of(*sizes), kind.vocab)
    rows = math.prod(kind.student.shape[:-1])
    geometry = plan(rows, kind.vocab, *sizes, kind.device, access != EVEN)
    arguments = _numbers(kind, inner, strides) | dict(rows=rows, parts=geometry.parts, size=geometry.size)
    spec = _spec(kind, access, geometry)
    most = MOST_REGISTERS if kind.device.nvidia else None
    if FAMILIES[spec.family] == "MOMENTS":
        return 0, [_matching(spec, arguments, 2 * geometry.warps, most)]
    if spec.is_limit:  # no sums of terms: all in fp64
        return 0, [_careful(kind, spec, arguments, True, most)]
    phases, state = (ALL,), 0
    if not spec.alone:
        again, middle = ([AGAIN] if spec.exact else []), ([MIDDLE] if spec.mixes else [])
        # programs that run one after another cannot wait for each other
        phases = (FIRST, *again, *middle, LAST) if kind.device.in_turn else (ALL,)
        state = rows * geometry.parts * dataclasses.replace(spec, phase=phases[0]).state
    registers = most and _registers(spec, kind.device)
    fast = [
        Launch(
            "loss_rows", rows * geometry.parts, arguments | dict(SPEC=dataclasses.replace(spec, phase=x)),
            geometry.warps, registers,
        )
        for x in phases
    ]  # fmt: skip
    return state, [*fast, _careful(kind, spec, arguments, False, most)]


def launches(
    call: Call, out: Tensor, device: Device, at: tuple | None = None
) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """What `loss` launches, in its order, on a device of such figures, and the tensors that all of it takes:
    `loss_rows` says which. One that a call has none of is `out`, which is not looked at there.

    out: the losses to be written. at: where counters are kept, the last tensor (counters.py).
    """
    z, v, vocab, labels, weight, divergence, n, grad, stats, own, _ = call
    hard = labels is not None and (n.hard_scale != 0 or n.hard_grad_scale != 0 or stats is not None)
    lies = lie(z), lie(v), None if grad is None else lie(grad)
    flags = hard, weight is not None, own is not None, stats is not None
    state, found = _launches(divergence, n, vocab, *lies, *flags, device)
    return found, (
        z,
        v,
        z if grad is None else grad,
        labels.contiguous() if hard else out,
        out if weight is None else weight.contiguous(),
        out if own is None else own.contiguous(),
        out,
        out if stats is None else stats,
        out.new_empty(state) if state else out,
        counters.take(out, at) if state else out,
    )
