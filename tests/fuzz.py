"""Draws calls of the public surface and compares them with what is right: `python tests/fuzz.py SEED COUNT
[--known]`, `make fuzz`.

Prints the smallest call of each kind that is wrong, as a program that runs, and exits with 1 where there is
one. `--known` also reports what `KNOWN` excuses. calls.py says what a call is, expected.py what is right and
what is allowed: 80-bit long doubles first, and 60 digits before anything is called wrong. A call depends on
SEED and its number alone.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import conftest  # noqa: F401  Triton's kernels run under its interpreter
import numpy as np
import oracle
import torch
from calls import DTYPES, LAYOUTS, MODULES, PER_CLASS, Case, snippet
from expected import SIDES, broken, finite, judge, logits
from rows import KINDS, make_rows

from kdkernels import LogitTransform
from kdkernels.divergence import usual

TINY = 2.0**-20
ORDERS = (0.0, TINY, 0.01, 0.3, 0.5, 0.75, 0.9999, 1.0, 1.0001, 1.5, 2.0, 5.0, 20.0, math.inf)
SKEWS = (0.0, TINY, 0.001, 0.1, 0.5, 0.75, 0.9, 0.99, 0.999)
PARAMETERS = {
    "renyi": ORDERS,
    "reverse_renyi": ORDERS,
    "skew_kl": SKEWS,
    "skew_reverse_kl": SKEWS,
    "jsd": (*SKEWS, 1 - TINY, 1.0),
}
PARAMETERS["alpha"] = (-3.0, -1.0, -0.25, 0.0, TINY, 0.5, 0.9999, 1.0, 1.25, 2.0, 3.0, 5.0)
# the registry's others: of an order those that it may have
PARAMETERS |= {
    d.name: tuple(x for x in ORDERS if d.domain[0] <= x <= min(d.domain[1], 5.0))
    for d in usual()
    if d.usual and d.name not in PARAMETERS
}
ALONE = tuple(d.name for d in usual() if not d.usual)
TEMPERATURES = (0.05, 0.1, 0.5, 1.0, 1.0, 2.0, 4.0, 20.0, 100.0, 1e4, 1e6, math.inf)
CALLS = dict(
    fused_kd_loss=0.68,
    tempered_log_softmax=0.05,
    logit_matching_loss=0.06,
    decoupled_kd_loss=0.06,
    fused_linear_kd_loss=0.13,
)
CALLS["standardize_logits"] = 0.02


# ---------------------------------------------------------------- drawing


class Dice(np.random.Generator):
    def __init__(self, *seed: int):
        super().__init__(np.random.PCG64(seed))

    def pick(self, *of):
        return of[int(self.integers(len(of)))]

    def chance(self, p: float) -> bool:
        return bool(self.random() < p)


def draw(seed: int, number: int) -> Case:
    dice = Dice(seed, number)
    backend = "triton" if dice.chance(0.02) else dice.pick("cpu", "cpu", "cpu", "eager")
    call = list(CALLS)[int(dice.choice(len(CALLS), p=list(CALLS.values())))]
    dtypes = tuple(dice.pick(*list(DTYPES)[: 3 if backend == "triton" else 4]) for _ in SIDES)
    vocab = dice.pick(1, 2, 2, 3, 3, 4, 5, 8, 17, 33)
    if backend != "triton" and call != "fused_linear_kd_loss" and dice.chance(0.1):
        vocab = dice.pick(64, 64, 130, 130, 130, 300, 4097)
    if call == "decoupled_kd_loss":
        vocab = max(vocab, 2)
    leading = tuple(int(x) for x in dice.integers(1, 4, size=dice.integers(4))) if dice.chance(0.7) else (1,)
    leading = (1,) if backend == "triton" or vocab > 300 else leading
    rows = math.prod(leading)
    z, v = draw_rows(dice, rows, vocab, dtypes)
    options, labels, weight, pad = draw_options(dice, call, vocab, rows)
    if call != "standardize_logits":
        options["backend"] = backend
    eager_alone = options.get("divergence") == "cross_entropy"  # has a gradient in the teacher
    if eager_alone and (backend != "eager" or options.get("inplace") or call == "fused_linear_kd_loss"):
        options.pop("teacher_grad", None)
    upstream = [dice.pick(1.0, 1.0, 1.0, -1.0, 0.5, 0.3, 3.0, 65536.0, 1e-4) for _ in range(rows)]
    upstream = tuple(upstream if options.get("reduction") == "none" else upstream[:1])
    tensors = dict(z=z, v=v)
    if call in ("tempered_log_softmax", "standardize_logits"):
        tensors, upstream = dict(z=z, u=np.round(dice.standard_normal(z.shape) * 4) / 4), (1.0,)
    elif call == "fused_linear_kd_loss":
        tensors = draw_heads(dice, rows, vocab, v)
        for name in ("inplace", *["teacher_grad"] * ("v" in tensors)):
            options.pop(name, None)
        options["memory_budget"] = dice.pick(1, 64 * vocab, 1 << 20)
        if dice.chance(0.2):
            options["logits_dtype"] = None
    module = call in MODULES and dice.chance(0.15)
    return Case(
        call,
        tensors,
        dtypes,
        options,
        labels,
        weight,
        upstream,
        leading,
        draw_layouts(dice, leading, options),
        pad,
        module,
    )


def draw_layouts(dice: Dice, leading: tuple, options: dict) -> tuple[str, str]:
    fit = [name for name, (dims, *_) in LAYOUTS.items() if len(leading) >= dims]
    student, teacher = (dice.pick(*fit) if dice.chance(0.4) else "plain" for _ in SIDES)
    if student == "expanded" or (options.get("inplace") and student != "odd start"):
        student = "plain"
    return student, "plain" if teacher == "expanded" and options.get("teacher_grad") else teacher


def draw_rows(dice: Dice, rows: int, vocab: int, dtypes) -> tuple[np.ndarray, np.ndarray]:
    z, v = (
        x.numpy()
        for x in make_rows(dice.pick(*KINDS), rows, vocab, torch.float64, seed=int(dice.integers(1 << 20)))
    )
    noise, chance = (lambda: dice.standard_normal((rows, vocab))), dice.chance
    if chance(0.35):  # spreads from 1e-3 to 300
        z, v = (x * dice.pick(1e-3, 0.03, 0.3, 10.0, 100.0) / 3 for x in (z, v))
    if chance(0.2):  # the student is the teacher, or nearly, or but for a constant
        z = v + dice.pick(0.0, 1e-3, 1e-3, 0.1) * noise() + dice.pick(0.0, 0.0, 1.0)
    if chance(0.15):  # ties
        z, v = np.round(z), np.round(v)
    if chance(0.2):  # confident rows
        at = int(dice.integers(vocab))
        z[:, at] += dice.pick(0, 8, 17, 40)
        v[:, at if chance(0.7) else 0] += dice.pick(0, 8, 17, 40)
    if chance(0.3):
        offset = dice.pick(10.0, 1000.0, -1000.0) if chance(0.6) else noise()[:, :1] * 100
        z, v = z + offset * chance(0.7), v + offset * chance(0.7)
    if chance(0.3):
        masked = dice.random((rows, vocab)) < dice.pick(0.2, 0.5, 0.8)
        masked[np.arange(rows), dice.integers(vocab, size=rows)] = False
        value, where = dice.pick(-math.inf, -1e9, -1e30, "min"), dice.pick("student", "teacher", "both")
        values = [torch.finfo(DTYPES[x]).min if value == "min" else value for x in dtypes]
        z, v = (
            np.where(masked & (where in (who, "both")), y, x)
            for who, x, y in zip(SIDES, (z, v), values, strict=True)
        )
    if chance(0.03):
        dice.pick(z, v)[0, int(dice.integers(vocab))] = dice.pick(math.nan, math.inf)
    return z, v


def draw_heads(dice: Dice, rows: int, vocab: int, v) -> dict:
    """Heads whose logits are exact in any dtype."""
    grid = lambda *shape: dice.integers(-4, 5, shape) / 2.0  # noqa: E731
    width, other = dice.pick(1, 2, 5), dice.pick(1, 3)
    out = dict(h=grid(rows, width), w=grid(vocab, width))
    out |= dict(v=v) if dice.chance(0.4) else dict(th=grid(rows, other), tw=grid(vocab, other))
    for name in ("b", "tb") if "tw" in out else ("b",):
        if dice.chance(0.5):
            out[name] = grid(vocab)
            if dice.chance(0.2):
                out[name][: int(dice.integers(vocab))] = dice.pick(-math.inf, -1e30)
    return out


def draw_options(dice: Dice, call: str, vocab: int, rows: int):
    """(options, labels, token weights, padding) that go together."""
    pick, chance = dice.pick, dice.chance
    o, labels, weight, pad, fused, decoupled = (
        {},
        None,
        None,
        (0, 0),
        call in MODULES,
        call == "decoupled_kd_loss",
    )
    if call == "standardize_logits":
        return o, labels, weight, pad
    kind, T = (
        pick("kl", *ALONE, *PARAMETERS) if fused else "kl",
        pick(*TEMPERATURES),
    )
    name = f"{kind}({pick(*PARAMETERS[kind])!r})" if kind in PARAMETERS else kind
    if name != "kl":
        o["divergence"] = name
    if math.isinf(T) and (kind in ("cross_entropy", "tvd") or "inf" in name or decoupled):
        T = 3.0
    if call != "logit_matching_loss" and T != 1:
        o["temperature"] = T
    if call == "tempered_log_softmax":
        return o, labels, weight, pad
    if fused and math.isfinite(T) and chance(0.1):
        own = [pick(0.1, 0.5, 1.0, 2.0, 20.0, 1e4) for _ in range(rows)]
        o["temperature"] = torch.tensor(own, dtype=torch.float64)
    if call != "logit_matching_loss" and (math.isinf(T) or chance(0.3)):
        o["t_squared"] = True
    if call == "logit_matching_loss" and chance(0.5):
        o["center"] = True
    if decoupled:
        o |= {
            x: pick(0.0, 0.5, 2.0, -1.0)
            for x in ("target_weight", "non_target_weight", "hard_weight")
            if chance(0.4)
        }
    if chance(0.4) or decoupled:
        ignored = pick(-100, -100, -1, 255, 0)
        labels = [ignored if chance(0.2) else int(dice.integers(vocab)) for _ in range(rows)]
        if ignored != -100:
            o["ignore_index"] = ignored
        if not decoupled and chance(0.7):
            o["hard_weight"] = pick(1.0, 0.1, 2.0)
            o |= {
                x: pick(*y)
                for x, y in dict(label_smoothing=(0.1, 0.5), z_loss=(1e-4, 0.1, 10.0)).items()
                if fused and chance(0.25)
            }
    if chance(0.3):
        weight = [pick(0.0, 1.0, 1.0, 0.25, 3.0, 1e-3) for _ in range(rows)]
    if not decoupled and chance(0.25):
        o["soft_weight"] = pick(0.0, 0.9, 3.0, -1.0, 1e-3)
    if chance(0.6):
        o["reduction"] = pick("none", "none", "sum")
    elif chance(0.25):
        o["num_items"] = pick(3, 2.5, torch.tensor(7))
    if chance(0.15):
        pad, o["vocab_size"] = (int(dice.integers(3)), int(dice.integers(3))), vocab
    if not decoupled and chance(0.25):
        o["teacher_grad"] = True
    if not decoupled and chance(0.12) and not (o.get("teacher_grad") and o.get("reduction") == "none"):
        o["inplace"] = True
    if fused:
        transforms = {
            f"{x}_transform": LogitTransform(pick(0.0625, 0.5, 1.0, 2.0, 10.0), pick(None, 1.0, 5.0, 30.0))
            for x in SIDES
        }
        o |= {x: y for x, y in transforms.items() if chance(0.1)}
        if chance(0.25):
            o["return_stats"] = True
    return o, labels, weight, pad


# ---------------------------------------------------------------- shrinking


def simpler(case: Case) -> Iterator[Case]:
    """Calls with less in them, those with much less first."""
    rows, vocab, options = case.rows, case.vocab, case.options
    yield from (only_rows(case, keep) for keep in parts(rows))
    if case.leading is not None:
        yield replace(
            case, leading=None, layouts=tuple("plain" if x == "transposed" else x for x in case.layouts)
        )
    yield from (only_classes(case, keep) for keep in parts(vocab))
    for name in options:
        without = {
            x: y
            for x, y in options.items()
            if x != name and not (name == "hard_weight" and x in ("label_smoothing", "z_loss"))
        }
        yield replace(
            case, options=without, upstream=case.upstream[:1] if name == "reduction" else case.upstream
        )
    for less in (
        dict(labels=None),
        dict(weight=None),
        dict(layouts=("plain", "plain")),
        dict(pad=(0, 0)),
        dict(module=False),
    ):
        yield replace(case, **less)
    yield replace(case, upstream=(1.0,) * len(case.upstream))
    if case.labels is not None:
        yield replace(case, labels=[min(max(x, 0), vocab - 1) for x in case.labels])
    yield from (
        replace(case, tensors={x: y for x, y in case.tensors.items() if x != name}) for name in ("b", "tb")
    )
    for dtypes in (("fp32", "fp32"), ("fp32", case.dtypes[1]), (case.dtypes[0], "fp32"), case.dtypes[:1] * 2):
        yield replace(case, dtypes=dtypes)
    if "temperature" in options:
        yield from (replace(case, options=options | dict(temperature=T)) for T in (2.0, 4.0, 10.0, 0.5, 0.1))
    if "(" in options.get("divergence", ""):
        kind = options["divergence"].partition("(")[0]
        yield from (replace(case, options=options | dict(divergence=f"{kind}({a})")) for a in (0.5, 2.0, 0.1))
    for change in (
        np.zeros_like,
        np.round,
        lambda x: np.round(x, 1),
        lambda x: np.round(x, 2),
        lambda x: x - np.trunc(x.flat[0]),
    ):
        for name, x in case.tensors.items():
            usual = np.isfinite(x) & (np.abs(x) < 1e6)
            yield replace(case, tensors=case.tensors | {name: np.where(usual, change(finite(x)), x)})
    for name, x in case.tensors.items():
        for i in range(x.size if x.size <= 40 else 0):
            for number in (0.0, 1.0, np.round(x.flat[i]), np.round(x.flat[i], 1)):
                y = x.copy()
                y.flat[i] = number
                yield replace(case, tensors=case.tensors | {name: y})


def parts(n: int) -> list[list[int]]:
    """Of n things both halves, and all but one."""
    every = list(range(n))
    halves = [every[: n // 2], every[n // 2 :]] if n > 1 else []
    return halves + ([every[:i] + every[i + 1 :] for i in every] if 1 < n <= 40 else [])


def only_rows(case: Case, keep: list[int]) -> Case:
    some = lambda x: x if x is None else [x[i] for i in keep]  # noqa: E731
    tensors = {name: x if name in PER_CLASS else x[keep] for name, x in case.tensors.items()}
    layouts = tuple("plain" if x == "transposed" else x for x in case.layouts)
    upstream = tuple(some(case.upstream)) if case.per_row else case.upstream
    own = {n: x[keep] for n, x in case.options.items() if n == "temperature" and isinstance(x, torch.Tensor)}
    return replace(
        case,
        options=case.options | own,
        tensors=tensors,
        labels=some(case.labels),
        weight=some(case.weight),
        upstream=upstream,
        leading=None,
        layouts=layouts,
    )


def only_classes(case: Case, keep: list[int]) -> Case:
    tensors = {
        n: x[:, keep] if n in ("z", "v", "u") else x[keep] if n in PER_CLASS else x
        for n, x in case.tensors.items()
    }
    labels, ignored = case.labels, case.get("ignore_index", -100)
    if labels is not None:
        labels = [x if x == ignored else keep.index(x) if x in keep else 0 for x in labels]
    options = case.options | ({"vocab_size": len(keep)} if "vocab_size" in case.options else {})
    return replace(case, tensors=tensors, labels=labels, options=options)


def shrunk(case: Case, failure: str, excused: Callable, tries: int = 800) -> tuple[Case, str]:
    """The smallest call found that fails in the same way."""
    candidates = simpler(case)
    while tries > 0 and (smaller := next(candidates, None)):
        tries -= 1
        if valid(smaller) and smaller.size < case.size:
            found = judge(smaller)
            if found and kind_of(found) == kind_of(failure) and not excused(smaller, found):
                case, failure, candidates = smaller, found, simpler(smaller)
    return case, failure


def valid(case: Case) -> bool:
    decoupled = case.call == "decoupled_kd_loss"
    limit = (
        math.isinf(case.temperature)
        and "temperature" in case.options
        and not (case.get("t_squared") or case.call == "tempered_log_softmax")
    )
    padded = case.pad == (0, 0) or "vocab_size" in case.options
    return (
        padded
        and not limit
        and (case.labels is not None or not (decoupled or case.get("hard_weight")))
        and not (decoupled and case.vocab < 2)
    )


def kind_of(failure: str) -> str:
    """What is wrong: which figure, in a number or in not being one; or what is raised."""
    if failure.startswith("raises"):
        return failure.partition(":")[0]
    head, _, rest = failure.partition(": found ")
    return head.partition("[")[0] + (" is not a number" if rest.startswith(("nan", "inf", "-inf")) else "")


# ---------------------------------------------------------------- what is known to be wrong


@dataclass(frozen=True)
class Known:
    """A fault: why, which failures it excuses, and one that a test sees fail. Who mends it deletes it."""

    reason: str
    excuses: Callable[[Case, str], bool]
    example: Case


def one_row(z, v, dtypes=("fp32", "fp32"), call="fused_kd_loss", labels=None, weight=None, **options) -> Case:
    return Case(call, dict(z=np.array([z], float), v=np.array([v], float)), dtypes, options, labels, weight)


def head(rows: int, **more) -> Case:
    """Logits of 0 from hidden states of 0."""
    return Case(
        "fused_linear_kd_loss",
        dict(h=np.zeros((rows, 1)), w=np.array([[0.0], [1]]), v=np.zeros((rows, 2))),
        **more,
    )


def both(case: Case) -> list[np.ndarray]:
    """The logits of student and teacher; the student's alone where there is no other."""
    return [logits(case, side) for side in range(2 if {"v", "tw"} & set(case.tensors) else 1)]


