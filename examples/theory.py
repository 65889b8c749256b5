"""Figures of what temperature and order do to a distillation loss, and the numbers worth saying.

python examples/theory.py --out docs/figures      # needs matplotlib; a few seconds
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from torch.nn import functional as F

from kdkernels import fused_kd_loss, logit_matching_loss, tempered_log_softmax

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text as text: small files
    "svg.hashsalt": "kdkernels",  # the same bits every time
}
Numbers = dict[str, float]


def softmax(x: Tensor, T: float) -> Tensor:
    return tempered_log_softmax(x, T).exp()


# ---------------------------------------------------------------- temperature


def temperature(quick: bool) -> tuple[Figure, Numbers]:
    """Softmax against the logit for several T, on logits between -10 and 10; and horse, zebra, car of
    Grätzer's figure 1.1."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    x = torch.linspace(-10, 10, 21, dtype=torch.float64)
    for T, line in zip((1, 2, 4, 8, 16), ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))), strict=True):
        left.semilogy(x, softmax(x, T), linestyle=line, label=f"T = {T}")
    left.set(
        xlabel="logit",
        ylabel="probability",
        ylim=(1e-7, 1),
        title="On a log scale the softmax has slope 1/T: heat flattens it",
    )
    left.legend()

    names, logits = ("horse", "zebra", "car"), torch.tensor([5.4, 0.2, -1.3], dtype=torch.float64)
    hard, soft = softmax(logits, 1.0).tolist(), softmax(logits, 4.0).tolist()
    for shift, values, label, hatch in ((-0.2, hard, "T = 1", ""), (0.2, soft, "T = 4", "//")):
        at = [i + shift for i in range(len(names))]
        right.bar_label(
            right.bar(at, values, 0.38, label=label, hatch=hatch, edgecolor="white"),
            fmt="%.3f",
            fontsize="small",
        )
    ticks = [f"{name}\nlogit {z:g}" for name, z in zip(names, logits.tolist(), strict=True)]
    right.set_xticks(range(len(names)), ticks)
    right.set(ylabel="probability", title=f"T = 4 raises the zebra from {hard[1]:.1%} to {soft[1]:.1%}")
    right.legend()
    return figure, {
        "horse at T = 1": hard[0],
        "zebra at T = 1": hard[1],
        "horse at T = 4": soft[0],
        "zebra at T = 4": soft[1],
    }


# ---------------------------------------------------------------- high temperature


def eager_loss(z: Tensor, v: Tensor, T: float) -> Tensor:
    """T^2 KL as it is written everywhere, in the logits' precision."""
    log_q, log_p = F.log_softmax(z / T, -1), F.log_softmax(v / T, -1)
    return T**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def value_and_grad(loss, z: Tensor, *args, **options) -> tuple[float, Tensor]:
    z = z.clone().requires_grad_()
    value = loss(z, *args, **options)
    value.backward()
    return value.item(), z.grad.double()


