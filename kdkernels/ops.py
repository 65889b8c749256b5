"""The operators: opaque to torch.compile, each asking `backends` who runs it.

`loss_into` gives the loss of each row and fills a gradient and statistics in the same pass; `loss`
makes their buffers itself, which is what a compiler that plans memory takes. Arguments are those of `Call`
(call.py), laid out flat. The autograd.Functions live in autograd.py, outside the operator, which is cheaper
than registering a backward for it.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from . import backends
from .call import SCHEMA, TEMPERATURES, Asked, Call, Rows, heard, row_dtype
from .divergence import of
from .stats import COLUMNS

library = torch.library.Library("kdkernels", "DEF")

ROWS = "Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, Tensor? temperature"
library.define(f"loss_into({ROWS}, {SCHEMA}, Tensor(a!)? grad, Tensor(b!)? stats) -> Tensor")
# (losses, gradient, statistics); those that are not asked for are empty
library.define(f"loss({ROWS}, {SCHEMA}, bool grad, bool stats) -> (Tensor, Tensor, Tensor)")
# log softmax(x / T) over the last dimension, or, given upstream, the gradient
# (upstream - softmax * sum(upstream)) / T
library.define(
    "log_softmax(Tensor logits, Tensor? upstream, float[] numbers, Tensor? varying, str backend) -> Tensor"
)


@torch.library.impl(library, "loss_into", "CompositeExplicitAutograd")
def _loss_into(student, teacher, labels, weight, temperature, *rest) -> Tensor:
    *asked, grad, stats = rest
    return _run(student, teacher, Rows(labels, weight, temperature), Asked(*asked), grad, stats)


@torch.library.impl(library, "loss", "CompositeExplicitAutograd")
def _loss(student, teacher, labels, weight, temperature, *rest) -> tuple[Tensor, Tensor, Tensor]:
    *asked, wants_grad, wants_stats = rest
    rows = Rows(labels, weight, temperature)
    grad, stats = new_gradient(student, wants_grad), new_columns(student, wants_stats)
    buffers = grad if wants_grad else None, stats if wants_stats else None
    return _run(student, teacher, rows, Asked(*asked), *buffers), grad, stats


def _run(student, teacher, rows: Rows, asked: Asked, grad, stats, keeps: bool = False) -> Tensor:
    run = backends.resolve(asked.backend, student.device, student.dtype, teacher.dtype)
    labels, weight, temperature = rows
    if run.name != "cpu" and labels is not None and student.is_cpu:
        check_labels(labels, weight, asked.vocab)
    if temperature is not None:
        temperature = checked_temperatures(temperature, weight)
    of_rows = labels, weight, *asked.record()
    return _losses(run, Call(student, teacher, asked.vocab, *of_rows, grad, stats, temperature, keeps))


def _losses(run: ModuleType, call: Call) -> Tensor:
    """The rows' losses by a backend. 0 times a term is no term, also where the term is nan: without a soft
    term the teacher's logits are read for statistics alone."""
    n = call.numbers
    if n.value_scale != 0 or n.grad_scale != 0:
        return run.loss(call)
    hard = call.labels is not None and (n.hard_scale != 0 or n.hard_grad_scale != 0)
    out = None
    if call.stats is not None or not hard:
        out = run.loss(call._replace(grad=None)).zero_()
    if hard:
        return run.loss(_without_a_teacher(call))
    if call.grad is not None:
        call.grad.zero_()
    return out


def _without_a_teacher(call: Call) -> Call:
    """The hard term alone: the student is its own teacher."""
    n, m = call.numbers, call.numbers.modifiers
    m = m._replace(teacher_scale=m.student_scale, teacher_softcap=m.student_softcap)
    same = n._replace(temperature=1.0, modifiers=m)
    alone = call._replace(teacher=call.student, divergence=of("kl", 0.0), numbers=same)
    return alone._replace(stats=None, temperature=None)


def new_gradient(logits: Tensor, wanted: bool = True) -> Tensor:
    return torch.empty(logits.shape if wanted else 0, dtype=logits.dtype, device=logits.device)


