"""Builds the kernels for host threads with g++, once for a state of the sources: library(),
in_place_of_cuda(), walk(sanitizer)."""

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from kdkernels import backends
from kdkernels.backends import cuda

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FLAGS = (
    "-std=c++17 -fPIC -pthread -fvisibility=hidden -Wall -Werror -Wno-unknown-pragmas -Wno-psabi "
    "-Wno-maybe-uninitialized "
    f"-fno-math-errno -fno-trapping-math -ffp-contract=fast -I{HERE}"
).split()
COMPILER = shutil.which("g++")


def _once(name: str, build) -> Path:
    """build(folder), unless these sources have been through it: processes of a test run share what comes of
    it."""
    sources = sorted([*(ROOT / "csrc").rglob("*"), *HERE.glob("*.*")])
    state = hashlib.sha256(b"".join(p.read_bytes() for p in sources if p.is_file())).hexdigest()[:16]
    base = ROOT / "build" / "simt"
    base.mkdir(parents=True, exist_ok=True)
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = base / f"{name}-{state}"
        if not folder.exists():
            for old in base.glob(f"{name}-*"):
                shutil.rmtree(old)
            partial = base / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            partial.rename(folder)
    return folder


def _run(*command) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def library() -> Path:
    def build(folder: Path) -> None:
        pieces = [(s, b, o) for s in ("Plain", "Tilted", "Mixture") for b in (2, 4) for o in (2, 4)]
        jobs = [
            [f"-DKD_FAMILY={s}", f"-DKD_BASE={b}", f"-DKD_OTHER={o}", "-o", folder / f"{s}{b}{o}.o"]
            for s, b, o in pieces
        ]
        jobs.append(["-o", folder / "api.o"])
        with ThreadPoolExecutor(2) as pool:
            list(
                pool.map(
                    lambda job: _run(
                        COMPILER, *FLAGS, "-O1", "-DKD_FIBERS", "-c", HERE / "library.cpp", *job
                    ),
                    jobs,
                )
            )
        _run(COMPILER, "-shared", "-pthread", *folder.glob("*.o"), "-o", folder / "simt.so")

    return _once("library", build) / "simt.so"


def planner() -> Path:
    """The C functions with the geometries of GPUs, and no kernels of the loss: for kd_plan."""

    def build(folder: Path) -> None:
        flags = ["-shared", "-Wno-unused", "-x", "c++", '-DKD_ARCHS=""', "-DKD_PIECES(family)="]
        _run(COMPILER, *FLAGS, "-O0", *flags, ROOT / "csrc" / "cuda.cu", "-o", folder / "planner.so")

    return _once("planner", build) / "planner.so"


def walk(sanitizer: str) -> Path:
    """walk.cpp under "address" or "thread"."""

    def build(folder: Path) -> None:
        _run(
            COMPILER, *FLAGS, "-O1", "-g", f"-fsanitize={sanitizer}", HERE / "walk.cpp", "-o", folder / "walk"
        )

    return _once(sanitizer, build) / "walk"


@contextmanager
def in_place_of_cuda() -> Iterator[None]:
    """backend="cuda" is the library for host threads."""
    patch = pytest.MonkeyPatch()
    patch.setattr(cuda, "LIBRARY", library())
    patch.setattr(cuda, "unavailable", lambda device, dtypes=(): "fp64" if torch.float64 in dtypes else None)
    forget = cuda.library.cache_clear, backends._resolve.cache_clear
    for clear in forget:
        clear()
    yield
    patch.undo()
    for clear in forget:
        clear()
