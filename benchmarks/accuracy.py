"""Relative error of loss and gradient against temperature, eager PyTorch beside kdkernels, against extended
precision.

python benchmarks/accuracy.py      # a minute; writes benchmarks/results/accuracy.csv and
                                   docs/figures/accuracy.svg
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from kdkernels import parse
from kdkernels.bench import contenders
from kdkernels.bench.reference import reference

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent
COLUMNS = ("divergence", "temperature", "contender", "loss_error", "grad_error")
DIVERGENCES = ("kl", "renyi(0.5)", "renyi(2)")


def errors(rows: int, vocab: int, temperatures: list[float]) -> list[dict]:
    """One record for each divergence, T and contender, fp32 logits."""
    g = torch.Generator().manual_seed(0)
    v = torch.randn(rows, vocab, generator=g) * 3
    z = (v + torch.randn(rows, vocab, generator=g) * 0.5).requires_grad_()
    records = []
    for divergence in tqdm(DIVERGENCES, disable=None):
        for T in temperatures:
            values, exact = reference(z, v, parse(divergence), T)
            exact = (exact / rows).astype(float)
            losses = {"kdkernels": contenders.fused(parse(divergence), T)} | contenders.spellings(
                parse(divergence), T
            )
            for name, loss in losses.items():
                value = loss(z, v)
                (grad,) = torch.autograd.grad(value, z)
                off = float(abs(value.item() / values.mean() - 1))
                grad_off = np.linalg.norm(grad.double().numpy() - exact) / np.linalg.norm(exact)
                records.append(dict(zip(COLUMNS, (divergence, T, name, off, float(grad_off)), strict=True)))
    return records


def plot(records: list[dict], path: Path) -> None:
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kdkernels",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with plt.style.context(["tableau-colorblind10", style]):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
        for i, divergence in enumerate(DIVERGENCES):
            here = [r for r in records if r["divergence"] == divergence]
            best = list(contenders.spellings(parse(divergence), 2.0))[-1]
            for name, line in (("kdkernels", "-"), (best, "--")):
                mine = [r for r in here if r["contender"] == name]
                label = f"{divergence}, {'kdkernels' if name == 'kdkernels' else 'eager PyTorch'}"
                for axis, column in zip(axes, COLUMNS[-2:], strict=True):
                    axis.loglog(
                        [r["temperature"] for r in mine],
                        [max(r[column], 1e-9) for r in mine],
                        line,
                        color=f"C{i}",
                        label=label,
                    )
        for axis, what in zip(axes, ("loss", "gradient"), strict=True):
            axis.axhline(1, color="0.7", linewidth=1, zorder=0)
            axis.set(xlabel="temperature T", title=f"Relative error of the {what}, fp32")
            axis.minorticks_off()
        axes[0].annotate("no digit is right", (0.5, 1.5), fontsize="small", color="0.4")
        axes[1].legend(frameon=False, fontsize="small")
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        plt.close(figure)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT, help="root under which both files are written")
    parser.add_argument("--shape", default="4x128256", help="ROWSxVOCAB")
    parser.add_argument("--points", type=int, default=25, help="temperatures from 0.5 to 1e6")
    args = parser.parse_args(argv)
    rows, vocab = map(int, args.shape.split("x"))
    records = errors(rows, vocab, np.geomspace(0.5, 1e6, args.points).tolist())
    table, figure = args.out / "benchmarks/results/accuracy.csv", args.out / "docs/figures/accuracy.svg"
    for path in (table, figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(
            {k: f"{x:.3g}" if isinstance(x, float) else x for k, x in r.items()} for r in records
        )
    plot(records, figure)
    print(table, figure, sep="\n")
    return records


if __name__ == "__main__":
    main()
