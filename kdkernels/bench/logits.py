"""The loss from logits: cases, their contenders' errors, times and memory, and the table of them."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .. import divergence, options
from . import contenders, measure, packages, screen
from .contenders import COMPILED, Loss
from .measure import LOSS_SCALE, TORCH_DTYPES, Bench
from .reference import check, reference

# what the fused loss must reach before its time counts, relative, (loss, gradient): its bound, and one
# rounding of a 16-bit gradient
TOLERANCES = {"fp32": (2e-5, 3e-6), "bf16": (2e-5, 4e-3), "fp16": (2e-5, 1e-3)}
CHECKED_ROWS = 4


@dataclass(frozen=True)
class Case:
    rows: int
    vocab: int
    dtype: str
    divergence: str
    temperature: float

    def __post_init__(self) -> None:
        """ValueError for what the fused loss or the reference has not, before anything runs."""
        options.options(divergence=self.divergence, temperature=self.temperature, t_squared=True)
        check(divergence.parse(self.divergence))

    def __str__(self) -> str:
        return f"{self.divergence}, T = {self.temperature:g}, {self.rows} x {self.vocab} {self.dtype}"

    @property
    def size(self) -> int:
        """What the time of a step is in proportion to."""
        return self.rows * self.vocab

    def part(self, share: int) -> Case:
        return replace(self, rows=max(1, self.rows // share))

    def eager(self) -> Loss:
        """The best spelling."""
        return list(contenders.spellings(divergence.parse(self.divergence), self.temperature).values())[-1]

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(student, teacher): a teacher as peaked as a language model, and a student that has learned most of
        it."""
        z, v = (x.to(TORCH_DTYPES[self.dtype]) for x in draw(self.rows, self.vocab, device=device))
        return z.requires_grad_(), v


shape = functools.partial(measure.sizes, "--shapes", "ROWSxVOCAB")


def ways(case: Case, bench: Bench) -> tuple[dict[str, Loss], set[str]]:
    """The contenders by name, the fused ones first, and which of them may be left out."""
    which, T = divergence.parse(case.divergence), case.temperature
    fused = {contenders.fused_name(x): contenders.fused(which, T, x) for x in bench.backends}
    others = {} if bench.device.type == "cpu" else packages.kernels(which, T)
    others |= packages.functions(which, T) if bench.peers else {}
    if bench.compiled:
        others[COMPILED] = contenders.compiled(case.eager())
    return fused | contenders.spellings(which, T) | others, set(others)


def run(bench: Bench, case: Case) -> dict:
    """Everything about one case, ready for JSON. SystemExit where the fused loss is wrong."""
    z, v = case.inputs(bench.device)
    checked, (losses, others) = Check(case, z, v), ways(case, bench)
    errors = bench.check(
        losses,
        lambda name: checked.errors(losses[name], packages.VALUES.get(name)),
        TOLERANCES[case.dtype],
        others,
    )
    steps = {name: measure.step(losses[name], (z, v)) for name in errors}
    memory = {name: bench.peak_memory(step) for name, step in steps.items()}
    target = torch.empty_like(v)
    with measure.Watch() as watch:
        times = bench.times({"copy": lambda: target.copy_(v)} | steps)

    size = v.numel() * v.element_size()
    copy_speed = 2 * size / times.pop("copy")["ms"]
    base = next(iter(times.values()))["ms"]
    return asdict(case) | {
        "device": bench.machine["device"],
        "copy_gb_per_s": copy_speed / 1e6,
        "others_cores": watch.cores,
        "contenders": {
            name: t
            | {
                "speed_up": t["ms"] / base,
                "fraction_of_copy": 3 * size / t["ms"] / copy_speed,
                "memory_in_gradients": None if memory[name] is None else memory[name] / size,
                "loss_error": errors[name][0],
                "grad_error": errors[name][1],
            }
            for name, t in times.items()
        },
    }


def show(result: dict) -> None:
    """The table of a result."""
    screen.say(f"\n{title(result)}; {result['device']}, copy {result['copy_gb_per_s']:.0f} GB/s")
    rows = []
    for name, x in result["contenders"].items():
        memory = x["memory_in_gradients"]
        rows.append(
            (
                name,
                f"{x['ms']:.1f}",
                "" if is_base(name, x) else f"{x['speed_up']:.1f} x",
                f"{x['fraction_of_copy']:.2f}",
                "" if memory is None else f"{memory:.2f}",
                f"{x['loss_error']:.0e}",
                f"{x['grad_error']:.0e}",
            )
        )
    screen.table(("", "ms", "speed-up", "copy", "memory", "loss err", "grad err"), rows)


def title(case: dict) -> str:
    return (
        f"{case['divergence']}, T = {case['temperature']:g}, {case['rows']} x {case['vocab']} {case['dtype']}"
    )


def is_base(name: str, contender: dict) -> bool:
    """Whether it is the fused loss that all others are compared with: of the first backend."""
    return name.startswith(contenders.FUSED) and contender["speed_up"] == 1


class Check:
    """Relative errors of a contender: its loss on a few rows, and those rows' gradients out of the whole
    batch."""

    def __init__(self, case: Case, z: Tensor, v: Tensor):
        self.z, self.v, which, T = z, v, divergence.parse(case.divergence), case.temperature
        self.temperature = T
        self.few = torch.linspace(0, case.rows - 1, min(case.rows, CHECKED_ROWS)).long()
        self.scale = LOSS_SCALE if case.dtype == "fp16" else 1.0
        values, self.grad = reference(z[self.few], v[self.few], which, T)
        self.value = values.mean()

    def errors(self, loss: Loss, other: divergence.Divergence | None = None) -> tuple[float, float]:
        """other: the divergence whose value the loss has, where that is not the case's."""
        value = self.value
        if other is not None:
            value = reference(self.z[self.few], self.v[self.few], other, self.temperature)[0].mean()
        try:
            few = loss(self.z[self.few], self.v[self.few])
            # so that torch.compile has seen two batch sizes, as in use; what it then makes is its fastest and
            # leanest
            few.backward()
            whole = loss(self.z, self.v)
            self.z.grad = None
            whole.backward(torch.full_like(whole, self.scale))
            grad = self.z.grad[self.few].double().cpu().numpy() * len(self.z) / self.scale
        finally:  # also where it raises: what is left would count as memory of the next
            self.z.grad = None
        return abs(float(few.item() / value - 1)), float(
            np.linalg.norm((grad - self.grad).astype(float)) / np.linalg.norm(self.grad.astype(float))
        )


def draw(
    rows: int, vocab: int, spread: float = 0.5, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(student, teacher), whose logits differ by `spread`; drawn on the device, as a CPU takes seconds for
    4096 x 128256."""
    g = torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, rows, vocab, device=device, generator=g)
    v = normal() * 3
    return v + normal() * spread, v
