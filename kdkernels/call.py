"""What a backend is asked for: `Call`, one record of tensors, numbers and a divergence, and its flat form,
which the operators of ops.py take.

The numbers are a list of floats. Under torch.compile a number may be a symbol (a temperature that changes
with the step): as floats of an operator, symbols are compiled again for each value, so that all numbers are
then a tensor, which the operator reads when it runs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .divergence import Divergence, of
from .transforms import PLAIN, Modifiers

# Of a finite temperature: where every backend is right. fp32 holds 1/T there, and the squares of (z - v) / T.
TEMPERATURES = (1e-4, 1e12)


def row_dtype(device: torch.device) -> torch.dtype:
    """Of what belongs to a row (losses, weights, statistics): float64, float32 where a device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class Rows(NamedTuple):
    """What belongs to the rows, each (...) or None: labels; their weights, of `row_dtype`; their own
    temperatures, of `row_dtype`, in place of `Numbers.temperature`."""

    labels: Tensor | None = None
    weight: Tensor | None = None
    temperature: Tensor | None = None


class Numbers(NamedTuple):
    """What a call multiplies with and divides by; T^2 and a reduction's denominator are in the scales.

    loss = value_scale D + hard_scale CE, and its gradient grad_scale T dD/dz + hard_grad_scale dCE/dz, each
    times the row's weight. At T = inf D is the limit of T^2 D, and grad_scale multiplies its gradient.

    Where rows have temperatures of their own the scales are without them: a row's value_scale is to be
    multiplied with S, and its grad_scale with S / T, S = T^2 if `squared` else 1.
    """

    temperature: float = 1.0
    value_scale: float = 1.0
    grad_scale: float = 1.0
    hard_scale: float = 0.0
    hard_grad_scale: float = 0.0
    modifiers: Modifiers = PLAIN
    squared: bool = False


class Call(NamedTuple):
    """The loss of rows of logits, and what of them is to be filled in.

    student, teacher: (..., V) logits, their rows as `addressable` has them. The first `vocab` classes count.
    labels: (...) int64; on the CPU checked where weight is not 0.
    weight: (...) of `row_dtype`, None for 1 everywhere; a row of weight 0 is not read.
    temperature: (...) of `row_dtype`, the rows' own; None: `numbers` has one for all. On a GPU nan for one
        outside of TEMPERATURES, which makes that row nan.
    grad: None, or the buffer of the gradient, in the student's shape. Its dtype is the student's, and it may
        be the student's own storage, or one up to float32. Classes beyond `vocab` and rows of weight 0 get 0.
    stats: None, or (rows, COLUMNS) of `row_dtype` (stats.py), nan for a row of weight 0.
    keeps: whether a backend may keep memory for the next call: not where a compiler plans memory.

    A backend's `loss` takes a Call and returns the rows' losses, (rows,) of `row_dtype`.
    """

    student: Tensor
    teacher: Tensor
    vocab: int
    labels: Tensor | None = None
    weight: Tensor | None = None
    divergence: Divergence = of("kl", 0.0)
    numbers: Numbers = Numbers()
    grad: Tensor | None = None
    stats: Tensor | None = None
    temperature: Tensor | None = None
    keeps: bool = False

    def flat(self, backend: str) -> tuple:
        """The arguments of `ops.loss_into`."""
        asked = Asked.of(self.divergence, self.numbers, self.vocab, backend)
        rows = Rows(self.labels, self.weight, self.temperature)
        return self.student, self.teacher, *rows, *asked, self.grad, self.stats


class Asked(NamedTuple):
    """The arguments of an operator between its logits and its buffers: SCHEMA."""

    divergence: str  # its name
    # the scales of `Numbers`, `squared`, the divergence's parameter, the modifiers, which may be left out
    numbers: list[float]
    varying: Tensor | None  # the numbers, (n,) float64 on the CPU, where some are known at run time alone
    vocab: int
    backend: str

    @staticmethod
    def of(divergence: Divergence, numbers: Numbers, vocab: int, backend: str) -> Asked:
        *scales, modifiers, squared = numbers
        if torch.compiler.is_compiling():
            flat = told(*scales, float(squared), divergence.parameter, *modifiers)
            return Asked(divergence.name, *flat, vocab, backend)
        # most calls have no modifiers: a list half as long. Dynamo does not know `is` of two of them
        more = () if modifiers is PLAIN else modifiers
        flat = [*scales, float(squared), divergence.parameter, *more]
        return Asked(divergence.name, flat, None, vocab, backend)

    def record(self) -> tuple[Divergence, Numbers]:
        """What `of` was given."""
        return _record(self.divergence, *heard(self.numbers, self.varying))


@functools.lru_cache(maxsize=256)
def _record(name: str, *flat: float) -> tuple[Divergence, Numbers]:
    *scales, squared, parameter = flat[:7]
    modifiers = Modifiers(*flat[7:]) if len(flat) > 7 else PLAIN
    return of(name, parameter), Numbers(*scales, modifiers, squared != 0)


def any_symbol(*numbers: float) -> bool:
    """Whether torch.compile knows one of the numbers at run time alone."""
    # the module is there when something is compiled, and takes a second to import
    return torch.compiler.is_compiling() and not all(
        torch.fx.experimental.symbolic_shapes.has_static_value(x) for x in numbers
    )


def told(*numbers: float) -> tuple[list[float], Tensor | None]:
    """Numbers as an operator takes them: a list of what is known when it is compiled, or a tensor."""
    if not any_symbol(*numbers):
        return list(numbers), None
    return [], torch.cat([torch.ones(1, dtype=torch.float64, device="cpu") * x for x in numbers])


def heard(numbers: list[float], varying: Tensor | None) -> list[float]:
    """What `told` was given."""
    return numbers if varying is None else varying.tolist()


SCHEMA = "str divergence, float[] numbers, Tensor? varying, int vocab, str backend"


def exchanged(divergence: Divergence, numbers: Numbers) -> tuple[Divergence, Numbers]:
    """With student and teacher exchanged, and without a hard term: what makes the teacher's gradient a
    student's."""
    m = numbers.modifiers
    modifiers = Modifiers(m.teacher_scale, m.teacher_softcap, m.student_scale, m.student_softcap)
    return divergence.reversed, numbers._replace(hard_scale=0.0, hard_grad_scale=0.0, modifiers=modifiers)


def regular(x: Tensor) -> bool:
    """Whether rows can be addressed as they lie: last dimension contiguous, leading ones folding into two."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return False
    return x.dim() <= 3 or all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 3))


def addressable(x: Tensor) -> Tensor:
    """x, or a copy of it where its rows cannot be addressed as they lie."""
    return x if regular(x) else x.contiguous()
