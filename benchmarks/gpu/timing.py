"""Stages that measure times of loss and gradient: the loss alone, replayed from a graph, over shapes, and
over the knobs of the plans."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kdkernels.backends import cuda
from kdkernels.backends.triton import numbers as triton_numbers
from kdkernels.backends.triton import plan as triton_plan
from kdkernels.bench import contenders, packages
from kdkernels.divergence import parse

from .cases import Case
from .setting import Setting

Loss = Callable[[Tensor, Tensor], Tensor]
DIVERGENCES = ("kl", "renyi(0.5)")
BIG, SMALL = (4096, 128256), (2, 500)
# short vocabularies and long ones, even and odd; few rows
SHAPES = (
    (4096, 32768),
    (4096, 50257),
    (2048, 151936),
    (1024, 262144),
    (4096, 8192),
    (64, 262144),
    (16, 128256),
)
SMALL_SHAPES = ((2, 255),)
# bytes written between two calls, so that the second-level cache holds nothing of the last one
FLUSH = 256 << 20
BUSY_CYCLES = 4_000_000  # of the device, 2 ms: what a step's launches take the host at most
# the Triton plan's knobs and their values, one changed at a time
TRITON_KNOBS = {
    "PART": (triton_plan, (16 << 10, 32 << 10, 64 << 10, 128 << 10)),
    "LANES": (triton_plan, (128, 256, 512)),
    "RESIDENT": (triton_plan, (4, 6, 8)),
    "WARM": (triton_numbers, (0.0, 8.0)),  # 0: every call takes the exact form
}
CUDA_KNOBS = {"wide": (0, 1), "stages": (2, 3)}  # kd_tune's


def shapes(setting: Setting) -> tuple[tuple[int, int], ...]:
    return SMALL_SHAPES if setting.rehearsal else SHAPES


def big(setting: Setting) -> tuple[int, int]:
    return SMALL if setting.rehearsal else BIG


def median(step: Callable[[], object], setting: Setting, seconds: float = 0.4, most: int = 100) -> dict:
    """{ms, p20, p80, n, host_ms}: the median over calls, each timed by the device, with the second-level
    cache flushed before it.

    The device has work to do while the host launches a call, as in a training step, so that ms has nothing of
    the host's part; host_ms is that, until the last launch.
    """
    step()
    setting.wait()
    times, hosts, stop = [], [], time.perf_counter() + seconds
    if setting.device == "cpu":
        while len(times) < 2:
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
    else:
        flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
        while len(times) < 5 or (time.perf_counter() < stop and len(times) < most):
            flush.zero_()
            torch.cuda._sleep(BUSY_CYCLES)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun = time.perf_counter()
            start.record()
            step()
            end.record()
            hosts.append(1e3 * (time.perf_counter() - begun))
            end.synchronize()
            times.append(start.elapsed_time(end))
    times.sort()
    found = {
        "ms": statistics.median(times),
        "p20": times[len(times) // 5],
        "p80": times[len(times) * 4 // 5],
        "n": len(times),
    }
    return found | ({"host_ms": statistics.median(hosts)} if hosts else {})


def memory(step: Callable[[], object], setting: Setting, beside: Tensor) -> dict:
    """{memory}: peak bytes that a step (which has run before) holds beyond what is there, as a multiple of a
    tensor's."""
    if setting.device == "cpu":
        return {}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return {"memory": (torch.cuda.max_memory_allocated() - before) / beside.nbytes}


def losses(kind: str, divergence: str, setting: Setting) -> dict[str, Loss]:
    """name -> loss(z, v), the mean of T^2 D at T = 2, of a kind of contender; a backend that was wrong for
    this divergence is none."""
    which, T = parse(divergence), 2.0
    if kind in ("triton", "cuda"):
        if divergence in setting.wrong(kind):
            return {}
        return {kind: lambda z, v: Case(divergence, T).loss(z, v, None, setting.backend(kind))}
    if kind == "simple":
        from . import simple_kl

        return simple_kl.variants() if divergence == "kl" else {}
    spelled = contenders.spellings(which, T)
    if kind == "eager":
        return spelled
    if kind == "compile":
        return {contenders.COMPILED: contenders.compiled(list(spelled.values())[-1])}
    return {} if setting.rehearsal else packages.kernels(which, T)


def step_of(loss: Loss, z: Tensor, v: Tensor) -> Callable[[], None]:
    def step() -> None:
        loss(z, v).backward()
        z.grad = None

    return step


