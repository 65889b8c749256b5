"""Trainings that the tests compare, alone and, as a script, as one of two processes."""

import os
import sys
import tempfile
from unittest import mock

import accelerate_loop
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from small import collate, llama, sequences
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from kdkernels.integrations.language import LanguageModelLoss
from kdkernels.integrations.transformers import KDTrainerMixin

DATA = sequences()[:24]  # of 16 to 64 tokens, so that means over batches are not those over tokens
HELD_OUT = sequences()[24:37]  # 13: a last batch that is not full, of two processes' batches of 2 or 3
LOSS = dict(temperature=2.0, t_squared=True, soft_weight=0.75, hard_weight=0.25)


class KDTrainer(KDTrainerMixin, Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(DATA)


def model(width: int, seed: int):
    """With logits of size 1, whose gradients move it."""
    found = llama(width, seed=seed)
    with torch.no_grad():
        for x in found.parameters():
            if x.dim() > 1:
                x.mul_(5)
    return found


def arguments(batch: int = 8, accumulation: int = 1, **more) -> TrainingArguments:
    fixed = dict(
        max_steps=3, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0
    )
    quiet = dict(
        report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True, dataloader_pin_memory=False
    )
    return TrainingArguments(
        tempfile.mkdtemp(),
        **dict(
            fixed | quiet,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=3,
            logging_steps=1,
        )
        | more,
    )


def trainer_of(args=None, student=None, teacher=None, **options) -> KDTrainer:
    return KDTrainer(
        model=model(32, 0) if student is None else student,
        args=args or arguments(),
        teacher=model(48, 1) if teacher is None else teacher,
        train_dataset=DATA,
        eval_dataset=HELD_OUT,
        data_collator=collate,
        **LOSS | options,
    )


def trained(batch: int = 8, accumulation: int = 1, options=(), **more) -> KDTrainer:
    trainer = trainer_of(arguments(batch, accumulation, **more), **dict(options))
    trainer.train()
    return trainer


def weights(trainer) -> list[torch.Tensor]:
    return [x.detach() for x in trainer.accelerator.unwrap_model(trainer.model).parameters()]


def apart(xs, ys) -> float:
    return max(float((x.detach() - y.detach()).abs().max()) for x, y in zip(xs, ys, strict=True))


def logged(trainer, name: str = "loss") -> list[float]:
    return [x[name] for x in trainer.state.log_history if name in x and "loss" in x]


def ddp(**more) -> dict:
    """Two batches of 2 on each process, from hidden states and from logits: what they end with."""
    found = {}
    for linear in (True, False):
        trainer = trained(2, 2, options=dict(linear=linear), ddp_backend="gloo", **more)
        metrics = trainer.evaluate()
        losses = logged(trainer), logged(trainer, "divergence")
        ends = [accelerate_loop.whole(x) for x in weights(trainer)]
        found[linear] = ends, *losses, metrics, trainer._kd.linear, type(trainer.model_wrapped).__name__
    return found


def loop(batch: int, accumulation: int):
    """What the recipe ends with, in which a batch is a process's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true"):
        return accelerate_loop.train(model(48, 1), DATA, batch, accumulation, 3)


def accelerated_fsdp2() -> dict:
    """The Trainer and the recipe's loop where accelerate shards the model. It does so on GPUs alone, and on
    CPUs takes DDP without a word; how it shards a model asks nothing of the device."""
    first = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **more):
        first(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None:
            for state in (AcceleratorState, PartialState):
                state._shared_state |= dict(distributed_type=DistributedType.FSDP, fsdp_plugin=fsdp_plugin)

    layer = model(32, 0).model.layers[0].__class__.__name__
    of_launch = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_TRANSFORMER_CLS_TO_WRAP=layer)
    of_launch |= dict(FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
    of_trainer = dict(version=2, transformer_layer_cls_to_wrap=layer)
    with mock.patch.object(AcceleratorState, "__init__", init):
        found = ddp(fsdp=True, fsdp_config=of_trainer)
        with (
            mock.patch.dict(os.environ, of_launch),
            # an error where accelerate has not sharded
            mock.patch.object(accelerate_loop, "whole", lambda x: x.full_tensor()),
        ):
            return dict(trainer=found, loop=loop(2, 2))


def fsdp2() -> dict:
    """A step of a model whose parameters are sharded, its head with the rest or apart: loss and gradients."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    rank, batch, found = torch.distributed.get_rank(), collate(DATA[:8]), {}
    items = int((batch["labels"][:, 1:] != -100).sum()) / 2  # for each process, whose gradients are averaged
    mine = {name: x[4 * rank : 4 * rank + 4] for name, x in batch.items()}
    for kind in ("whole", "apart"):
        student = model(32, 0)
        for x in (*student.model.layers, *([student.lm_head] if kind == "apart" else []), student):
            fully_shard(x, mesh=mesh, reshard_after_forward=True)
        loss_of = LanguageModelLoss(model(48, 1), True, **LOSS)
        for _ in range(2):  # a second step finds what the first one has sharded again
            student.zero_grad()
            loss = loss_of(student, student, mine, num_items=items).loss
            loss.backward()
        mean = loss.detach() / 2
        torch.distributed.all_reduce(mean)
        found[kind] = mean, [x.grad.full_tensor() for x in student.parameters()]
    return found


if __name__ == "__main__":
    rank, port, path = sys.argv[1:]
    os.environ |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    found = dict(ddp=ddp(), loop=loop(2, 2), fsdp2=fsdp2(), accelerated_fsdp2=accelerated_fsdp2())
    if rank == "0":
        torch.save(found, path)
    torch.distributed.destroy_process_group()
    os._exit(0)  # a thread of gloo that lets go of a tensor while the interpreter ends would abort
