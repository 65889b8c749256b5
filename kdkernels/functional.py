"""The public functions: options checked once, shapes and masks resolved, factors folded, one operator called.

Every factor that is known before the pass goes into it (T^2, the weights, the reduction's denominator, which
stays on the device), so that the gradient comes out final and the backward has nothing to do for an upstream
gradient of 1.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends, inputs, ops, recycle
from .divergence import KL, Divergence, LogitMatching, mirror, parse
from .stats import KDStats, from_columns
from .transforms import LogitTransform, Modifiers

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# of a token_weight, besides
MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REDUCTIONS = ("mean", "sum", "none")
AS_THEY_ARE = LogitTransform()
# Of a finite temperature: where every backend is right. fp32 holds 1/T there, and the squares of (z - v) / T.
TEMPERATURES = (1e-4, 1e12)


# ---------------------------------------------------------------- options

# options, of any make that `inputs.number` knows
NUMBERS = ("temperature", "soft_weight", "hard_weight", "label_smoothing", "z_loss")


@dataclass(frozen=True)
class Options:
    """The options of a loss that are not tensors, checked, and what the operator takes of them."""

    divergence: Divergence
    text: str
    temperature: float
    t_squared: bool
    soft_weight: float
    hard_weight: float
    ignore_index: int
    reduction: str
    vocab_size: int | None
    inplace: bool
    teacher_grad: bool
    student_transform: LogitTransform
    teacher_transform: LogitTransform
    label_smoothing: float
    z_loss: float
    return_stats: bool
    backend: str
    value_scale: float = field(init=False)  # factor of D
    grad_scale: float = field(init=False)  # factor of T dD/dz, or of the limit's gradient at T = inf
    modifiers: list[float] = field(init=False)  # `Modifiers`, as the operator takes them

    def __post_init__(self) -> None:
        # comparisons rather than math.isfinite: this is traced by torch.compile
        T, (low, high) = self.temperature, TEMPERATURES
        for name in NUMBERS[1:]:
            inputs.check_finite(name, getattr(self, name))
        if not (low <= T <= high or T == math.inf):
            raise ValueError(
                f"temperature: must be in [{low:g}, {high:g}], or inf, the limit; got {inputs.shown(T)}"
            )
        if isinstance(self.divergence, LogitMatching) and T != math.inf:
            raise ValueError("divergence: logit matching has no temperature; use logit_matching_loss")
        if T == math.inf:
            if self.divergence.form.limit is None:
                raise ValueError(
                    f"temperature: inf has no limit for {self.divergence}: T^2 D grows without bound"
                )
            if not self.t_squared:
                raise ValueError(
                    "temperature: inf without t_squared=True is zero everywhere; t_squared=True gives "
                    "the limit of T^2 D"
                )
        if self.reduction == "batchmean":
            raise ValueError(
                'reduction: "batchmean" is spelled "mean" here: the sum over rows divided by the counted rows'
            )
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction: must be one of {', '.join(REDUCTIONS)}; got {self.reduction!r}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size: must be a positive integer or None, got {self.vocab_size!r}")
        if not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(
                f"ignore_index: must be an int64, as labels are, got {inputs.shown(self.ignore_index)}"
            )
        if self.inplace and self.teacher_grad and self.reduction == "none":
            raise ValueError(
                'inplace: teacher_grad needs the student\'s logits in the backward of reduction="none"'
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: must be in [0, 1), got {self.label_smoothing!r}")
        if (self.label_smoothing or self.z_loss) and not self.hard_weight:
            raise ValueError("label_smoothing and z_loss: belong to the hard term, and hard_weight is 0")
        for name in ("student_transform", "teacher_transform"):
            if not isinstance(getattr(self, name), LogitTransform):
                raise TypeError(f"{name}: must be a LogitTransform, got {getattr(self, name)!r}")
        backends.check(self.backend)
        scale = self.soft_weight * (T**2 if self.t_squared and T != math.inf else 1.0)
        inputs.check_finite("soft_weight times T^2", scale)
        object.__setattr__(self, "value_scale", scale)
        object.__setattr__(self, "grad_scale", scale / T if T != math.inf else scale)
        mixed = self.student_transform, self.teacher_transform, self.label_smoothing, self.z_loss
        object.__setattr__(self, "modifiers", Modifiers.of(*mixed))


def options(
    divergence: Divergence | str = "kl",
    temperature: float = 1.0,
    t_squared: bool = False,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
    inplace: bool = False,
    teacher_grad: bool = False,
    student_transform: LogitTransform = AS_THEY_ARE,
    teacher_transform: LogitTransform = AS_THEY_ARE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_stats: bool = False,
    backend: str = "auto",
) -> Options:
    """The one place where options are checked; the same options are checked once."""
    numbers = temperature, soft_weight, hard_weight, label_smoothing, z_loss
    if (
        not type(temperature)
        is type(soft_weight)
        is type(hard_weight)
        is type(label_smoothing)
        is type(z_loss)
        is float
    ):
        temperature, soft_weight, hard_weight, label_smoothing, z_loss = map(inputs.number, NUMBERS, numbers)
    if type(ignore_index) is not int and (ignore_index := inputs.integer(given := ignore_index)) is None:
        raise TypeError(f"ignore_index: must be an integer, got {inputs.shown(given)}")
    if vocab_size is not None and (vocab_size := inputs.integer(given := vocab_size)) is None:
        raise ValueError(f"vocab_size: must be a positive integer or None, got {inputs.shown(given)}")
    mixing = soft_weight, hard_weight, ignore_index, reduction
    more = student_transform, teacher_transform, label_smoothing, z_loss, return_stats
    everything = (
        divergence,
        temperature,
        t_squared,
        *mixing,
        vocab_size,
        inplace,
        teacher_grad,
        *more,
        backend,
    )
    if torch.compiler.is_compiling():
        return _options(*everything)
    try:
        return _known_options(*everything)
    except TypeError:
        pass  # of a wrong type, and perhaps without a hash: the checks name it
    return _options(*everything)


def _options(divergence, *rest) -> Options:
    if isinstance(divergence, str):
        return Options(parse(divergence), divergence, *rest)
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence: must be a Divergence or its text form, got {divergence!r}")
    return Options(divergence, divergence.text, *rest)


_known_options = functools.lru_cache(maxsize=256, typed=True)(_options)  # True is not 1.0


def _check_tensors(
    student: Tensor, teacher: Tensor, labels: Tensor | None, token_weight: Tensor | None, o: Options
) -> int:
    """Raise for tensors that do not fit together or with the options; the number of classes that count."""
    for name, x in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: must be a tensor, got {type(x).__name__}")
        inputs.check_dense(name, x)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: must be bfloat16, float16, float32 or float64, got {x.dtype}")
    if student.dim() == 0 or student.shape[:-1] != teacher.shape[:-1] or teacher.dim() == 0:
        raise ValueError(
            "student_logits and teacher_logits: must be (..., V) with the same leading shape, got "
            f"{tuple(student.shape)} "
            f"and {tuple(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"teacher_logits: must be on the student's device {student.device}, got {teacher.device}"
        )
    vocab = _common_vocab(student.shape[-1], teacher.shape[-1], o)
    _check_rows(labels, token_weight, student, o)
    if inputs.differentiated(teacher) and not o.teacher_grad:
        raise ValueError(
            "teacher_logits: receive a gradient only with teacher_grad=True; pass that, or "
            "teacher_logits.detach()"
        )
    if o.inplace:
        _check_in_place(
            student, (("teacher_logits", teacher), ("labels", labels), ("token_weight", token_weight))
        )
    return vocab


def _check_in_place(student: Tensor, others: tuple[tuple[str, Tensor | None], ...]) -> None:
    """Raise where the gradient cannot take the student's memory."""
    if student.requires_grad and student.is_leaf:
        raise ValueError("inplace: student_logits is a leaf that requires grad; its values would be lost")
    if student.numel() == 0:
        return
    if inputs.rows_overlap(student):
        raise ValueError("inplace: student_logits is expanded; its rows share storage")
    if not _in_place_layout(student):
        raise ValueError(
            "inplace: student_logits would be copied first; its last dimension must be contiguous and "
            "its rows regular"
        )
    if torch.compiler.is_compiling():  # it keeps what is read apart from what is written
        return
    for name, x in others:
        if x is not None and inputs.overlap(student, x):
            raise ValueError(
                f"inplace: {name} shares memory with student_logits, which the gradient is written over"
            )


