"""The README's figure, from committed results: how many times as fast as the best eager spelling the fused
loss and torch.compile are, for KL on bf16 logits of three vocabularies.

python benchmarks/speed_figure.py       # writes docs/figures/speed_light.svg and speed_dark.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu_amd_epyc_zen5.json"
FOLDER = ROOT / "docs" / "figures"
OWN, COMPILED = "kdkernels", "torch.compile"
THEMES = {  # text, kdkernels, torch.compile, eager: Okabe and Ito's blue and orange
    "light": ("#1f2328", "#0072B2", "#E69F00", "#8c959f"),
    "dark": ("#e6edf3", "#56B4E9", "#E69F00", "#8b949e"),
}


def speed_ups(results: dict) -> dict[str, dict[str, float]]:
    """By case and contender, eager being 1."""
    found = {}
    for case in results["cases"]:
        if (case["divergence"], case["dtype"]) != ("kl", "bf16"):
            continue
        times = {name: x["ms"] for name, x in case["contenders"].items()}
        eager = min(ms for name, ms in times.items() if name not in (OWN, COMPILED))
        name = f"{case['rows']} tokens,\nvocabulary {case['vocab']}"
        found[name] = {OWN: eager / times[OWN], COMPILED: eager / times[COMPILED], "eager": 1.0}
    return found


def draw(found: dict[str, dict[str, float]], machine: dict, theme: str, path: Path) -> None:
    text, *colours = THEMES[theme]
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kdkernels",
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), text),
        "axes.edgecolor": text,
    }
    with plt.rc_context(style):
        figure, axis = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
        for i, bars in enumerate(found.values()):
            for j, (name, x) in enumerate(bars.items()):
                y = i + 0.27 * (j - 1)
                axis.barh(y, x, 0.25, color=colours[j], label=name if i == 0 else None)
                axis.text(x, y, f" {x:.1f} x" if x != 1 else " 1 x", va="center", fontsize=9)
        axis.set(
            yticks=range(len(found)),
            yticklabels=list(found),
            ylim=(len(found) - 0.5, -0.5),
            xlabel="times as fast as the best eager spelling (loss and gradient)",
            title=f"KL on bf16 logits, {machine['threads']} cores of an AMD EPYC (Zen 5)",
        )
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, loc="outside lower center", ncols=3)
        plain = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(path, metadata=plain, transparent=True)
        plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder that both files go to")
    args = parser.parse_args(argv)
    results = json.loads(RESULTS.read_text())
    for theme in THEMES:
        draw(speed_ups(results), results["machine"], theme, args.out / f"speed_{theme}.svg")


if __name__ == "__main__":
    main()
