"""TRL's GKDTrainer with kdkernels: one line, `fused(trainer)`. Half a minute on a CPU.

    pip install '.[trl]'
    python examples/recipes/trl_gkd.py

The student never holds the logits of its batch: the divergence is computed from the hidden states of both
models. `fused(trainer, linear=False)` computes it from logits.
"""

from __future__ import annotations

import tempfile

from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl_setting import dataset, first_and_last, halves, setting, training

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
            **training(folder, steps),
            beta=0.5,  # Jensen-Shannon; 0 is KL(teacher, student), 1 KL(student, teacher)
            lmbda=0.0,  # the dataset's answers alone; 1 is the student's own
            max_length=128,
            max_new_tokens=16,
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
    return first_and_last(trainer, "loss")


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.4f}")