def has_grad(case: Case, dtype: str) -> bool:
    return dtype in case.dtypes[: 1 + bool(case.get("teacher_grad"))]


def is_broken(case: Case) -> bool:
    return any(broken(row) for x in both(case) for row in x)


def lacks_label(case: Case) -> bool:
    """Whether a row's label is masked in the student."""
    z, vocab = both(case)[0], case.vocab
    return any(
        0 <= label < vocab and np.isneginf(row[label])
        for row, label in zip(z, case.labels or [-1] * case.rows, strict=True)
    )


def largest(case: Case) -> float:
    """The size of the largest logit that is finite."""
    return max(float(np.abs(finite(x)).max(initial=0)) for x in both(case))


def scales(case: Case) -> list[float]:
    """What the models' logits are multiplied with."""
    return [getattr(case.get(f"{side}_transform"), "scale", 1.0) for side in ("student", "teacher")]


def is_offset(case: Case) -> bool:
    """Whether a row's student is its teacher but for an offset and its rounding."""
    z, v = both(case)
    with np.errstate(invalid="ignore"):
        apart = np.asarray(z - v, np.float64)
    return bool((np.ptp(apart, axis=-1) <= 1e-15 * largest(case)).any())


def is_rounded(case: Case) -> bool:
    """Whether fp32 holds the differences of the logits."""
    x = both(case)
    difference = finite(x[0]) - finite(x[-1])
    return bool((difference.astype(np.float32) != difference).any())


