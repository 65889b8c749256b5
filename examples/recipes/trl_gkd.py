"""TRL's GKDTrainer with kdkernels: one line, `fused(trainer)`. Half a minute on a CPU.

    pip install '.[trl]'
    python examples/recipes/trl_gkd.py

The student never holds the logits of its batch: the divergence is computed from the hidden states of both
models. `fused(trainer, linear=False)` computes it from logits.
"""

from __future__ import annotations

import tempfile

from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl_setting import dataset, halves, setting

from kdkernels.integrations.trl import fused


def main(steps: int = 100, with_kdkernels: bool = True) -> dict[str, float]:
    """Train; the first and the last divergence that the trainer logs."""
    student, teacher, tokenizer = setting()
    roles = "user", "assistant"
    turns = [
        [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)] for pair in halves()
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            beta=0.5,  # Jensen-Shannon; 0 is KL(teacher, student), 1 KL(student, teacher)
            lmbda=0.0,  # the dataset's answers alone; 1 is the student's own
            max_length=128,
            max_new_tokens=16,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=dataset([{"messages": x} for x in turns]),
            processing_class=tokenizer,
        )
        if with_kdkernels:
            fused(trainer)  # the one line
        trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    return {"first_loss": losses[0], "last_loss": losses[-1]}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.4f}")
