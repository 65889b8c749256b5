"""Distillation in the Trainer of transformers: a mixin that brings the loss, its scaling and its figures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from .language import ALLOWED, FIGURES, IGNORED, LanguageModelLoss, shifted_labels, teacher_on
from .running import Running


class KDTrainerMixin:
    """A Trainer that distils a teacher into its model: `class KDTrainer(KDTrainerMixin, Trainer)`.

    A causal language model learns from `fused_linear_kd_loss`, where its head is a plain nn.Linear, else from
    `fused_kd_loss`. labels (of the collator, -100 for what does not count) are shifted here. The loss is the
    sum over the tokens that count divided by their number in all batches of a step, over accumulation and
    processes, as in Trainer: four batches of two are one of eight.

    Args:
        *args, **kwargs: as Trainer takes them, and the options of `fused_kd_loss` and `fused_linear_kd_loss`
            by name: divergence, temperature, t_squared, soft_weight, hard_weight, vocab_size,
            label_smoothing, z_loss, backend, logits_dtype, memory_budget; inplace with logits.
            student_transform and teacher_transform are read from the models' configs
            (`LogitTransform.from_config`), and the first batch shows whether they are right.
        teacher: a causal language model with the student's tokens. It is put in eval mode and on the
            student's device, gets the student's inputs, runs without gradients under the same autocast, and
            is neither trained nor saved. Every process has it whole.
        linear: None takes hidden states where the head is a plain nn.Linear without hooks or adapters, and
            logits under torch.compile, FSDP1 and DeepSpeed, which have not been tried; True insists, False
            takes logits.
        log_stats: log divergence, cross_entropy (with hard_weight), student_entropy, teacher_entropy, agree
            and correct beside the loss, as means over the tokens since the last log, and in an evaluation
            with its prefix.

    An evaluation's loss is the mean over its tokens, not over its batches. Its logits are computed where
    somebody takes them: compute_metrics, predict, return_outputs.

    Raises ValueError and TypeError at construction for options that do not fit, nn.DataParallel, an
    encoder-decoder, a loss of Trainer's own (compute_loss_func, label_smoothing_factor), a router loss, and
    with linear=True for a head that cannot be taken out: adapters, hooks, another class than nn.Linear.

    Example:
        >>> from transformers import Trainer
        >>> from kdkernels.integrations.transformers import KDTrainerMixin
        >>> class KDTrainer(KDTrainerMixin, Trainer): ...
        >>> # trainer = KDTrainer(model=student, args=args, teacher=teacher, temperature=2.0, hard_weight=0.5)
        >>> # trainer.train()
    """

    def __init__(
        self, *args, teacher: nn.Module, linear: bool | None = None, log_stats: bool = True, **kwargs
    ):
        options = {name: kwargs.pop(name) for name in ALLOWED if name in kwargs}
        # before Trainer's long start
        self._kd = LanguageModelLoss(teacher, linear, self._kd_autocast, log_stats, **options)
        self._kd_trained, self._kd_evaluated = Running(), None
        self._kd_wants_logits: bool | None = None  # of the batch that is evaluated; None outside of one
        super().__init__(*args, **kwargs)
        self._kd_check()
        if linear is None and (self.args.torch_compile or self.is_deepspeed_enabled or self._kd_is_fsdp1()):
            self._kd.asked = False
        if self.model is not None:
            self._kd.adopt(self.accelerator.unwrap_model(self.model))
        teacher_on(teacher, self.args.device)
        # what Trainer counts, and that the loss is divided by it
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True

    def _kd_check(self) -> None:
        """Raise for what this loss would ignore, or get wrong."""
        config = getattr(self.model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                "model: an encoder-decoder's labels are not shifted; causal language models alone"
            )
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func: takes the place of this loss; give one or the other")
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor: of Trainer's own loss; pass label_smoothing here")
        if getattr(config, "output_router_logits", False):
            raise ValueError(
                "model: output_router_logits asks for a router loss, which is no part of this one; set it to "
                "False"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                "args: several GPUs in one process are nn.DataParallel, which this loss does not know; start "
                "a process for each (torchrun), or show one GPU alone (CUDA_VISIBLE_DEVICES=0)"
            )

    def _kd_autocast(self):
        return self.accelerator.autocast()

    def _kd_is_fsdp1(self) -> bool:
        return bool(self.is_fsdp_enabled) and not getattr(self.accelerator, "is_fsdp2", False)

    # ------------------------------------------------------------ the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch, scaled as Trainer scales its own, and with return_outputs the model's outputs
        (without any where an evaluation takes none)."""
        if isinstance(model, DataParallel):
            raise ValueError("model: nn.DataParallel is not known to this loss; start a process for each GPU")
        student = self.accelerator.unwrap_model(model)
        evaluated = self._kd_wants_logits is not None
        # of an evaluation each token's loss, from which its mean comes; see `evaluation_loop`
        how = dict(reduction="none") if evaluated else dict(num_items=num_items_in_batch)
        wanted = return_outputs and self._kd_wants_logits is not False
        loss, stats, outputs = self._kd(model, student, inputs, outputs=wanted, **how)
        if evaluated:
            loss = self._kd_evaluation_loss(loss, stats, inputs, num_items_in_batch)
        elif stats is not None and model.training:
            self._kd_trained.add(stats.masked())
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # the processes' gradients are averaged, and the number is that of all of them
            loss = loss * (self.accelerator.num_processes // self._kd_tensor_parallel())
        return (loss, {} if outputs is None else outputs) if return_outputs else loss

    def _kd_tensor_parallel(self) -> int:
        size = getattr(self, "get_tp_size", None)
        return 1 if size is None else size()

    # ------------------------------------------------------------ evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Trainer's, for which `compute_loss` is told whether logits are wanted."""
        self._kd_wants_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        finally:
            self._kd_wants_logits = None

    def _kd_evaluation_loss(
        self, rows: Tensor, stats, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> Tensor:
        """The loss of a batch of which `rows` are the tokens' losses; they are kept for the mean of all."""
        counts = shifted_labels(inputs) != IGNORED
        if self._kd_evaluated is not None:
            figures = dict(loss=rows) | ({} if stats is None else stats.masked()) | dict(counted=counts)
            by_sequence = torch.stack([x.sum(-1, dtype=rows.dtype) for x in figures.values()], dim=-1)
            # without the sequences that fill up the last batch of some process
            gathered = self.accelerator.gather_for_metrics(by_sequence)
            self._kd_evaluated.add(dict(zip(figures, gathered.unbind(-1), strict=True)))
        items = counts.sum() if num_items is None else torch.as_tensor(num_items, device=rows.device)
        return rows.sum() / items.clamp_min(1)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Trainer's, with the mean over all tokens in place of that over batches, and the figures."""
        self._kd_evaluated = Running()
        try:
            found = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            means = self._kd_evaluated.take()
        finally:
            self._kd_evaluated = None
        for name in ("loss", *FIGURES):
            if name in means:
                found.metrics[f"{metric_key_prefix}_{name}"] = means[name]
        return found

    # ------------------------------------------------------------ the log

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Trainer's, with the figures of the tokens since the last one."""
        if "loss" in logs:
            means = self._kd_trained.take(lambda x: self.accelerator.reduce(x, "sum"))
            logs.update({name: means[name] for name in FIGURES if name in means})
        super().log(logs, *args, **kwargs)