def copy(setting: Setting) -> None:
    """How fast this device copies, bytes read and written: what every time is compared with."""
    rows, vocab = big(setting)

    def measure() -> dict:
        source = Case("kl", rows=rows, vocab=vocab).inputs(setting.device)[1]
        target = torch.empty_like(source)
        found = median(lambda: target.copy_(source), setting)
        return found | {"gb_s": 2 * source.nbytes / found["ms"] / 1e6}

    setting.once(f"time copy {rows}x{vocab} bf16", measure)


def _times(setting: Setting, kinds: tuple[str, ...], shape: tuple[int, int]) -> None:
    """A line for each contender of these kinds, with its loss; the logits are drawn once, when the first is
    measured."""
    rows, vocab = shape
    drawn: list[Tensor] = []

    def measure(loss: Loss) -> dict:
        if not drawn:
            drawn.extend(Case("kl", rows=rows, vocab=vocab).inputs(setting.device)[:2])
        step = step_of(loss, *drawn)
        return (
            median(step, setting) | memory(step, setting, drawn[1]) | {"loss": float(loss(*drawn).detach())}
        )

    for divergence, kind in itertools.product(DIVERGENCES, kinds):
        for name, loss in losses(kind, divergence, setting).items():
            setting.once(f"time {name} {divergence} {rows}x{vocab} bf16", lambda loss=loss: measure(loss))


def times(setting: Setting, kind: str) -> None:
    _times(setting, (kind,), big(setting))


def over_shapes(setting: Setting) -> None:
    for shape in shapes(setting):
        _times(setting, ("triton", "cuda", "simple"), shape)


def graph(setting: Setting, kind: str) -> None:
    """Replayed from a graph: without Python, and without launches one by one. launched_ms: the same step as
    it is."""
    for shape, divergence in itertools.product(
        ((64, 32768), BIG) if not setting.rehearsal else (SMALL,), DIVERGENCES
    ):
        for name, loss in losses(kind, divergence, setting).items():
            key = f"graph {name} {divergence} {shape[0]}x{shape[1]} bf16"
            setting.once(key, lambda loss=loss, shape=shape: _replayed(setting, loss, shape))


def _replayed(setting: Setting, loss: Loss, shape: tuple[int, int]) -> dict:
    step = step_of(loss, *Case("kl", rows=shape[0], vocab=shape[1]).inputs(setting.device)[:2])
    launched = median(step, setting)["ms"]
    if setting.device == "cpu":
        return {"launched_ms": launched, "ms": launched}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return {"launched_ms": launched} | median(captured.replay, setting)


@contextmanager
def turned(kind: str, knob: str, value: float) -> Iterator[bool]:
    """A knob of a backend's plan at a value; whether that is where it stands anyway."""
    if kind == "triton":
        module = TRITON_KNOBS[knob][0]
        before = getattr(module, knob)
        setattr(module, knob, value)
        try:
            yield value == before
        finally:
            setattr(module, knob, before)
    else:
        library = cuda.library()
        choose = (lambda *_: None) if isinstance(library, str) else library.c.kd_tune
        choose(*(value if x == knob else 0 for x in CUDA_KNOBS))
        try:
            yield value == {"wide": 0, "stages": 3}[knob]
        finally:
            choose(0, 0)


def knobs(kind: str) -> list[tuple[str, float]]:
    of = {name: values for name, (_, values) in TRITON_KNOBS.items()} if kind == "triton" else CUDA_KNOBS
    return [(name, value) for name, values in of.items() for value in values]


def tune(setting: Setting, kind: str) -> None:
    """The time of a step with one knob of the backend's plan at a time turned, of the big shape."""
    rows, vocab = big(setting)
    drawn: list[Tensor] = []
    for divergence in DIVERGENCES[: 1 if setting.rehearsal else None]:
        for loss in losses(kind, divergence, setting).values():
            for knob, value in knobs(kind):

                def measure(loss=loss, knob=knob, value=value) -> dict:
                    if not drawn:
                        drawn.extend(Case("kl", rows=rows, vocab=vocab).inputs(setting.device)[:2])
                    with turned(kind, knob, value) as default:
                        return median(step_of(loss, *drawn), setting, 0.2) | {"default": default}

                setting.once(f"tune {kind} {divergence} {knob}={value:g}", measure)
