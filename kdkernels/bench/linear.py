"""The loss from hidden states: cases, their contenders' errors, times and memory, and the table of them.

"floor" is the projections, with fp32 logits, the products with a gradient that is there already, and the
fused loss of fp32 logits that are there already, timed apart and added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from .. import divergence, linear, options
from ..chunks import chunk_tokens
from . import contenders, measure, packages, paper, screen
from .contenders import COMPILED, Step
from .measure import LOSS_SCALE, TORCH_DTYPES, Bench

# relative, (loss, hidden states' gradient, weight's): the first by the chunk's sums, the others by the
# gradient's rounding
TOLERANCES = {"fp32": (2e-5, 2e-5, 2e-5), "bf16": (2e-5, 1e-2, 1e-2), "fp16": (2e-5, 2e-3, 2e-3)}
CHECKED_TOKENS = 256  # of the fp64 reference at a time


@dataclass(frozen=True)
class Case:
    tokens: int
    vocab: int
    width: int
    dtype: str
    divergence: str
    temperature: float

    def __post_init__(self) -> None:
        """ValueError for what the loss has not, before anything runs."""
        options.options(self.divergence, self.temperature, True)

    def __str__(self) -> str:
        return (
            f"{self.divergence}, T = {self.temperature:g}, {self.tokens} tokens x {self.vocab} x "
            f"{self.width} {self.dtype}"
        )

    @property
    def size(self) -> int:
        """What the time of a step is in proportion to."""
        return self.tokens * self.vocab * self.width

    def part(self, share: int) -> Case:
        return replace(self, tokens=max(1, self.tokens // share))

    def eager(self) -> Step:
        which = divergence.parse(self.divergence)
        return list(contenders.from_hidden(which, self.temperature).values())[-1]

    def inputs(self, device: torch.device) -> list[Tensor]:
        """A student that has learned most of its teacher."""
        draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
        hidden, weight = draw(self.tokens, self.width), draw(self.vocab, self.width) * 3
        weight *= self.width**-0.5
        teacher = hidden + 0.15 * draw(*hidden.shape), weight.clone()
        made = [x.to(TORCH_DTYPES[self.dtype]) for x in (hidden, weight, *teacher)]
        return [x.requires_grad_(i < 2) for i, x in enumerate(made)]


shape = functools.partial(measure.sizes, "--linear", "TOKENSxVOCABxWIDTH")


def ways(case: Case, bench: Bench) -> tuple[dict[str, Step], set[str]]:
    """The contenders by name, the fused ones first, and which of them may be left out."""
    which, T = divergence.parse(case.divergence), case.temperature
    own = contenders.from_hidden(which, T, bench.backends, rounded=case.dtype != "fp32")
    others = packages.from_hidden(which, T, bench.device)
    if bench.compiled:
        others[COMPILED] = contenders.compiled(case.eager())
    return own | others, set(others)


class Check:
    """Relative errors of a contender's loss, and of its gradients in hidden states and weight, against
    fp64."""

    def __init__(self, case: Case, inputs: list[Tensor]):
        self.case, self.inputs = case, inputs
        self.scale = LOSS_SCALE if case.dtype == "fp16" else 1.0
        self.total, *self.grads = exact(case, inputs, divergence.parse(case.divergence))

    def errors(self, step: Step, other: divergence.Divergence | None = None) -> tuple[float, ...]:
        """other: the divergence whose value the loss has, where that is not the case's."""
        total = self.total if other is None else exact(self.case, self.inputs, other)[0]
        h, w, *_ = self.inputs
        try:
            loss = step(*self.inputs)
            loss.backward(torch.full_like(loss, self.scale))
            grads = [x.grad.double() / self.scale for x in (h, w)]
        finally:
            h.grad = w.grad = None
        errors = [float((x - g).norm() / g.norm()) for x, g in zip(grads, self.grads, strict=True)]
        return abs(float(loss.detach()) / total - 1), *errors


def exact(case: Case, inputs: list[Tensor], which: divergence.Divergence) -> tuple[float, Tensor, Tensor]:
    """(loss, its gradients in hidden states and weight) in fp64, of the textbook's spelling, some tokens at a
    time."""
    loss = list(contenders.spellings(which, case.temperature).values())[-1]
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


def floor(case: Case, inputs: list[Tensor], backend: str) -> dict[str, Callable[[], None]]:
    """What no way from hidden states can leave out: the products, and the loss of logits that are there."""
    h, w, th, tw = inputs
    z, v = (_wide_product(*x).detach() for x in ((h, w), (th, tw)))
    z.requires_grad_()
    dz, loss = v.to(h.dtype), contenders.fused(divergence.parse(case.divergence), case.temperature, backend)

    def projections() -> None:
        with torch.no_grad():
            for x in ((h, w), (th, tw)):
                _wide_product(*x)
            _ = dz @ w, dz.t() @ h

    def loss_alone() -> None:
        loss(z, v).backward()
        z.grad = None

    return {"projections": projections, "loss": loss_alone}


def run(bench: Bench, case: Case) -> dict:
    """Everything about one case, ready for JSON. SystemExit where the chunked loss is wrong."""
    inputs = case.inputs(bench.device)
    checked, (found, others) = Check(case, inputs), ways(case, bench)
    errors = bench.check(
        found,
        lambda name: checked.errors(found[name], packages.VALUES.get(name)),
        TOLERANCES[case.dtype],
        others,
    )
    steps = {name: measure.step(found[name], inputs) for name in errors}
    memory = {name: bench.peak_memory(step) for name, step in steps.items()}
    with measure.Watch() as watch:
        times = bench.times(steps | floor(case, inputs, bench.backends[0]))
    least = times.pop("projections")["ms"] + times.pop("loss")["ms"]
    budget = linear.CPU_BUDGET if bench.device.type == "cpu" else linear.GPU_BUDGET
    itemsize = paper.class_bytes(TORCH_DTYPES[case.dtype].itemsize)
    return asdict(case) | {
        "device": bench.machine["device"],
        "chunk": chunk_tokens(case.tokens, case.vocab, itemsize, budget),
        "floor_ms": least,
        "others_cores": watch.cores,
        "contenders": {
            name: t
            | {"of_floor": t["ms"] / least, "memory_bytes": memory[name]}
            | dict(zip(("loss_error", "hidden_error", "weight_error"), errors[name], strict=True))
            for name, t in times.items()
        },
    }


def show(result: dict) -> None:
    """The table of a result."""
    case = Case(*(result[x.name] for x in fields(Case)))
    screen.say(
        f"\n{case}; {result['device']}, floor {result['floor_ms']:.0f} ms, chunks of {result['chunk']} tokens"
    )
    rows = []
    for name, x in result["contenders"].items():
        size = "" if x["memory_bytes"] is None else f"{x['memory_bytes'] / 2**20:.0f}"
        errors = (f"{x[f'{of}_error']:.0e}" for of in ("loss", "hidden", "weight"))
        rows.append((name, f"{x['ms']:.1f}", f"{x['of_floor']:.2f}", size, *errors))
    screen.table(("", "ms", "of floor", "MiB", "loss err", "dh err", "dW err"), rows)