def _common_vocab(student: int, teacher: int, o: Options) -> int:
    """The number of classes that count, of vocabularies of these sizes."""
    if o.vocab_size is None:
        if teacher != student:
            raise ValueError(
                f"vocab_size: required when the vocabularies differ; the student's is {student}, the "
                f"teacher's {teacher}"
            )
        if student == 0:
            raise ValueError("student_logits: the last dimension, the vocabulary, is empty")
        return student
    if o.vocab_size > min(student, teacher):
        raise ValueError(
            f"vocab_size: {o.vocab_size} is more than the student's {student} or the teacher's "
            f"{teacher} classes"
        )
    return o.vocab_size


def _check_rows(
    labels: Tensor | None, token_weight: Tensor | None, student: Tensor, o: Options, of: str = "logits"
) -> None:
    """What belongs to the rows of `student`, which the caller knows as `of`."""
    if labels is not None:
        _check_per_row(
            "labels",
            labels,
            student,
            "an int64 tensor",
            isinstance(labels, Tensor) and labels.dtype == torch.int64,
            of,
        )
    elif o.hard_weight:
        raise ValueError(f"hard_weight: {o.hard_weight} needs labels")
    if token_weight is not None:
        is_real = isinstance(token_weight, Tensor) and (
            token_weight.dtype.is_floating_point or token_weight.dtype in MASK_DTYPES
        )
        _check_per_row(
            "token_weight", token_weight, student, "a floating-point, integer or bool tensor", is_real, of
        )
        if inputs.differentiated(token_weight):
            raise ValueError("token_weight: receives no gradient; pass token_weight.detach()")


