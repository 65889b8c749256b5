"""`python -m kdkernels bench --linear`: from hidden states to loss and gradients, with and without the logits
of all tokens.

Memory first, on paper, for 8192 tokens in bf16; then time, peak memory and errors, measured. "floor" is the
projections, with fp32 logits, the products with a gradient that is there already, and the fused loss of fp32
logits that are there already, timed apart and added.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import Tensor

from .. import divergence, linear, options
from ..chunks import chunk_tokens
from ..functional import fused_kd_loss
from . import contenders, report
from .measure import TORCH_DTYPES, Bench

SHAPES = ("2048x32768x256", "1024x128256x256")
PAPER_TOKENS, PAPER_VOCABS, PAPER_WIDTHS = 8192, (32768, 128256, 262144), (1024, 4096)
LOGIT_BYTES = 4  # of a chunk's, whatever the dtype of the products
# relative, (loss, hidden states' gradient, weight's): the first by the chunk's sums, the others by the
# gradient's rounding
TOLERANCES = {"fp32": (2e-5, 2e-5, 2e-5), "bf16": (2e-5, 1e-2, 1e-2), "fp16": (2e-5, 2e-3, 2e-3)}
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
        return (
            f"{self.divergence}, T = {self.temperature:g}, {self.tokens} tokens x {self.vocab} x "
            f"{self.width} {self.dtype}"
        )

    def inputs(self, device: torch.device) -> list[Tensor]:
        """A student that has learned most of its teacher."""
        draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        hidden, weight = draw(self.tokens, self.width), draw(self.vocab, self.width) * 3
        weight *= self.width**-0.5
        teacher = hidden + 0.15 * draw(*hidden.shape), weight.clone()
        made = [x.to(TORCH_DTYPES[self.dtype]) for x in (hidden, weight, *teacher)]
        return [x.requires_grad_(i < 2) for i, x in enumerate(made)]


def shape(text: str) -> tuple[int, int, int]:
    try:
        tokens, vocab, width = map(int, text.split("x"))
        if min(tokens, vocab, width) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"--linear: TOKENSxVOCABxWIDTH, as 2048x32768x512; got {text!r}") from None
    return tokens, vocab, width


def class_bytes(itemsize: int) -> int:
    """Of a chunk, a token and class: both logits, and a 16-bit gradient beside them."""
    return 2 * LOGIT_BYTES + (itemsize if itemsize < LOGIT_BYTES else 0)


def memory(
    tokens: int, vocab: int, width: int, itemsize: int = 2, budget: int = linear.GPU_BUDGET
) -> dict[str, int]:
    """Peak bytes beyond hidden states and weights, by what they are for, both models of one width and
    dtype."""
    logits, gradients = tokens * vocab * itemsize, (tokens + vocab) * width * itemsize
    chunk = chunk_tokens(tokens, vocab, class_bytes(itemsize), budget)
    # 16-bit: the weight's gradient is summed in fp32, and cast when the chunks are gone
    several, total = chunk < tokens and itemsize == 2, vocab * width * 4
    chunks = chunk * vocab * class_bytes(itemsize)
    held = tokens * width * itemsize
    return {
        "chunk": chunk,
        "kdkernels": held + max(chunks + total, total + vocab * width * itemsize)
        if several
        else chunks + gradients,
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
        lines.append(
            f"{f'{vocab} x {width}':>16s}{found['chunk']:>8d}"
            + "".join(f"{found[x] / 2**30:>24.2f}" for x in names)
        )
    return "\n".join(lines)


def steps(case: Case, backends: tuple[str, ...] = ("auto",)) -> dict[str, Step]:
    """Our and PyTorch's ways from hidden states to the loss, by name; the fused loss of the first backend
    comes first."""
    which, T = divergence.parse(case.divergence), case.temperature
    eager = contenders.spellings(which, T)
    spelling, spelled = list(eager.items())[-1]
    options = dict(divergence=which, temperature=T, t_squared=True)

    def fused(backend: str, **more) -> Step:
        return lambda h, w, th, tw: linear.fused_linear_kd_loss(
            h, w, th, tw, backend=backend, **options, **more
        )

    rounded = (
        {}
        if case.dtype == "fp32"
        else {
            f"{contenders.fused_name(backends[0])}, logits_dtype=None": fused(backends[0], logits_dtype=None)
        }
    )

    def full(inplace: bool) -> Step:
        return lambda h, w, th, tw: fused_kd_loss(
            h @ w.t(), th @ tw.t(), inplace=inplace, backend=backends[0], **options
        )

    return (
        {contenders.fused_name(x): fused(x) for x in backends}
        | rounded
        | {
            "full logits": full(False),
            "full logits, in place": full(True),
            f"eager {spelling}": lambda h, w, th, tw: spelled(h @ w.t(), th @ tw.t()),
        }
    )


def libraries(case: Case, device: torch.device) -> dict[str, Step]:
    """Losses of others from hidden states, where they are installed; those that are Triton kernels and
    nothing else on GPUs alone.

    Liger-Kernel's chunked and fused linear JSD, TRL's chunked divergence: a generalised JSD with beta.
    flash-linear-attention's KL, which has no temperature: it takes the hidden states over T.
    """
    which, T = divergence.parse(case.divergence), case.temperature
    beta = contenders.jsd_beta(which)
    if beta is None or math.isinf(T):
        return {}

    def labels(h):
        return torch.zeros(len(h), dtype=torch.int64, device=h.device)

    def chunked(h, w, th, tw):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        return (
            T
            * T
            * LigerFusedLinearJSDLoss(0.0, 1.0, beta, temperature=T, compiled=False)(h, w, th, tw, labels(h))
        )

    def fused(h, w, th, tw):
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        return T * T * LigerFusedLinearJSD(jsd_beta=beta, temperature=T)(h, w, th, tw, labels(h))

    def trl(h, w, th, tw):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return T * T * ChunkedDivergenceFunction.apply(h, w, None, th, tw, None, beta, T)[0].mean()

    def fla(h, w, th, tw):
        from fla.modules.fused_kl_div import fused_kl_div_loss

        return T * T * fused_kl_div_loss(h / T, th / T, w, tw)

    on_gpu = device.type != "cpu"
    known = (
        ("liger_kernel", "Liger chunked JSD", chunked, True),
        ("liger_kernel", "Liger Triton JSD", fused, on_gpu),
        ("trl", "TRL chunked divergence", trl, True),
        ("fla", "flash-linear-attention KL", fla, on_gpu and beta == 0),
    )
    return {name: step for package, name, step, runs in known if runs and importlib.util.find_spec(package)}


def exact(case: Case, inputs: list[Tensor]) -> tuple[float, Tensor, Tensor]:
    """(loss, its gradients in hidden states and weight) in fp64, of the textbook's spelling, some tokens at a
    time."""
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


def _wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """fp32 logits of hidden states and weight; a CPU has no such product of 16-bit factors."""
    if x.device.type == "cpu" or x.dtype == torch.float32:
        return x.float() @ weight.float().t()
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def run(bench: Bench, case: Case) -> dict:
    """Everything about one case, ready for JSON. SystemExit where the chunked loss is wrong."""
    inputs = case.inputs(bench.device)
    h, w, th, tw = inputs
    total, *grads = exact(case, inputs)
    scale = 2.0**14 if case.dtype == "fp16" else 1.0
    others = libraries(case, bench.device)
    own = steps(case, bench.backends)
    if bench.compiled:
        own[contenders.COMPILED] = contenders.compiled(list(own.values())[-1])
    ways, errors, memories = own | others, {}, {}

    def check(step: Step) -> tuple[float, ...]:
        h.grad = w.grad = None
        loss = step(*inputs)
        loss.backward(torch.full_like(loss, scale))
        found = [
            float((x.grad.double() / scale - g).norm() / g.norm()) for x, g in zip((h, w), grads, strict=True)
        ]
        return abs(float(loss.detach()) / total - 1), *found

    for name in list(ways):
        try:
            errors[name] = check(ways[name])
        except Exception as error:
            if name not in others:
                raise
            print(report.left_out(name, error), flush=True)
            del ways[name]
    h.grad = w.grad = None
    for name in map(contenders.fused_name, bench.backends):
        if not all(error <= limit for error, limit in zip(errors[name], TOLERANCES[case.dtype], strict=True)):
            raise SystemExit(
                f"{name} is wrong here ({case}): relative errors of loss and gradients "
                f"{errors[name]}, no time is given"
            )

    def timed(step: Step) -> Callable[[], None]:
        def once() -> None:
            step(*inputs).backward()
            h.grad = w.grad = None

        return once

    steady = {name: timed(step) for name, step in ways.items()}
    for name, step in steady.items():
        memories[name] = bench._peak_memory(step)
    z, v = (_wide_product(*x).detach() for x in ((h, w), (th, tw)))
    z.requires_grad_()
    dz = v.to(h.dtype)

    def projections() -> None:
        with torch.no_grad():
            for x in ((h, w), (th, tw)):
                _wide_product(*x)
            _ = dz @ w, dz.t() @ h

    loss = contenders.fused(divergence.parse(case.divergence), case.temperature, bench.backends[0])

    def loss_alone() -> None:
        loss(z, v).backward()
        z.grad = None

    times = bench._times(steady | {"projections": projections, "loss": loss_alone}, bench.repeats)
    floor = times.pop("projections")[0] + times.pop("loss")[0]
    chunk = chunk_tokens(
        case.tokens,
        case.vocab,
        class_bytes(TORCH_DTYPES[case.dtype].itemsize),
        linear.CPU_BUDGET if bench.device.type == "cpu" else linear.GPU_BUDGET,
    )
    return asdict(case) | {
        "device": bench.machine["device"],
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
        f"\n{case}; {result['device']}, floor {result['floor_ms']:.0f} ms, chunks of "
        f"{result['chunk']} tokens",
        f"{'':38s}{'ms':>9s}{'of floor':>10s}{'MiB':>9s}{'loss err':>10s}{'dh err':>9s}{'dW err':>9s}",
    ]
    for name, x in result["contenders"].items():
        size = "" if x["memory_bytes"] is None else f"{x['memory_bytes'] / 2**20:.0f}"
        errors = f"{x['loss_error']:10.0e}{x['hidden_error']:9.0e}{x['weight_error']:9.0e}"
        lines.append(f"{name:38s}{x['ms']:9.1f}{x['of_floor']:10.2f}{size:>9s}{errors}")
    return "\n".join(lines)


def cases(args) -> list[Case]:
    """Of the command line; SystemExit for what cannot be measured."""
    try:
        shapes = [shape(x) for x in (args.linear or SHAPES)]
        found = [
            Case(*s, *rest) for s, *rest in product(shapes, args.dtypes, args.divergences, args.temperatures)
        ]
        for case in found:
            options.options(case.divergence, case.temperature, True)
    except ValueError as error:
        raise SystemExit(f"bench: {error}") from None
    return found


def main(args) -> dict:
    found, bench = cases(args), Bench.of(args, compiled=False)
    results = {"machine": bench.machine, "cases": []}
    print(paper())
    print(
        f"\n{bench.machine['device']}, {bench.machine['threads']} threads; errors: relative, against "
        "fp64; memory: peak beyond the inputs"
    )
    for case in found:
        results["cases"].append(run(bench, case))
        print(table(case, results["cases"][-1]), flush=True)
        if args.json:
            report.write_json(results, args.json)
    return results
