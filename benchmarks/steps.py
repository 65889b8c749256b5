"""Whole training steps: a head's product, the loss, its backward and that of the head. Time, and peak memory
beyond what is held between.

    python benchmarks/steps.py [--tokens 256] [--vocab 32768] [--width 64] [--dtype fp32] [--repeats 9]

plain: the logits are gone before the backward, as nothing but the loss holds on to them. accumulated: four
    micro-batches divided by the number of all tokens. compiled: forward and loss by torch.compile. Ways take
    turns; each is compared with fp64 before it is timed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdkernels import fused_kd_loss
from kdkernels.bench import contenders
from kdkernels.bench.measure import TORCH_DTYPES, Bench, take_turns
from kdkernels.divergence import parse

T = 2.0
PARTS = 4  # micro-batches of a step
# loss and head's gradient: 16-bit logits are rounded
BOUNDS = {"fp32": (1e-5, 1e-5), "bf16": (5e-2, 1e-1), "fp16": (5e-3, 1e-2)}

Loss = Callable[[Tensor, Tensor, int], Tensor]  # student's and teacher's logits, tokens to divide by


@dataclass(frozen=True)
class Model:
    """Hidden states and the heads' weights, drawn once."""

    x: Tensor
    head: Tensor
    teacher: Tensor

    @classmethod
    def draw(cls, tokens: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device) -> Model:
        g = torch.Generator(device).manual_seed(0)
        x, head = (
            torch.randn(tokens, width, generator=g, device=device),
            torch.randn(vocab, width, generator=g, device=device) * width**-0.5 * 3,
        )
        teacher = head + torch.randn(vocab, width, generator=g, device=device) * width**-0.5 / 2
        return cls(*(y.to(dtype) for y in (x, head, teacher)))

    def exact(self) -> tuple[float, Tensor]:
        """(loss, head's gradient) in fp64."""
        head = self.head.detach().double().requires_grad_()
        x = self.x.double()
        loss = fused_kd_loss(x @ head.t(), x @ self.teacher.double().t(), temperature=T, t_squared=True)
        loss.backward()
        return loss.item(), head.grad


def losses() -> dict[str, Loss]:
    spelling, spelled = list(contenders.spellings(parse("kl"), T).items())[-1]

    def fused(z, v, n, inplace):
        return fused_kd_loss(z, v, temperature=T, t_squared=True, num_items=n, inplace=inplace)

    return {
        "kdkernels": lambda z, v, n: fused(z, v, n, False),
        "kdkernels in place": lambda z, v, n: fused(z, v, n, True),
        f"eager {spelling}": lambda z, v, n: spelled(z, v) * (len(z) / n),
    }


def steps(model: Model) -> dict[str, Callable[[], float]]:
    """name -> a step that leaves the gradient in model.head.grad and returns the loss."""
    found: dict[str, Callable[[], float]] = {}
    for name, loss in losses().items():

        def forward(x: Tensor, n: int, loss=loss) -> Tensor:
            return loss(x @ model.head.t(), x @ model.teacher.t(), n)

        def step(forward=forward, parts: int = 1) -> float:
            total = 0.0
            for x in model.x.chunk(parts):
                value = forward(x, len(model.x))
                value.backward()
                total += value.item()
            return total

        found[f"{name}, plain"] = step
        found[f"{name}, accumulated"] = functools.partial(step, parts=PARTS)
        if "in place" not in name:
            found[f"{name}, compiled"] = functools.partial(step, torch.compile(forward))
    return found


def check(
    name: str,
    step: Callable[[], float],
    model: Model,
    exact: tuple[float, Tensor],
    bounds: tuple[float, float],
) -> None:
    """SystemExit where a step's loss or gradient is wrong."""
    model.head.grad = None
    loss = step()
    errors = abs(loss / exact[0] - 1), float((model.head.grad.double() - exact[1]).norm() / exact[1].norm())
    if not all(error <= bound for error, bound in zip(errors, bounds, strict=True)):
        raise SystemExit(f"{name} is wrong: relative errors of loss and gradient {errors}, no time is given")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("tokens", 256), ("vocab", 32768), ("width", 64), ("repeats", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=TORCH_DTYPES, default="fp32")
    parser.add_argument("--device")
    args = parser.parse_args()
    bench = Bench(args.device, args.repeats, compiled=True)
    model = Model.draw(args.tokens, args.vocab, args.width, TORCH_DTYPES[args.dtype], bench.device)
    model.head.requires_grad_()
    ways, exact, peaks = steps(model), model.exact(), {}
    for name, step in ways.items():
        check(name, step, model, exact, BOUNDS[args.dtype])
        peaks[name] = bench.peak_memory(step)

    def clean(step: Callable[[], float]) -> Callable[[], None]:
        def once() -> None:
            step()
            model.head.grad = None

        return once

    times = take_turns({name: clean(step) for name, step in ways.items()}, args.repeats)
    logits = args.tokens * args.vocab * model.x.element_size()
    print(
        f"{bench.machine['device']}, {bench.machine['threads']} threads; {args.tokens} tokens x "
        f"{args.vocab} x {args.width} {args.dtype}"
    )
    print(f"{'':44s}{'ms':>9s}{'20 %':>9s}{'80 %':>9s}{'peak, in logits':>17s}")
    for name, seconds in times.items():
        low, middle, high = (1e3 * np.quantile(seconds, q) for q in (0.2, 0.5, 0.8))
        peak = "" if peaks[name] is None else f"{peaks[name] / logits:.2f}"
        print(f"{name:44s}{middle:9.2f}{low:9.2f}{high:9.2f}{peak:>17s}")


if __name__ == "__main__":
    main()
