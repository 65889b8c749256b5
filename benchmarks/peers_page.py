"""Write docs/results/peers_cpu.md from the committed results of `python -m kdkernels bench --peers`, and
print the rows that docs/performance.md has of them.

python benchmarks/peers_page.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "peers_amd_epyc_zen4.json"
PAGE = ROOT / "docs" / "results" / "peers_cpu.md"
OWN, COMPILED = "kdkernels", "torch.compile"
PACKAGES = ("TRL", "Liger", "torchtune")
NAMES = {"kl": "KL", "jsd(0.5)": "JSD(0.5)"}
ITEMSIZE = {"fp32": 4, "bf16": 2}

HEAD = """\
# The losses of other packages, on a CPU

`python -m kdkernels bench --peers --processor-time`: loss and gradient, T = 2, {processor} (Zen 4),
{threads}, {versions}.
`benchmarks/peers_page.py` writes this page from [the results](../../benchmarks/results/{results}).

The machine is shared: other programs took {least:.1f} to {most:.1f} of its two cores. So times are the
processor's, of one thread, and the contenders take turns. Read ratios, not times: "x kdkernels" is the time
over that of kdkernels.

MiB is peak memory beyond the inputs. Errors are relative: of the loss, and of its gradient in logits (grad)
against 80-bit numbers, in hidden states and weight against fp64. torchtune's forward KL is the cross entropy,
which has KL's gradient, and is held to that; torchtune has no JSD. Liger-Kernel's losses of logits are Triton
kernels, for GPUs. "Full logits" is `fused_kd_loss` on the products. Of bf16 hidden states kdkernels and TRL
have fp32 logits; the others, and kdkernels with `logits_dtype=None`, round them to bf16."""


def title(case: dict) -> str:
    sizes = (case[x] for x in ("rows", "tokens", "vocab", "width") if x in case)
    return f"{NAMES[case['divergence']]}, {' x '.join(map(str, sizes))} {case['dtype']}"


def mebibytes(case: dict, x: dict) -> float:
    """Peak memory beyond the inputs."""
    if "memory_bytes" in x:
        return x["memory_bytes"] / 2**20
    return x["memory_in_gradients"] * case["rows"] * case["vocab"] * ITEMSIZE[case["dtype"]] / 2**20


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(case: dict) -> Iterator[str]:
    """Of one case, a row for each contender."""
    own = case["contenders"][OWN]
    errors = {x: x.removesuffix("_error") for x in own if x.endswith("_error")}
    heads = ("", "ms", "x kdkernels", "MiB", *errors.values())
    yield from ("", f"### {title(case)}", "", row(heads), row(["---", *["---:"] * (len(heads) - 1)]))
    for name, x in case["contenders"].items():
        figures = f"{x['ms']:.0f}", f"{x['ms'] / own['ms']:.2f}", f"{mebibytes(case, x):.0f}"
        yield row((name, *figures, *(f"{x[e]:.0e}" for e in errors)))


def page(results: dict) -> str:
    machine, cases = results["machine"], (*results["cases"], *results["linear"])
    taken = [case["others_cores"] for case in cases]
    versions = {"torch": machine["torch"], **results["packages"]}
    head = HEAD.format(
        processor=machine["device"].removeprefix("cpu: "),
        threads="one thread" if machine["threads"] == 1 else f"{machine['threads']} threads",
        versions=", ".join(" ".join(x) for x in versions.items()),
        results=RESULTS.name,
        least=min(taken),
        most=max(taken),
    )
    lines = [head]
    for part, name in (("cases", "logits"), ("linear", "hidden states")):
        lines += ["", f"## From {name}", *(line for case in results[part] for line in table(case))]
    return "\n".join(lines) + "\n"


def summary(results: dict) -> Iterator[str]:
    """A row for each case: the time and the memory of others over those of kdkernels; of the eager spellings
    and of a package's losses those of the quickest."""
    for case in (*results["cases"], *results["linear"]):
        found = case["contenders"]
        apart = (OWN, COMPILED, "full logits", *PACKAGES)
        eager = [name for name in found if not name.startswith(apart)]
        cells = [title(case)]
        for names in (eager, [COMPILED], *([x for x in found if x.startswith(p)] for p in PACKAGES)):
            best = min((found[x] for x in names), key=lambda x: x["ms"], default=None)
            cells.append("" if best is None else over(case, best))
        yield row(cells)


def over(case: dict, x: dict) -> str:
    own = case["contenders"][OWN]
    return f"{x['ms'] / own['ms']:.1f}, {mebibytes(case, x) / mebibytes(case, own):.1f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PAGE, help="the file that the page goes to")
    args = parser.parse_args(argv)
    results = json.loads(RESULTS.read_text())
    args.out.write_text(page(results))
    print("\n".join(summary(results)))


if __name__ == "__main__":
    main()