def figure(failure: str, after: str = "off by ") -> float:
    return float(failure.partition(after)[2].split()[0].rstrip(","))


def is_value(failure: str) -> bool:
    return kind_of(failure) in ("value", "stats.divergence")


def excess(failure: str) -> float:
    """The error as a multiple of what is allowed."""
    return figure(failure) / max(figure(failure, "where "), 1e-300) if "off by" in failure else math.inf


FAR_APART = dict(divergence="skew_reverse_kl(0.99)", temperature=0.1)
SLOPING = dict(temperature=1e4, t_squared=True, hard_weight=0.1, reduction="none")
KNOWN: dict[str, Known] = {
    "fp16 head: upstream gradients of different size": Known(
        "one factor for all rows, that of the largest: the others' gradients are subnormal",
        lambda case, failure: (
            case.call == "fused_linear_kd_loss" and has_grad(case, "fp16") and ".grad" in failure
        ),
        head(2, dtypes=("fp16", "fp32"), options=SLOPING, labels=[1, 1], upstream=(0.5, 65536.0)),
    ),
    "Triton: 16-bit differences": Known(
        "the rounding of o - b is not carried for 16-bit logits, though a common offset takes it "
        "beyond 24 bits",
        lambda case, failure: (
            case.get("backend") == "triton" and not {"fp32", "fp64"} & set(case.dtypes) and is_rounded(case)
        ),
        one_row([0, 0.0316], [1001, 1001], ("fp16", "fp16"), temperature=9.0, backend="triton"),
    ),
    "TVD of equal rows": Known(
        "a gradient of 1e-17 where the right one is 0, and of any sign where an offset is rounded",
        lambda case, failure: case.divergence == "tvd" and ".grad" in failure and is_offset(case),
        one_row([1004, 999, 995], [1004, 999, 995], ("fp32", "fp64"), divergence="tvd", temperature=4.0),
    ),
    "statistics of transformed logits": Known(
        "a transformed logit is rounded to fp32",
        lambda case, failure: (
            failure.startswith("stats.")
            and {"student_transform", "teacher_transform"} & set(case.options)
            and figure(failure) < 1e-7 * largest(case) * max(scales(case)) / case.temperature
        ),
        one_row(
            [0, 0],
            [1003, 1002.6395],
            teacher_transform=LogitTransform(10.0),
            return_stats=True,
            backend="cpu",
        ),
    ),
    "decoupled: a class that is masked in one model": Known(
        "+inf or nan, as what is left of the target is smaller than fp64 can hold, or not",
        lambda case, failure: case.call == "decoupled_kd_loss" and "right nan" in failure,
        one_row(
            [0, -math.inf, 0],
            [0, 0, 126],
            ("fp32", "bf16"),
            call="decoupled_kd_loss",
            labels=[2],
            temperature=0.1,
            non_target_weight=0.0,
        ),
    ),
    "alpha's gradient near a float's largest": Known(
        "it is a product, of which one factor is beyond",
        lambda case, failure: (
            oracle.member(case.divergence)[2] and kind_of(failure).endswith("grad is not a number")
        ),
        one_row([0, 0, 0, 0], [119, -10, 0, 0], divergence="alpha(-3.0)", temperature=4.0),
    ),
    "cross entropy of one-hot rows": Known(
        "what is summed is rounded at 1 in fp64, where KL's value is relative to itself",
        lambda case, failure: (
            case.divergence == "cross_entropy" and is_value(failure) and figure(failure) < 1e-13
        ),
        one_row([40, 0], [17, 0], divergence="cross_entropy", temperature=0.5),
    ),
    "TVD of one-hot rows": Known(
        "the same, beyond the 1e-15 that bounds.py allows",
        lambda case, failure: case.divergence == "tvd" and is_value(failure) and figure(failure) < 1e-12,
        one_row([0, 4], [998, 1001], divergence="tvd", temperature=0.1),
    ),
    "a bound missed by less than its double": Known(
        "few classes, fp32 roundings that meet no others to average with",
        lambda case, failure: excess(failure) < 2,
        one_row(
            [-2, 6, 0, 2, 9, 1, 1, 4, 1, 2],
            [-2, 1, 0, 2, 7, 7, 1, 4, 1, 7],
            temperature=0.3,
            divergence="reverse_kl",
        ),
    ),
    "fp64's finfo.min": Known(
        "its quotient by T, or that times p, is beyond fp64",
        lambda case, failure: "fp64" in case.dtypes and largest(case) > 1e300,
        one_row(
            [0, 0],
            [-1.7976931348623157e308, 0],
            ("fp32", "fp64"),
            temperature=0.5,
            return_stats=True,
            backend="eager",
        ),
    ),
    "what is near fp32's largest": Known(
        "a part of it is beyond",
        lambda case, failure: (
            "is not a number" in kind_of(failure)
            and max(abs(figure(failure, "right ")), figure(failure, "where "))
            * (1e4 if case.weight is not None else 1)
            > 1e35
        ),
        replace(
            one_row([0, 0], [-3.3895313892515355e38, 0], temperature=0.1, divergence="reverse_kl"),
            upstream=(1e-4,),
        ),
    ),
    "fp64 mixtures of rows that are 1e5 T apart": Known(
        "1e-9 of D is held, where logits' rounding over T is no part of it",
        lambda case, failure: (
            case.dtypes[0] == "fp64"
            and largest(case) / case.temperature > 1e5
            and is_value(failure)
            and figure(failure) < 1e-8 * figure(failure, "right ")
        ),
        one_row([0.0010470595359802248, 0], [0, 33443], ("fp64", "fp32"), **FAR_APART),
    ),
    "orders above 1: ties of large finite masks": Known(
        "z - v is the same of all the classes that the mask is in, and the rest of the logits is lost in it",
        lambda case, failure: "renyi" in case.divergence and largest(case) > 1e15 and ".grad" in failure,
        one_row([-1e30, -1e30, 0], [0, 1, 0], divergence="renyi(inf)"),
    ),
    "fp64: order inf of rows that are equal but for an offset": Known(
        "D is what rounding is in z - v, and so is which classes have the gradient",
        lambda case, failure: (
            "renyi(inf)" in case.divergence
            and case.dtypes[0] == "fp64"
            and (".grad" in failure or figure(failure) < 1e-15 * (1 + largest(case)) / case.temperature)
        ),
        one_row(
            [-2.900899092356364, 41.373846689860024, -1.6695853471755981],
            [-1003.9008990923563, -959.62615331014, -1002.6695853471756],
            ("fp64", "fp64"),
            divergence="renyi(inf)",
            temperature=2.0,
        ),
    ),
    "orders: a mass below e^-700": Known(
        "it is 0 in fp64",
        lambda case, failure: (
            "renyi" in case.divergence
            and largest(case) / case.temperature > 700
            and "is not a number" in kind_of(failure)
        ),
        one_row([-math.inf, 0], [0, -154], divergence="reverse_renyi(0.0)", temperature=0.1),
    ),
    "decoupled: nan of a teacher at the label": Known(
        "target_weight=0 leaves the label out: the value and the others' gradient are nan, the "
        "label's is the hard term's",
        lambda case, failure: (
            case.call == "decoupled_kd_loss" and case.get("target_weight") == 0 and is_broken(case)
        ),
        one_row([0, 0], [math.nan, 0], call="decoupled_kd_loss", labels=[0], target_weight=0.0),
    ),
    "fp16: elements of a teacher's gradient that are subnormal": Known(
        "one factor keeps both gradients off underflow; the hard term that it makes room for, or a "
        "divergence's steepness, is not theirs",
        lambda case, failure: (
            case.dtypes[1] == "fp16"
            and failure.startswith("v.grad")
            and abs(figure(failure, "right ")) < 2.0**-14
        ),
        replace(
            one_row(
                [0, 0],
                [0, 1],
                ("fp64", "fp16"),
                labels=[1],
                divergence="reverse_renyi(0.5)",
                temperature=1e4,
                hard_weight=1.0,
                teacher_grad=True,
                teacher_transform=LogitTransform(0.5, 5.0),
            ),
            upstream=(65536.0,),
        ),
    ),
    "triton: the z-loss of a log-sum-exp near 0": Known(
        "the log-sum-exp is rounded at the size of the logits in base 2",
        lambda case, failure: (
            case.get("backend") == "triton" and bool(case.get("z_loss")) and excess(failure) < 10
        ),
        one_row(
            [0.010009765625],
            [0],
            ("fp32", "fp32"),
            labels=[0],
            hard_weight=1.0,
            z_loss=10.0,
            backend="triton",
        ),
    ),
    "triton: masks of finfo.min": Known(
        "beyond fp32 over a small T, or when they are scaled",
        lambda case, failure: (
            case.get("backend") == "triton" and largest(case) > 1e38 and failure.startswith("value")
        ),
        one_row(
            [0, 3], [-3.3895313892515355e38, 0], divergence="reverse_kl", temperature=0.1, backend="triton"
        ),
    ),
}


