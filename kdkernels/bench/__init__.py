"""`python -m kdkernels bench`: the fused loss against PyTorch's own, on this machine, loss and gradient as one.

The fused loss is checked against fp64 first, and no speed-up is printed for a wrong one; every contender's own errors stand beside
its time. All are timed in one run, taking turns. Bandwidth is 3 N V b bytes (both logits read once, the gradient written once) over
the time, as a fraction of this machine's measured copy speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import recycle
from ..divergence import parse
from ..functional import fused_kd_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Loss = Callable[[Tensor, Tensor], Tensor]


def spellings(divergence: str, T: float) -> dict[str, Loss]:
    """The loss as PyTorch code has it, mean over rows, by name."""
    order = parse(divergence).order
    if divergence == "kl":
        return {
            "eager": lambda z, v: F.kl_div(F.log_softmax(z / T, -1), F.softmax(v / T, -1), reduction="batchmean"),
            "eager, log_target": lambda z, v: F.kl_div(
                F.log_softmax(z / T, -1), F.log_softmax(v / T, -1), reduction="batchmean", log_target=True
            ),
        }

    def renyi(z, v):
        mixed = order * F.log_softmax(v / T, -1) + (1 - order) * F.log_softmax(z / T, -1)
        return (mixed.logsumexp(-1) / (order - 1)).mean()

    return {"eager": renyi}


def step(loss: Loss, z: Tensor, v: Tensor) -> None:
    """Loss, gradient, and the freeing of the gradient, which each contender pays for itself."""
    loss(z, v).backward()
    z.grad = None


def take_turns(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, measured alternately after one round of warming up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: sorted(x)[len(x) // 2] for name, x in times.items()}


def peak_memory(run: Callable[[], object]) -> int | None:
    """Bytes that a call holds at its peak beyond what was held before; None where the system does not tell (Linux does)."""

    def status(key: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    try:
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        before = status("VmRSS:")
        run()
        return status("VmHWM:") - before
    except OSError:
        return None


def bench(rows: int, vocab: int, dtype: str, divergence: str, T: float, repeats: int, compiled: bool) -> None:
    torch.manual_seed(0)
    v = (torch.randn(rows, vocab) * 3).to(DTYPES[dtype])
    z = (v + torch.randn(rows, vocab) * 0.5).to(DTYPES[dtype]).requires_grad_()

    # the reference on a few rows, in fp64
    few = slice(0, min(rows, 4))
    x = z.detach()[few].double().requires_grad_()
    exact = fused_kd_loss(x, v[few].double(), divergence=divergence, temperature=T, backend="eager")
    (exact_grad,) = torch.autograd.grad(exact, x)

    losses: dict[str, Loss] = {"kdkernels": lambda z, v: fused_kd_loss(z, v, divergence=divergence, temperature=T)}
    losses |= spellings(divergence, T)
    if compiled:
        losses |= {f"torch.compile of {name}": torch.compile(loss) for name, loss in list(losses.items())[1:]}
    errors, memory = {}, {}
    for name, loss in losses.items():
        a = z.detach()[few].clone().requires_grad_()
        value = loss(a, v[few])
        value.backward()
        errors[name] = (
            abs(value.item() - exact.item()) / exact.item(),
            float((a.grad.double() - exact_grad).norm() / exact_grad.norm()),
        )
        step(loss, z, v)  # pages of code and threads' stacks are not the loss's memory
        recycle.clear()
        memory[name] = peak_memory(lambda loss=loss: step(loss, z, v))
    target = torch.empty_like(v)
    runs: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(v)}
    times = take_turns(runs | {name: (lambda loss=loss: step(loss, z, v)) for name, loss in losses.items()}, repeats)

    size = v.numel() * v.element_size()
    copy_speed = 2 * size / times["copy"]
    print(f"\n{divergence}, T = {T:g}, {rows} x {vocab} {dtype}, {torch.get_num_threads()} threads; copy {copy_speed / 1e9:.1f} GB/s")
    print(f"{'':34s}{'ms':>9s}{'speed-up':>10s}{'of copy':>9s}{'memory':>9s}{'loss err':>10s}{'grad err':>10s}")
    if max(errors["kdkernels"]) > (1e-5 if dtype == "fp32" else 1e-2):  # a 16-bit gradient is good to its rounding
        raise SystemExit(f"kdkernels is wrong here: relative errors {errors['kdkernels']}")
    for name in losses:
        speed_up = f"{times[name] / times['kdkernels']:.1f} x" if name != "kdkernels" else ""
        extra = "" if memory[name] is None else f"{memory[name] / size:.2f}"
        print(
            f"{name:34s}{times[name] * 1e3:9.1f}{speed_up:>10s}{3 * size / times[name] / copy_speed:9.2f}{extra:>9s}"
            f"{errors[name][0]:10.0e}{errors[name][1]:10.0e}"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=["256x128256"], help="ROWSxVOCAB")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--divergences", nargs="+", default=["kl", "renyi(0.5)"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[2.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")


def main(args: argparse.Namespace) -> None:
    print("speed-up: of kdkernels over the line. memory: peak beyond the inputs, in gradients. errors: relative, against fp64")
    for shape in args.shapes:
        rows, vocab = map(int, shape.split("x"))
        for dtype in args.dtypes:
            for divergence in args.divergences:
                for T in args.temperatures:
                    bench(rows, vocab, dtype, divergence, T, args.repeats, not args.no_compile)
