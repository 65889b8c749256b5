"""A result as a table, a JSON file and a plot."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .contenders import FUSED


def header(machine: dict) -> str:
    return (
        f"{machine['device']}, {machine['threads']} threads; kdkernels {machine['kdkernels']} "
        f"({machine['cpu_library']}), "
        f"torch {machine['torch']}\n"
        "speed-up: of kdkernels over the line. of copy: 3 N V b bytes over the time, as a fraction of "
        "copy speed.\n"
        "memory: peak beyond the inputs, in gradients. errors: relative, against extended precision."
    )


def title(case: dict) -> str:
    return (
        f"{case['divergence']}, T = {case['temperature']:g}, {case['rows']} x {case['vocab']} {case['dtype']}"
    )


def is_base(name: str, contender: dict) -> bool:
    """Whether it is the fused loss that all others are compared with: of the first backend."""
    return name.startswith(FUSED) and contender["speed_up"] == 1


def left_out(name: str, error: Exception) -> str:
    """A line for a contender that is installed and cannot run here."""
    return f"left out: {name}: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def table(case: dict) -> str:
    lines = [
        f"\n{title(case)}; {case['device']}, copy {case['copy_gb_per_s']:.0f} GB/s",
        f"{'':34s}{'ms':>9s}{'speed-up':>10s}{'of copy':>9s}{'memory':>8s}{'loss err':>10s}{'grad err':>10s}",
    ]
    for name, x in case["contenders"].items():
        speed_up = "" if is_base(name, x) else f"{x['speed_up']:.1f} x"
        memory = "" if x["memory_in_gradients"] is None else f"{x['memory_in_gradients']:.2f}"
        lines.append(
            f"{name:34s}{x['ms']:9.1f}{speed_up:>10s}{x['fraction_of_copy']:9.2f}{memory:>8s}{x['loss_error']:10.0e}{x['grad_error']:10.0e}"
        )
    return "\n".join(lines)


def check_json(path: str) -> None:
    """A file that could not be written is an error before the measuring, not after; a device or a pipe would
    be replaced by a file."""
    file = Path(path)
    if not file.parent.is_dir() or (file.exists() and not file.is_file()):
        raise SystemExit(f"--json: a file in a folder that is there, got {path!r}")


def write_json(results: dict, path: str) -> None:
    """In one step, so that a run that is ended keeps what it had; where the path is a link, to what it
    names."""
    file = os.path.realpath(path)
    new = Path(f"{file}.new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, file)


def check_plot(path: str) -> None:
    """A plot that could not be drawn is an error before the measuring, not after."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("bench: --plot needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    if Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise SystemExit(f"--plot: a .svg, .png or .pdf file, got {path!r}")


def plot(results: dict, path: str) -> None:
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
