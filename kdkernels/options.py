"""Every option of a loss, and every check of options and of the tensors that they go with.

Options are checked once: the same ones are looked up when they come again.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import backends, inputs
from .call import TEMPERATURES, Numbers, Rows, regular
from .divergence import CrossEntropy, Divergence, LogitMatching, parse
from .transforms import LogitTransform, Modifiers

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# of a token_weight, besides
MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REDUCTIONS = ("mean", "sum", "none")
# what belongs to the rows, in the order of `Rows`: the argument, and its dtypes
ROW_NAMES = "labels", "token_weight", "temperature"
ROW_KINDS = (
    ("an int64 tensor", lambda dtype: dtype == torch.int64),
    (
        "a floating-point, integer or bool tensor",
        lambda dtype: dtype.is_floating_point or dtype in MASK_DTYPES,
    ),
    ("a number or a floating-point tensor", lambda dtype: dtype.is_floating_point),
)
AS_THEY_ARE = LogitTransform()
# options, of any make that `inputs.number` knows
NUMBERS = ("temperature", "soft_weight", "hard_weight", "label_smoothing", "z_loss")


@dataclass(frozen=True)
class Options:
    """The options of a loss that are not tensors, checked, and what the operator takes of them."""

    divergence: Divergence
    temperature: float | None  # None: the rows have their own
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
    numbers: Numbers = field(init=False)  # of rows whose loss is not reduced

    def __post_init__(self) -> None:
        # comparisons rather than math.isfinite: this is traced by torch.compile
        own, (low, high) = self.temperature is None, TEMPERATURES
        T = 1.0 if own else self.temperature
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
        if not self.is_autograd:
            self.check_exchangeable()
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
        hard = float(self.hard_weight)
        mixed = self.student_transform, self.teacher_transform, self.label_smoothing, self.z_loss
        # of the value, and of T dD/dz, which the gradient is 1/T of
        scales = scale, scale / T if T != math.inf else scale, hard, hard
        numbers = Numbers(float(T), *scales, Modifiers.of(*mixed), own and bool(self.t_squared))
        object.__setattr__(self, "numbers", numbers)

    def check_exchangeable(self) -> None:
        """Raise for a teacher's gradient that is no student's of another divergence."""
        if not self.teacher_grad:
            return
        if isinstance(self.divergence, CrossEntropy):
            raise ValueError(
                "teacher_grad: of the cross entropy, the teacher's own entropy counts in it, which the "
                'operators do not compute; take divergence="kl", which is without it, or fused_kd_loss with '
                'backend="eager", not compiled and not in place'
            )
        _ = self.divergence.reversed  # of a parameter near its bound there may be none

    @property
    def is_exchangeable(self) -> bool:
        """Whether `check_exchangeable` has nothing to raise."""
        try:
            self.check_exchangeable()
        except ValueError:
            return False
        return True

    @property
    def is_autograd(self) -> bool:
        """Whether the loss can be differentiated to any order, which the eager backend does out of place."""
        return self.backend == "eager" and not self.inplace


def options(
    divergence: Divergence | str = "kl",
    temperature: float | None = 1.0,
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
        if temperature is None:
            numbers = 1.0, *numbers[1:]
        found, soft_weight, hard_weight, label_smoothing, z_loss = map(inputs.number, NUMBERS, numbers)
        temperature = temperature if temperature is None else found
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
        divergence = parse(divergence)
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence: must be a Divergence or its text form, got {divergence!r}")
    return Options(divergence, *rest)


_known_options = functools.lru_cache(maxsize=256, typed=True)(_options)  # True is not 1.0


def own_temperature(temperature: float | Tensor, like: Tensor) -> tuple[float | None, Tensor | None]:
    """(the temperature as `options` takes it, those of the rows of `like`): one of the two is None."""
    if isinstance(temperature, Tensor):
        if temperature.dim():
            return None, temperature
        if temperature.requires_grad and isinstance(like, Tensor):  # one that is learned
            return None, temperature.expand(like.shape[:-1])
    return inputs.number("temperature", temperature), None


def check_tensors(student: Tensor, teacher: Tensor, rows: Rows, o: Options, by_autograd: bool) -> int:
    """Raise for tensors that do not fit together or with the options; the number of classes that count.

    by_autograd: the rows' temperatures may have a gradient.
    """
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
    vocab = common_vocab(student.shape[-1], teacher.shape[-1], o)
    check_rows(rows, student, o, "logits", by_autograd)
    if inputs.differentiated(teacher) and not o.teacher_grad:
        raise ValueError(
            "teacher_logits: receive a gradient only with teacher_grad=True; pass that, or "
            "teacher_logits.detach()"
        )
    if o.inplace:
        check_in_place(student, (("teacher_logits", teacher), *zip(ROW_NAMES, rows, strict=True)))
    return vocab


def check_in_place(student: Tensor, others: tuple[tuple[str, Tensor | None], ...]) -> None:
    """Raise where the gradient cannot take the student's memory."""
    if student.requires_grad and student.is_leaf:
        raise ValueError("inplace: student_logits is a leaf that requires grad; its values would be lost")
    if student.numel() == 0:
        return
    if inputs.rows_overlap(student):
        raise ValueError("inplace: student_logits is expanded; its rows share storage")
    if not regular(student):
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


def common_vocab(student: int, teacher: int, o: Options) -> int:
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


def check_rows(rows: Rows, student: Tensor, o: Options, of: str, by_autograd: bool = False) -> None:
    """What belongs to the rows of `student`, which the caller knows as `of`."""
    if rows.labels is None and o.hard_weight:
        raise ValueError(f"hard_weight: {o.hard_weight} needs labels")
    for name, x, (kind, is_kind) in zip(ROW_NAMES, rows, ROW_KINDS, strict=True):
        if x is not None:
            if not isinstance(x, Tensor) or not is_kind(x.dtype):
                raise TypeError(f"{name}: must be {kind}, got {getattr(x, 'dtype', type(x).__name__)}")
            _check_per_row(name, x, student, of)
    if rows.weight is not None and inputs.differentiated(rows.weight):
        raise ValueError("token_weight: receives no gradient; pass token_weight.detach()")
    if rows.temperature is not None and inputs.differentiated(rows.temperature) and not by_autograd:
        raise ValueError(
            'temperature: receives a gradient from fused_kd_loss with backend="eager" alone, not compiled '
            "and not in place; take that, or pass temperature.detach()"
        )


def _check_per_row(name: str, x: Tensor, student: Tensor, of: str) -> None:
    inputs.check_dense(name, x)
    if x.shape != student.shape[:-1]:
        raise ValueError(
            f"{name}: must be {tuple(student.shape[:-1])}, the {of}' leading shape; got {tuple(x.shape)}"
        )
    if x.device != student.device:
        raise ValueError(f"{name}: must be on the {of}' device {student.device}, got {x.device}")


def checked_items(num_items: float | Tensor | None, o: Options) -> float | Tensor | None:
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
