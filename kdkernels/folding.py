"""What is known before the pass goes into its factors: T^2, weights, the reduction's denominator, and, for
fp16, a power of 2 that keeps a gradient off underflow.

So the gradient comes out final, and the backward has nothing to do for an upstream gradient of 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .call import Numbers, Rows, any_symbol, row_dtype
from .options import Options

# of an fp16 gradient; beyond, what keeps its largest elements below fp16's range would take the smallest
# ones' digits
MOST_STEEP = 32.0
LARGEST_HALF = 65504.0


def counted_rows(rows: Rows, student, vocab: int, o: Options, num_items) -> tuple[Rows, float | Tensor]:
    """(what belongs to the rows as the operators take it, a weight of None where all count alike; what
    reduction="mean" divides by, on the rows' device).

    num_items: as `checks.checked_items` returns it.
    """
    labels, weight, temperature = rows
    if labels is weight is temperature is num_items is None:  # the same in short
        return rows, at_least_one(student) if o.reduction == "mean" else 1.0
    dtype = row_dtype(student.device)
    if weight is not None:
        weight = weight.to(dtype)
    if temperature is not None:
        temperature = temperature.to(dtype)
    if labels is not None:
        counted = labels != o.ignore_index
        weight = counted.to(dtype) if weight is None else torch.where(counted, weight, 0.0)
    denominator: float | Tensor = 1.0
    if o.reduction == "mean":
        denominator = (
            num_items if num_items is not None else at_least_one(student) if weight is None else weight.sum()
        )
        if isinstance(denominator, Tensor):
            denominator = torch.where(denominator == 0, 1.0, denominator.detach().to(student.device, dtype))
    if labels is not None and not o.hard_weight and not student.is_cpu:
        weight = nan_at_wrong(labels, weight, vocab)
    # on a CPU labels go down without a hard term too: the library raises for a wrong one
    return Rows(labels if o.hard_weight or student.is_cpu else None, weight, temperature), denominator


def at_least_one(student: Tensor) -> int:
    """The number of rows, or 1 for none."""
    rows = math.prod(student.shape[:-1])
    # before torch 2.13 sym_max takes no plain integer
    return torch.sym_max(rows, 1) if isinstance(rows, torch.SymInt) else max(rows, 1)


def nan_at_wrong(labels: Tensor, weight: Tensor, vocab: int) -> Tensor:
    """The weights, nan for a row that counts with a label outside of [0, vocab): what such a row is on a
    device with a hard term."""
    return torch.where((weight != 0) & ((labels < 0) | (labels >= vocab)), math.nan, weight)


class Folded(NamedTuple):
    """Numbers and weights of an operator's call, and what they lack."""

    numbers: Numbers
    weight: Tensor | None
    post: float | Tensor | None = None  # what value and gradient are still to be multiplied with; None for 1
    boost: float = 1.0  # what the gradient has been multiplied with besides


def steepness(o: Options, vocab: int, of_teacher: bool) -> float:
    """A bound on the elements of a row's gradients, in units of the factors that they are multiplied with;
    inf where there is none, where rows have their own temperatures, or where a mixture's weight is a symbol,
    whose logarithm is not known.

    T |dD/dz_i| <= `Form.steepest`; |dCE/dz_i| <= 1; the z-loss adds 2 z_loss lse q_i, and fp16 logits bound
    lse.
    """
    form = o.divergence.form
    if o.temperature in (None, math.inf) or form.family == "mixture" and any_symbol(form.mix):
        return math.inf
    student, teacher = o.student_transform, o.teacher_transform
    soft = form.steepest if o.soft_weight else 0.0
    largest = student.softcap or abs(student.scale) * LARGEST_HALF
    hard = 1.0 + 2.0 * o.z_loss * (largest + math.log(vocab)) if o.hard_weight else 0.0
    steepest = max(soft, hard) * abs(student.scale)
    if of_teacher and o.soft_weight:
        steepest = max(steepest, o.divergence.reversed.form.steepest * abs(teacher.scale))
    return max(1.0, steepest)


def fold(o: Options, leading, weight: Tensor | None, denominator, steepest: float | None) -> Folded:
    """steepest: None unless a gradient is fp16, and then a bound on its elements (`steepness`)."""
    numbers = o.numbers
    if o.reduction == "none":
        return Folded(numbers, weight)
    if steepest is not None:
        # Divided by the number of rows before the upstream gradient (a loss scale, often 65536) has
        # multiplied it, an fp16 gradient would underflow. It is kept near 1 instead, and the backward applies
        # upstream and denominator together.
        post = None
        if weight is not None:
            most = largest(weight)
            weight, post = weight / most, most / denominator
        elif denominator != 1.0:
            post = 1.0 / denominator
        boost = boost_of(numbers, steepest)
        return Folded(boosted(numbers, boost), weight, post, boost)
    if torch.compiler.is_compiling() or isinstance(denominator, torch.SymInt):
        # the number of rows may be a symbol, which a factor of the operator must not become
        return Folded(numbers, weight, 1.0 / denominator)
    if isinstance(denominator, Tensor):
        weight = weight / denominator if weight is not None else (1.0 / denominator).expand(leading)
        return Folded(numbers, weight)
    if denominator == 1:
        return Folded(numbers, weight)
    T, value, grad, hard, hard_grad, *rest = numbers
    d = denominator
    return Folded(Numbers(T, value / d, grad / d, hard / d, hard_grad / d, *rest), weight)


def largest(x: Tensor) -> Tensor:
    """The largest size in x, 0-d; 1 where it is 0 or there is none."""
    most = x.abs().amax() if x.numel() else x.new_ones(())
    return torch.where(most > 0, most, 1.0)


def boost_of(numbers: Numbers, steepest: float) -> float:
    """What takes an fp16 gradient far from underflow, and not beyond 2^14: a power of 2, or of symbols, whose
    logarithm is not known, any number.
    """
    size = abs(numbers.grad_scale) + abs(numbers.hard_grad_scale)
    most = 16384.0 / max(size * steepest, 1e-300)
    return most if any_symbol(most) else 2.0 ** math.floor(math.log2(most))


def boosted(numbers: Numbers, boost: float) -> Numbers:
    """With the gradient multiplied by a factor."""
    grads = dict(grad_scale=numbers.grad_scale * boost, hard_grad_scale=numbers.hard_grad_scale * boost)
    return numbers._replace(**grads)


def reduced(rows: Tensor, student: Tensor, o: Options, denominator) -> Tensor:
    """The loss, of the rows' fp64 losses."""
    total = rows.view(student.shape[:-1]) if o.reduction == "none" else rows.sum() / denominator
    return total.to(value_dtype(student))


def value_dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32