def high_temperature(quick: bool) -> tuple[Figure, Numbers]:
    """T^2 KL and its gradient against their limit, centred logit matching, for T = 1 to 1e6, in fp32."""
    rows, classes, points = (2, 2000, 7) if quick else (4, 32000, 25)
    g = torch.Generator().manual_seed(0)
    v = 3 * torch.randn(rows, classes, generator=g)
    z = v + 0.5 * torch.randn(rows, classes, generator=g)
    limit, limit_grad = value_and_grad(logit_matching_loss, z, v, center=True)
    T = torch.logspace(0, 6, points).tolist()
    spellings = {
        "kdkernels": lambda t: value_and_grad(fused_kd_loss, z, v, temperature=t, t_squared=True),
        "kl_div(log_softmax, log_softmax)": lambda t: value_and_grad(eager_loss, z, v, t),
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    numbers = {"limit": limit}
    for (name, spelling), line in zip(spellings.items(), ("-", "--"), strict=True):
        values, grads = zip(*(spelling(t) for t in T), strict=True)
        # a fp32 result is no nearer than its rounding
        off = [max(abs(x / limit - 1), 2**-24) for x in values]
        grad_off = [((x - limit_grad).norm() / limit_grad.norm()).item() for x in grads]
        for axis, y in zip(axes, (off, grad_off), strict=True):
            axis.loglog(T, y, line, label=name)
        numbers |= {
            f"{name}: value at 1e6, off by": off[-1],
            f"{name}: gradient at 1e6, off by": grad_off[-1],
        }
        exponent = math.log10(grad_off[-1] / grad_off[points // 2]) / 3
        numbers |= {
            f"{name}: least T^2 KL": min(values),
            f"{name}: exponent of T in the gradient's distance, from 1e3": exponent,
        }
    axes[0].set_title("$T^2$ KL becomes logit matching; in eager fp32, noise")
    axes[1].set_title("Its gradient gets there like 1/T, if it keeps its digits")
    for axis in axes:
        axis.set(xlabel="temperature T", ylabel="relative distance from the limit")
        axis.minorticks_off()
        axis.legend()
    return figure, numbers


# ---------------------------------------------------------------- order


def order_axis(axis: Axes, points: int) -> tuple[list[float], list[float]]:
    """Orders from 0 to infinity and where they lie on an axis of a/(1 + a), which is labelled."""
    at = [i / (points - 1) for i in range(points)]
    ticks = (0, 0.25, 0.5, 1, 2, 4, 10, math.inf)
    place = [t / (1 + t) if math.isfinite(t) else 1.0 for t in ticks]
    axis.set_xticks(place, ["∞" if math.isinf(t) else f"{t:g}" for t in ticks])
    axis.set_xlabel("order α, on a scale of α/(1 + α)")
    axis.axvline(0.5, color="0.8", linewidth=1, zorder=0)
    return at, [x / (1 - x) if x < 1 else math.inf for x in at]


def orders(quick: bool) -> tuple[Figure, Numbers]:
    """D_a against a for a peaked and a flat teacher, with the same student error z - v."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    at, alphas = order_axis(axis, 21 if quick else 101)
    g = torch.Generator().manual_seed(3)
    base, error = torch.randn(2, 50, generator=g, dtype=torch.float64)
    numbers = {}
    for name, scale, line in (("peaked", 4.0, "-"), ("flat", 0.5, "--")):
        v = scale * base
        D = [fused_kd_loss(v + error, v, divergence=f"renyi({a!r})").item() for a in alphas]
        kl = fused_kd_loss(v + error, v).item()
        axis.plot(at, D, line, label=f"{name} teacher: greatest probability {softmax(v, 1.0).max():.2f}")
        axis.plot(0.5, kl, "ko", markersize=4)
        steps = [b - a for a, b in zip(D, D[1:], strict=False)]
        numbers |= {
            f"{name}: KL": kl,
            f"{name}: order inf over KL": D[-1] / kl,
            f"{name}: least step": min(steps),
        }
    axis.annotate("KL", (0.5, kl), xytext=(6, -12), textcoords="offset points")
    gains = numbers["peaked: order inf over KL"], numbers["flat: order inf over KL"]
    title = (
        f"The same error z - v: order ∞ is {gains[0]:.0f} x KL for a peaked teacher, "
        f"{gains[1]:.0f} x for a flat one"
    )
    axis.set(ylabel=r"$D_\alpha(P \| Q)$, nats", title=title)
    axis.legend()
    return figure, numbers


def weights(quick: bool) -> tuple[Figure, Numbers]:
    """What Renyi has where KL has the teacher's p: w = softmax((a v + (1 - a) z)/T), which is q - T dD/dz."""
    figure, axis = plt.subplots(figsize=(8, 3.8))
    at, alphas = order_axis(axis, 21 if quick else 101)
    T = 1.0
    v = torch.tensor([2.0, 1.2, 0.6, 0.0, -1.0], dtype=torch.float64)
    z = torch.tensor([2.3, 0.2, 1.0, -1.2, 0.1], dtype=torch.float64)
    p, q = softmax(v, T), softmax(z, T)
    w = torch.stack(
        [
            q - T * value_and_grad(fused_kd_loss, z, v, divergence=f"renyi({a!r})", temperature=T)[1]
            for a in alphas
        ]
    )
    for i, line in enumerate(("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))):
        axis.plot(at, w[:, i], linestyle=line, label=f"p = {p[i]:.2f}, p/q = {p[i] / q[i]:.2f}")
    axis.plot([0.5] * len(p), p, "ko", markersize=4)
    axis.annotate("teacher's p", (0.5, p.max()), xytext=(6, 4), textcoords="offset points")
    axis.set(ylabel="weight w of a class", ylim=(-0.02, 1.02))
    axis.set_title("From the student itself (α = 0) over the teacher (1) to the class missed most (∞)")
    axis.legend(title="classes", loc="upper left", bbox_to_anchor=(1, 1))
    most = int((p / q).argmax())
    return figure, {
        "w - q at 0": (w[0] - q).abs().max().item(),
        "w - p at 1": (w[len(at) // 2] - p).abs().max().item(),
        "w of the greatest p/q at inf": w[-1, most].item(),
    }


FIGURES = {f.__name__: f for f in (temperature, high_temperature, orders, weights)}


def main(argv: list[str] | None = None) -> dict[str, Numbers]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--quick", action="store_true", help="fewer points, smaller vocabularies")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    with plt.style.context(["tableau-colorblind10", STYLE]):
        for name, draw in FIGURES.items():
            figure, results[name] = draw(args.quick)
            path = args.out / f"{name}.svg"
            figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
            plt.close(figure)
            lines = (f"    {what:60} {number:.4g}" for what, number in results[name].items())
            print(path, *lines, sep="\n", flush=True)
    return results


if __name__ == "__main__":
    main()
