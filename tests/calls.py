"""A call of the public surface as data (`Case`), and as a program: the text that is shown is the text that is
run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

import kdkernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
PER_CLASS = ("w", "b", "tw", "tb")  # tensors that have a row for each class, and no others
MODULES = {"fused_kd_loss": "KDLoss", "fused_linear_kd_loss": "LinearKDLoss"}
# how a tensor of a shape lies in a larger one: dimensions it needs before the classes, the shape of the
# larger one, the view of that
LAYOUTS: dict[str, tuple[int, Callable, str]] = {
    "plain": (0, lambda s: s, "{}"),
    "every other": (1, lambda s: (2 * s[0], *s[1:]), "{}[::2]"),
    "odd start": (0, lambda s: (*s[:-1], s[-1] + 5), "{}[..., 3:-2]"),
    "classes apart": (0, lambda s: (*s[:-1], 2 * s[-1]), "{}[..., ::2]"),
    "transposed": (2, lambda s: (s[1], s[0], *s[2:]), "{}.transpose(0, 1)"),
    "expanded": (0, lambda s: (1,) * (len(s) - 1) + s[-1:], "{}.expand({})"),
}


@dataclass(frozen=True)
class Case:
    """A call. Its numbers are rounded to their dtypes when the tensors are made."""

    call: str = "fused_kd_loss"
    # z, v: (rows, V) logits; or h, w, b of the student, th, tw, tb (or v) of the teacher
    tensors: dict = field(default_factory=dict)
    dtypes: tuple = ("fp32", "fp32")
    options: dict = field(default_factory=dict)
    labels: list | None = None
    weight: list | None = None
    # one number, or one for each row where reduction="none"; `tensors["u"]` for a call that gives no loss
    upstream: tuple = (1.0,)
    leading: tuple | None = None  # None: (rows,)
    layouts: tuple = ("plain", "plain")
    pad: tuple = (0, 0)  # classes beyond vocab_size, of student and teacher
    module: bool = False

    def get(self, option: str, default=None):
        return self.options.get(option, default)

    @property
    def rows(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def vocab(self) -> int:
        return self.tensors["z"].shape[1] if "z" in self.tensors else len(self.tensors["w"])

    @property
    def shape(self) -> tuple:
        return (self.rows,) if self.leading is None else self.leading

    @property
    def temperature(self) -> float:
        """Of all rows; the least of their own."""
        T = self.get(
            "temperature", {"logit_matching_loss": math.inf, "decoupled_kd_loss": 4.0}.get(self.call, 1.0)
        )
        return T.min().item() if isinstance(T, torch.Tensor) else T

    def at(self, row: int) -> Case:
        """The case with the temperature of a row for all."""
        if not isinstance(T := self.get("temperature"), torch.Tensor):
            return self
        return replace(self, options=self.options | dict(temperature=T[row].item()))

    @property
    def divergence(self) -> str:
        return (
            ("kl" if self.get("center") else "matching")
            if self.call == "logit_matching_loss"
            else self.get("divergence", "kl")
        )

    @property
    def per_row(self) -> bool:
        return self.get("reduction") == "none"

    @property
    def size(self) -> tuple:
        """Of its text; then of what the text's length does not show."""
        return len(snippet(self)), sum(int(np.count_nonzero(x)) for x in self.tensors.values()) + sum(
            x != "fp32" for x in self.dtypes
        )


def side_of(name: str) -> int:
    """0 for a tensor of the student, 1 for one of the teacher."""
    return int(name[0] in "tv")