def _check_per_row(name: str, x: Tensor, student: Tensor, kind: str, is_kind: bool, of: str) -> None:
    if not is_kind:
        raise TypeError(f"{name}: must be {kind}, got {getattr(x, 'dtype', type(x).__name__)}")
    inputs.check_dense(name, x)
    if x.shape != student.shape[:-1]:
        raise ValueError(
            f"{name}: must be {tuple(student.shape[:-1])}, the {of}' leading shape; got {tuple(x.shape)}"
        )
    if x.device != student.device:
        raise ValueError(f"{name}: must be on the {of}' device {student.device}, got {x.device}")


def _items(num_items: float | Tensor | None, o: Options) -> float | Tensor | None:
    """What mean's sum is divided by in place of the counted rows, checked: a number, or a 0-d tensor, in
    which 0 stands for 1."""
    if num_items is None:
        return None
    if o.reduction != "mean":
        raise ValueError(
            f'num_items: replaces the denominator of reduction="mean"; reduction is {o.reduction!r}'
        )
    if not isinstance(num_items, Tensor):
        _check_items(n := inputs.number("num_items", num_items))
        return n if n else 1
    inputs.check_dense("num_items", num_items)
    if num_items.numel() != 1:
        raise ValueError(
            f"num_items: must be a number or a tensor of one element, got shape {tuple(num_items.shape)}"
        )
    if num_items.dtype == torch.bool or num_items.is_complex():
        raise TypeError(f"num_items: must be a number, got a tensor of {num_items.dtype}")
    num_items = num_items.detach().reshape(())
    if not torch.compiler.is_compiling() and inputs.readable(num_items):
        _check_items(num_items.item())
    return num_items


def _check_items(n: float) -> None:
    if not 0 <= n <= inputs.LARGEST:
        raise ValueError(f"num_items: must be finite and not negative, got {inputs.shown(n)}")


def _in_place_layout(x: Tensor) -> bool:
    """Whether rows can be addressed as they lie: last dimension contiguous, leading ones folding into two."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return False
    return x.dim() <= 3 or all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 3))


def _rows_addressable(x: Tensor) -> Tensor:
    return x if _in_place_layout(x) else x.contiguous()


# ---------------------------------------------------------------- autograd

# the operator's arguments after the tensors
Factors = tuple[str, float, float, float, float, float, int, list[float], str]


class _Total(torch.autograd.Function):
    """Sum of the row losses; the forward fills the gradients of student and teacher, the backward multiplies
    them by the upstream one."""

    @staticmethod
    def forward(
        ctx,
        student,
        teacher,
        labels,
        weight,
        factors: Factors,
        boost: float,
        inplace: bool,
        stats: bool,
        wanted: tuple[bool, bool],
    ):
        rows, grads, columns = _rows_and_gradients(
            student, teacher, labels, weight, factors, inplace, stats, wanted
        )
        ctx.wanted, ctx.boost = wanted, boost
        ctx.save_for_backward(*grads)
        if stats:
            ctx.mark_non_differentiable(columns)
        return rows.sum().to(_value_dtype(student)), columns

    @staticmethod
    def backward(ctx, upstream, _):
        inputs.check_upstream("fused_kd_loss", upstream)
        grads = iter(
            _times_upstream(ctx.saved_tensors, upstream / ctx.boost if ctx.boost != 1.0 else upstream)
        )
        return (
            *(next(grads) if wanted else None for wanted in ctx.wanted),
            None,
            None,
            None,
            None,
            None,
            None,
            None,
        )


class _PerRow(torch.autograd.Function):
    """Row losses; the backward runs the operator again with the upstream gradient in the rows' weights."""

    @staticmethod
    def forward(ctx, student, teacher, labels, weight, factors: Factors, inplace: bool, stats: bool):
        rows, columns = _rows_alone(student, teacher, labels, weight, factors, stats)
        ctx.save_for_backward(student, teacher, labels, weight)
        ctx.factors, ctx.inplace = factors, inplace
        if stats:
            ctx.mark_non_differentiable(columns)
        return rows.view(student.shape[:-1]).to(_value_dtype(student)), columns

    @staticmethod
    def backward(ctx, upstream, _):
        inputs.check_upstream("fused_kd_loss", upstream)
        student, teacher, labels, weight = ctx.saved_tensors
        with torch.no_grad():
            scale = (
                upstream.double()
                if weight is None
                else torch.where(weight != 0, upstream.double() * weight, 0.0)
            )
            wanted = ctx.needs_input_grad[:2]
            _, grads, _ = _rows_and_gradients(
                student, teacher, labels, scale, ctx.factors, ctx.inplace, False, wanted
            )
        if torch.is_grad_enabled():
            grads = [
                _OnceDifferentiable.apply(_anchor(), grad, torch.ones((), device=grad.device))
                for grad in grads
            ]
        grads = iter(grads)
        return *(next(grads) if x else None for x in wanted), None, None, None, None, None


