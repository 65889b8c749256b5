"""`python -m kdkernels bench`: the fused loss against PyTorch's own spellings, on this machine, loss and
gradient as one.

    contenders.py   the spellings
    reference.py    the same numbers in extended precision
    measure.py      time, peak memory and errors of one case
    report.py       the table, the JSON file, the plot
    linear.py       --linear: from hidden states, instead
    peers.py        --peers: both, with the losses of other packages

The fused loss is checked before anything is printed, and no speed-up is printed for a wrong one; every
contender's own errors stand beside its time. All are timed in one run. Bandwidth is 3 N V b bytes (both
logits read once, the gradient written once) over the time, as a fraction of this machine's measured copy
speed.
"""

from __future__ import annotations

import argparse

DTYPES = ("fp32", "bf16", "fp16")
SHAPES = ("512x32768", "256x128256", "64x262144")  # Llama 2, Llama 3, Gemma 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", help=f"ROWSxVOCAB, default {' '.join(SHAPES)}")
    parser.add_argument("--dtypes", nargs="+", default=("fp32", "bf16"), choices=DTYPES)
    parser.add_argument(
        "--divergences",
        nargs="+",
        help='as in fused_kd_loss, default "kl" "renyi(0.5)", with --peers "kl" "jsd(0.5)"',
    )
    parser.add_argument(
        "--temperatures", nargs="+", type=float, default=(2.0,), help="default 2; inf is possible"
    )
    parser.add_argument("--device", help="default: the accelerator where there is one, else cpu")
    parser.add_argument(
        "--backends",
        nargs="+",
        default=("auto",),
        metavar="NAME",
        help="of the fused loss, each a line; default auto",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed rounds on a CPU, in which the contenders take turns"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--linear",
        nargs="*",
        metavar="TOKENSxVOCABxWIDTH",
        help="the loss of hidden states instead, with a table of memory on paper",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="from logits and from hidden states, with the losses of other packages that are installed",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the results there, with the machine's description"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw time and error there (.svg, .png, .pdf)")


def main(args: argparse.Namespace) -> dict:
    """Run the cases one by one, print each as soon as it is there, and return what --json writes."""
    try:
        from tqdm import tqdm
    except ImportError:
        raise SystemExit("bench: needs tqdm; pip install tqdm matplotlib") from None
    from . import linear, measure, peers, report

    defaults = (SHAPES, ("kl", "renyi(0.5)")) if not args.peers else (peers.SHAPES, peers.DIVERGENCES)
    args.shapes, args.divergences = args.shapes or defaults[0], args.divergences or defaults[1]
    if args.json:
        report.check_json(args.json)
    if args.peers:
        return peers.main(args)
    if args.linear is not None:
        return linear.main(args)
    if args.plot:
        report.check_plot(args.plot)
    cases = measure.cases(args)
    bench = measure.Bench.of(args, compiled=not args.no_compile)
    results = {"machine": bench.machine, "cases": []}
    print(report.header(bench.machine))
    with tqdm(total=len(cases), unit="case", disable=None) as bar:
        for case in cases:
            bar.set_description(str(case))
            result = bench.run(case, on_step=lambda name: bar.set_postfix_str(name))
            results["cases"].append(result)
            bar.write(report.table(result))
            bar.update()
            if args.json:
                report.write_json(results, args.json)
    if args.plot:
        report.plot(results, args.plot)
    return results
