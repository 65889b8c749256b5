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
from .call import TEMPERATURES, Numbers
from .divergence import CrossEntropy, Divergence, LogitMatching, parse
from .transforms import LogitTransform, Modifiers

REDUCTIONS = ("mean", "sum", "none")
AS_THEY_ARE = LogitTransform()
# options, of any make that `inputs.number` knows
NUMBERS = ("temperature", "soft_weight", "hard_weight", "label_smoothing", "z_loss")


@dataclass(frozen=True, eq=False)
class Options:
    """The options of a loss that are not tensors, checked, and what the operator takes of them. The same ones
    are one object: `options`."""

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