# torch.export keeps operators, and nothing of an autograd.Function: what is to be trained through its graph
# is one with a derivative
ops._library.define(
    f"trainable_loss(Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, {ops._OPTIONS}) "
    "-> Tensor"
)


@torch.library.impl(ops._library, "trainable_loss", "CompositeExplicitAutograd")
def _trainable_loss(*arguments) -> Tensor:
    return ops.loss(*arguments)


@torch.library.register_fake("kdkernels::trainable_loss", lib=ops._library)
def _(student, *rest):
    return student.new_empty(math.prod(student.shape[:-1]), dtype=torch.float64)


def _save_trainable(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.factors = inputs[4:]


def _trainable_backward(ctx, upstream):
    student, teacher, labels, weight = ctx.saved_tensors
    scale = upstream.view(student.shape[:-1])
    scale = scale if weight is None else torch.where(weight != 0, scale * weight, 0.0)
    own, others = ctx.needs_input_grad[:2]
    grad = other = None
    if others:
        _, grad, other, _ = ops.loss_and_new_grads(student, teacher, labels, scale, *ctx.factors, False, own)
    elif own:
        _, grad = ops.loss_and_new_grad(student, teacher, labels, scale, *ctx.factors)
    return grad if own else None, other, *[None] * (2 + len(ctx.factors))


torch.library.register_autograd(
    "kdkernels::trainable_loss", _trainable_backward, setup_context=_save_trainable, lib=ops._library
)


class _OnceDifferentiable(torch.autograd.Function):
    """grad * factor, with an error where a second derivative is asked for."""

    @staticmethod
    def forward(ctx, anchor, grad, factor):
        return grad * factor

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            'fused_kd_loss: the fused backends are differentiable once; backend="eager" is '
            "differentiable to any order"
        )


def _rows_alone(
    student, teacher, labels, weight, factors: Factors, stats: bool
) -> tuple[Tensor, Tensor | None]:
    """The rows' losses and statistics, without a gradient."""
    if stats:
        return ops.loss_and_stats(student.detach(), teacher.detach(), labels, weight, None, *factors)
    return ops.loss(student.detach(), teacher.detach(), labels, weight, *factors), None


def _rows_and_gradients(
    student, teacher, labels, weight, factors: Factors, inplace: bool, stats: bool, wanted: tuple[bool, bool]
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """The rows' losses, the gradients that are wanted of student and teacher, and statistics.

    A gradient is in the student's storage, in memory that is used again, or in the compiler's.
    """
    z, v = student.detach(), teacher.detach()
    own, others = wanted
    if torch.compiler.is_compiling() and (others or not inplace):
        if others:
            rows, grad, other, columns = ops.loss_and_new_grads(z, v, labels, weight, *factors, stats, own)
            return rows, (grad, other) if own else (other,), columns if stats else None
        if stats:
            rows, grad, columns = ops.loss_new_grad_and_stats(z, v, labels, weight, *factors)
            return rows, (grad,), columns
        rows, grad = ops.loss_and_new_grad(z, v, labels, weight, *factors)
        return rows, (grad,), None
    grad = None if not own else z if inplace else _gradient_for(student)
    columns = None
    if others:
        other = _gradient_for(teacher)
        rows, columns = ops.loss_and_grads(z, v, labels, weight, grad, other, *factors, stats)
    elif stats:
        rows, columns = ops.loss_and_stats(z, v, labels, weight, grad, *factors)
    else:
        rows = ops.loss_and_grad(z, v, labels, weight, grad, *factors)
    # autograd is told, so that whoever saved the logits finds out
    if inplace and own and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(student)
    return rows, (*((grad,) if own else ()), *((other,) if others else ())), columns if stats else None


def _gradient_for(x: Tensor) -> Tensor:
    fake = type(x) is not Tensor  # no memory to recycle
    return torch.empty_like(x, memory_format=torch.contiguous_format) if fake else recycle.empty(x)


def _anchor() -> Tensor:
    """What makes the first derivative differentiable, so that the second one meets the error."""
    return torch.zeros((), requires_grad=True)


# whether the backward that is running keeps its graph, so that another one may follow it (retain_graph,
# checkpoints without reentry)
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _times_upstream(grads: tuple[Tensor, ...], factor: Tensor) -> list[Tensor]:
    """What the forward has saved, times a 0-d factor: in its own memory only where no backward can come after
    this one.

    So nothing that a later backward, another thread or a saved-tensor hook may read is ever changed, and no
    state passes between backwards.
    """
    if torch.compiler.is_compiling():  # a graph that plans its own memory
        return [grad * factor for grad in grads]
    if torch.is_grad_enabled():  # create_graph
        return [_OnceDifferentiable.apply(_anchor(), grad, factor) for grad in grads]
    if _keeps_graph():
        grads = [grad.clone() for grad in grads]
    for grad in grads:
        _multiply_(grad, factor)
    return list(grads)


def _multiply_(grad: Tensor, factor: Tensor) -> None:
    """In place by a 0-d factor; not at all when it is 1, where it can be looked at without waiting for a
    device."""
    if not inputs.readable(factor) or factor.item() != 1.0:
        getattr(backends.resolve("auto", grad.device, grad.dtype), "scale_", Tensor.mul_)(grad, factor)


def _value_dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- the loss


def _loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    o: Options,
    token_weight: Tensor | None,
    num_items: int | Tensor | None,
) -> Tensor | tuple[Tensor, KDStats]:
    compiling = torch.compiler.is_compiling()
    autograd = o.backend == "eager" and not o.inplace and not compiling  # past the operator
    if not compiling:
        inputs.check_mode("fused_kd_loss", (student, teacher if o.teacher_grad else None), autograd)
    vocab = _check_tensors(student, teacher, labels, token_weight, o)
    num_items = _items(num_items, o)
    if not compiling and (autograd or o.reduction == "none"):  # which save what they are given
        student, teacher, labels, token_weight = map(
            inputs.saveable, (student, teacher, labels, token_weight)
        )
    weight, denominator = _weights(student, labels, vocab, o, token_weight, num_items)
    # without a hard term only looked at: a wrong one is an error
    hard = labels if o.hard_weight or student.device.type == "cpu" else None
    if autograd:
        columns = None
        if o.return_stats:
            unweighted: Factors = (
                o.text,
                float(o.temperature),
                1.0,
                0.0,
                1.0,
                0.0,
                vocab,
                o.modifiers,
                o.backend,
            )
            _, columns = _rows_alone(student, teacher.detach(), hard, weight, unweighted, True)
        loss = _differentiable(student, teacher, hard, weight, o, vocab, denominator)
    else:
        loss, columns = _fused(
            student, teacher if o.teacher_grad else teacher.detach(), hard, weight, o, vocab, denominator
        )
    if not o.return_stats:
        return loss
    return loss, from_columns(
        columns.detach(), student.shape[:-1], labels, bool(o.hard_weight), weight, _value_dtype(student)
    )


