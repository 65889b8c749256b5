"""What each divergence costs beside KL, and what statistics and the teacher's gradient cost beside a plain
step of the same divergence.

    python benchmarks/divergences.py               # a minute; a table
    python benchmarks/divergences.py --write       # and docs/results/divergences_cpu.md

A step is the public function's loss and gradient. The steps take turns, and a figure is the median over the
rounds of the ratio of two that stood in the same round: machines are shared, and ratios move less than times.
Each is compared with the fp64 backend first.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kdkernels import fused_kd_loss
from kdkernels.bench import logits, measure
from kdkernels.divergence import usual

PAGE = Path(__file__).parent.parent / "docs" / "results" / "divergences_cpu.md"
# and the error allowed, of the gradient's norm
DTYPES = {"fp32": (torch.float32, 3e-6), "bf16": (torch.bfloat16, 4e-3)}
SPREADS = (0.5, 3.0)  # how far a student's logits are from its teacher's
DIVERGENCES = (
    *(d.text for d in usual()),
    "skew_kl(0.5)",
    "skew_kl(0.9)",
    "skew_reverse_kl(0.5)",
    "skew_reverse_kl(0.9)",
)
VARIANTS = {"step": {}, "stats": {"return_stats": True}}


def step(z: Tensor, v: Tensor, divergence: str, **options) -> Tensor:
    """The gradient."""
    z = z.detach().requires_grad_()
    loss = fused_kd_loss(z, v, divergence=divergence, temperature=2.0, t_squared=True, **options)
    (loss[0] if "return_stats" in options else loss).backward()
    return z.grad


def check(z: Tensor, v: Tensor, divergence: str, allowed: float, **options) -> None:
    found = step(z[:2], v[:2], divergence, **options)
    exact = step(z[:2].double(), v[:2].double(), divergence, backend="eager", **options)
    if not (found.double() - exact).norm() <= allowed * exact.norm():
        raise SystemExit(f"kdkernels is wrong here ({divergence}, {options}): no time is given")


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def measured(rows: int, vocab: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """By divergence, for each dtype and spread: beside KL, and with statistics beside without."""
    found: dict[str, dict[str, list[float]]] = {d: {"step": [], "stats": []} for d in DIVERGENCES}
    for dtype, allowed in DTYPES.values():
        for spread in SPREADS:
            z, v = (x.to(dtype) for x in logits.draw(rows, vocab, spread))
            steps: dict[object, Callable[[], object]] = {}
            for d in DIVERGENCES:
                for name, options in VARIANTS.items():
                    check(z, v, d, allowed, **options)
                    steps[d, name] = functools.partial(step, z, v, d, **options)
            seconds = measure.take_turns(steps, repeats)
            for d in DIVERGENCES:
                found[d]["step"].append(ratio(seconds[d, "step"], seconds["kl", "step"]))
                found[d]["stats"].append(ratio(seconds[d, "stats"], seconds[d, "step"]))
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    columns = [f"{dtype}, {spread:g}" for dtype in DTYPES for spread in SPREADS]
    lines = [
        "| | " + " | ".join(columns) + " | statistics |",
        "| --- |" + " ---: |" * (len(columns) + 1),
    ]
    for d, of in found.items():
        statistics_take = f"{min(of['stats']):.2f} to {max(of['stats']):.2f}"
        lines.append(f"| `{d}` | " + " | ".join(f"{x:.2f}" for x in of["step"]) + f" | {statistics_take} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", default=["64x128256", "256x32768"], help="ROWSxVOCAB, default %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", action="store_true", help=f"{PAGE.name}")
    parser.add_argument("--machine", help="what it is called there, default: what the system calls it")
    args = parser.parse_args(argv)
    machine = measure.machine(torch.device("cpu"))
    about = ", ".join(
        [
            args.machine or machine["device"],
            f"{machine['threads']} threads",
            machine["cpu_library"],
            f"torch {machine['torch']}",
        ]
    )
    parts = [
        "# What each divergence costs on a CPU",
        "`python benchmarks/divergences.py`: the time of a step (loss and gradient, T = 2) beside "
        "KL's, for logits that differ from the\n"
        "teacher's by 1/2 and by 3; then a step with `return_stats=True` beside a plain one, from the "
        f"least to the most of\nthe four. {about}.",
    ]
    for shape in tqdm(args.shapes, disable=None):
        text = table(measured(*logits.shape(shape), args.repeats))
        parts += [f"## {shape.replace('x', ' x ')}", text]
        print(f"{shape}\n{text}\n")
    if args.write:
        PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
