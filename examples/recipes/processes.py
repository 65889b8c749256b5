"""What the recipes with two processes share: how they start, a model, and the batches of a step."""

import os
import socket
import sys
import tempfile

import torch
from small import collate, sequences
from torch import distributed, nn

PROCESSES, BATCHES, SIZE = 2, 2, 4


class Model(nn.Module):
    """Logits of the next byte from the last four."""

    def __init__(self, width: int, seed: int, head: type[nn.Linear] = nn.Linear):
        super().__init__()
        torch.manual_seed(seed)
        self.body = Body(width)
        self.head = head(width, 258)

    def forward(self, ids, *more):
        return self.head(self.body(ids), *more)


class Body(nn.Module):
    """Hidden states."""

    def __init__(self, width: int):
        super().__init__()
        self.embed = nn.Embedding(258, width)
        self.mix = nn.Conv1d(width, width, 4)

    def forward(self, ids):
        x = nn.functional.pad(self.embed(ids).mT, (3, 0))
        return torch.tanh(self.mix(x).mT)


def batches(step: int) -> list[dict[str, torch.Tensor]]:
    """Those of a step, for all processes; a position's label is the token that comes next."""
    data, count = sequences(), PROCESSES * BATCHES
    found = [collate(data[i * SIZE : (i + 1) * SIZE]) for i in range(step * count, (step + 1) * count)]
    for batch in found:
        batch["labels"] = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return found


def together(work) -> list:
    """What work(rank) gives in each of PROCESSES processes of gloo; `work` is a function of a module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as path:
        torch.multiprocessing.spawn(_process, (work, port, path), PROCESSES)
        return [torch.load(f"{path}/{rank}") for rank in range(PROCESSES)]


def _process(rank: int, work, port: int, path: str) -> None:
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    torch.save(work(rank), f"{path}/{rank}")
    distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo that lets go of a tensor while the interpreter ends would abort


def compared(
    one: tuple[float, nn.Module], losses: list[float], states: list[dict[str, torch.Tensor]], start: nn.Module
) -> dict[str, float]:
    """The loss of one process beside the sum of the processes' parts, and the largest difference of a weight
    beside how far the weights have moved."""
    loss, model = one
    weights = model.state_dict()

    def apart(state: dict[str, torch.Tensor]) -> float:
        return max(float((state[x] - weights[x]).abs().max()) for x in weights)

    return dict(
        one_process=loss,
        two_processes=sum(losses),
        apart=max(map(apart, states)),
        moved=apart(start.state_dict()),
    )