def _fused(
    student, teacher, labels: Tensor | None, weight: Tensor | None, o: Options, vocab: int, denominator
) -> tuple[Tensor, Tensor | None]:
    """The loss by the operator, into which every factor goes that is known, and its statistics."""
    if torch.compiler.is_exporting():
        return _exported(student, teacher, labels, weight, o, vocab, denominator)
    wanted = (
        torch.is_grad_enabled() and student.requires_grad,
        torch.is_grad_enabled() and teacher.requires_grad,
    )
    inplace, halves = (
        o.inplace,
        [has and x.dtype == torch.float16 for x, has in zip((student, teacher), wanted, strict=True)],
    )
    if o.reduction != "none" and any(halves) and _steepness(o, vocab, halves[1]) > MOST_STEEP:
        # no factor keeps such a gradient within fp16: it is fp32's until autograd casts it, with the loss
        # scale in it
        inplace = inplace or halves[0] and not torch.compiler.is_compiling()  # nobody else has the copy
        student, teacher = (
            x.float() if half else x for x, half in zip((student, teacher), halves, strict=True)
        )
        halves = [False, False]
    steepness = _steepness(o, vocab, halves[1]) if any(halves) else None
    factors, weight, post, boost = _folded(steepness, student.shape[:-1], weight, o, vocab, denominator)
    x, y = _rows_addressable(student), _rows_addressable(teacher)
    if o.reduction == "none":
        return _PerRow.apply(x, y, labels, weight, factors, o.inplace, o.return_stats)
    if any(wanted):
        total, columns = _Total.apply(x, y, labels, weight, factors, boost, inplace, o.return_stats, wanted)
    else:
        total, columns = _rows_alone(x, y, labels, weight, factors, o.return_stats)
        total = total.sum().to(_value_dtype(student))
    return total if post is None else (total * post).to(total.dtype), columns


def _exported(
    student, teacher, labels: Tensor | None, weight: Tensor | None, o: Options, vocab: int, denominator
) -> tuple[Tensor, Tensor | None]:
    """`_fused` for torch.export: an operator that has a derivative, whatever requires one at the time."""
    factors = _factors(o, vocab)
    x, y = _rows_addressable(student), _rows_addressable(teacher)
    rows = torch.ops.kdkernels.trainable_loss.default(x, y, labels, weight, *factors)
    columns = _rows_alone(x, y, labels, weight, factors, True)[1] if o.return_stats else None
    return _reduced(rows, student, o, denominator), columns


def _factors(o: Options, vocab: int) -> Factors:
    """The operator's arguments for rows that nothing is folded into."""
    hard = float(o.hard_weight)
    return (
        o.text,
        float(o.temperature),
        o.value_scale,
        o.grad_scale,
        hard,
        hard,
        vocab,
        o.modifiers,
        o.backend,
    )


def _reduced(rows: Tensor, student: Tensor, o: Options, denominator) -> Tensor:
    """The loss, of the rows' fp64 losses."""
    total = rows.view(student.shape[:-1]) if o.reduction == "none" else rows.sum() / denominator
    return total.to(_value_dtype(student))