def is_known(case: Case, failure: str) -> bool:
    return any(known.excuses(case, failure) for known in KNOWN.values())


# ---------------------------------------------------------------- searching


def search(
    seed: int, count: int, excused: Callable = is_known, progress: bool = False
) -> Iterator[tuple[int, Case, str]]:
    """(number, call, what is wrong) of the calls that are wrong and not excused."""
    begin = time.monotonic()
    for number in range(count):
        case = draw(seed, number)
        failure = judge(case)
        if failure and not excused(case, failure):
            yield number, case, failure
        if progress and (number + 1) % 500 == 0:
            spent = time.monotonic() - begin
            left = spent / (number + 1) * (count - number - 1)
            print(
                f"{number + 1} of {count} calls in {spent:.0f} s, about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def main(seed: int, count: int, excused: Callable) -> int:
    torch.set_num_threads(1)
    found: dict[tuple, list] = {}
    for number, case, failure in search(seed, count, excused, progress=True):
        kind = (
            case.call,
            case.divergence.partition("(")[0],
            case.get("backend"),
            case.dtypes[0],
            kind_of(failure),
        )
        found.setdefault(kind, []).append((number, case, failure))
    reports = []
    for (number, case, failure), *others in found.values():
        case, failure = shrunk(case, failure, excused)
        reports.append(
            (
                case.size,
                f"# call {number} of seed {seed}; {len(others)} more like it\n{snippet(case, failure)}\n",
            )
        )
    print(*(text for _, text in sorted(reports)), sep="\n", end="")
    print(
        f"{sum(map(len, found.values()))} of {count} calls are wrong, in {len(found)} kinds", file=sys.stderr
    )
    return bool(found)


if __name__ == "__main__":
    everything = (lambda case, failure: False) if "--known" in sys.argv else is_known
    sys.exit(main(*(int(x) for x in sys.argv[1:] if x != "--known"), everything))
