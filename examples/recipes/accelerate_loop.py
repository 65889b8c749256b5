"""Distillation in a loop of one's own with accelerate, from hidden states: `accelerate launch
examples/recipes/accelerate_loop.py`, or python for one process. DDP and FSDP2 are accelerate's to set up, and
ask nothing of the loop.

The loss of a step is the sum over the tokens of all its batches, on all processes, divided by their number,
so that every token counts alike, however many pads its batch has. Accelerator is not told that batches are
accumulated, since it would divide by their number.
"""

import contextlib

import torch
from accelerate import Accelerator, PartialState
from small import collate, llama, sequences, trained_teacher
from torch.utils.data import DataLoader

from kdkernels.integrations.language import LanguageModelLoss
from kdkernels.integrations.running import Running


def train(teacher, data, batch: int, accumulation: int, steps: int):
    """The student's weights, the losses of its steps, and means over all tokens; a batch is a process's."""
    accelerator = Accelerator()
    student = llama(48)
    loss_of = LanguageModelLoss(
        teacher.to(accelerator.device), autocast=accelerator.autocast, temperature=2.0, hard_weight=0.5
    )
    rows = steps * batch * accumulation * accelerator.num_processes
    loader = DataLoader(data[:rows], batch, collate_fn=collate)
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
    return [whole(x) for x in accelerator.unwrap_model(student).parameters()], losses, means


def whole(x: torch.Tensor) -> torch.Tensor:
    """A parameter, put together where FSDP2 has sharded it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def main(steps: int = 10) -> dict[str, float]:
    """The first and the last loss, and how far four batches of four are from one of sixteen."""
    data = sequences()
    teacher = trained_teacher(data)
    one, losses, means = train(teacher, data, 16, 1, steps)
    four, *_ = train(teacher, data, 4, 4, steps)

    def furthest(those) -> float:
        return max(float((x - y).detach().abs().max()) for x, y in zip(one, those, strict=True))

    figures = dict(first=losses[0], last=losses[-1], agree=means["agree"])
    return figures | dict(apart=furthest(four), moved=furthest(llama(48).parameters()))


if __name__ == "__main__":
    found = main()
    if PartialState().is_main_process:
        print(found)