# of an fp16 gradient; beyond, what keeps its largest elements below fp16's range would take the smallest
# ones' digits
MOST_STEEP = 32.0
LARGEST_HALF = 65504.0


def _steepness(o: Options, vocab: int, of_teacher: bool) -> float:
    """A bound on the elements of a row's gradients, in units of the factors that they are multiplied with;
    inf where there is none.

    T |dD/dz_i| <= `Form.steepest`; |dCE/dz_i| <= 1; the z-loss adds 2 z_loss lse q_i, and fp16 logits bound
    lse.
    """
    if o.temperature == math.inf:
        return math.inf
    student, teacher = o.student_transform, o.teacher_transform
    soft = o.divergence.form.steepest if o.soft_weight else 0.0
    largest = student.softcap or abs(student.scale) * LARGEST_HALF
    hard = 1.0 + 2.0 * o.z_loss * (largest + math.log(vocab)) if o.hard_weight else 0.0
    steepness = max(soft, hard) * abs(student.scale)
    if of_teacher and o.soft_weight:
        steepness = max(steepness, parse(mirror(o.text)).form.steepest * abs(teacher.scale))
    return max(1.0, steepness)


def _folded(steepness: float | None, leading, weight: Tensor | None, o: Options, vocab: int, denominator):
    """(operator's arguments, weights, post, boost): value and gradient lack the factor post, and the gradient
    has one too much, boost.

    steepness: None unless a gradient is fp16, and then a bound on its elements (`_steepness`).
    """
    value, grad, hard = o.value_scale, o.grad_scale, float(o.hard_weight)
    hard_grad = hard
    post, boosted = None, False
    if o.reduction == "none":
        pass
    elif steepness is not None:
        # Divided by the number of rows before the upstream gradient (a loss scale, often 65536) has
        # multiplied it, an fp16 gradient would underflow. It is kept near 1 instead, and the backward applies
        # upstream and denominator together.
        if weight is not None:
            most = weight.abs().amax() if weight.numel() else weight.new_ones(())
            most = torch.where(most > 0, most, 1.0)
            weight = weight / most
            post = most / denominator
        elif denominator != 1.0:
            post = 1.0 / denominator
        boosted = True
    elif torch.compiler.is_compiling() or isinstance(denominator, torch.SymInt):
        # the number of rows may be a symbol, which a factor of the operator must not become
        post = 1.0 / denominator
    elif isinstance(denominator, Tensor):
        weight = weight / denominator if weight is not None else (1.0 / denominator).expand(leading)
    else:
        value, grad, hard, hard_grad = (x / denominator for x in (value, grad, hard, hard_grad))

    factors: Factors = (
        o.text,
        float(o.temperature),
        value,
        grad,
        hard,
        hard_grad,
        vocab,
        o.modifiers,
        o.backend,
    )
    factors, boost = _boosted(factors, steepness) if boosted else (factors, 1.0)
    return factors, weight, post, boost


def _boosted(factors: Factors, steepness: float) -> tuple[Factors, float]:
    """The gradient's factors times a power of 2 that takes an fp16 gradient far from underflow, and not
    beyond 2^14; and that power."""
    *before, grad, hard, hard_grad, vocab, modifiers, backend = factors
    boost = 2.0 ** math.floor(math.log2(16384.0 / max((abs(grad) + abs(hard_grad)) * steepness, 1e-300)))
    return (*before, grad * boost, hard, hard_grad * boost, vocab, modifiers, backend), boost


def _weights(
    student, labels, vocab: int, o: Options, token_weight, num_items
) -> tuple[Tensor | None, float | Tensor]:
    """(fp64 weights of the rows, None where all count alike; what reduction="mean" divides by, on the rows'
    device).

    num_items: as `_items` returns it.
    """
    weight = None
    if token_weight is not None:
        weight = token_weight.double()
    if labels is not None:
        counted = labels != o.ignore_index
        weight = counted.double() if weight is None else torch.where(counted, weight, 0.0)
    denominator: float | Tensor = 1.0
    if o.reduction == "mean":
        denominator = (
            num_items if num_items is not None else _at_least_one(student) if weight is None else weight.sum()
        )
        if isinstance(denominator, Tensor):
            denominator = torch.where(
                denominator == 0, 1.0, denominator.detach().to(student.device, torch.float64)
            )
    if labels is not None and not o.hard_weight and student.device.type != "cpu":
        weight = _nan_at_wrong(labels, weight, vocab)
    return weight, denominator


def _at_least_one(student: Tensor) -> int:
    """The number of rows, or 1 for none."""
    rows = math.prod(student.shape[:-1])
    # before torch 2.13 sym_max takes no plain integer
    return torch.sym_max(rows, 1) if isinstance(rows, torch.SymInt) else max(rows, 1)


def _nan_at_wrong(labels: Tensor, weight: Tensor, vocab: int) -> Tensor:
    """The weights, nan for a row that counts with a label outside of [0, vocab): what such a row is on a
    device with a hard term."""
    return torch.where((weight != 0) & ((labels < 0) | (labels >= vocab)), math.nan, weight)


