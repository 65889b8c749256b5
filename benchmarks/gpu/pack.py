"""make gpu-pack: what is brought to a machine with a GPU for minutes and no network, made on one with a
network and no GPU.

The CUDA library for sm_90; Triton's cache of all that the stages launch, made with the versions that the GPU
machine has, by Triton's own compiler and launcher over a libcuda that does nothing (fake_gpu.py); packages to
compare with. All of it goes to .gpu, but for the libraries, which stay where they are built. The cache holds
absolute paths: it is made, and unpacked there, in CACHE; and it is of no use once a kernel's source has
changed. Needs Python 3.12 (python3.12, or $PYTHON312), a C++ compiler and nvcc; takes a quarter of an hour on
two cores.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .fake_gpu import build_stub
from .paths import PACK, ROOT, python_path

VENV = ROOT / ".venv-gpu"
VERSIONS = ("torch==2.11.0", "triton==3.6.0", "numpy==2.5.2", "setuptools", "wheel", "mpmath")
PACKAGES = ("liger_kernel", "fla-core")
CACHE = Path("/tmp/kdkernels-triton-cache")
KEPT = (".cubin", ".json", ".so")  # of the cache; what else is there is for people
LIBRARIES = ("kdkernels/_cuda.so", "kdkernels/_cpu.so", "kdkernels/_build.txt")
MOST = 64 << 20  # bytes that can be brought, the repository with them


def say(text: str) -> None:
    print(f"gpu-pack: {text}", flush=True)


def python312() -> str:
    found = [
        os.environ.get("PYTHON312"),
        "python3.12",
        *map(str, Path.home().glob(".pyenv/versions/3.12*/bin/python")),
    ]
    for name in filter(None, found):
        try:
            subprocess.run(
                [name, "-c", "import sys; sys.exit(sys.version_info[:2] != (3, 12))"],
                check=True,
                capture_output=True,
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return name
    raise SystemExit(
        "gpu-pack: needs Python 3.12, as the GPU machine has it: python3.12 on PATH, or PYTHON312=its path"
    )


def environment() -> Path:
    """The Python of a virtual environment with the GPU machine's versions."""
    python, ready = VENV / "bin" / "python", VENV / "ready"
    if not ready.exists() or ready.read_text() != " ".join(VERSIONS):
        say(f"a virtual environment with {', '.join(VERSIONS[:3])}: gigabytes, the first time")
        subprocess.run([python312(), "-m", "venv", str(VENV)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-compile", *VERSIONS], check=True)
        ready.write_text(" ".join(VERSIONS))
    return python


def build_libraries(python: Path) -> None:
    say("the CUDA library for sm_90: minutes, where a source has changed")
    env = os.environ | {"KDKERNELS_CUDA": "1", "KDKERNELS_CUDA_ARCHS": "90"}
    subprocess.run([str(python), "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=env, check=True)


def fill(python: Path, stub: Path, cache: Path, processes: int, *options: str) -> tuple[int, int, list[str]]:
    """(launches, entries that Triton's cache gained, what failed) of all that fake_gpu.py launches, divided
    among processes."""
    env = os.environ | {
        "KD_STUB": str(stub),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": python_path(),
    }
    before = entries(cache)

    def share(i: int) -> str:
        command = [str(python), "-m", "benchmarks.gpu.fake_gpu", "--share", f"{i}/{processes}", *options]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-1000:])
        return done.stdout

    with ThreadPoolExecutor(processes) as pool:
        lines = "".join(pool.map(share, range(processes))).splitlines()
    launches = sum(int(found[1]) for x in lines if (found := re.search(r": (\d+) launches$", x)))
    return launches, entries(cache) - before, [x for x in lines if ": failed" in x]


def entries(cache: Path) -> int:
    return len(list(cache.iterdir())) if cache.is_dir() else 0


def pack_cache(cache: Path, target: Path) -> None:
    with tarfile.open(target, "w:xz", preset=6) as file:
        for path in sorted(cache.rglob("*")):
            if path.suffix in KEPT:
                file.add(path, path.relative_to(cache))


def triton_key(python: Path) -> str:
    code = "from benchmarks.gpu.stages import triton_key; print(triton_key())"
    env = os.environ | {"PYTHONPATH": python_path()}
    return subprocess.run(
        [str(python), "-c", code], cwd=ROOT, env=env, check=True, capture_output=True, text=True
    ).stdout.strip()


def rehearse(folder: Path) -> dict:
    """What a rehearsal runs of it: a case is compiled and launched, and again from the cache, packed and
    unpacked, without compiling."""
    stub, cache, packed = build_stub(folder / "stub"), folder / "triton", folder / "cache.tar.xz"
    python = Path(sys.executable)
    launches, compiled, failed = fill(python, stub, cache, 1, "--rehearse")
    pack_cache(cache, packed)
    shutil.rmtree(cache)
    with tarfile.open(packed) as file:
        file.extractall(cache, filter="data")
    again, compiled_again, failed_again = fill(python, stub, cache, 1, "--rehearse")
    if failed or failed_again or not launches or launches != again or compiled_again:
        raise RuntimeError(
            f"{launches} and {again} launches, {compiled_again} compiled again, failed: "
            f"{failed + failed_again}"
        )
    return {"launches": launches, "compiled": compiled, "compiled_again": compiled_again}


def size() -> int:
    """Bytes that travel: what git tracks or does not ignore, and what is brought besides."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    brought = [x for x in PACK.rglob("*") if x.is_file()] + [ROOT / x for x in LIBRARIES]
    return sum(
        x.stat().st_size for x in {*(ROOT / x for x in listed.stdout.splitlines()), *brought} if x.is_file()
    )


def main() -> None:
    python = environment()
    build_libraries(python)
    shutil.rmtree(PACK, ignore_errors=True)
    (PACK / "whl").mkdir(parents=True)
    subprocess.run(
        [str(python), "-m", "pip", "download", "-q", "--no-deps", "-d", str(PACK / "whl"), *PACKAGES],
        check=True,
    )
    stub = build_stub(ROOT / "build" / "gpu")
    shutil.rmtree(CACHE, ignore_errors=True)
    processes = os.cpu_count() or 1
    say(f"Triton's cache, with {VERSIONS[1]}, in {processes} processes: minutes")
    launches, compiled, failed = fill(python, stub, CACHE, processes)
    say(f"{launches} launches, {compiled} entries; did not compile: {'; '.join(failed) or 'none'}")
    pack_cache(CACHE, PACK / "cache.tar.xz")
    shutil.rmtree(CACHE)
    with tarfile.open(PACK / "cache.tar.xz") as file:
        file.extractall(CACHE, filter="data")
    _, again, failed_again = fill(python, stub, CACHE, processes)
    if again > len(failed_again):
        raise SystemExit(f"gpu-pack: with the cache packed and unpacked, {again} entries were compiled again")
    manifest = {
        "versions": VERSIONS[:3],
        "triton_key": triton_key(python),
        "cache": str(CACHE),
        "entries": compiled,
    }
    (PACK / "manifest.json").write_text(json.dumps(manifest))
    total = size()
    say(
        f"{total / 2**20:.1f} MiB with the repository, of {MOST >> 20}; the cache "
        f"{(PACK / 'cache.tar.xz').stat().st_size / 2**20:.1f}"
    )
    say(f"to be brought beside the repository: .gpu {' '.join(LIBRARIES)}")
    say('first:  bash benchmarks/gpu/run.sh "$OUT" --budget 540')
    say(
        'then:   bash benchmarks/gpu/run.sh "$OUT" --budget SECONDS --resume .gpu/results.jsonl   '
        "(what the first call found, put there)"
    )
    if total > MOST:
        raise SystemExit("gpu-pack: that is too much")


if __name__ == "__main__":
    main()
