"""Distillation in a loop of one's own with accelerate, from hidden states: `accelerate launch
examples/recipes/accelerate_loop.py`, or python for one process.

The loss of a step is the sum over the tokens of all its batches, on all processes, divided by their number,
so that every token counts alike, however many pads its batch has. Accelerator is not told that batches are
accumulated, since it would divide by their number.
"""

import contextlib

import torch
from accelerate import Accelerator
from small import collate, llama, sequences, trained_teacher
from torch.utils.data import DataLoader

from kdkernels.integrations.language import LanguageModelLoss
from kdkernels.integrations.running import Running


def train(teacher, data, batch: int, accumulation: int, steps: int):
    """The student and the losses of its steps."""
    accelerator = Accelerator()
    student = llama(48)
    loss_of = LanguageModelLoss(
        teacher.to(accelerator.device), autocast=accelerator.autocast, temperature=2.0, hard_weight=0.5
    )
    loader = DataLoader(data[: steps * batch * accumulation], batch, collate_fn=collate)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    batches, losses, figures = iter(loader), [], Running()
    for _ in range(steps):
        some = [next(batches) for _ in range(accumulation)]
        tokens = sum((x["labels"][:, 1:] != -100).sum() for x in some)
        tokens = accelerator.reduce(tokens, "sum") / accelerator.num_processes  # whose gradients are averaged
        total = 0.0
        for i, inputs in enumerate(some):
            # processes wait for each other with the last batch alone
            with accelerator.no_sync(student) if i < accumulation - 1 else contextlib.nullcontext():
                found = loss_of(student, accelerator.unwrap_model(student), inputs, num_items=tokens)
                accelerator.backward(found.loss)
            figures.add(found.stats.masked())
            total += accelerator.reduce(found.loss.detach(), "mean").item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    means = figures.take(lambda x: accelerator.reduce(x, "sum"))
    return accelerator.unwrap_model(student), losses, means


def main(steps: int = 10) -> dict[str, float]:
    """The first and the last loss, and how far four batches of four are from one of sixteen."""
    data = sequences()
    teacher = trained_teacher(data)
    one, losses, means = train(teacher, data, 16, 1, steps)
    four, *_ = train(teacher, data, 4, 4, steps)
    pairs = zip(one.parameters(), four.parameters(), strict=True)
    apart = max(float((x - y).detach().abs().max()) for x, y in pairs)
    moved = max(
        float((x - y).detach().abs().max())
        for x, y in zip(one.parameters(), llama(48).parameters(), strict=True)
    )
    return dict(first=losses[0], last=losses[-1], agree=means["agree"], apart=apart, moved=moved)


if __name__ == "__main__":
    print(main())
