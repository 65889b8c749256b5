"""The process of one or more stages: python -m benchmarks.gpu.stages RESULTS STAGE[+STAGE ...] [--rehearse]
[--share I/N]."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import cases, timing, tools, training
from .log import Log
from .paths import PACK
from .setting import Setting

MANIFEST = PACK / "manifest.json"


def triton_key() -> str:
    """What Triton's cache depends on besides the kernels: its own files."""
    try:
        from triton.runtime.cache import triton_key as key
    except ImportError:
        from triton.compiler.compiler import triton_key as key
    return hashlib.sha256(key().encode()).hexdigest()[:16]


def here(setting: Setting) -> None:
    """The device and the versions, and whether the cache that was brought is of this Triton."""

    def measure() -> dict:
        import numpy
        import triton

        from kdkernels.backends import cuda

        library = cuda.library()
        found = {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "numpy": numpy.__version__,
            "python": sys.version.split()[0],
        }
        found |= {
            "triton_key": triton_key(),
            "cuda_library": library if isinstance(library, str) else library.isa,
        }
        if MANIFEST.exists():
            brought = json.loads(MANIFEST.read_text())
            found["cache_fits"] = brought["triton_key"] == found["triton_key"] and brought[
                "cache"
            ] == os.environ.get("TRITON_CACHE_DIR")
        if setting.device == "cuda":
            p = torch.cuda.get_device_properties(0)
            found |= {
                "multiprocessors": p.multi_processor_count,
                "l2": p.L2_cache_size,
                "memory": p.total_memory,
            }
            query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
            command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
            found["smi"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return found

    setting.once("here", measure)


def right(setting: Setting, backend: str) -> None:
    """Every case of cases.py against fp64."""
    if backend == "triton" and setting.rehearsal:
        import interpreter  # Triton's interpreter with the arithmetic of the hardware

        interpreter.install()
    covering = cases.covering(cases.SMALL_SHAPES if setting.rehearsal else cases.SHAPES)
    for case in setting.own(covering):
        key = f"right {backend} {case}"
        setting.once(key, lambda case=case: cases.examine(case, setting.backend(backend), setting.device))


def launches(setting: Setting) -> None:
    """Kernels of a case compiled for sm_90 and launched by Triton's own launcher over a libcuda that does
    nothing: of a rehearsal."""
    if not (importlib.util.find_spec("triton") and Path(sysconfig.get_path("include"), "Python.h").exists()):
        return setting.log.write("launches", skipped="needs triton and Python.h")
    from . import pack

    setting.once("launches kl", lambda: pack.rehearse(setting.folder), 80)


def planted(setting: Setting, fault: str) -> None:
    """What must cost itself alone: of three cases the second raises, ends the process, or never ends."""

    def hang() -> dict:
        while True:
            time.sleep(1)

    faults = {"raise": lambda: 1 / 0, "crash": lambda: ctypes.string_at(0), "hang": hang}
    setting.once(f"planted {fault} before", dict)
    setting.log.once(f"planted {fault}", faults[fault], 2)
    setting.once(f"planted {fault} after", dict)


# name -> (what runs it; after a colon of the name, its argument)
STAGES: dict[str, Callable[..., None]] = {
    "here": here,
    "copy": timing.copy,
    "right": right,
    "time": timing.times,
    "graph": timing.graph,
    "shapes": timing.over_shapes,
    "tune": timing.tune,
    "tests": tools.tests,
    "sanitize": tools.sanitize,
    "ncu": tools.profile,
    "train": training.train,
    "linear": training.from_hidden_states,
    "launches": launches,
    "planted": planted,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results")
    parser.add_argument("stages")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--share", default="0/1")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("no GPU: --rehearse runs every stage on the CPU")
    card = "cpu" if args.rehearse else torch.cuda.get_device_name()
    i, n = map(int, args.share.split("/"))
    log = Log(args.results, card=card, by=f"{args.stages} {args.share}")
    for stage in args.stages.split("+"):
        name, _, argument = stage.partition(":")
        STAGES[name](Setting(log, args.rehearse, (i, n)), *filter(None, [argument]))


if __name__ == "__main__":
    main()