def _differentiable(student, teacher, labels, weight, o: Options, vocab: int, denominator) -> Tensor:
    """The eager backend past the operator: plain autograd, differentiable to any order."""
    from .backends import eager

    leading = student.shape[:-1]
    z, v = student[..., :vocab].reshape(-1, vocab), teacher[..., :vocab].reshape(-1, vocab)
    labels, weight = (x if x is None else x.reshape(-1) for x in (labels, weight))
    if labels is not None and inputs.readable(labels):
        ops.check_labels(labels, weight, vocab)
    v = v if o.teacher_grad else v.detach()
    rows = eager.rows(
        z,
        v,
        labels,
        weight,
        o.text,
        float(o.temperature),
        o.value_scale,
        float(o.hard_weight),
        Modifiers(*o.modifiers),
    )
    dtype = _value_dtype(student)
    return rows.view(leading).to(dtype) if o.reduction == "none" else (rows.sum() / denominator).to(dtype)


@inputs.names_checked
def fused_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: Divergence | str = "kl",
    temperature: float = 1.0,
    t_squared: bool = False,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    teacher_grad: bool = False,
    student_transform: LogitTransform = AS_THEY_ARE,
    teacher_transform: LogitTransform = AS_THEY_ARE,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, KDStats]:
    r"""Distillation loss between a teacher's and a student's logits, value and gradient in one pass over
    them.

    Per row, with p = softmax(teacher / T), q = softmax(student / T):

        loss = soft_weight * (T^2 if t_squared else 1) * D(p, q)  +  hard_weight * CE(label, softmax(student))

    T^2 multiplies value and gradient of the soft term, never the cross entropy, which is at T = 1. Hinton,
    Vinyals and Dean (2015), section 2; soft_weight = 0.9, hard_weight = 0.1, t_squared = True is eq. 1.13 of
    Grätzer's thesis with beta = 0.9.

    Args:
        student_logits: (..., V) bfloat16, float16, float32 or float64. Any strides; copied where the last
            dimension is not contiguous.
        teacher_logits: (..., V), same leading shape; its dtype may differ. It receives a gradient with
            teacher_grad alone.
        labels: (...) int64, already shifted. Rows whose label is ignore_index count for nothing, whatever
            hard_weight is. Another label that is no class is an error whatever hard_weight is, on a GPU a row
            of nan.
        divergence: a `Divergence` or its text form: "kl", "reverse_kl", "cross_entropy", "renyi(0.5)",
            "reverse_renyi(0.5)", "alpha(2)", "jsd(0.5)", "skew_kl(0.1)", "skew_reverse_kl(0.1)", "tvd".
        temperature: T in [1e-4, 1e12], or inf, the limit of T^2 D, (k/2) Var(student - teacher), which needs
            t_squared=True.
        t_squared: multiply the soft term by T^2, so that its gradient does not vanish at high temperature.
        soft_weight, hard_weight: weights of the two terms. A term of weight 0 is not there, whatever its
            logits are. These and other numbers may be numpy's, or 0-d tensors, which the host waits for and
            which get no gradient.
        ignore_index: the label of rows that do not count.
        token_weight: (...) weight of each row, >= 0, or a bool or integer mask; rows of weight 0 are ignored
            rows, and are not read.
        reduction: "mean" over the counted rows (divided by the sum of their weights; 0 when there are none),
            "sum", or "none".
        num_items: number or tensor of one element, in place of mean's denominator: gradient accumulation,
            data parallel. 0 divides by 1, so that the loss is 0 where no row counts.
        vocab_size: compare the first vocab_size classes of both; required when the two V differ. The others
            get zero gradient.
        inplace: the gradient takes the student logits' storage, which no other argument may share; they are
            gone afterwards, and one backward is possible. Not where an fp16 gradient is computed in fp32
            because nothing bounds it (reverse KL, alpha, T = inf, a scale beyond 32): that takes 6 bytes a
            logit.
        teacher_grad: the gradient in the teacher's logits too, where they require one: mutual and online
            distillation. From the same sweeps, but for what takes the fp64 path, and a few cases besides
            (README, Limits). The hard term has none.
        student_transform, teacher_transform: a `LogitTransform`, scale and softcap, from what is given to the
            logits of the model, for both terms; the gradient is in what is given.
        label_smoothing: eps in [0, 1): the hard term is (1 - eps) CE + eps times the mean of -log q over the
            classes (at T = 1), as in `torch.nn.functional.cross_entropy`. Szegedy et al. (2016), section 7.
        z_loss: adds hard_weight * z_loss * logsumexp(student)^2, which keeps logits from drifting: Chowdhery
            et al. (2022), section 5.
        return_stats: also a `KDStats` of per-row figures, from the same sweeps.
        backend: "auto", "cpu", "cuda", "triton" or "eager". "eager" is differentiable to any order, the
            others once.

    Returns:
        A scalar, or (...) for reduction="none", and with return_stats a `KDStats` after it; float64 for a
        float64 student, else float32. A row with nan or +inf gives nan, and classes at -inf are masked: a
        divergence that does not allow for them is +inf (KL where a class is masked in the student alone,
        reverse KL in the teacher alone), and only for those rows.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before anything is computed; of DTensors pass
            full_tensor(), or each rank its own rows. RuntimeError: the backend cannot run here; torch.func or
            forward-mode derivatives, which only "eager" has; torch.jit.trace.

    Example:
        >>> import torch
        >>> from kdkernels import fused_kd_loss
        >>> student = torch.randn(8, 32000, requires_grad=True)
        >>> teacher, labels = torch.randn(8, 32000), torch.randint(32000, (8,))
        >>> mixing = dict(soft_weight=0.9, hard_weight=0.1)
        >>> loss = fused_kd_loss(student, teacher, labels, temperature=2.0, t_squared=True, **mixing)
        >>> loss.backward()
    """
    mixing = soft_weight, hard_weight, ignore_index, reduction
    more = student_transform, teacher_transform, label_smoothing, z_loss, return_stats
    o = options(
        divergence, temperature, t_squared, *mixing, vocab_size, inplace, teacher_grad, *more, backend
    )
    return _loss(student_logits, teacher_logits, labels, o, token_weight, num_items)


