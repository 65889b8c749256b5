"""The build: without a compiler, without OpenMP, at every instruction-set level, under sanitizers, and what
loading it leaves alone."""

import collections
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kdkernels
from kdkernels.backends import abi, cpu

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="levels of x86-64")


def run(*command, env=None, cwd=ROOT, check=True):
    # the package in cwd also for a script that lies elsewhere
    env = {**os.environ, "PYTHONPATH": str(cwd), **(env or {})}
    done = subprocess.run([*map(str, command)], env=env, cwd=cwd, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def compiler_without(path, *flags):
    """A compiler that does not know some flags; what it builds is what counts, not how fast that is."""
    refuse = " || ".join(f'[ "$x" = {flag} ]' for flag in flags)
    path.write_text(f'#!/bin/sh\nfor x in "$@"; do if {refuse}; then exit 1; fi; done\nexec c++ "$@" -O1\n')
    path.chmod(0o755)
    return path


def build(tmp_path, env=None):
    """setup.py build in a copy of the sources, of one instruction-set level and quickly; the built package's
    folder."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("csrc", "kdkernels"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("*.so", "_build.txt", "__pycache__"),
        )
    quick = compiler_without(tmp_path / "c++-quick", "-march=x86-64-v3", "-march=x86-64-v4")
    env = {"KDKERNELS_CUDA": "", "CXX": str(quick), **(env or {})}
    run(sys.executable, "setup.py", "-q", "build", "--build-lib", "out", env=env, cwd=tmp_path)
    return tmp_path / "out" / "kdkernels"


def test_without_a_compiler(tmp_path):
    """The install succeeds, says so, and the package runs on the eager backend."""
    package = build(tmp_path, {"PATH": str(tmp_path), "CXX": ""})
    assert not (package / "_cpu.so").exists()
    assert "no C++ compiler was found" in (package / "_build.txt").read_text()
    code = (
        "import torch, kdkernels; print(kdkernels.fused_kd_loss(torch.ones(2, 3), torch.zeros(2, 3)).item())"
    )
    assert run(sys.executable, "-c", code, cwd=package.parent).stdout.strip() == "0.0"
    info = run(sys.executable, "-m", "kdkernels", "info", cwd=package.parent).stdout
    assert 'backend="auto" is eager' in info and "no C++ compiler was found" in info


@pytest.mark.slow
def test_without_openmp(tmp_path):
    """A compiler that does not know -fopenmp gives a library that is right, and says that it is
    single-threaded."""
    compiler = compiler_without(
        tmp_path / "c++-without-openmp", "-fopenmp", "-march=x86-64-v3", "-march=x86-64-v4"
    )
    package = build(tmp_path, {"CXX": str(compiler)})
    assert "openmp: no" in (package / "_build.txt").read_text()
    if platform.machine() == "x86_64":
        assert "levels: v2\n" in (package / "_build.txt").read_text()
    library = abi.Library(package / "_cpu.so")
    assert not library.openmp
    info = run(sys.executable, "-m", "kdkernels", "info", cwd=package.parent).stdout
    assert "single-threaded" in info
    run(sys.executable, TESTS / "exercise.py", cwd=package.parent)


def test_cuda_is_built_only_when_asked_for(tmp_path):
    """An nvcc on PATH is not run unless KDKERNELS_CUDA=1 says so; then its failure, and its absence, are
    errors."""
    tools, called = tmp_path / "bin", tmp_path / "nvcc was called"
    tools.mkdir()
    (tools / "nvcc").write_text(f'#!/bin/sh\ntouch "{called}"\nexit 3\n')
    (tools / "nvcc").chmod(0o755)
    package = build(tmp_path, {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"})
    assert (package / "_cpu.so").exists() and not (package / "_cuda.so").exists() and not called.exists()
    info = run(sys.executable, "-m", "kdkernels", "info", cwd=package.parent).stdout
    assert (
        "CUDA library: none: KDKERNELS_CUDA=1 was not set when kdkernels was built; reinstall "
        "kdkernels with KDKERNELS_CUDA=1" in info
    )
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", "out"]
    asked = {"KDKERNELS_CPU": "0", "KDKERNELS_CUDA": "1"}
    done = run(
        *command, env={"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", **asked}, cwd=tmp_path, check=False
    )
    assert done.returncode != 0 and called.exists()
    assert "compiling the CUDA library for sm_80, sm_90, sm_100, sm_120" in done.stdout
    (tools / "nvcc").unlink()
    without = os.pathsep.join(x for x in os.environ["PATH"].split(os.pathsep) if not Path(x, "nvcc").exists())
    done = run(*command, env={"PATH": f"{tools}{os.pathsep}{without}", **asked}, cwd=tmp_path, check=False)
    assert done.returncode != 0 and "there is no nvcc on PATH" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_cuda_library(tmp_path):
    """Compiled for one architecture: it loads without a GPU, speaks this package's language, and is not
    compiled again."""
    env = {"KDKERNELS_CUDA": "1", "KDKERNELS_CUDA_ARCHS": "90"}
    package = build(tmp_path, env)
    library = abi.Library(package / "_cuda.so")
    assert library.isa == "sm_90" and "architectures: 90" in (package / "_build.txt").read_text()
    needed = run("ldd", package / "_cuda.so").stdout
    assert "cudart" not in needed and "torch" not in needed
    if not Path("/dev/nvidiactl").exists():
        assert library.c.kd_unavailable(0)
    objects = {p: p.stat().st_mtime for p in tmp_path.rglob("cuda_*.o")}
    run(sys.executable, "setup.py", "-q", "build", "--build-lib", "out", env=env, cwd=tmp_path)
    assert len(objects) == 13 and all(p.stat().st_mtime == t for p, t in objects.items())


def test_wheel(tmp_path):
    """One wheel for every Python and torch: py3-none, the library inside, the sources not needed at run
    time."""
    build(tmp_path)
    command = "-m pip wheel -q --no-build-isolation --no-deps -w wheels ."
    run(
        sys.executable,
        *command.split(),
        env={"KDKERNELS_CUDA": "", "CXX": str(tmp_path / "c++-quick")},
        cwd=tmp_path,
    )
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert re.fullmatch(r"kdkernels-[\d.]+-py3-none-\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"kdkernels/_cpu.so", "kdkernels/_build.txt", "kdkernels/backends/cpu.py"} <= set(names)
    assert not [n for n in names if n.endswith((".cpp", ".cu", ".h", ".o"))]


def test_a_library_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(kdkernels.divergence, "FAMILIES", (*kdkernels.divergence.FAMILIES, "new"))
    with pytest.raises(OSError, match="families are kl,(.*), this package's kl,\\1,new; reinstall"):
        abi.Library(cpu.LIBRARY)
    monkeypatch.undo()
    monkeypatch.setattr(abi, "Loss", abi.LogSoftmax)
    with pytest.raises(OSError, match="kd_call has .* bytes"):
        abi.Library(cpu.LIBRARY)


def test_loading_leaves_denormals_alone():
    code = (
        "import ctypes, numpy as np\n"
        "tiny = lambda: float(np.float32(1e-38) * np.float32(0.1) + np.float32(1e-45) * np.float32(1))\n"
        "before = tiny(); assert before > 0\n"
        f"lib = ctypes.CDLL({str(cpu.LIBRARY)!r}); lib.kd_isa()\n"
        "assert tiny() == before\n"
    )
    run(sys.executable, "-c", code)


@x86
def test_levels_share_no_code():
    """The linker keeps one copy of an inline function: one that several levels define would run AVX-512 on a
    machine without it."""
    defined = collections.Counter()
    objects = list((ROOT / "build").rglob("cpu_v*.o"))
    if not objects:
        pytest.skip("no object files of a build beside the sources")
    for path in objects:
        names = {
            line.split()[-1]
            for line in run("nm", "--defined-only", path).stdout.splitlines()
            if line.split()[-2] in "WVu"
        }
        defined.update(names)
    assert not [name for name, n in defined.items() if n > 1]


@x86
@pytest.mark.slow
@pytest.mark.parametrize("level", ["v2", "v3"])
def test_every_level_is_right(level):
    """The accuracy tests again, of half of the kinds of rows, on the levels below this machine's own."""
    env = {"KDKERNELS_CPU_ISA": level}
    assert f"x86-64-{level}" in run(sys.executable, "-m", "kdkernels", "info", env=env).stdout
    tests = [TESTS / "test_accuracy.py", TESTS / "test_functional.py"]
    which = (
        "cpu and not fp64 and not (independent or close or dominant or peaked) or bits or "
        "workspace or inplace"
    )
    done = run(sys.executable, "-m", "pytest", "-q", *tests, "-k", which, env=env)
    assert " passed" in done.stdout


def test_sanitizers(tmp_path):
    """AddressSanitizer and UBSan over every path of the library: dtypes, layouts, masks, careful rows, odd
    lengths."""
    compiler = shutil.which("g++")
    runtime = (
        [Path(run(compiler, f"-print-file-name=lib{x}.so").stdout.strip()) for x in ("asan", "ubsan")]
        if compiler
        else []
    )
    if not all(x.is_absolute() and x.exists() for x in runtime) or not runtime:
        pytest.skip("no g++ with sanitizers")
    flags = "-O1 -g1 -std=c++17 -fPIC -shared -fno-math-errno -fno-trapping-math -fwrapv -fopenmp -Wno-psabi"
    flags += " -fsanitize=address,undefined -fno-sanitize-recover=all"
    level = ["-march=x86-64-v3"] if platform.machine() == "x86_64" else []
    isa, dispatch = ("v3", ["-DKD_X86_LEVELS", "-DKD_HAS_v3"]) if level else ("base", [])
    jobs = [[*level, f"-DKD_ISA={isa}"], dispatch]
    for i, extra in enumerate(jobs):
        run(
            compiler,
            *[f for f in flags.split() if f != "-shared"],
            *extra,
            "-c",
            ROOT / "csrc/cpu.cpp",
            "-o",
            tmp_path / f"{i}.o",
        )
    run(compiler, *flags.split(), tmp_path / "0.o", tmp_path / "1.o", "-o", tmp_path / "_cpu.so")
    env = {
        "LD_PRELOAD": " ".join(map(str, runtime)),
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "KDKERNELS_TEST_LIBRARY": str(tmp_path / "_cpu.so"),
        "KDKERNELS_CPU_ISA": "v3",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # beside other tests
    }
    done = run(sys.executable, TESTS / "exercise.py", env=env, check=False)
    assert done.returncode == 0 and "ERROR" not in done.stderr and "runtime error" not in done.stderr, (
        done.stderr[-3000:]
    )


@pytest.mark.slow
def test_fewer_threads_than_asked_for():
    """OpenMP may give less: no block of a split row is forgotten."""
    run(sys.executable, TESTS / "exercise.py", env={"OMP_THREAD_LIMIT": "1", "KDKERNELS_TEST_THREADS": "4"})
    run(sys.executable, TESTS / "exercise.py", env={"OMP_DYNAMIC": "true", "KDKERNELS_TEST_THREADS": "5"})


def test_aarch64_compiles(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++")
    for extra in (["-DKD_ISA=base"], []):
        run(
            compiler,
            "-O3",
            "-std=c++17",
            "-fPIC",
            "-Wno-psabi",
            *extra,
            "-c",
            ROOT / "csrc/cpu.cpp",
            "-o",
            tmp_path / "x.o",
        )
