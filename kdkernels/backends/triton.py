"""Triton: CUDA, ROCm and XPU from one source (triton_kernels.py, triton_careful.py); CPU tensors under its
interpreter, for tests.

Everything that depends on a temperature, an order or a weight is a number computed here, in fp64, and handed
over at run time; only flags and the geometry of a tile are compiled. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import divergence as math_of
from ..call import Call
from .triton_plan import (
    AGAIN,
    BOTH,
    CAPPED,
    CROSS_ENTROPY,
    EVEN,
    FAMILIES,
    FINISH,
    MIX,
    MIXTURES,
    PUBLISH,
    REGISTERS_WHOLE,
    SCALAR,
    SCALED,
    SLOTS,
    SMOOTHED,
    STEEP,
    STUDENT,
    TEACHER,
    WINDOW,
    Device,
    plan,
    run,
)

name = "triton"

CAREFUL_ROWS = 16  # rows whose losses a program of the second kernel looks at
CAREFUL_BLOCK, CAREFUL_WARPS = 512, 8
MOST_REGISTERS = 128  # of a thread, with 512 of them on a multiprocessor
# with 384, for mixtures, orders, hard labels and transforms, where a program has no more
HEAVY_REGISTERS = 168
# for mixtures, and transformed rows that are whole or give both gradients, with hard labels, which spill with
# 168: two programs to a multiprocessor
HEAVIEST_REGISTERS = 224
FILE_REGISTERS = 64 << 10  # of a multiprocessor
SOFTMAX_BLOCK = 2048
SCALE_BLOCK = 8192
SCALE_PROGRAMS = 8  # of `scale_all`, on a multiprocessor


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


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
        return Device(processors=2, cache=32 << 20)
    properties = getattr(torch, device.type).get_device_properties(device)
    known = [getattr(properties, x, None) for x in ("multi_processor_count", "gpu_subslice_count")]
    cache = getattr(properties, "L2_cache_size", None) or 32 << 20
    if getattr(properties, "gcnArchName", "").startswith(("gfx94", "gfx95")):
        # all processors share the cache behind the second level, which is divided among them
        cache = 256 << 20
    return Device(next((x for x in known if x), 64), cache, getattr(properties, "warp_size", None) or 32)


def single(x: float) -> float:
    """x rounded to fp32."""
    return torch.tensor(x, dtype=torch.float32).item()


class Numbers(NamedTuple):
    """What a call asks for, each number rounded once."""

    family: str
    base: int  # the side a row is seen from; for what has no sum of terms, whether p and q are exchanged
    c: float = 0.0  # log2(e) / T
    k: float = 1.0  # 1 / T
    tilt: float = 0.0  # the power family's, a mixture's l; at T = inf, whether there is a limit but 0
    inverse_tilt: float = 1.0
    base_share: float = 0.0  # a mixture's weights of KL(b, m) and KL(o, m)
    other_share: float = 0.0
    value: float = 1.0  # factors of the loss and of its gradient
    grad: float = 1.0
    centered: bool = True  # logit matching compares the logits themselves


# of a tilt or a mixture's l, for a float's range to hold what is made of them; beyond, D is proportional to
# it or no longer changes
SMALLEST, LARGEST = 1e-25, 1e36


@functools.lru_cache(maxsize=256)
def numbers(divergence: math_of.Divergence, temperature: float) -> Numbers:
    form = divergence.form
    if math.isinf(temperature):
        limit = form.limit or 0.0
        return Numbers(
            "MOMENTS",
            int(form.reverse),
            tilt=float(limit != 0),
            value=limit or 1.0,
            grad=limit,
            centered=form.family != "logit_matching",
        )
    k = single(1 / temperature)
    # a row is computed at one temperature, 1 / k; where D is proportional to 1 / T^2, what that lacks is a
    # factor
    correction = (
        1 / (k * temperature)
        if temperature >= 64 and form.family not in ("tvd", "support", "extreme")
        else 1.0
    )
    call = functools.partial(Numbers, c=single(k * math.log2(math.e)), k=k)
    simple = functools.partial(call, value=form.factor * correction**2, grad=form.factor * correction)
    if form.family in ("support", "extreme"):
        return call(form.family.upper(), int(form.reverse))
    if form.family == "tvd":
        return call("TVD", TEACHER)
    if form.family == "mixture":
        return _mixture(form.sides, simple)
    if form.family in ("renyi", "alpha") and form.order != 1:
        side = TEACHER if form.order > 0.5 else STUDENT if form.order >= -1 else STEEP
        exact = max(-LARGEST, min(form.order if side else 1 - form.order, LARGEST))
        tilt = single(exact) if abs(exact) >= SMALLEST else SMALLEST
        found = simple(
            "ALPHA" if form.family == "alpha" else "POWER", side, tilt=tilt, inverse_tilt=single(1 / tilt)
        )
        less = exact / SMALLEST if tilt == SMALLEST and form.family == "renyi" else 1.0
        return found._replace(value=found.value * less, grad=found.grad * less)
    return simple("ENTROPY" if form.family == "cross_entropy" else "KL", TEACHER)


def _mixture(sides: math_of.Sides, simple: Callable[..., Numbers]) -> Numbers:
    base = STUDENT if sides.student_base else TEACHER
    if sides.mix == 0:  # KL(o, b), which KL is with b and o exchanged
        found = simple("KL", TEACHER if base else STUDENT)
        return found._replace(value=found.value * sides.other, grad=found.grad * sides.other)
    shares = dict(base_share=single(sides.base), other_share=single(sides.other))
    return simple(
        "SKEWED" if sides.shares else "MIXTURE", base, tilt=single(max(sides.mix, SMALLEST)), **shares
    )


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


def _on(device: torch.device):
    """Kernels are launched on the current device and its current stream."""
    return contextlib.nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


def kernel(name: str):
    """The jitted function of a name; triton is imported when the first is asked for."""
    from . import triton_careful, triton_kernels

    return getattr(triton_careful if name == "careful_rows" else triton_kernels, name)


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments."""

    kernel: str
    grid: int
    arguments: dict
    warps: int
    registers: int | None = None  # the most that a thread gets, where the compiler's own choice is a bad one

    def options(self, nvidia: bool) -> dict:
        """What the compiler is told; the default of enable_fp_fusion is not the same in every version."""
        limit = dict(maxnreg=self.registers) if nvidia and self.registers else {}
        return dict(num_warps=self.warps, enable_fp_fusion=True, **limit)

    def run(self, device: torch.device) -> None:
        kernel(self.kernel)[(self.grid,)](
            **self.arguments, **self.options(device.type == "cuda" and not torch.version.hip)
        )


