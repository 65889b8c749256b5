"""Two processes that accumulate two batches each take the step of one process with all of the tokens: `python
examples/recipes/ddp_accumulation.py`.

The denominator of the loss is the number of tokens of all batches of a step on all processes, over the number
of processes, since DDP averages their gradients. A mean over each batch would weight its tokens by its
padding.
"""

import os
import socket
import tempfile

import torch
from small import collate, sequences
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kdkernels import fused_kd_loss

PROCESSES, BATCHES, STEPS = 2, 2, 3


class Model(nn.Module):
    """Logits of the next byte from the last four."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(258, width)
        self.mix = nn.Conv1d(width, width, 4)
        self.head = nn.Linear(width, 258)

    def forward(self, ids):
        x = nn.functional.pad(self.embed(ids).mT, (3, 0))
        return self.head(torch.tanh(self.mix(x)).mT)


def loss_of(student, teacher, batch, num_items):
    """The loss of a batch, as a share of the step's."""
    labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)  # the token that comes next
    with torch.no_grad():
        teacher_logits = teacher(batch["input_ids"])
    logits = student(batch["input_ids"])
    return fused_kd_loss(
        logits, teacher_logits, labels, temperature=2.0, hard_weight=0.5, num_items=num_items
    )


def batches(step: int) -> list[dict[str, torch.Tensor]]:
    """Those of a step, for all processes."""
    data, size = sequences(), 4
    starts = range(step * PROCESSES * BATCHES * size, (step + 1) * PROCESSES * BATCHES * size, size)
    return [collate(data[i : i + size]) for i in starts]


def train(student: nn.Module, rank: int, world: int) -> float:
    """STEPS steps on this process's batches; its part of the last loss."""
    teacher = Model(64, seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    for step in range(STEPS):
        mine = batches(step)[rank::world]
        tokens = sum((x["labels"][:, 1:] != -100).sum() for x in mine)
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


def process(rank: int, port: int, path: str) -> None:
    """One of the processes; saves what it ends with."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    student = DistributedDataParallel(Model(32, seed=0))
    loss = train(student, rank, PROCESSES)
    torch.save((loss, student.module.state_dict()), f"{path}/{rank}")
    distributed.destroy_process_group()


def main() -> dict[str, float]:
    """Both losses, and the largest difference of a weight beside how far the weights have moved."""
    path = tempfile.mkdtemp()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, path), PROCESSES)
    losses, states = zip(*(torch.load(f"{path}/{rank}") for rank in range(PROCESSES)), strict=True)
    one = Model(32, seed=0)
    loss_of_one = train(one, 0, 1)
    start = Model(32, seed=0).state_dict()
    weights = one.state_dict()
    return dict(
        one_process=loss_of_one,
        two_processes=sum(losses),
        apart=max(float((two[x] - weights[x]).abs().max()) for two in states for x in weights),
        moved=max(float((start[x] - weights[x]).abs().max()) for x in weights),
    )


if __name__ == "__main__":
    print(main())
