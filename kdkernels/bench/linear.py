"""`python -m kdkernels bench --linear`: from hidden states to loss and gradients, with and without the logits of all tokens.

Memory first, on paper, for 8192 tokens in bf16; then time, peak memory and errors, measured. "floor" is the projections and their
products with a gradient that is there already, and the fused loss of logits that are there already, timed apart and added.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import Tensor

from .. import divergence, functional, linear
from . import contenders
from .measure import TORCH_DTYPES, Bench

SHAPES = ("2048x32768x256", "1024x128256x256")
PAPER_TOKENS, PAPER_VOCABS, PAPER_WIDTHS = 8192, (32768, 128256, 262144), (1024, 4096)
FUSED, FLOOR = "kdkernels", "floor"
# relative, (loss, hidden states' gradient, weight's): the first by the chunk's sums, the others by the rounding of logits
TOLERANCES = {"fp32": (2e-5, 2e-5, 2e-5), "bf16": (2e-2, 1e-1, 1e-1), "fp16": (2e-3, 5e-3, 5e-3)}
CHECKED_TOKENS = 256  # of the fp64 reference at a time

Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # hidden and weight of student and teacher -> loss


@dataclass(frozen=True)
class Case:
    tokens: int
    vocab: int
    width: int
    dtype: str
    divergence: str
    temperature: float

    def __str__(self) -> str:
        return f"{self.divergence}, T = {self.temperature:g}, {self.tokens} tokens x {self.vocab} x {self.width} {self.dtype}"

    def inputs(self, device: torch.device) -> list[Tensor]:
        """A student that has learned most of its teacher."""
        g = torch.Generator().manual_seed(0)
        hidden, weight = torch.randn(self.tokens, self.width, generator=g), torch.randn(self.vocab, self.width, generator=g) * 3
        weight *= self.width**-0.5
        teacher = hidden + 0.15 * torch.randn(hidden.shape, generator=g), weight.clone()
        made = [x.to(device, TORCH_DTYPES[self.dtype]) for x in (hidden, weight, *teacher)]
        return [x.requires_grad_(i < 2) for i, x in enumerate(made)]


def shape(text: str) -> tuple[int, int, int]:
    try:
        tokens, vocab, width = map(int, text.split("x"))
        if min(tokens, vocab, width) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"--linear: TOKENSxVOCABxWIDTH, as 2048x32768x512; got {text!r}") from None
    return tokens, vocab, width


def memory(tokens: int, vocab: int, width: int, itemsize: int = 2, budget: int = linear.GPU_BUDGET) -> dict[str, int]:
    """Peak bytes beyond hidden states and weights, by what they are for, both models of one width and dtype."""
    logits, gradients = tokens * vocab * itemsize, (tokens + vocab) * width * itemsize
    chunk = linear.chunk_tokens(tokens, vocab, 2 * itemsize, budget)
    # 16-bit: the weight's gradient is summed in fp32, and cast when the chunks are gone
    several, total = chunk < tokens and itemsize == 2, vocab * width * 4
    chunks = 2 * chunk * vocab * itemsize
    held = tokens * width * itemsize
    return {
        "chunk": chunk,
        "kdkernels": held + max(chunks + total, total + vocab * width * itemsize) if several else chunks + gradients,
        "full logits, in place": 2 * logits + gradients,
        "full logits": 3 * logits + gradients,
        # kl_div(log_target=True), as measured
        "eager": 9 * logits + gradients,
    }


def paper() -> str:
    names = list(memory(1, 1, 1))[1:]
    lines = [
        f"peak memory beyond hidden states and weights in GiB, on paper: {PAPER_TOKENS} tokens, bf16",
        f"{'V x H':>16s}{'chunk':>8s}" + "".join(f"{x:>24s}" for x in names),
    ]
    for vocab, width in product(PAPER_VOCABS, PAPER_WIDTHS):
        found = memory(PAPER_TOKENS, vocab, width)
        lines.append(f"{f'{vocab} x {width}':>16s}{found['chunk']:>8d}" + "".join(f"{found[x] / 2**30:>24.2f}" for x in names))
    return "\n".join(lines)


def steps(case: Case, device: torch.device) -> dict[str, Step]:
    """The ways from hidden states to the loss, by name."""
    which, T = divergence.parse(case.divergence), case.temperature
    eager = contenders.spellings(which, T)
    spelling, spelled = list(eager.items())[-1]
    options = dict(divergence=which, temperature=T, t_squared=True)
    return {
        FUSED: lambda h, w, th, tw: linear.fused_linear_kd_loss(h, w, th, tw, **options),
        "full logits": lambda h, w, th, tw: functional.fused_kd_loss(h @ w.t(), th @ tw.t(), **options),
        "full logits, in place": lambda h, w, th, tw: functional.fused_kd_loss(h @ w.t(), th @ tw.t(), inplace=True, **options),
        f"eager {spelling}": lambda h, w, th, tw: spelled(h @ w.t(), th @ tw.t()),
    } | liger(which, T, device)


def liger(which: divergence.Divergence, T: float, device: torch.device) -> dict[str, Step]:
    """Liger-Kernel's two fused linear JSD losses, where they are installed and run: the Triton one on GPUs. beta = 0 is KL there."""
    form = which.form
    if not importlib.util.find_spec("liger_kernel") or math.isinf(T) or not (form.family == "kl" or isinstance(which, divergence.JSD)):
        return {}
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = 0.0 if form.family == "kl" else which.beta
    chunked = LigerFusedLinearJSDLoss(0.0, 1.0, beta, temperature=T, compiled=False)

    def labels(h):
        return torch.zeros(len(h), dtype=torch.int64, device=h.device)

    found = {"Liger chunked JSD": lambda h, w, th, tw: T * T * chunked(h, w, th, tw, labels(h))}
    if device.type != "cpu":
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(jsd_beta=beta, temperature=T)
        found["Liger Triton JSD"] = lambda h, w, th, tw: T * T * fused(h, w, th, tw, labels(h))
    return found


