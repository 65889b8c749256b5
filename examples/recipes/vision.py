"""Distilling an image classifier: hard labels with label smoothing mixed with soft targets, or decoupled KD:
`python examples/recipes/vision.py`.

Ten classes of synthetic images, each a mixture with the class beside it, so that the teacher's second guesses
say something. The student has few of them: with the teacher's logits it learns more than from the labels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels import KDLoss, decoupled_kd_loss, fused_kd_loss

CLASSES, SIZE = 10, 16
T = 4.0
KL = KDLoss(temperature=T, t_squared=True, soft_weight=0.9, hard_weight=0.1, label_smoothing=0.1)


def hard(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    """Smoothed for a student. A teacher learns without, since smoothing would hide its second guesses."""
    return F.cross_entropy(student, labels, label_smoothing=0.0 if teacher is None else 0.1)


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The target's share of the divergence, and the other classes' with a weight of its own."""
    weights = dict(target_weight=1.0, non_target_weight=4.0, hard_weight=1.0)
    return decoupled_kd_loss(student, teacher, labels, temperature=T, t_squared=True, **weights)


LOSSES = {"hard": hard, "kl": KL, "decoupled": decoupled}


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, 3, 16, 16) images and their labels: a class's pattern and somewhat of the next one's, moved by
    up to three pixels, and noise."""
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    patterns = F.interpolate(patterns, SIZE, mode="bilinear")
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=g)
    share = 0.45 * torch.rand(count, 1, 1, 1, generator=g)
    mixed = (1 - share) * patterns[labels] + share * patterns[(labels + 1) % CLASSES]
    moves = torch.randint(-3, 4, (count, 2), generator=g).tolist()
    moved = torch.stack([x.roll(move, (1, 2)) for x, move in zip(mixed, moves, strict=True)])
    return moved + 1.5 * torch.randn(moved.shape, generator=g), labels


def network(width: int, seed: int) -> nn.Sequential:
    """Two convolutions and a linear layer."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * width * (SIZE // 4) ** 2, CLASSES))


def train(model: nn.Module, loss_of, data: tuple[Tensor, Tensor], teacher: nn.Module | None, steps: int):
    """The model after so many batches; the teacher, if there is one, sees the same images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        at = torch.randint(len(data[0]), (64,), generator=g)
        x, y = data[0][at], data[1][at]
        with torch.no_grad():
            v = None if teacher is None else teacher(x)
        loss_of(model(x), v, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, teacher: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Accuracy, the share of images on which both models agree, and KL at T = 1."""
    x, y = data
    means = fused_kd_loss(model(x), teacher(x), y, return_stats=True)[1].mean()
    return dict(accuracy=means["correct"], agree=means["agree"], divergence=means["divergence"])


def main(steps: int = 200, losses=tuple(LOSSES)) -> dict[str, dict[str, float]]:
    """The figures of the teacher, of a student before training, and of one for each loss, on held-out
    images."""
    few, held_out = images(200, seed=1), images(2000, seed=2)
    teacher = train(network(24, seed=1), hard, images(4000, seed=3), None, 2 * steps)
    found = dict(teacher=evaluate(teacher, teacher, held_out))
    found["before"] = evaluate(network(8, seed=0), teacher, held_out)
    for name in losses:
        student = train(network(8, seed=0), LOSSES[name], few, teacher, steps)
        found[name] = evaluate(student, teacher, held_out)
    return found


if __name__ == "__main__":
    for name, figures in main().items():
        print(f"{name:10}", *(f"{what} {x:.3f}" for what, x in figures.items()), sep="  ")
