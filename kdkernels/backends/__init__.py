"""Which backend runs a call: names, their order of preference for each kind of device, and the reason when
one cannot.

A backend is a module of this package with `name`, `unavailable(device, dtypes) -> reason | None`, `loss`,
which takes a `Call` (call.py), and `log_softmax`; `scale_` where a device has something better than `mul_`.
To add one, write the module and put its name into `ORDER` and `NAMES`.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch

# device type -> backends, best first. cuda is half as fast as triton on an H200
# (docs/results/gpu_nvidia_h200.md): backend="cuda" is for those who ask for it.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "eager"),
    "cuda": ("triton", "cuda", "eager"),
    "xpu": ("triton", "eager"),
}
OTHER_DEVICES: tuple[str, ...] = ("eager",)
NAMES: tuple[str, ...] = ("auto", "cpu", "cuda", "triton", "eager")


@functools.cache
def module(name: str) -> ModuleType:
    """The backend of a name; imported when it is first asked for."""
    return importlib.import_module(f"{__name__}.{name}")


def check(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"backend: must be one of {', '.join(NAMES)}; got {name!r}")


@functools.lru_cache(maxsize=64)
def _resolve(name: str, device: torch.device, *dtypes: torch.dtype) -> ModuleType | str:
    check(name)
    reasons = []
    for candidate in ORDER.get(device.type, OTHER_DEVICES) if name == "auto" else (name,):
        reason = module(candidate).unavailable(device, dtypes)
        if reason is None:
            return module(candidate)
        reasons.append(f"{candidate}: {reason}")
    return f"backend: {name!r} cannot run on {device}: {'; '.join(reasons)}"


def resolve(name: str, device: torch.device, *dtypes: torch.dtype) -> ModuleType:
    """The module that runs `name` on a device for such logits; RuntimeError with the reason, and the way to
    get it, when none can."""
    found = _resolve(name, device, *dtypes)
    if isinstance(found, str):
        raise RuntimeError(found)
    if name == "auto" and found.name == "eager" and device.type == "cpu":
        _say_what_is_missing()
    return found


@functools.cache
def _say_what_is_missing() -> None:
    """One warning a process where the CPU library is not there at all. Operators resolve when they run, so no
    compiler traces this."""
    reason = module("cpu").unavailable(torch.device("cpu"))
    if reason is not None:
        warnings.warn(
            "kdkernels: CPU tensors take the eager backend, which is accurate and many times slower, "
            "because there is no CPU library: "
            f'{reason}. `python -m kdkernels info` says what was found; backend="eager" asks for it '
            "without this warning.",
            RuntimeWarning,
            stacklevel=3,
        )


def describe(device: torch.device) -> list[tuple[str, str | None]]:
    """Every backend with the reason why it cannot run on a device (None: it can), in order of preference."""
    order = ORDER.get(device.type, OTHER_DEVICES)
    return [
        (name, module(name).unavailable(device))
        for name in (*order, *(n for n in NAMES[1:] if n not in order))
    ]
