"""Time, peak memory and errors of any contenders, on one machine, and what else runs there meanwhile."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import time
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import __version__, recycle
from ..backends import cpu, resolve
from . import screen
from .contenders import fused_name

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = 2.0**14  # what keeps an fp16 gradient from underflow, as in training
BUSY = 0.1  # a share of the cores, taken by other programs, that is worth a warning
UNSTEADY = 0.3  # the same of the spread of a contender's times, from the 20th to the 80th percentile
Key = TypeVar("Key")
Errors = tuple[float, ...]  # relative, of the loss and of each gradient
Times = dict[str, float]


def sizes(option: str, names: str, text: str) -> tuple[int, ...]:
    """Those of a text such as 256x128256, with the names ROWSxVOCAB; ValueError where it has others."""
    try:
        found = tuple(map(int, text.split("x")))
    except ValueError:
        found = ()
    if len(found) != names.count("x") + 1 or min(found) < 1:
        raise ValueError(f"{option}: {names}, whole numbers; got {text!r}")
    return found


class Bench:
    """The machine the cases run on, and how many timed rounds each gets."""

    def __init__(
        self,
        device: str | None = None,
        repeats: int = 5,
        compiled: bool = True,
        backends: tuple[str, ...] = ("auto",),
        peers: bool = False,
        processor_time: bool = False,
    ):
        """SystemExit for a backend that cannot run there, and for a processor's time of a GPU."""
        if device is None:
            device = (
                torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
            )
        self.device, self.repeats, self.compiled = torch.device(device), repeats, compiled
        self.backends, self.peers = backends, peers
        self.clock = time.process_time if processor_time else time.perf_counter
        if processor_time and self.device.type != "cpu":
            raise SystemExit(f"bench: --processor-time is for a CPU, not {device}")
        for name in backends:
            try:
                resolve(name, self.device)
            except (ValueError, RuntimeError) as error:
                raise SystemExit(f"bench: {error}") from None
        self.machine = machine(self.device) | ({"clock": "processor time"} if processor_time else {})

    @classmethod
    def of(cls, args, compiled: bool) -> Bench:
        """From the command line."""
        backends = tuple(dict.fromkeys(args.backends))
        return cls(args.device, args.repeats, compiled, backends, args.peers, args.processor_time)

    def check(
        self,
        names: Collection[str],
        errors: Callable[[str], Errors],
        tolerances: Errors,
        others: Collection[str],
    ) -> dict[str, Errors]:
        """Errors of the contenders of these names. One of `others` that cannot run is left out, with a line;
        SystemExit where a fused loss is wrong."""
        found: dict[str, Errors] = {}
        own = [fused_name(x) for x in self.backends]
        for name in names:
            try:
                found[name] = errors(name)
            except Exception as error:
                if name not in others:
                    raise
                reason = " ".join(str(error).split())[:120]
                screen.say(f"left out: {name}: {type(error).__name__}: {reason}")
                continue
            if name in own and not all(x <= y for x, y in zip(found[name], tolerances, strict=True)):
                raise SystemExit(
                    f"{name} is wrong here: relative errors of loss and gradient {found[name]}, where "
                    f"{tolerances} are allowed; no time is given"
                )
        return found

    def times(self, steps: dict[str, Callable[[], object]]) -> dict[str, Times]:
        """Milliseconds of each: median, 20th and 80th percentile. On a CPU they take turns."""
        quantiles = [0.5, 0.2, 0.8]
        if self.device.type != "cpu":
            # flushes the cache between calls, times with the device's own events
            from triton.testing import do_bench

            found = {name: do_bench(step, quantiles=quantiles) for name, step in steps.items()}
        else:
            found = {
                name: (1e3 * np.quantile(x, quantiles)).tolist()
                for name, x in take_turns(steps, self.repeats, self.clock).items()
            }
        return {name: dict(zip(("ms", "ms_p20", "ms_p80"), x, strict=True)) for name, x in found.items()}

    def peak_memory(self, step: Callable[[], object]) -> int | None:
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


class Watch:
    """`with Watch() as watch: ...`, then `watch.cores`: the cores that other programs, and other machines on
    this one's processor, took meanwhile; None where the system does not tell."""

    cores: float | None = None

    def __enter__(self) -> Watch:
        self._start = self._now()
        return self

    def __exit__(self, *_) -> None:
        if self._start is not None:
            wall, all_, own = (x - y for x, y in zip(self._now(), self._start, strict=True))
            self.cores = max(0.0, (all_ - own) / max(wall, 0.01))

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: of the clock, of all processors at work, of them for this process."""
        try:
            with open("/proc/stat") as lines:
                user, nice, system, _, _, *interrupts, steal = map(int, lines.readline().split()[1:9])
        except (OSError, ValueError):
            return None
        ticks = user + nice + system + sum(interrupts) + steal
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def disturbed(cores: float | None, spread: float = 0.0) -> str:
    """A line where other programs took so many cores, or times vary so much, that they mean little; else
    empty."""
    reasons, here = [], os.cpu_count() or 1
    if cores is not None and cores > BUSY * here:
        reasons.append(f"other programs take {cores:.1f} of {here} cores")
    if spread > UNSTEADY:
        reasons.append(f"times vary by {spread:.0%}")
    return f"busy: {', '.join(reasons)}; read ratios, not times" if reasons else ""


def spread(times: dict[str, Times]) -> float:
    """Of the contenders' times from round to round: the median of their relative ranges."""
    return float(np.median([(x["ms_p80"] - x["ms_p20"]) / x["ms"] for x in times.values()]))


def step(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], None]:
    """Loss, gradients, and the freeing of the gradients, which each contender pays for itself."""

    def once() -> None:
        loss(*inputs).backward()
        for x in inputs:
            x.grad = None

    return once


def take_turns(
    steps: dict[Key, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Key, list[float]]:
    """Seconds of each in each round, one untimed round first."""
    seconds: dict[Key, list[float]] = {key: [] for key in steps}
    for i in range(repeats + 1):
        for key, step in steps.items():
            start = clock()
            step()
            if i:
                seconds[key].append(clock() - start)
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
    library = cpu.library()
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