@inputs.names_checked
def logit_matching_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: bool = False,
    *,
    labels: Tensor | None = None,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
    teacher_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Logit matching, |z - v|^2 / (2 V) per row, with gradient (z - v) / V: Chen et al., eq. 2.

    With center=True the rows' means are taken off first, Var(z - v) / 2 with gradient ((z - v) - mean(z - v))
    / V, which is what T^2 KL(p, q) becomes at T = inf: the two agree when the means of student and teacher
    do. Classes at -inf in both are left out; V counts the others. The remaining arguments, the result and the
    errors are those of `fused_kd_loss`.
    """
    divergence = KL() if center else LogitMatching()
    mixing = soft_weight, hard_weight, ignore_index, reduction
    o = options(divergence, math.inf, True, *mixing, vocab_size, inplace, teacher_grad, backend=backend)
    return _loss(student_logits, teacher_logits, labels, o, token_weight, num_items)


class _TemperedLogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, temperature: float, backend: str):
        ctx.save_for_backward(logits)
        ctx.temperature, ctx.backend = temperature, backend
        return ops.log_softmax(logits.detach(), None, temperature, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (logits,) = ctx.saved_tensors
        return (
            ops.log_softmax(logits.detach(), upstream.to(logits.dtype), ctx.temperature, ctx.backend),
            None,
            None,
        )


# as `trainable_loss`
ops._library.define("trainable_log_softmax(Tensor logits, float temperature, str backend) -> Tensor")


@torch.library.impl(ops._library, "trainable_log_softmax", "CompositeExplicitAutograd")
def _trainable_log_softmax(logits: Tensor, temperature: float, backend: str) -> Tensor:
    return ops.log_softmax(logits, None, temperature, backend)


@torch.library.register_fake("kdkernels::trainable_log_softmax", lib=ops._library)
def _(logits, temperature, backend):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save_log_softmax(ctx, inputs, output) -> None:
    logits, *ctx.options = inputs
    ctx.save_for_backward(logits)


def _log_softmax_backward(ctx, upstream):
    (logits,) = ctx.saved_tensors
    return ops.log_softmax(logits, upstream.to(logits.dtype), *ctx.options), None, None


torch.library.register_autograd(
    "kdkernels::trainable_log_softmax",
    _log_softmax_backward,
    setup_context=_save_log_softmax,
    lib=ops._library,
)


@inputs.names_checked
def tempered_log_softmax(logits: Tensor, temperature: float = 1.0, *, backend: str = "auto") -> Tensor:
    r"""log softmax(x / T) over the last dimension, (..., V) in the logits' dtype; T = inf is the uniform -log
    V.

    Hinton, Vinyals and Dean (2015), eq. 1. The gradient is (u - softmax(x / T) sum u) / T for an upstream u,
    computed from the logits: nothing but them is kept. Raises TypeError for logits that are not floating
    point, ValueError for T outside [1e-4, 1e12] but inf.
    """
    o = options(temperature=temperature, t_squared=True, backend=backend)
    if not torch.compiler.is_compiling():
        inputs.check_mode("tempered_log_softmax", (logits,), by_autograd=backend == "eager")
    if not isinstance(logits, Tensor) or logits.dtype not in DTYPES:
        raise TypeError(
            "logits: must be bfloat16, float16, float32 or float64, got "
            f"{getattr(logits, 'dtype', type(logits).__name__)}"
        )
    inputs.check_dense("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: must be (..., V) with V > 0, got {tuple(logits.shape)}")
    logits = logits if torch.compiler.is_compiling() else inputs.saveable(logits)
    if backend == "eager":
        from .backends import eager

        return eager.log_softmax(logits, None, float(o.temperature))
    if torch.compiler.is_exporting():
        return torch.ops.kdkernels.trainable_log_softmax.default(logits, float(o.temperature), backend)
    return _TemperedLogSoftmax.apply(logits, float(o.temperature), backend)
