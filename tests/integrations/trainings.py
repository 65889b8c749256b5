"""Trainings that the tests compare, alone and, as a script, as one of two processes."""

import os
import sys
import tempfile

import torch
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


def ddp() -> dict:
    """Two batches of 2 on each process, from hidden states and from logits: what they end with."""
    found = {}
    for linear in (True, False):
        trainer = trained(2, 2, options=dict(linear=linear), ddp_backend="gloo")
        metrics = trainer.evaluate()
        losses = logged(trainer), logged(trainer, "divergence")
        found[linear] = weights(trainer), *losses, metrics, trainer._kd.linear
    return found


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
    found = dict(ddp=ddp(), fsdp2=fsdp2())
    if rank == "0":
        torch.save(found, path)
    torch.distributed.destroy_process_group()
    os._exit(0)  # a thread of gloo that lets go of a tensor while the interpreter ends would abort