def _arguments(call: Call, out: Tensor) -> tuple[Numbers, int, dict]:
    """(the numbers of a call, how its rows lie, what every kernel takes of it)."""
    student, teacher, weight, grad, asked = call.student, call.teacher, call.weight, call.grad, call.numbers
    n, m, told = numbers(call.divergence, asked.temperature), asked.modifiers, call.stats is not None
    hard = call.labels is not None and (asked.hard_scale != 0 or asked.hard_grad_scale != 0 or told)
    capped, scaled = m.student_softcap or m.teacher_softcap, (m.student_scale, m.teacher_scale) != (1.0, 1.0)
    G = student if grad is None else grad
    run_of = run(student.element_size(), teacher.element_size())
    inner, access, strides = _layout([student, teacher, G], run_of, call.vocab)
    # the value's factor, T^2 in it, as two numbers that a float holds
    value_scale = asked.value_scale * n.value
    value_unit = 2.0 ** (math.frexp(value_scale)[1] // 2) if math.isfinite(value_scale) else 1.0
    where = ("z_outer", "z_inner", "v_outer", "v_inner", "g_outer", "g_inner")
    arguments = dict(
        Z=student,
        V=teacher,
        G=G,
        LABELS=call.labels.contiguous() if hard else out,
        WEIGHTS=out if weight is None else weight.contiguous(),
        LOSS=out,
        STATS=call.stats if told else out,
        rows=out.numel(),
        inner=inner,
        **dict(zip(where, strides, strict=True)),
        vocab=call.vocab,
        width=student.shape[-1],
        k=n.k,
        tilt=n.tilt,
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
        FAMILY=FAMILIES.index(n.family),
        BASE_Z=n.base,
        CENTERED=n.centered,
        HARD=(SMOOTHED if m.label_smoothing else CROSS_ENTROPY) if hard else 0,
        WEIGHTED=weight is not None,
        GRAD=grad is not None,
        TRANSFORM=CAPPED if capped else SCALED if scaled else 0,
        TELL=told,
    )
    return n, access, arguments


def _careful(arguments: dict, every: bool, **changes) -> Launch:
    """The kernel for every row, or for those that others have lost."""
    rows = arguments["rows"]
    lines = dict(ALL=True, ROWS=1) if every else dict(ALL=False, ROWS=CAREFUL_ROWS)
    mixture = FAMILIES[arguments["FAMILY"]] in MIXTURES
    registers = HEAVY_REGISTERS if mixture or arguments["TRANSFORM"] else MOST_REGISTERS
    taken = dict(MARKS=arguments["LOSS"], BLOCK=CAREFUL_BLOCK) | arguments | lines | changes
    return Launch(
        "careful_rows", rows if every else -(-rows // CAREFUL_ROWS), taken, CAREFUL_WARPS, registers
    )


def launches(call: Call, out: Tensor, device: Device) -> list[Launch]:
    """What `loss` launches, in its order, on a device of such figures; out: the losses to be written."""
    student, teacher, told = call.student, call.teacher, call.stats is not None
    n, access, arguments = _arguments(call, out)
    if n.family in ("SUPPORT", "EXTREME"):  # no sum of terms: every row is one for fp64
        return [_careful(arguments, True)]
    rest = _careful(arguments, False)
    rows, vocab, hard, transform = out.numel(), call.vocab, arguments["HARD"], arguments["TRANSFORM"]
    mixture = n.family in MIXTURES
    # a mixture's three sweeps with labels leave a whole row half of the registers, and so do modifiers and
    # statistics
    modified = transform or told or hard == SMOOTHED
    whole = REGISTERS_WHOLE // (2 if mixture and hard else 1) // (2 if modified else 1)
    sizes = student.element_size(), teacher.element_size()
    chosen = plan(rows, vocab, *sizes, access == WINDOW, device, whole)
    light = n.family in ("KL", "ENTROPY", "MOMENTS")
    heavy = hard or transform or not light or chosen.whole and told
    heavy = heavy and chosen.warps * device.warp * HEAVY_REGISTERS <= FILE_REGISTERS
    registers = HEAVY_REGISTERS if heavy else MOST_REGISTERS
    if heavy and hard and (mixture or transform and chosen.whole):
        registers = HEAVIEST_REGISTERS
    carry = bool(transform) or torch.float32 in (student.dtype, teacher.dtype)
    arguments |= dict(
        c=n.c, inverse_tilt=n.inverse_tilt, CARRY=carry, ACCESS=access, RB=chosen.RB, R=chosen.R
    )
    if chosen.parts == 1:
        whole_rows = arguments | dict(WHOLE=chosen.whole)
        return [Launch("loss_rows", chosen.grid, whole_rows, chosen.warps, registers), rest]
    arguments |= dict(
        STATE=torch.empty(rows * chosen.parts * SLOTS, dtype=torch.float64, device=out.device),
        COUNTERS=torch.zeros(1 + 2 * rows, dtype=torch.int32, device=out.device),
        PARTS=chosen.parts,
    )
    if not interpreting():
        whole_rows = arguments | dict(PHASE=BOTH)
        return [Launch("loss_parts", chosen.grid, whole_rows, chosen.warps, registers), rest]
    # programs that run one after another cannot wait for each other
    phases = (PUBLISH, AGAIN, MIX, FINISH) if mixture else (PUBLISH, AGAIN, FINISH)
    each = (arguments | dict(PHASE=x) for x in phases)
    return [*(Launch("loss_parts", rows * chosen.parts, x, chosen.warps) for x in each), rest]


def loss(call: Call) -> Tensor:
    """The contract of `Call`."""
    if call.stats is not None:
        call.stats.fill_(math.nan)  # of rows that count for nothing
    device = call.student.device
    out = torch.empty(math.prod(call.student.shape[:-1]), dtype=torch.float64, device=device)
    if out.numel():
        with _on(device):
            for launch in launches(call, out, figures(device)):
                launch.run(device)
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
    more = dict(BACKWARD=upstream is not None, BLOCK=SOFTMAX_BLOCK)
    with _on(logits.device):
        Launch(
            "log_softmax_rows",
            out.numel() // vocab,
            dict(X=x, U=u, OUT=out, vocab=vocab, k=k, k_low=1 / temperature - k) | more,
            8,
        ).run(x.device)
    return out


def scale_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, 0-d on its device, without waiting for it; nothing is moved where it is 1."""
    count = grad.numel()
    if not grad.is_contiguous():
        grad.mul_(factor)
    elif count:
        with _on(grad.device):
            grid = min(-(-count // SCALE_BLOCK), SCALE_PROGRAMS * figures(grad.device).processors)
            Launch("scale_all", grid, dict(X=grad, FACTOR=factor, count=count, BLOCK=SCALE_BLOCK), 8).run(
                grad.device
            )
