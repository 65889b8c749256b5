"""The loss and its statistics in TensorBoard, as means over tokens: `python
examples/recipes/tensorboard_log.py`, then `tensorboard --logdir build/tensorboard`. Needs `pip install
tensorboard`.

The sums of a log stay on the device, and nothing waits for it between logs.
"""

import argparse
from pathlib import Path

import torch
from evaluation import evaluate
from small import batch_of, collate, llama, sequences, trained_teacher
from torch.utils.tensorboard import SummaryWriter

from kdkernels.integrations.language import FIGURES, LanguageModelLoss
from kdkernels.integrations.running import Running


def train(student, loss_of: LanguageModelLoss, data, held_out, writer: SummaryWriter, steps: int, every: int):
    """Steps of one batch each; every so many of them a line for the train curves, and one for the held-out
    ones."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    figures = Running()

    def look(step: int) -> None:
        for name, x in evaluate(student, loss_of.teacher, held_out).items():
            writer.add_scalar(f"held_out/{name}", x, step)

    look(0)
    for step in range(1, steps + 1):
        found = loss_of(student, student, batch_of(data, step), reduction="none")
        (found.loss.sum() / found.stats.counted).backward()
        optimizer.step()
        optimizer.zero_grad()
        figures.add(dict(loss=found.loss) | found.stats.masked())
        if step % every == 0:
            means = figures.take()
            for name in ("loss", *FIGURES):
                writer.add_scalar(f"train/{name}", means[name], step)
            look(step)


def main(folder: str | Path = "build/tensorboard", steps: int = 60, every: int = 10) -> Path:
    """The folder with the events."""
    data = sequences()
    held_out = [collate(data[i : i + 16]) for i in range(len(data) - 64, len(data), 16)]
    options = dict(temperature=2.0, t_squared=True, soft_weight=0.9, hard_weight=0.1)
    loss_of = LanguageModelLoss(trained_teacher(data[:-64]), **options)
    with SummaryWriter(folder) as writer:
        train(llama(48), loss_of, data[:-64], held_out, writer, steps, every)
    return Path(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="build/tensorboard")
    print("events in", main(parser.parse_args().out))
