"""The distillation loss of a batch for causal language models, from hidden states or from logits."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import fused_kd_loss
from ..inputs import check_names
from ..linear import fused_linear_kd_loss
from ..modules import LINEAR_OPTIONS, OPTIONS, KDLoss, LinearKDLoss
from ..stats import KDStats
from ..transforms import LogitTransform
from .heads import check_transform, head_of, inside, logits_of, take, why_not

IGNORED = -100  # the label of tokens that do not count, for every collator
TRANSFORMS = ("student_transform", "teacher_transform")
# what the caller of the loss decides, not the options of a training
FIXED = ("reduction", "ignore_index", "return_stats", "teacher_grad")
ALLOWED = tuple(x for x in dict.fromkeys((*OPTIONS, *LINEAR_OPTIONS)) if x not in FIXED)
# of the loss from hidden states alone, and of that from logits
LINEAR_ALONE = tuple(x for x in LINEAR_OPTIONS if x not in OPTIONS)
LOGITS_ALONE = ("inplace",)
# of `KDStats`, what is worth a line in a log
FIGURES = ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "agree", "correct")
# inputs that are not the model's
NOT_FOR_MODELS = ("labels", "shift_labels", "num_items_in_batch", "skip_logits")


class Found(NamedTuple):
    """What a batch gives."""

    loss: Tensor  # a scalar, or (B, S) per token
    stats: KDStats | None
    outputs: Any  # of the student, with its logits; None from hidden states


def teacher_on(teacher: nn.Module, device: torch.device) -> nn.Module:
    """The teacher in eval mode, on the device unless a device_map has spread it."""
    first = next(teacher.parameters(), None)
    if first is not None and first.device != device and getattr(teacher, "hf_device_map", None) is None:
        teacher.to(device)
    return teacher.eval()


def shifted_labels(inputs: dict[str, Any]) -> Tensor:
    """(B, S): at each position the token that comes next, -100 at the last one; `shift_labels` of a collator
    as they are."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"]
    if inputs.get("labels") is None:
        raise ValueError(
            "labels: the batch has none; a language model's are its input_ids with -100 where nothing is to "
            "be learnt, as DataCollatorForLanguageModeling(mlm=False) makes them"
        )
    return F.pad(inputs["labels"][..., 1:], (0, 1), value=IGNORED)


