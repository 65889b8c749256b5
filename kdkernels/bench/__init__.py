"""`python -m kdkernels bench`: the fused loss against PyTorch's own spellings, on this machine, loss and
gradient as one.

    logits.py       a case from logits: errors, time, memory, the table
    linear.py       --linear: the same from hidden states, after paper.py's memory on paper
    contenders.py   the fused loss and PyTorch's spellings
    packages.py     --peers: the losses of other packages
    reference.py    the same numbers in extended precision
    measure.py      time, peak memory, and what else runs on the machine
    forecast.py     how long it will take
    report.py       what stands around the tables, the JSON file
    plot.py         --plot
    screen.py       80 columns, with rich's tables where it is installed

The fused loss is checked before anything is printed, and no speed-up is printed for a wrong one; every
contender's own errors stand beside its time. All are timed in one run. Bandwidth is 3 N V b bytes (both
logits read once, the gradient written once) over the time, as a fraction of this machine's measured copy
speed.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch

DTYPES = ("fp32", "bf16", "fp16")
SHAPES = ("512x32768", "256x128256", "64x262144")  # Llama 2, Llama 3, Gemma 3
LINEAR_SHAPES = ("2048x32768x256", "1024x128256x256")
DIVERGENCES = ("kl", "renyi(0.5)")
PEERS = ("1024x32768",), ("1024x32768x256",), ("kl", "jsd(0.5)")


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
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="of one thread on a CPU, in the place of the clock's: for ratios on a machine that is shared",
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
    from . import forecast, linear, logits, measure, packages, plot, report, screen

    shapes, linear_shapes, divergences = PEERS if args.peers else (SHAPES, LINEAR_SHAPES, DIVERGENCES)
    args.divergences = args.divergences or divergences
    hidden = args.peers or args.linear is not None
    if args.json:
        report.check_json(args.json)
    if args.plot:
        if hidden:
            raise SystemExit("bench: --plot draws cases from logits; --json has the others' figures")
        plot.check(args.plot)
    jobs: list[forecast.Job] = []
    if args.linear is None or args.peers:
        jobs += [(logits, x) for x in _cases(logits, args.shapes or shapes, args)]
    if hidden:
        jobs += [(linear, x) for x in _cases(linear, args.linear or linear_shapes, args)]
    if args.processor_time:
        torch.set_num_threads(1)  # of several, those that wait would count
    bench = measure.Bench.of(args, compiled=not args.no_compile and (args.peers or not hidden))
    results: dict = {"machine": bench.machine, "cases": []}
    if args.peers:
        results |= {"packages": packages.versions(), "linear": []}
    report.introduce(bench, jobs)
    for module, case in screen.track(jobs):
        result = module.run(bench, case)
        results["linear" if args.peers and module is linear else "cases"].append(result)
        module.show(result)
        if line := measure.disturbed(result["others_cores"], measure.spread(result["contenders"])):
            screen.say(line)
        if args.json:
            report.write_json(results, args.json)
    if args.plot:
        plot.draw(results, args.plot)
    if line := report.compared(results["cases"]):
        screen.say("\n" + line)
    return results


def _cases(module, shapes, args: argparse.Namespace) -> list:
    """Of the command line; SystemExit for what cannot be measured."""
    options = args.dtypes, args.divergences, args.temperatures
    try:
        return [module.Case(*module.shape(x), *rest) for x, *rest in product(shapes, *options)]
    except ValueError as error:
        raise SystemExit(f"bench: {error}") from None
