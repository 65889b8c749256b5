"""Distillation in the Trainer of transformers, from hidden states: `python examples/recipes/hf_trainer.py`.

Two lines differ from a training without a teacher: the class, and the arguments of the loss.
"""

import sys
import tempfile

from small import collate, llama, sequences, trained_teacher
from transformers import Trainer, TrainingArguments

from kdkernels.integrations.transformers import KDTrainerMixin


class KDTrainer(KDTrainerMixin, Trainer):
    pass


def main(
    steps: int = 60, batch: int = 4, accumulation: int = 4, linear: bool | None = None
) -> dict[str, float]:
    """What an evaluation says before and after, and the last log of the training."""
    data = sequences()
    train, held_out = data[:-64], data[-64:]
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,  # the loss is that of one batch of both together
        max_steps=steps,
        learning_rate=5e-3,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=not sys.stdout.isatty(),  # lines in a file, a bar on a terminal
    )
    trainer = KDTrainer(
        model=llama(48),
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collate,
        teacher=trained_teacher(train),
        divergence="kl",
        temperature=2.0,
        t_squared=True,
        soft_weight=0.9,
        hard_weight=0.1,
        linear=linear,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    last = [x for x in trainer.state.log_history if "loss" in x][-1]
    return dict(
        loss_before=before["eval_loss"],
        loss_after=after["eval_loss"],
        divergence_before=before["eval_divergence"],
        divergence_after=after["eval_divergence"],
        agree_after=after["eval_agree"],
        train_divergence=last["divergence"],
    )


if __name__ == "__main__":
    print(main())