class LanguageModelLoss:
    """`fused_kd_loss` or `fused_linear_kd_loss` of a batch, for a student that is called as it is wrapped.

    Args:
        teacher: a causal language model of the same tokenizer; it is put in eval mode, and is no part of what
            is trained or saved.
        linear: True takes hidden states and never holds logits, False logits; None hidden states where the
            head is a plain nn.Linear. The teacher's own head may be any where linear is None.
        autocast: a context that the teacher runs in, as the student does.
        stats: whether to compute `KDStats` as well.
        **options: ALLOWED, as in the two functions. The transforms are those from what a head gives to its
            model's logits, by default what `LogitTransform.from_config` reads; logits have them already.

    Raises ValueError and TypeError for options that do not fit, at construction; for a head that cannot be
    taken out where linear=True, when the student is first seen.
    """

    def __init__(
        self,
        teacher: nn.Module,
        linear: bool | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        stats: bool = True,
        **options,
    ):
        check_names("LanguageModelLoss", options, ALLOWED)
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher: must be a module, got {type(teacher).__name__}")
        self.teacher, self.autocast = teacher.eval(), autocast
        self.asked = linear
        self.transforms = {name: options.pop(name, None) for name in TRANSFORMS}
        self.vocab_size = options.get("vocab_size")
        self.options = {x: y for x, y in options.items() if x not in (*LINEAR_ALONE, *LOGITS_ALONE)}
        self.options |= dict(ignore_index=IGNORED, return_stats=stats)
        self.of_logits = {x: options[x] for x in LOGITS_ALONE if x in options}
        self.of_hidden = {x: options[x] for x in LINEAR_ALONE if x in options}
        given = {x: y for x, y in self.transforms.items() if y is not None}
        KDLoss(**self.options, **self.of_logits, **given)
        LinearKDLoss(**self.options, **self.of_hidden)
        self.student: nn.Module | None = None
        self.linear = self.teacher_linear = False
        self.checked: set[str] = set()  # models whose transform was seen to be right

    # ------------------------------------------------------------ the two models

    def adopt(self, student: nn.Module) -> None:
        """Decide for a student whether hidden states are taken, of it and of its teacher."""
        if student is self.student:
            return
        self.student, self.checked = student, set()
        reason = None if self.asked is False else self._reason("student", student)
        of_teacher = None if self.asked is False else self._reason("teacher", self.teacher)
        for why in (reason, of_teacher):
            if self.asked and why is not None:
                raise ValueError(f"linear: {why}; or pass linear=False, which takes logits")
        self.linear = self.asked is not False and reason is None
        self.teacher_linear = self.linear and of_teacher is None

    def _reason(self, name: str, model: nn.Module) -> str | None:
        """Why this model cannot give hidden states."""
        if hasattr(model, "_orig_mod"):
            return f"the {name} is compiled, and its head cannot be taken out of the graph"
        head = head_of(model)
        if (reason := why_not(model, head)) is not None:
            return reason
        if name == "teacher" and (hasattr(head.weight, "full_tensor") or hasattr(head.weight, "ds_id")):
            return "the teacher's head is sharded: its weight is together in its own forward alone"
        if self.transforms[f"{name}_transform"] is None:
            try:
                self._transform(name, model)
            except ValueError as error:
                return str(error)
        return None

    def _transform(self, name: str, model: nn.Module) -> LogitTransform:
        given = self.transforms[f"{name}_transform"]
        config = getattr(model, "config", None)
        return given or (LogitTransform() if config is None else LogitTransform.from_config(config))

    # ------------------------------------------------------------ a batch

    def __call__(
        self,
        wrapper: nn.Module,
        student: nn.Module,
        inputs: dict[str, Any],
        *,
        num_items: float | Tensor | None = None,
        reduction: str = "mean",
        outputs: bool = False,
    ) -> Found:
        """The loss of a batch.

        Args:
            wrapper: what to call: the student, or what DDP, FSDP or another made of it.
            student: the bare model.
            inputs: as the model takes them, with labels (B, S), which are shifted here, or shift_labels.
            num_items: in place of the number of tokens that count, with reduction="mean".
            reduction: "mean", or "none" for (B, S) losses.
            outputs: return the student's outputs as well, for which its logits are computed.
        """
        self.adopt(student)
        labels = shifted_labels(inputs)
        inputs = {name: x for name, x in inputs.items() if name not in NOT_FOR_MODELS}
        more = dict(self.options, reduction=reduction, num_items=num_items)
        if self.linear and not outputs:
            return self._from_hidden(wrapper, inputs, labels, more)
        return self._from_logits(wrapper, inputs, labels, more, outputs)

    def _from_logits(self, wrapper, inputs, labels, more: dict, outputs: bool) -> Found:
        found = wrapper(**inputs)
        student, teacher = logits_of(found), self._teacher_logits(inputs)
        _check_leading(labels, student.shape[:-1])
        if not outputs and student.requires_grad:
            more |= self.of_logits
        return Found(
            *self._split(fused_kd_loss(student, teacher, labels, **more)), found if outputs else None
        )

    def _from_hidden(self, wrapper, inputs, labels, more: dict) -> Found:
        teacher, stats = self._teacher_terms(inputs), []
        head, transform = head_of(self.student), self._transform("student", self.student)
        if (reason := why_not(self.student, head)) is not None:
            raise ValueError(f"linear: {reason}; or pass linear=False")

        def loss_of(hidden: Tensor) -> Tensor:
            _check_leading(labels, hidden.shape[:-1])
            models = hidden, head.weight, teacher.pop("hidden", None), teacher.pop("weight", None)
            own = dict(student_bias=head.bias, student_transform=transform, **self.of_hidden)
            loss, of_rows = self._split(fused_linear_kd_loss(*models, labels, **own, **teacher, **more))
            stats.append(of_rows)
            return loss

        def run(forward: Callable, **inputs) -> Tensor:
            loss, *seen = take(forward, head, inputs, loss_of)
            self._check("student", *seen, transform)
            return loss

        return Found(inside(wrapper, self.student, run, inputs), stats[0], None)

    def _split(self, found) -> tuple[Tensor, KDStats | None]:
        return found if self.options["return_stats"] else (found, None)

    @torch.no_grad()
    def _teacher_logits(self, inputs: dict[str, Any]) -> Tensor:
        with self.autocast():
            return logits_of(self.teacher.eval()(**inputs, **self._no_cache()))

    @torch.no_grad()
    def _teacher_terms(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the teacher gives to the loss from hidden states: its own and its head, or its logits."""
        if not self.teacher_linear:
            return dict(teacher_logits=self._teacher_logits(inputs))
        head, transform = head_of(self.teacher), self._transform("teacher", self.teacher)
        with self.autocast():
            hidden, *seen = take(self.teacher.eval(), head, inputs | self._no_cache(), lambda x: x)
        self._check("teacher", *seen, transform)
        more = dict(teacher_bias=head.bias, teacher_transform=transform)
        return dict(hidden=hidden, weight=head.weight.detach(), **more)

    def _no_cache(self) -> dict[str, bool]:
        known = "use_cache" in inspect.signature(self.teacher.forward).parameters
        return dict(use_cache=False) if known else {}

    def _check(self, name: str, probe: Tensor, made: Tensor, transform: LogitTransform) -> None:
        """Once, since it waits for the device."""
        if name not in self.checked:
            check_transform(name, probe, made, transform, self.vocab_size)
            self.checked.add(name)


def _check_leading(labels: Tensor, leading: tuple[int, ...]) -> None:
    if labels.shape != leading:
        raise ValueError(
            f"labels: must be {tuple(leading)}, a label for each position of the student, got "
            f"{tuple(labels.shape)}"
        )
