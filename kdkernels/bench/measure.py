"""Time, peak memory and errors of the contenders on one case."""

from __future__ import annotations

import ctypes
import datetime
import functools
import gc
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import __version__, divergence, options, recycle
from ..backends import native, resolve
from . import contenders, report
from .contenders import COMPILED, Loss
from .reference import check, reference

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what the fused loss must reach before its time counts, relative, (loss, gradient): its bound, and one
# rounding of a 16-bit gradient
TOLERANCES = {"fp32": (2e-5, 3e-6), "bf16": (2e-5, 4e-3), "fp16": (2e-5, 1e-3)}
CHECKED_ROWS = 4
Key = TypeVar("Key")
LOSS_SCALE = 2.0**14  # what keeps an fp16 gradient from underflow, as in training


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

    def logits(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(student, teacher): a teacher as peaked as a language model, and a student that has learned most of
        it."""
        z, v = (x.to(TORCH_DTYPES[self.dtype]) for x in logits(self.rows, self.vocab, device=device))
        return z.requires_grad_(), v


def shape(text: str) -> tuple[int, int]:
    try:
        rows, vocab = map(int, text.split("x"))
        if rows < 1 or vocab < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"--shapes: ROWSxVOCAB, as 256x128256; got {text!r}") from None
    return rows, vocab


def cases(args) -> list[Case]:
    """Of the command line; SystemExit for what cannot be measured."""
    try:
        return [
            Case(*shape(s), *rest)
            for s, *rest in product(args.shapes, args.dtypes, args.divergences, args.temperatures)
        ]
    except ValueError as error:
        raise SystemExit(f"bench: {error}") from None


class Bench:
    """The machine the cases run on, and how many timed rounds each gets."""

    def __init__(
        self,
        device: str | None = None,
        repeats: int = 5,
        compiled: bool = True,
        backends: tuple[str, ...] = ("auto",),
        peers: bool = False,
    ):
        """SystemExit for a backend that cannot run there."""
        if device is None:
            device = (
                torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
            )
        self.device, self.repeats, self.compiled, self.backends = (
            torch.device(device),
            repeats,
            compiled,
            backends,
        )
        for name in backends:
            try:
                resolve(name, self.device)
            except (ValueError, RuntimeError) as error:
                raise SystemExit(f"bench: {error}") from None
        self.peers = peers
        self.machine = machine(self.device)

    @classmethod
    def of(cls, args, compiled: bool) -> Bench:
        """From the command line."""
        return cls(args.device, args.repeats, compiled, tuple(dict.fromkeys(args.backends)), args.peers)

    def run(self, case: Case, on_step: Callable[[str], object] = lambda name: None) -> dict:
        """Everything about one case, ready for JSON. SystemExit where the fused loss is wrong."""
        which, T = divergence.parse(case.divergence), case.temperature
        z, v = case.logits(self.device)
        check = _Check(case, z, v)
        eager = contenders.spellings(which, T)
        others = {} if self.device.type == "cpu" else contenders.libraries(which, T)
        others |= contenders.functions(which, T) if self.peers else {}
        fused = {contenders.fused_name(x): contenders.fused(which, T, x) for x in self.backends}
        losses: dict[str, Loss] = {**fused, **eager, **others}
        errors = {}
        for name in list(losses):
            on_step(name)
            try:
                errors[name] = check.errors(losses[name], contenders.VALUES.get(name))
            except Exception as error:
                if name not in others:
                    raise
                print(report.left_out(name, error), flush=True)
                del losses[name]
        for name in fused:
            if not all(
                error <= limit for error, limit in zip(errors[name], TOLERANCES[case.dtype], strict=True)
            ):
                raise SystemExit(
                    f"{name} is wrong here ({case}): relative errors of loss and gradient "
                    f"{errors[name]}, no time is given"
                )

        if self.compiled:
            on_step(COMPILED)
            losses[COMPILED] = contenders.compiled(list(eager.values())[-1])
            errors[COMPILED] = check.errors(losses[COMPILED])
        memory = {}
        for name, loss in losses.items():
            on_step(name)
            memory[name] = self._peak_memory(_step(loss, z, v))
        on_step("timing")
        target = torch.empty_like(v)
        steps = {"copy": lambda: target.copy_(v)} | {name: _step(loss, z, v) for name, loss in losses.items()}
        times = self._times(steps, self.repeats)

        size = v.numel() * v.element_size()
        copy_speed = 2 * size / times.pop("copy")[0]
        base = times[next(iter(fused))][0]
        return asdict(case) | {
            "device": self.machine["device"],
            "copy_gb_per_s": copy_speed / 1e9,
            "contenders": {
                name: {
                    "ms": 1e3 * t[0],
                    "ms_p20": 1e3 * t[1],
                    "ms_p80": 1e3 * t[2],
                    "speed_up": t[0] / base,
                    "fraction_of_copy": 3 * size / t[0] / copy_speed,
                    "memory_in_gradients": None if memory[name] is None else memory[name] / size,
                    "loss_error": errors[name][0],
                    "grad_error": errors[name][1],
                }
                for name, t in times.items()
            },
        }

    def _times(
        self, steps: dict[str, Callable[[], object]], repeats: int
    ) -> dict[str, tuple[float, float, float]]:
        """Seconds of each (median, 20th and 80th percentile). On a CPU they take turns, one untimed round
        first."""
        quantiles = [0.5, 0.2, 0.8]
        if self.device.type != "cpu":
            # flushes the cache between calls, times with the device's own events
            from triton.testing import do_bench

            return {
                name: tuple(x / 1e3 for x in do_bench(step, quantiles=quantiles))
                for name, step in steps.items()
            }
        return {
            name: tuple(np.quantile(x, quantiles).tolist()) for name, x in take_turns(steps, repeats).items()
        }

    def _peak_memory(self, step: Callable[[], object]) -> int | None:
        """Bytes that a step holds at its peak beyond what was held before (it has run before); None where the
        system does not tell."""
        recycle.clear()
        gc.collect()
        if self.device.type == "cpu":
            return resident_peak(step)
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        return torch.cuda.max_memory_allocated(self.device) - before


def _step(loss: Loss, z: Tensor, v: Tensor) -> Callable[[], None]:
    """Loss, gradient, and the freeing of the gradient, which each contender pays for itself."""

    def step() -> None:
        loss(z, v).backward()
        z.grad = None

    return step


class _Check:
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


def logits(
    rows: int, vocab: int, spread: float = 0.5, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(student, teacher), whose logits differ by `spread`; drawn on the device, as a CPU takes seconds for
    4096 x 128256."""
    g = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, rows, vocab, device=device, generator=g)
    v = draw() * 3
    return v + draw() * spread, v


def take_turns(steps: dict[Key, Callable[[], object]], repeats: int) -> dict[Key, list[float]]:
    """Seconds of each in each round, one untimed round first."""
    seconds: dict[Key, list[float]] = {key: [] for key in steps}
    for i in range(repeats + 1):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            if i:
                seconds[key].append(time.perf_counter() - start)
    return seconds


def resident_peak(step: Callable[[], object]) -> int | None:
    """Bytes of memory that a call holds at its peak beyond what the process held before; None where the
    system does not tell."""

    def status(key: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc has kept would hide what a step takes
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        before = status("VmRSS:")
        step()
        return status("VmHWM:") - before
    except (OSError, AttributeError):
        return None


def machine(device: torch.device) -> dict[str, str | int]:
    """What a result needs beside it to be read later."""
    library = native.library()
    name = _cpu_name()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "kdkernels": __version__,
        "cpu_library": library if isinstance(library, str) else library.isa,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
