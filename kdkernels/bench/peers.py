"""`python -m kdkernels bench --peers`: against the losses that other packages have for the same divergence.

From logits: TRL's generalized_jsd_loss, torchtune's losses and, on a GPU, Liger-Kernel's Triton kernels. From
hidden states: TRL's chunked divergence and Liger-Kernel's chunked and fused linear JSD. With both PyTorch's
spellings and torch.compile, and each of them with time, peak memory and the errors of its loss and gradients
against more digits.
"""

from __future__ import annotations

import importlib.util

from . import linear, measure, report

PACKAGES = ("trl", "liger_kernel", "torchtune", "fla")
SHAPES, LINEAR_SHAPES = ("1024x32768",), ("1024x32768x256",)
DIVERGENCES = ("kl", "jsd(0.5)")


def missing() -> str:
    """A line for the packages that are not installed; empty where all are."""
    names = [x for x in PACKAGES if not importlib.util.find_spec(x)]
    return f"not installed, and left out: {', '.join(names)}" if names else ""


def main(args) -> dict:
    """Run the cases, logits first, print each as soon as it is there, and return what --json writes."""
    if args.plot:
        raise SystemExit("bench: --plot draws no peers; --json has their figures")
    args.linear = args.linear or LINEAR_SHAPES
    of_logits, of_hidden = measure.cases(args), linear.cases(args)
    bench = measure.Bench.of(args, compiled=not args.no_compile)
    results = {"machine": bench.machine, "cases": [], "linear": []}
    print(report.header(bench.machine))
    if line := missing():
        print(line)

    def add(name: str, result: dict, table: str) -> None:
        results[name].append(result)
        print(table, flush=True)
        if args.json:
            report.write_json(results, args.json)

    for case in of_logits:
        result = bench.run(case)
        add("cases", result, report.table(result))
    print("\nfrom hidden states; of floor: over the time of the projections and of the fused loss alone")
    for case in of_hidden:
        result = linear.run(bench, case)
        add("linear", result, linear.table(case, result))
    return results
