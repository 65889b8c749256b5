"""Two processes that accumulate two batches each take the step of one process with all of the tokens: `python
examples/recipes/ddp_accumulation.py`.

The denominator of the loss is the number of tokens of all batches of a step on all processes, over the number
of processes, since DDP averages their gradients. A mean over each batch would weight its tokens by its
padding.
"""

import torch
from processes import PROCESSES, Model, batches, compared, together
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kdkernels import fused_kd_loss


def loss_of(student, teacher, batch, num_items):
    """The loss of a batch, as a share of the step's."""
    with torch.no_grad():
        teacher_logits = teacher(batch["input_ids"])
    logits = student(batch["input_ids"])
    return fused_kd_loss(
        logits, teacher_logits, batch["labels"], temperature=2.0, hard_weight=0.5, num_items=num_items
    )


def train(student: nn.Module, rank: int, world: int, steps: int = 3) -> float:
    """Steps on this process's batches; its part of the last loss."""
    teacher = Model(64, seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    for step in range(steps):
        mine = batches(step)[rank::world]
        tokens = sum((x["labels"] != -100).sum() for x in mine)
        total = torch.zeros(())
        if world > 1:
            distributed.all_reduce(tokens)
        for i, batch in enumerate(mine):
            if world > 1:  # gradients are averaged with the last batch
                student.require_backward_grad_sync = i == len(mine) - 1
            loss = loss_of(student, teacher, batch, tokens / world)
            loss.backward()
            total += loss.detach() / world
        optimizer.step()
        optimizer.zero_grad()
    return float(total)


def process(rank: int) -> tuple[float, dict[str, torch.Tensor]]:
    """What a process ends with."""
    student = DistributedDataParallel(Model(32, seed=0))
    return train(student, rank, PROCESSES), student.module.state_dict()


def main() -> dict[str, float]:
    """Both losses, and the largest difference of a weight beside how far the weights have moved."""
    losses, states = zip(*together(process), strict=True)
    one = Model(32, seed=0)
    return compared((train(one, 0, 1), one), losses, states, start=Model(32, seed=0))


if __name__ == "__main__":
    print(main())