def data(case: Case) -> dict[str, torch.Tensor]:
    """The tensors, by the names that `program` gives them."""
    out = {}
    for name, x in case.tensors.items():
        side = side_of(name)
        x = torch.from_numpy(np.array(x, float)).to(DTYPES[case.dtypes[side]])
        if name in PER_CLASS:
            x = torch.cat([x, x.new_full((case.pad[side], *x.shape[1:]), 5.0)])
        else:
            x = (
                torch.cat([x, x.new_full((len(x), case.pad[side]), math.nan)], -1)
                if name in ("z", "v")
                else x
            )
            x = laid_out(x.view(*case.shape, x.shape[-1]), "plain" if name == "u" else case.layouts[side])
        out[name] = x.requires_grad_(name != "u" and (side == 0 or bool(case.get("teacher_grad"))))
    for name, x, dtype in (
        ("labels", case.labels, torch.int64),
        ("token_weight", case.weight, torch.float32),
    ):
        if x is not None:
            out[name] = torch.tensor(x, dtype=dtype).view(case.shape)
    if "u" not in case.tensors and case.upstream != (1.0,):
        upstream = torch.tensor(
            case.upstream, dtype=torch.float64 if case.dtypes[0] == "fp64" else torch.float32
        )
        out["upstream"] = upstream.view(case.shape) if case.per_row else upstream[0]
    return out


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A larger tensor, of which x is the view."""
    whole = torch.full(LAYOUTS[layout][1](tuple(x.shape)), 7.0, dtype=x.dtype)
    if layout == "expanded":
        return whole.copy_(x[(slice(0, 1),) * (x.dim() - 1)])
    eval(viewed("whole", layout, x.shape)).copy_(x)
    return whole


def viewed(name: str, layout: str, shape) -> str:
    return LAYOUTS[layout][2].format(name, ", ".join(map(str, shape)))


def gradient(case: Case, x: torch.Tensor, side: int) -> torch.Tensor:
    """(rows, ...), as the call has seen x; 0 where autograd has none."""
    grad = torch.zeros_like(x) if x.grad is None else x.grad  # noqa: F841  the view's
    return eval(viewed("grad", case.layouts[side], (*case.shape, -1))).reshape(case.rows, -1)


def program(case: Case) -> str:
    """The call, as text."""
    literal = lambda x: f"torch.{x!r}" if isinstance(x, torch.Tensor) else repr(x)  # noqa: E731
    student = "h" if "h" in case.tensors else "z.clone()" if case.get("inplace") else "z"
    names = student, "th" if "th" in case.tensors else "v"
    z, v = (viewed(name, layout, (*case.shape, -1)) for name, layout in zip(names, case.layouts, strict=True))
    options = dict(case.options)
    given = {x: x for x, has in (("labels", case.labels), ("token_weight", case.weight)) if has is not None}
    if isinstance(T := case.get("temperature"), torch.Tensor):
        given["temperature"] = f"{literal(T)}.view({case.shape})"
        options.pop("temperature")
    if "num_items" in options and case.module:
        given["num_items"] = literal(options.pop("num_items"))
    values = [z, v]
    if "u" in case.tensors:
        values = [z]
    elif case.call == "fused_linear_kd_loss":
        values = [z, "w"]
        names = dict(
            b="student_bias", th="teacher_hidden", tw="teacher_weight", tb="teacher_bias", v="teacher_logits"
        )
        given |= {names[x]: v if x in ("th", "v") else x for x in case.tensors if x in names}
    kept, given = [f"{x}={literal(y)}" for x, y in options.items()], [f"{x}={y}" for x, y in given.items()]
    if case.module:
        call = f"{MODULES[case.call]}({', '.join(kept)})({', '.join([*values, *given])})"
    else:
        call = f"{case.call}({', '.join([*values, *given, *kept])})"
    upstream = "u" if "u" in case.tensors else "" if case.upstream == (1.0,) else "upstream"
    return f"loss{', stats' if case.get('return_stats') else ''} = {call}\nloss.backward({upstream})"


def run(case: Case) -> dict:
    """What its names stand for when the program has run."""
    space = dict(
        {x: getattr(kdkernels, x) for x in kdkernels.__all__},
        torch=torch,
        inf=math.inf,
        nan=math.nan,
        **data(case),
    )
    exec(program(case), space)
    return space


def snippet(case: Case, failure: str = "") -> str:
    """A program that shows the failure."""
    tensors = data(case)
    lines = ["import torch", "from math import inf, nan", "from kdkernels import *"]
    for name, x in tensors.items():
        lines.append(
            f"{name} = torch.tensor({x.tolist()}, "
            f"dtype={x.dtype}{', requires_grad=True' if x.requires_grad else ''})"
        )
    shown = [
        "loss.detach()",
        *(f"{x}.grad" for x, t in tensors.items() if t.requires_grad),
        *["stats"] * bool(case.get("return_stats")),
    ]
    return "\n".join(
        [*lines, program(case), f"print({', '.join(shown)})", *(f"# {x}" for x in failure.splitlines())]
    )
