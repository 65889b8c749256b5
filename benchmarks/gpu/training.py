"""Stages of whole training steps: forward, loss, backward and optimizer, from logits and from hidden
states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from kdkernels import fused_kd_loss, fused_linear_kd_loss
from kdkernels.bench import contenders, linear
from kdkernels.bench.measure import Bench
from kdkernels.divergence import parse

from .setting import Setting
from .timing import median

T = 2.0
LINEAR = ("8192x32768x1024", "8192x128256x1024", "8192x128256x4096")
LINEAR_DIVERGENCES = ("kl", "jsd(0.5)")


@dataclass(frozen=True)
class Size:
    tokens: int = 4096
    vocab: int = 128256
    width: int = 1024


class Student(nn.Module):
    """The end of a language model: a layer and the head. What comes before costs every loss the same."""

    def __init__(self, size: Size):
        super().__init__()
        self.layer = nn.Linear(size.width, size.width, bias=False)
        self.head = nn.Linear(size.width, size.vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.gelu(self.layer(x))


Loss = Callable[[Student, Tensor, Tensor], Tensor]  # student, inputs, teacher's head


def losses() -> dict[str, Loss]:
    spelled = list(contenders.spellings(parse("kl"), T).items())[-1]
    options = dict(temperature=T, t_squared=True)
    return {
        "kdkernels": lambda m, x, w: fused_kd_loss(m.head(m(x)), x @ w.t(), **options),
        "kdkernels in place": lambda m, x, w: fused_kd_loss(m.head(m(x)), x @ w.t(), inplace=True, **options),
        "kdkernels linear": lambda m, x, w: fused_linear_kd_loss(m(x), m.head.weight, x, w, **options),
        f"eager {spelled[0]}": lambda m, x, w: spelled[1](m.head(m(x)), x @ w.t()),
    }


def train(setting: Setting) -> None:
    """A step of a student in bf16 with a teacher's head, as it is and under
    torch.compile(mode="reduce-overhead")."""
    size = Size(8, 1000, 16) if setting.rehearsal else Size()
    for name, compiled in product(losses(), (False, True)):
        if compiled and ("linear" in name or setting.rehearsal):
            continue
        key = (
            f"train {name}{', reduce-overhead' if compiled else ''} "
            f"{size.tokens}x{size.vocab}x{size.width} bf16"
        )
        setting.once(key, lambda name=name, compiled=compiled: _step_time(setting, size, name, compiled), 90)


def _step_time(setting: Setting, size: Size, name: str, compiled: bool) -> dict:
    torch.manual_seed(0)
    with torch.device(setting.device):
        student = Student(size).bfloat16()
        x = torch.randn(size.tokens, size.width).bfloat16()
        teacher = (
            student.head.weight.detach() + torch.randn(size.vocab, size.width).bfloat16() * 0.01
        ).detach()
    loss = losses()[name]
    whole = torch.compile(loss, mode="reduce-overhead") if compiled else loss
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=setting.device == "cuda")
    values = []

    def step() -> None:
        value = whole(student, x, teacher)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(value.detach().clone())

    for _ in range(3):
        step()
    found = median(step, setting)
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        found["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return found | {"first_loss": float(values[0]), "later_loss": float(values[3])}


def from_hidden_states(setting: Setting) -> None:
    """fused_linear_kd_loss beside full logits, eager and what others there are, checked against fp64, as
    `bench --linear` has it."""
    bench = Bench(setting.device, 2, compiled=False)
    for text, divergence in product(("96x500x16",) if setting.rehearsal else LINEAR, LINEAR_DIVERGENCES):
        case = linear.Case(*linear.shape(text), "bf16", divergence, T)
        setting.once(f"linear {divergence} {text} bf16", lambda case=case: linear.run(bench, case), 120)
