"""The operators: one per capability, opaque to torch.compile, each asking `backends` who runs it.

`torch.ops.kdkernels.loss` gives the loss of each row in fp64; `loss_and_grad` also fills a gradient buffer,
in the same pass. Every factor is the host's: the functions of functional.py fold weights, T^2 and reductions
into them. The autograd.Functions live there too, outside the operator, which is cheaper than registering a
backward for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backends
from . import divergence as math_of
from .stats import COLUMNS
from .transforms import Modifiers

_library = torch.library.Library("kdkernels", "DEF")

# student, teacher  (..., V) logits. Of a row the first `vocab` classes count
# labels            (...) int64 or None. Checked on the CPU where weight is not 0
# weight            (...) float64 or None; a row of weight 0 is not read
# grad              the buffer of the gradient, in the student's shape and dtype; may be the student's own
#                   storage
# modifiers         transforms.Modifiers, or empty: what is done to the logits before all else, and CE is with
#                   label smoothing and z-loss (1 - label_smoothing) CE + label_smoothing (lse - mean z) +
#                   z_loss lse^2, lse and the mean over the classes not at -inf
# returns           (rows,) float64: weight * (value_scale * D + hard_scale * CE), D the limit of T^2 D at T =
#                   inf
#                   grad = weight * (grad_scale * T dD/dz + hard_grad_scale * dCE/dz)
#
# A backend's `loss` takes stats besides, None or (rows, COLUMNS) float64 to be filled (stats.py), nan for a
# row of weight 0; and mirror: None or the operator's arguments for the same rows with student and teacher
# exchanged, whose grad it fills from the same sweeps. The divergence there is `divergence.mirror`'s, which of
# the cross entropy lacks the teacher's own entropy.
_OPTIONS = ", ".join(
    [
        "str divergence",
        *(
            f"float {x}"
            for x in ("temperature", "value_scale", "grad_scale", "hard_scale", "hard_grad_scale")
        ),
    ]
    + ["int vocab", "float[] modifiers", "str backend"]
)
_library.define(f"loss(Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, {_OPTIONS}) -> Tensor")
_library.define(
    "loss_and_grad(Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, Tensor(a!) grad, "
    f"{_OPTIONS}) -> Tensor"
)
# the same with a gradient of its own: what a compiler that plans memory takes, whose buffers nobody else may
# write to; and with statistics of the rows (stats.py), [rows, COLUMNS] float64, from the same pass
_library.define(
    f"loss_and_new_grad(Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, {_OPTIONS}) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "loss_and_stats(Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, Tensor(a!)? "
    f"grad, {_OPTIONS}) -> (Tensor, Tensor)"
)
_library.define(
    "loss_new_grad_and_stats(Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
# with the teacher's gradient, in its shape and dtype, grad_scale * T dD/dv, from the same sweeps where they
# are enough; statistics and the student's gradient are empty unless they are asked for
_library.define(
    "loss_and_grads(Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, Tensor(a!)? "
    f"grad, Tensor(b!) teacher_grad, {_OPTIONS},"
    " bool stats) -> (Tensor, Tensor)"
)
_library.define(
    f"loss_and_new_grads(Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, {_OPTIONS}, "
    "bool stats, bool student_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
# log softmax(x / T) over the last dimension, or, given upstream, the gradient (upstream - softmax *
# sum(upstream)) / T
_library.define("log_softmax(Tensor logits, Tensor? upstream, float temperature, str backend) -> Tensor")


def mirrored(
    student, teacher, weight, teacher_grad, divergence, temperature, grad_scale, vocab, modifiers
) -> tuple:
    """The arguments that make the teacher's gradient a student's: of the divergence with both exchanged."""
    changed = Modifiers(*modifiers)
    swapped = [*changed[2:4], *changed[:2], 0.0, 0.0] if modifiers else []
    turned, scales = math_of.mirror(divergence), (0.0, grad_scale, 0.0, 0.0)
    return teacher, student, None, weight, teacher_grad, turned, temperature, *scales, vocab, swapped


def _run(
    student,
    teacher,
    labels,
    weight,
    grad,
    divergence,
    temperature,
    *rest,
    stats: bool = False,
    teacher_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    *factors, vocab, modifiers, backend = rest
    run = backends.resolve(backend, student.device, student.dtype, teacher.dtype)
    if run.name != "cpu" and labels is not None and student.device.type == "cpu":
        check_labels(labels, weight, vocab)
    more = {}
    if teacher_grad is not None:
        more["mirror"] = mirrored(
            student, teacher, weight, teacher_grad, divergence, temperature, factors[1], vocab, modifiers
        )
    if stats:
        more["stats"] = torch.empty(
            math.prod(student.shape[:-1]), COLUMNS, dtype=torch.float64, device=student.device
        )
    rows = run.loss(
        student, teacher, labels, weight, grad, divergence, temperature, *factors, vocab, modifiers, **more
    )
    return rows, more.get("stats")


@torch.library.impl(_library, "loss_and_grad", "CompositeExplicitAutograd")
def _loss_and_grad(student, teacher, labels, weight, grad, *options) -> Tensor:
    return _run(student, teacher, labels, weight, grad, *options)[0]


@torch.library.impl(_library, "loss", "CompositeExplicitAutograd")
def _loss(student, teacher, labels, weight, *options) -> Tensor:
    return _loss_and_grad(student, teacher, labels, weight, None, *options)


@torch.library.impl(_library, "loss_and_new_grad", "CompositeExplicitAutograd")
def _loss_and_new_grad(student, teacher, labels, weight, *options) -> tuple[Tensor, Tensor]:
    grad = _new_grad(student)
    return _loss_and_grad(student, teacher, labels, weight, grad, *options), grad


@torch.library.impl(_library, "loss_and_stats", "CompositeExplicitAutograd")
def _loss_and_stats(student, teacher, labels, weight, grad, *options) -> tuple[Tensor, Tensor]:
    return _run(student, teacher, labels, weight, grad, *options, stats=True)


@torch.library.impl(_library, "loss_new_grad_and_stats", "CompositeExplicitAutograd")
def _loss_new_grad_and_stats(student, teacher, labels, weight, *options) -> tuple[Tensor, Tensor, Tensor]:
    grad = _new_grad(student)
    rows, columns = _run(student, teacher, labels, weight, grad, *options, stats=True)
    return rows, grad, columns


@torch.library.impl(_library, "loss_and_grads", "CompositeExplicitAutograd")
def _loss_and_grads(student, teacher, labels, weight, grad, teacher_grad, *options) -> tuple[Tensor, Tensor]:
    *options, stats = options
    rows, columns = _run(
        student, teacher, labels, weight, grad, *options, stats=stats, teacher_grad=teacher_grad
    )
    return rows, columns if stats else rows.new_empty(0)


@torch.library.impl(_library, "loss_and_new_grads", "CompositeExplicitAutograd")
def _loss_and_new_grads(student, teacher, labels, weight, *options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *options, student_grad = options
    grad, other = _new_grad(student, student_grad), _new_grad(teacher)
    rows, columns = _loss_and_grads(
        student, teacher, labels, weight, grad if student_grad else None, other, *options
    )
    return rows, grad, other, columns


def _new_grad(logits: Tensor, asked: bool = True) -> Tensor:
    return torch.empty(logits.shape if asked else 0, dtype=logits.dtype, device=logits.device)


@torch.library.impl(_library, "log_softmax", "CompositeExplicitAutograd")
def _log_softmax(logits: Tensor, upstream: Tensor | None, temperature: float, backend: str) -> Tensor:
    return backends.resolve(backend, logits.device, logits.dtype).log_softmax(logits, upstream, temperature)


@torch.library.register_fake("kdkernels::loss", lib=_library)
@torch.library.register_fake("kdkernels::loss_and_grad", lib=_library)
def _(student, *rest):
    return student.new_empty(math.prod(student.shape[:-1]), dtype=torch.float64)


@torch.library.register_fake("kdkernels::loss_and_new_grad", lib=_library)
def _(student, *rest):
    grad = _new_grad(student)
    return student.new_empty(math.prod(student.shape[:-1]), dtype=torch.float64), grad


@torch.library.register_fake("kdkernels::loss_and_stats", lib=_library)
def _(student, *rest):
    rows = math.prod(student.shape[:-1])
    return student.new_empty(rows, dtype=torch.float64), student.new_empty(rows, COLUMNS, dtype=torch.float64)


@torch.library.register_fake("kdkernels::loss_new_grad_and_stats", lib=_library)
def _(student, *rest):
    rows = math.prod(student.shape[:-1])
    grad = _new_grad(student)
    return (
        student.new_empty(rows, dtype=torch.float64),
        grad,
        student.new_empty(rows, COLUMNS, dtype=torch.float64),
    )


@torch.library.register_fake("kdkernels::loss_and_grads", lib=_library)
def _(student, *rest):
    rows = math.prod(student.shape[:-1])
    return student.new_empty(rows, dtype=torch.float64), _new_columns(student, rows, rest[-1])


@torch.library.register_fake("kdkernels::loss_and_new_grads", lib=_library)
def _(student, teacher, *rest):
    *_, stats, student_grad = rest
    rows = math.prod(student.shape[:-1])
    grads = _new_grad(student, student_grad), _new_grad(teacher)
    return student.new_empty(rows, dtype=torch.float64), *grads, _new_columns(student, rows, stats)


def _new_columns(student: Tensor, rows: int, asked: bool) -> Tensor:
    return student.new_empty((rows, COLUMNS) if asked else 0, dtype=torch.float64)


@torch.library.register_fake("kdkernels::log_softmax", lib=_library)
def _(logits, upstream, temperature, backend):
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


loss = torch.ops.kdkernels.loss.default
loss_and_grad = torch.ops.kdkernels.loss_and_grad.default
loss_and_new_grad = torch.ops.kdkernels.loss_and_new_grad.default
loss_and_stats = torch.ops.kdkernels.loss_and_stats.default
loss_and_grads = torch.ops.kdkernels.loss_and_grads.default
loss_and_new_grads = torch.ops.kdkernels.loss_and_new_grads.default
loss_new_grad_and_stats = torch.ops.kdkernels.loss_new_grad_and_stats.default
log_softmax = torch.ops.kdkernels.log_softmax.default
