"""Distillation in a LightningModule: a mixin with the steps for language models and for classifiers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..inputs import check_names
from ..modules import OPTIONS, KDLoss
from ..stats import KDStats
from .language import ALLOWED, FIGURES, LanguageModelLoss, teacher_on


class KDMixin:
    """A LightningModule that distils: `class Distilled(KDMixin, LightningModule)`.

    Its __init__ calls `distil_language_model` or `distil_classifier` once, after that of LightningModule;
    then training_step, validation_step and test_step are here, or `kd_step` for steps of one's own. Losses
    and the figures of `KDStats` are logged as train_loss, train_divergence, val_loss and so on; those of an
    evaluation are means over all tokens, or rows. The teacher is put in eval mode and on the module's device,
    runs without gradients under the precision of the Trainer, and is in no checkpoint and no optimizer.

    Lightning averages the batches that it accumulates, and the processes, each with the same weight. Where
    every token is to have the same weight, pass num_items to `kd_step`: the tokens of all these batches
    together, divided by accumulate_grad_batches and by the number of processes.

    Example:
        >>> from lightning import LightningModule
        >>> from kdkernels.integrations.lightning import KDMixin
        >>> class Distilled(KDMixin, LightningModule):
        ...     def __init__(self, student, teacher):
        ...         super().__init__()
        ...         self.student = student
        ...         self.distil_language_model(student, teacher, temperature=2.0, hard_weight=0.5)
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.student.parameters())
    """

    def distil_language_model(
        self, student: nn.Module, teacher: nn.Module, *, linear: bool | None = None, **options
    ) -> None:
        """Batches are a causal language model's inputs by name with labels (B, S), which are shifted here.

        linear: None takes hidden states where the student's head is a plain nn.Linear, True insists, False
        takes logits. options: those of `fused_kd_loss` and `fused_linear_kd_loss`, as in `KDTrainerMixin`.
        """
        check_names("distil_language_model", options, ALLOWED)
        loss = LanguageModelLoss(teacher, linear, **options)
        loss.adopt(student)
        self._kd = _LanguageModel(student, teacher, loss)

    def distil_classifier(self, student: nn.Module, teacher: nn.Module, **options) -> None:
        """Batches are (inputs, labels): student(inputs) and teacher(inputs) are (B, V) logits, labels (B).

        options: those of `KDLoss` but reduction, return_stats and teacher_grad.
        """
        known = (*(x for x in ALLOWED if x in OPTIONS), "ignore_index")
        check_names("distil_classifier", options, known)
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher: must be a module, got {type(teacher).__name__}")
        self._kd = _Classifier(student, teacher, KDLoss(**options, return_stats=True))

    def kd_step(self, batch: Any, stage: str, num_items: float | Tensor | None = None) -> Tensor:
        """The loss of a batch; logged with its figures under names that begin with the stage: "train", whose
        steps are logged, or another, whose means over an epoch are.

        num_items: in place of the tokens, or rows, of this batch that count.
        """
        if not hasattr(self, "_kd"):
            raise RuntimeError("kd_step: call distil_language_model or distil_classifier in __init__")
        teacher_on(self._kd.teacher, self.device)
        loss, stats = self._kd(batch, num_items)
        self._kd_log(stage, loss.detach(), stats)
        return loss

    def _kd_log(self, stage: str, loss: Tensor, stats: KDStats) -> None:
        sums = {name: x.sum() for name, x in stats.masked().items()}
        counted = sums["counted"].clamp_min(1)
        means = dict(loss=loss) | {name: sums[name] / counted for name in FIGURES if name in sums}
        named = {f"{stage}_{name}": x for name, x in means.items()}
        if stage == "train":
            self.log_dict(named, batch_size=len(stats.mask))
        else:  # Lightning's mean over batches is weighted by what it is told to be their size
            self.log_dict(named, batch_size=int(stats.counted), on_epoch=True, sync_dist=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """`kd_step` as "train"."""
        return self.kd_step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """`kd_step` as "val"."""
        return self.kd_step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """`kd_step` as "test"."""
        return self.kd_step(batch, "test")


class _LanguageModel:
    """(loss, statistics) of a batch. No module: what it holds is not the LightningModule's to save or to
    train, but for the student, which is there by another name."""

    def __init__(self, student: nn.Module, teacher: nn.Module, loss: LanguageModelLoss):
        self.student, self.teacher, self.loss = student, teacher, loss

    def __call__(self, batch: dict[str, Any], num_items: float | Tensor | None) -> tuple[Tensor, KDStats]:
        found = self.loss(self.student, self.student, dict(batch), num_items=num_items)
        return found.loss, found.stats


class _Classifier(_LanguageModel):
    def __call__(self, batch: tuple, num_items: float | Tensor | None) -> tuple[Tensor, KDStats]:
        inputs, labels = batch
        with torch.no_grad():
            teacher = self.teacher(inputs)
        return self.loss(self.student(inputs), teacher, labels, num_items=num_items)
