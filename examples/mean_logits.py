"""The mean logit of ResNets for CIFAR-100 at initialisation, over many seeds: table 1 of Chen et al.

    python examples/mean_logits.py --seeds 6000        # can be stopped: what is in the CSV file is not
                                                       computed again

Distillation at high temperature is logit matching when the mean logits of teacher and student agree, and
these means are those of the initialisation. The paper's argument is their expectation, zero over seeds
(proposition 1); what one run has is a draw from a distribution, so its standard deviation is printed as well.
It is known: for features h of width D the last layer, uniform in +-1/sqrt(D) with a bias, gives a mean over K
classes of variance (|h|^2 + 1) / (3 D K).

The networks are those of RepDistiller (He initialisation, fan out), the input is standardised noise in place
of images, and batch normalisation takes the batch's statistics, as in the first step of a training.
`--running` takes its running ones instead, which are the identity at initialisation: the logits then grow
with depth.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import torch
from progress import Progress
from torch import Tensor, nn

CLASSES, WIDTHS = 100, (16, 32, 64)
# depth -> average of the mean logit over 6000 seeds
PAPER = {8: 1.04e-5, 20: -1.67e-4, 32: 1.72e-4, 44: 2.50e-2}
FIELDS = ("depth", "batch_norm", "images", "seed", "mean_logit", "expected_sd")


class Block(nn.Module):
    """relu(F(x) + x) with two 3 x 3 convolutions in F, and a 1 x 1 convolution of x where the shape
    changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(
            convolution(inputs, outputs, 3, stride), nn.ReLU(), convolution(outputs, outputs, 3)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + self.shortcut(x)).relu()


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


def resnet(depth: int) -> nn.Sequential:
    """The ResNet of 6n + 2 layers for 32 x 32 images: three stages of n blocks; its last module is the linear
    layer."""
    blocks, inputs = [], WIDTHS[0]
    for stage, width in enumerate(WIDTHS):
        for i in range((depth - 2) // 6):
            blocks.append(Block(inputs, width, stride=2 if stage and not i else 1))
            inputs = width
    stem = (convolution(3, WIDTHS[0], 3), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def initialise(net: nn.Module) -> None:
    """He initialisation of the convolutions; batch normalisation and the linear layer as PyTorch makes
    them."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
            module.reset_parameters()


@torch.inference_mode()
def measure(net: nn.Sequential, seed: int, images: int) -> tuple[float, float]:
    """(mean of the logits over classes and images, its standard deviation given the features)."""
    torch.manual_seed(seed)
    initialise(net)
    features = net[:-1](torch.randn(images, 3, 32, 32))
    norm2 = features.mean(0).square().sum().item()
    return net[-1](features).mean().item(), math.sqrt((norm2 + 1) / (3 * features.shape[1] * CLASSES))


def run(depth: int, seeds: int, images: int, running: bool, path: Path) -> list[tuple[float, float]]:
    """The measurements of seeds 0, 1, ...: those in the file, and the others, which are appended to it."""
    key = {"depth": str(depth), "batch_norm": "running" if running else "batch", "images": str(images)}
    known = {}
    if path.exists():
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if all(row[k] == value for k, value in key.items())]
        known = {int(row["seed"]): (float(row["mean_logit"]), float(row["expected_sd"])) for row in rows}
    net = resnet(depth).train(not running)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if not file.tell():
            writer.writeheader()
        pending = [seed for seed in range(seeds) if seed not in known]
        for seed in Progress(pending, f"ResNet-{depth}", "seed", done=seeds - len(pending)):
            known[seed] = measure(net, seed, images)
            writer.writerow(key | {"seed": seed, "mean_logit": known[seed][0], "expected_sd": known[seed][1]})
            file.flush()
    return [known[seed] for seed in range(seeds)]


def summary(measured: list[tuple[float, float]]) -> dict[str, float]:
    """Mean over seeds, its standard error, the standard deviation over seeds, and that of mean_logit /
    expected_sd, which is 1."""
    means, expected = torch.tensor(measured, dtype=torch.float64).T
    sd = means.std().item()
    return {
        "seeds": len(means),
        "mean": means.mean().item(),
        "error": sd / math.sqrt(len(means)),
        "sd": sd,
        "against_expected": (means / expected).square().mean().sqrt().item(),
    }


def main(argv: list[str] | None = None) -> dict[int, dict[str, float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, help="default 6000, as in the paper; 12 with --quick")
    parser.add_argument("--depths", type=int, nargs="+", default=list(PAPER), choices=list(PAPER))
    parser.add_argument("--images", type=int, default=4, help="noise images in a batch")
    parser.add_argument(
        "--running", action="store_true", help="batch normalisation with its running statistics"
    )
    parser.add_argument("--quick", action="store_true", help="12 seeds, 2 images, ResNet-8 and ResNet-20")
    parser.add_argument("--out", type=Path, default=Path("build"), help="the folder of mean_logits.csv")
    args = parser.parse_args(argv)
    depths, images = ([8, 20], 2) if args.quick else (args.depths, args.images)
    seeds = args.seeds or (12 if args.quick else 6000)

    args.out.mkdir(parents=True, exist_ok=True)
    path, results = args.out / "mean_logits.csv", {}
    print(
        f"{'':10}  {'mean over seeds':>22}  {'paper':>9}  {'sd over seeds':>13}  {'/ expected':>10}  time",
        flush=True,
    )
    for depth in depths:
        start = time.perf_counter()
        s = results[depth] = summary(run(depth, seeds, images, args.running, path))
        row = (
            f"{s['mean']:+.2e} +- {s['error']:.1e}",
            f"{PAPER[depth]:+.2e}",
            f"{s['sd']:.3f}",
            f"{s['against_expected']:.3f}",
        )
        print(
            f"ResNet-{depth:<3}  {row[0]:>22}  {row[1]:>9}  {row[2]:>13}  {row[3]:>10}  "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    print(f"{seeds} seeds, in {path}", flush=True)
    return results


if __name__ == "__main__":
    main()