def exact(case: Case, inputs: list[Tensor]) -> tuple[float, Tensor, Tensor]:
    """(loss, its gradients in hidden states and weight) in fp64, of the textbook's spelling, some tokens at a time."""
    loss = list(contenders.spellings(divergence.parse(case.divergence), case.temperature).values())[-1]
    h, w, th, tw = (x.detach().double() for x in inputs)
    total, dh, w = 0.0, torch.empty_like(h), w.requires_grad_()
    for start in range(0, case.tokens, CHECKED_TOKENS):
        at = slice(start, start + CHECKED_TOKENS)
        x = h[at].clone().requires_grad_()
        part = loss(x @ w.t(), th[at] @ tw.t()) * (len(x) / case.tokens)
        part.backward()
        total, dh[at] = total + part.item(), x.grad
    return total, dh, w.grad


def run(bench: Bench, case: Case) -> dict:
    """Everything about one case, ready for JSON. SystemExit where the chunked loss is wrong."""
    inputs = case.inputs(bench.device)
    h, w, th, tw = inputs
    total, *grads = exact(case, inputs)
    scale = 2.0**14 if case.dtype == "fp16" else 1.0
    ways, errors, memories = steps(case, bench.device), {}, {}
    for name, step in ways.items():
        loss = step(*inputs)
        loss.backward(torch.full_like(loss, scale))
        found = [float((x.grad.double() / scale - g).norm() / g.norm()) for x, g in zip((h, w), grads, strict=True)]
        errors[name] = (abs(float(loss.detach()) / total - 1), *found)
        h.grad = w.grad = None
    if not all(error <= limit for error, limit in zip(errors[FUSED], TOLERANCES[case.dtype], strict=True)):
        raise SystemExit(f"kdkernels is wrong here ({case}): relative errors of loss and gradients {errors[FUSED]}, no time is given")

    def timed(step: Step) -> Callable[[], None]:
        def once() -> None:
            step(*inputs).backward()
            h.grad = w.grad = None

        return once

    steady = {name: timed(step) for name, step in ways.items()}
    for name, step in steady.items():
        memories[name] = bench._peak_memory(step)
    z, v = (h @ w.t()).detach().requires_grad_(), (th @ tw.t()).detach()

    def projections() -> None:
        logits = h @ w.t()
        _ = th @ tw.t()
        logits.backward(v)
        h.grad = w.grad = None

    def loss_alone() -> None:
        functional.fused_kd_loss(z, v, divergence=case.divergence, temperature=case.temperature, t_squared=True).backward()
        z.grad = None

    times = bench._times(steady | {"projections": projections, "loss": loss_alone}, bench.repeats)
    floor = times.pop("projections")[0] + times.pop("loss")[0]
    chunk = linear.chunk_tokens(
        case.tokens, case.vocab, 2 * h.element_size(), linear.CPU_BUDGET if bench.device.type == "cpu" else linear.GPU_BUDGET
    )
    return asdict(case) | {
        "chunk": chunk,
        "floor_ms": 1e3 * floor,
        "contenders": {
            name: {
                "ms": 1e3 * t[0],
                "of_floor": t[0] / floor,
                "memory_bytes": memories[name],
                **dict(zip(("loss_error", "hidden_error", "weight_error"), errors[name], strict=True)),
            }
            for name, t in times.items()
        },
    }


def table(case: Case, result: dict) -> str:
    lines = [
        f"\n{case}; floor {result['floor_ms']:.0f} ms, chunks of {result['chunk']} tokens",
        f"{'':38s}{'ms':>9s}{'of floor':>10s}{'MiB':>9s}{'loss err':>10s}{'dh err':>9s}{'dW err':>9s}",
    ]
    for name, x in result["contenders"].items():
        size = "" if x["memory_bytes"] is None else f"{x['memory_bytes'] / 2**20:.0f}"
        numbers = f"{x['ms']:9.1f}{x['of_floor']:10.2f}{size:>9s}{x['loss_error']:10.0e}{x['hidden_error']:9.0e}{x['weight_error']:9.0e}"
        lines.append(f"{name:38s}{numbers}")
    return "\n".join(lines)


def main(args) -> dict:
    try:
        shapes = [shape(x) for x in (args.linear or SHAPES)]
        cases = [Case(*s, *rest) for s, *rest in product(shapes, args.dtypes, args.divergences, args.temperatures)]
        for case in cases:
            functional.options(case.divergence, case.temperature, True)
    except ValueError as error:
        raise SystemExit(f"bench: {error}") from None
    bench = Bench(args.device, args.repeats, compiled=False)
    results = {"machine": bench.machine, "cases": []}
    print(paper())
    print(
        f"\n{bench.machine['device']}, {bench.machine['threads']} threads; errors: relative, against fp64; memory: peak beyond the inputs"
    )
    for case in cases:
        results["cases"].append(run(bench, case))
        print(table(case, results["cases"][-1]), flush=True)
    return results
