"""TRL's DistillationTrainer with kdkernels: one line, `fused(trainer)`. Half a minute on a CPU.

    pip install '.[trl]'
    python examples/recipes/trl_distillation.py

The student writes the answers itself, and learns on them to be like its teacher. Both models' hidden states
go to the loss, which is TRL's own divergence with TRL's own options; the student's entropy is logged as
before.
"""

from __future__ import annotations

import tempfile

from trl import DistillationConfig, DistillationTrainer
from trl_setting import TEMPLATE_LINE, dataset, first_and_last, halves, setting, training

from kdkernels.integrations.trl import fused


def main(steps: int = 60, with_kdkernels: bool = True) -> dict[str, float]:
    """Train; the first and the last divergence and entropy of the student that the trainer logs."""
    student, teacher, tokenizer = setting()
    questions = [TEMPLATE_LINE.partition("{}</s>")[0].format(question) for question, _ in halves()]
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationConfig(
            **training(folder, steps),
            beta=1.0,  # KL(student, teacher); 0 is KL(teacher, student), 0.5 Jensen-Shannon
            max_completion_length=24,
        )
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=dataset([{"prompt": x} for x in questions]),
            processing_class=tokenizer,
        )
        if with_kdkernels:
            fused(trainer)  # the one line
        trainer.train()
    return first_and_last(trainer, "loss", "entropy")


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.4f}")
