"""A plot of the results from logits: time and error of each contender."""

from __future__ import annotations

from pathlib import Path

from .logits import is_base, title


def check(path: str) -> None:
    """A plot that could not be drawn is an error before the measuring, not after."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("bench: --plot needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    if Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise SystemExit(f"--plot: a .svg, .png or .pdf file, got {path!r}")


def draw(results: dict, path: str) -> None:
    """Time of a step and error of its gradient, a group of bars for each case, both on logarithmic axes."""
    import matplotlib.pyplot as plt

    # text as text, and the same bits every time
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "kdkernels"}
    cases = results["cases"]
    names = list(dict.fromkeys(name for case in cases for name in case["contenders"]))
    colours = ["#0072B2", "#E69F00", "#D55E00", "#999999", "#CC79A7", "#56B4E9"]  # Okabe and Ito
    figure, axes = plt.subplots(1, 2, figsize=(9, 1.2 + 0.5 * len(cases)), sharey=True, width_ratios=(3, 2))
    for i, case in enumerate(cases):
        bars = case["contenders"]
        height = 0.8 / len(bars)
        for j, (name, x) in enumerate(bars.items()):
            y, colour = i + height * (j - (len(bars) - 1) / 2), colours[names.index(name) % len(colours)]
            axes[0].barh(y, x["ms"], height, color=colour)
            axes[1].barh(y, max(x["grad_error"], 1e-9), height, color=colour)
            ratio = (
                ""
                if is_base(name, x)
                else f"  {x['speed_up']:.0f} x"
                if x["speed_up"] >= 10
                else f"  {x['speed_up']:.1f} x"
            )
            axes[0].text(x["ms"], y, f" {x['ms']:.0f}{ratio}", va="center", fontsize=7)
    axes[0].set(
        xscale="log",
        xlabel="ms, loss + gradient",
        yticks=range(len(cases)),
        yticklabels=[title(case) for case in cases],
    )
    axes[0].set_xlim(right=axes[0].get_xlim()[1] * 2)  # room for the numbers
    axes[1].set(xscale="log", xlabel="relative error of the gradient")
    axes[0].set_ylim(len(cases) - 0.5, -0.5)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[i % len(colours)]) for i in range(len(names))]
    machine = results["machine"]
    figure.suptitle(
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}", fontsize=9
    )
    figure.legend(handles, names, loc="lower center", ncols=min(4, len(names)), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    plain = dict.fromkeys(("Creator", "Date", "Format", "Type")) if path.endswith(".svg") else None
    figure.savefig(path, metadata=plain)
    plt.close(figure)
