"""Calls of the loss that cover its families and options, logits for them, and what makes a result right."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass

import bounds
import torch
from torch import Tensor

from kdkernels import fused_kd_loss
from kdkernels.divergence import parse

HARD_ROUNDING = 1e-6  # of a hard term and of its gradient, in fp32


@dataclass(frozen=True)
class Case:
    """A call: its divergence and options, its rows, classes and dtype. As text: "kl T=1 labels none 9x128256
    bfloat16"."""

    divergence: str
    temperature: float = 2.0
    labels: bool = False  # a hard term of weight 0.1; row 0 is ignored
    inplace: bool = False
    none: bool = False  # reduction="none" in place of "mean"
    rows: int = 4096
    vocab: int = 128256
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        flags = "".join(f" {x}" for x in ("labels", "inplace", "none") if getattr(self, x))
        return f"{self.divergence} T={self.temperature:g}{flags} {self.rows}x{self.vocab} {self.dtype}"

    @classmethod
    def parse(cls, text: str) -> Case:
        pattern = r"(\S+) T=(\S+)((?: labels| inplace| none)*) (\d+)x(\d+) (\w+)"
        found = re.fullmatch(pattern, text)
        if not found:
            raise ValueError(f'a case is as "kl T=1 labels none 9x128256 bfloat16", got {text!r}')
        divergence, T, flags, rows, vocab, dtype = found.groups()
        return cls(
            divergence,
            float(T),
            *(x in flags.split() for x in ("labels", "inplace", "none")),
            int(rows),
            int(vocab),
            dtype,
        )

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """(student, teacher, labels), drawn on the device: a CPU takes 8 s for 4096 x 128256."""
        g = torch.Generator(device).manual_seed(0)
        v = torch.randn(self.rows, self.vocab, device=device, generator=g) * 3
        z = v + torch.randn(self.rows, self.vocab, device=device, generator=g) / 2
        labels = None
        if self.labels:
            labels = torch.arange(self.rows, device=device) * 7919 % self.vocab
            labels[0] = -100
        dtype = getattr(torch, self.dtype)
        return z.to(dtype).requires_grad_(), v.to(dtype), labels

    def loss(self, z: Tensor, v: Tensor, labels: Tensor | None, backend: str, **changes: object) -> Tensor:
        """T^2 D, 0.9 of it where there is a hard term."""
        options = dict(
            divergence=self.divergence,
            temperature=self.temperature,
            t_squared=True,
            backend=backend,
            inplace=self.inplace,
        )
        options |= dict(soft_weight=0.9, hard_weight=0.1) if self.labels else {}
        options |= dict(reduction="none" if self.none else "mean") | changes
        return fused_kd_loss(z * 1 if options["inplace"] else z, v, labels, **options)


# every family of kernels that has sums, from both sides, with and without a hard term
CALLS = (
    Case("kl"),
    Case("cross_entropy", 1.0, labels=True, none=True),
    Case("reverse_kl", none=True),
    Case("renyi(0.5)", inplace=True),
    Case("renyi(2.0)", 1.0, labels=True),
    Case("jsd(0.5)", labels=True, none=True),
    Case("tvd"),
    Case("kl", math.inf, inplace=True),
)
# rows in registers, a program or block to a row, clusters, rows that begin anywhere, several programs to a
# row
SHAPES = (
    (9, 128256, "bfloat16"),
    (40, 32768, "bfloat16"),
    (3, 50257, "float32"),
    (300, 4096, "bfloat16"),
    (600, 8192, "bfloat16"),
    (2, 262144, "float32"),
)
SMALL_SHAPES = ((3, 301, "bfloat16"), (2, 700, "float32"))


def covering(shapes: tuple[tuple[int, int, str], ...] = SHAPES) -> list[Case]:
    return [
        Case(x.divergence, x.temperature, x.labels, x.inplace, x.none, *shape)
        for shape in shapes
        for x in CALLS
    ]


def run(case: Case, backend: str, device: str) -> tuple[Tensor, Tensor, float]:
    """(loss, gradient, seconds of this first call)."""
    z, v, labels = case.inputs(device)
    start = time.perf_counter()
    loss = case.loss(z, v, labels, backend)
    loss.sum().backward()
    loss = loss.detach().clone()
    if device == "cuda":
        torch.cuda.synchronize()
    return loss, z.grad, time.perf_counter() - start


def examine(case: Case, backend: str, device: str) -> dict:
    """Errors against fp64 as fractions of the stated bounds (tests/bounds.py), and relative; right: none is
    above its bound."""
    loss, grad, seconds = run(case, backend, device)
    z, v, labels = case.inputs(device)
    x = z.detach().double().requires_grad_()
    exact = case.loss(x, v.double(), labels, "eager", inplace=False, reduction="none")
    exact.sum().backward()
    exact, value_bounds, gradient_bounds = (
        exact.detach(),
        *_bounds(case, z.detach(), v, labels, exact.detach(), x.grad),
    )
    counted = case.rows - case.labels
    scale = 1.0 if case.none else 1 / counted
    if not case.none:
        exact, value_bounds = exact.sum() / counted, value_bounds.sum() / counted
    right_grad = x.grad * scale
    rounding = bounds.cast_bound(grad.dtype, right_grad).norm(dim=-1) if grad.dtype != torch.float32 else 0.0
    error, grad_error = (loss.double() - exact).abs(), (grad.double() - right_grad).norm(dim=-1)
    value, gradient = (
        float((error / value_bounds).max()),
        float((grad_error / (gradient_bounds * scale + rounding)).max()),
    )
    norm = right_grad.norm(dim=-1)
    return {
        "right": value <= 1 and gradient <= 1,  # false for nan
        "value_of_bound": value,
        "gradient_of_bound": gradient,
        "loss_error": float((error / exact.abs().clamp_min(1e-30)).max()),
        "grad_error": float((grad_error / norm.clamp_min(1e-30)).max()),
        "first_call_s": round(seconds, 3),
    }


def _bounds(
    case: Case, z: Tensor, v: Tensor, labels: Tensor | None, loss: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """(rows,) bounds of each loss and of each gradient's norm before its rounding: bounds.py's times T^2 and
    T, and the hard term's."""
    T = case.temperature
    square, slope = (1.0, 1.0) if math.isinf(T) else (T * T, T)
    form, name = parse(case.divergence).form, case.divergence
    values, gradients = [], []
    for i in range(case.rows):
        if labels is not None and labels[i] < 0:  # exactly 0, and its gradient
            values.append(1e-30)
            gradients.append(1e-30)
            continue
        D, norm, spread = (
            float(loss[i]) / square,
            float(grad[i].norm()) / slope,
            bounds.spread_of(z[i], v[i], T),
        )
        if form.family in ("kl", "cross_entropy", "renyi"):
            order = form.order if form.family == "renyi" else 1
            value, gradient = (
                bounds.value_bound(order, case.vocab, T, spread, D),
                bounds.gradient_bound(order, norm),
            )
        else:
            value, gradient = (
                bounds.value_bound_of(name, case.vocab, T, spread, D),
                bounds.gradient_bound_of(norm, D),
            )
        hard = HARD_ROUNDING if labels is not None else 0.0
        values.append(value * square + hard * float(loss[i]))
        gradients.append(gradient * slope + hard)
    return torch.tensor(values, device=z.device, dtype=torch.float64), torch.tensor(
        gradients, device=z.device, dtype=torch.float64
    )
