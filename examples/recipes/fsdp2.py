"""FSDP2 and the loss from hidden states: `python examples/recipes/fsdp2.py`. Two processes that hold half of
each model take the steps of one process that has both whole.

FSDP2 has a module's weights together while its forward runs. So the loss is computed in the head's own
forward, which gives it in the place of logits; outside of it `head.weight` is a shard (a DTensor, which is an
error), and `head.weight.full_tensor()` trains each shard on the tokens of its own process alone.
`LanguageModelLoss` and `KDTrainerMixin` do the same to models of transformers, without a head of their own.
"""

import torch
from processes import PROCESSES, Model, batches, compared, together
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

from kdkernels import fused_kd_loss, fused_linear_kd_loss

OPTIONS = dict(temperature=2.0, t_squared=True, soft_weight=0.9, hard_weight=0.1)


class LossHead(nn.Linear):
    """A head whose forward gives the loss of hidden states."""

    def forward(
        self, hidden: Tensor, teacher_hidden: Tensor, teacher: nn.Linear, labels: Tensor, num_items: Tensor
    ) -> Tensor:
        models = hidden, self.weight, teacher_hidden, teacher.weight
        more = dict(student_bias=self.bias, teacher_bias=teacher.bias, num_items=num_items)
        return fused_linear_kd_loss(*models, labels, **more, **OPTIONS)


def sharded(model: Model) -> Model:
    """Of which each process holds its share; the head is a unit of its own, which is gathered by itself."""
    mesh = distributed.init_device_mesh("cpu", (PROCESSES,))  # on GPUs "cuda"
    for module in (model.body, model.head, model):
        fully_shard(module, mesh=mesh)
    return model


def loss_of(student: Model, teacher: Model, batch: dict[str, Tensor], num_items: Tensor) -> Tensor:
    """The loss of a batch, as a share of the step's."""
    ids, labels = batch["input_ids"], batch["labels"]
    with torch.no_grad():
        hidden = teacher.body(ids)
    teacher.head.unshard()  # by hand: its forward is not called, and no gradient comes to it
    loss = student(ids, hidden, teacher.head, labels, num_items)
    teacher.head.reshard()
    return loss


def train(student: Model, teacher: Model, rank: int, steps: int) -> float:
    """Steps on this process's batches; its part of the last loss."""
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    for step in range(steps):
        mine, total = batches(step)[rank::PROCESSES], 0.0
        tokens = sum((x["labels"] != -100).sum() for x in mine)
        distributed.all_reduce(tokens)
        for i, batch in enumerate(mine):
            student.set_requires_gradient_sync(i == len(mine) - 1)  # gradients are averaged with the last
            loss = loss_of(student, teacher, batch, tokens / PROCESSES)
            loss.backward()
            total += loss.item() / PROCESSES
        optimizer.step()
        optimizer.zero_grad()
    return total


def process(rank: int, steps: int = 3) -> tuple[float, dict[str, Tensor]]:
    """What a process ends with: its part of the loss, and its shards of the student."""
    student = sharded(Model(32, seed=0, head=LossHead))
    teacher = sharded(Model(64, seed=1).requires_grad_(False))
    loss = train(student, teacher, rank, steps)
    return loss, {name: x.to_local() for name, x in student.state_dict().items()}


def train_whole(steps: int = 3) -> tuple[float, Model]:
    """The same in one process, from logits: the last loss, and the student."""
    student, teacher = Model(32, seed=0), Model(64, seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    for step in range(steps):
        several = batches(step)
        tokens, total = sum((x["labels"] != -100).sum() for x in several), 0.0
        for batch in several:
            ids, labels = batch["input_ids"], batch["labels"]
            with torch.no_grad():
                teacher_logits = teacher(ids)
            loss = fused_kd_loss(student(ids), teacher_logits, labels, num_items=tokens, **OPTIONS)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return total, student


def main() -> dict[str, float]:
    """Both losses, the largest difference of a weight beside how far the weights have moved, and the largest
    share of the student that a process holds."""
    losses, shards = zip(*together(process), strict=True)
    state = {name: torch.cat([x[name] for x in shards]) for name in shards[0]}
    one = train_whole()
    whole = sum(x.numel() for x in state.values())
    held = max(sum(x.numel() for x in of_process.values()) for of_process in shards) / whole
    return compared(one, losses, [state], start=Model(32, seed=0)) | dict(held=held)


if __name__ == "__main__":
    print(main())
