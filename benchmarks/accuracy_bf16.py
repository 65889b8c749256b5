"""Relative error of loss and gradient for bf16 logits at the temperatures that people train with: the fused
loss, eager PyTorch on the bf16 logits, and eager PyTorch on fp32 copies of them, against extended precision.

python benchmarks/accuracy_bf16.py      # ten seconds; writes benchmarks/results/accuracy_bf16.csv
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from kdkernels import parse
from kdkernels.bench import contenders
from kdkernels.bench.reference import reference

FILE = Path(__file__).parent / "results" / "accuracy_bf16.csv"
COLUMNS = ("divergence", "temperature", "contender", "loss_error", "grad_error")
DIVERGENCES = ("kl", "reverse_kl", "jsd(0.5)", "renyi(0.5)")
TEMPERATURES = (1.0, 2.0, 4.0, 10.0)
OWN, EAGER, COPIES = "kdkernels", "eager", "eager on fp32 copies"


def losses(divergence: str, T: float) -> dict[str, contenders.Loss]:
    """The three, eager in its best spelling."""
    *_, best = contenders.spellings(parse(divergence), T).values()
    return {
        OWN: contenders.fused(parse(divergence), T),
        EAGER: best,
        COPIES: lambda z, v: best(z.float(), v.float()),
    }


def errors(rows: int, vocab: int) -> Iterator[dict]:
    """One record for each divergence, T and contender; the teacher's logits have a standard deviation of 3,
    the student's differ from them by 1/2."""
    g = torch.Generator().manual_seed(0)
    v = (torch.randn(rows, vocab, generator=g) * 3).bfloat16()
    z = (v.float() + torch.randn(rows, vocab, generator=g) * 0.5).bfloat16().requires_grad_()
    for divergence in DIVERGENCES:
        for T in TEMPERATURES:
            values, exact = reference(z, v, parse(divergence), T)
            exact = (exact / rows).astype(float)
            for name, loss in losses(divergence, T).items():
                value = loss(z, v)
                (grad,) = torch.autograd.grad(value, z)
                off = abs(value.item() / float(values.mean()) - 1)
                grad_off = np.linalg.norm(grad.double().numpy() - exact) / np.linalg.norm(exact)
                found = (divergence, f"{T:g}", name, f"{off:.1e}", f"{grad_off:.1e}")
                yield dict(zip(COLUMNS, found, strict=True))


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--shape", default="4x128256", help="ROWSxVOCAB")
    args = parser.parse_args(argv)
    records = list(errors(*map(int, args.shape.split("x"))))
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(records)
    print(args.out)
    return records


if __name__ == "__main__":
    main()