def new_columns(student: Tensor, wanted: bool = True) -> Tensor:
    """For the statistics of the rows (stats.py)."""
    shape = (math.prod(student.shape[:-1]), COLUMNS) if wanted else 0
    return student.new_empty(shape, dtype=row_dtype(student.device))


def new_losses(student: Tensor) -> Tensor:
    """For the losses of the rows."""
    return student.new_empty(math.prod(student.shape[:-1]), dtype=row_dtype(student.device))


@torch.library.register_fake("kdkernels::loss_into", lib=library)
def _(student, *rest):
    return new_losses(student)


@torch.library.register_fake("kdkernels::loss", lib=library)
def _(student, *rest):
    *_, wants_grad, wants_stats = rest
    return new_losses(student), new_gradient(student, wants_grad), new_columns(student, wants_stats)


@torch.library.impl(library, "log_softmax", "CompositeExplicitAutograd")
def _log_softmax(logits: Tensor, upstream: Tensor | None, numbers, varying, backend: str) -> Tensor:
    (temperature,) = heard(numbers, varying)
    return backends.resolve(backend, logits.device, logits.dtype).log_softmax(logits, upstream, temperature)


@torch.library.register_fake("kdkernels::log_softmax", lib=library)
def _(logits, *rest):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def check_labels(labels: Tensor, weight: Tensor | None, vocab: int) -> None:
    """What the C++ library checks itself, for the backends that index with labels: ValueError outside [0,
    vocab)."""
    bad = (labels < 0) | (labels >= vocab)
    if weight is not None:
        bad &= weight != 0
    if bad.any():
        row = int(bad.reshape(-1).nonzero()[0])
        raise ValueError(
            f"labels: row {row} has label {labels.reshape(-1)[row].item()}; labels are in [0, "
            f"{vocab}) or ignore_index"
        )


def checked_temperatures(temperature: Tensor, weight: Tensor | None) -> Tensor:
    """The rows' own temperatures: ValueError on the CPU for one of a row that counts outside of
    TEMPERATURES; nan for it on a device, which nobody waits for."""
    low, high = TEMPERATURES
    good = (temperature >= low) & (temperature <= high)
    if not temperature.is_cpu:
        return torch.where(good, temperature, math.nan)
    bad = ~good if weight is None else ~good & (weight != 0)
    if bad.any():
        row = int(bad.reshape(-1).nonzero()[0])
        raise ValueError(
            f"temperature: must be in [{low:g}, {high:g}]; that of row {row} is "
            f"{temperature.reshape(-1)[row].item():g}"
        )
    return temperature


def loss_into(
    student: Tensor,
    teacher: Tensor,
    rows: Rows,
    asked: Asked,
    grad: Tensor | None = None,
    stats: Tensor | None = None,
    planned: bool = False,
) -> Tensor:
    """The operator of that name; without torch's dispatcher, whose way takes longer than a backend's, where
    nobody on it is to see the call: no compiler, no mode, no other kind of tensor.

    planned: within another operator, whose memory a compiler may have planned.
    """
    if planned or torch.compiler.is_compiling() or _is_seen(student, teacher):
        return torch.ops.kdkernels.loss_into.default(student, teacher, *rows, *asked, grad, stats)
    if torch._C._autograd._profiler_enabled():
        with torch.profiler.record_function("kdkernels::loss_into"):
            return _run(student, teacher, rows, asked, grad, stats, keeps=True)
    return _run(student, teacher, rows, asked, grad, stats, keeps=True)


def _is_seen(student: Tensor, teacher: Tensor) -> bool:
    """Whether the dispatcher has more to do than call what runs: for tensors whose memory is not what they
    stand for, and for modes."""
    for x in (student, teacher):
        if type(x) is not Tensor or x.is_meta or x.is_neg():
            return True
    return torch._C._len_torch_dispatch_stack() > 0


loss = torch.ops.kdkernels.loss.default
log_softmax = torch.ops.kdkernels.log_softmax.default
