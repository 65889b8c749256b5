"""Builds the C++ library with the compiler alone, in seconds, and where KDKERNELS_CUDA=1 asks for it the CUDA
library with nvcc, in
minutes: no torch, no Python headers, one file each for every version of both.

A machine without a compiler, or with one that cannot build it, gets the package without the library, which
then runs on the eager backend; _build.txt in the package keeps what was found, for `python -m kdkernels
info`. KDKERNELS_CPU=0 leaves the C++ library out on purpose. With KDKERNELS_CUDA=1 a CUDA library that cannot
be built is an error; KDKERNELS_CUDA_ARCHS="90 100" are the architectures to compile it for.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Never -ffast-math: it flushes denormals in the whole process and breaks -inf and nan. Without
# -fno-trapping-math nothing vectorises; -fwrapv because exponents are shifted and added as integers.
FLAGS = [
    *"-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wno-psabi".split(),
    *"-fno-trapping-math -fno-math-errno -ffp-contract=fast -fwrapv -fno-exceptions".split(),
]
X86_LEVELS = {
    "v2": ["-march=x86-64-v2"],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}


CUDA_ARCHS = ("80", "90", "100", "120")  # machine code for each, and PTX of the last for what comes after
CUDA_FLAGS = (
    "-O3 -std=c++17 -cudart static -Xfatbin -compress-all -Xcompiler -fPIC,-fvisibility=hidden,-Wno-psabi"
).split()


def replace(source: Path, target: Path) -> None:
    """Copy in one step: a running process keeps the library it has mapped."""
    shutil.copy2(source, target.with_suffix(".new"))
    os.replace(target.with_suffix(".new"), target)


class LeftOut(Exception):
    """A library is not built, and the package does without: why in a line, and what a compiler said last, if
    it did."""


def find_compiler() -> list[str]:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name.split()
    raise LeftOut("no C++ compiler was found ($CXX, c++, g++, clang++)")


class CompilerFailed(Exception):
    """What a compiler printed."""


def compile_with(command: list[str]) -> None:
    """Run a compiler and show what it prints; CompilerFailed when that is why there is no result."""
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        raise CompilerFailed(f"{command[0]}: {error}") from error
    print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode:
        raise CompilerFailed(done.stderr.strip() or f"{command[0]}: exit status {done.returncode}")


def accepts(compiler: list[str], flags: list[str], source: str = "int main() { return 0; }") -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source)
        command = [*compiler, *flags, str(path), "-o", str(Path(folder, "probe"))]
        try:
            return not subprocess.run(command, capture_output=True).returncode
        except OSError:
            return False


def compile_all(
    command: list[str], jobs: dict[str, list[str]], sources: list[Path], objects: Path
) -> list[Path]:
    """An object file for each job (name -> flags), in parallel; those of the same command that are newer than
    every source are kept."""
    objects = objects / hashlib.sha256(" ".join(command).encode()).hexdigest()[:12]
    objects.mkdir(parents=True, exist_ok=True)
    newest = max(p.stat().st_mtime for p in [*sources, *(ROOT / "csrc").rglob("*.h"), ROOT / "setup.py"])

    def compile_one(job: tuple[str, list[str]]) -> Path:
        out = objects / f"{job[0]}.o"
        if not out.exists() or out.stat().st_mtime < newest:
            partial = out.with_suffix(".partial.o")
            compile_with([*command, *job[1], "-c", *map(str, sources), "-o", str(partial)])
            os.replace(partial, out)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs.items()))


def build_cpu(sources: list[Path], target: Path, objects: Path) -> dict[str, str]:
    """What was found, for _build.txt; a compiler's failure leaves the library out."""
    if os.environ.get("KDKERNELS_CPU") == "0":
        raise LeftOut("left out: KDKERNELS_CPU=0 was set when kdkernels was built")
    compiler = find_compiler()
    try:
        return build_cpu_with(compiler, sources, target, objects)
    except CompilerFailed as error:
        lines = str(error).splitlines()
        why = next((line for line in lines if "error" in line.lower()), lines[-1]).strip()
        raise LeftOut(
            f"{compiler[0]} could not build the C++ library ({why})", "\n".join(lines[-20:])
        ) from error


def build_cpu_with(compiler: list[str], sources: list[Path], target: Path, objects: Path) -> dict[str, str]:
    """Compile csrc/cpu.cpp once per instruction-set level and once for the C functions."""
    openmp = (
        ["-fopenmp"]
        if accepts(compiler, ["-fopenmp"], "#include <omp.h>\nint main() { return omp_get_thread_num(); }")
        else []
    )
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    levels = {k: v for k, v in X86_LEVELS.items() if accepts(compiler, v)} if on_x86 else {"base": []}
    if not levels and accepts(compiler, []):
        raise CompilerFailed(f"error: it does not know {X86_LEVELS['v2'][0]}, as g++ 11 and clang++ 12 do")
    jobs = {f"cpu_{level}": [f"-DKD_ISA={level}", *flags] for level, flags in levels.items()}
    jobs["cpu_api"] = [*(["-DKD_X86_LEVELS"] if on_x86 else []), *(f"-DKD_HAS_{level}" for level in levels)]
    print(
        f"kdkernels: compiling the C++ library with {compiler[0]} for {', '.join(levels)}: half a "
        "minute on two cores",
        flush=True,
    )
    built = compile_all([*compiler, *FLAGS, *openmp], jobs, sources, objects)
    target.parent.mkdir(parents=True, exist_ok=True)
    linked = built[0].parent / target.name
    compile_with([*compiler, "-shared", *openmp, *map(str, built), "-o", str(linked)])
    replace(linked, target)
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
    return {
        "compiler": version[0] if version else compiler[0],
        "levels": " ".join(levels),
        "openmp": "yes" if openmp else "no: single-threaded",
    }


def build_cuda(sources: list[Path], target: Path, objects: Path) -> dict[str, str]:
    """Compile csrc/cuda.cu once per piece and once for the C functions; what was found, for _build.txt."""
    if os.environ.get("KDKERNELS_CUDA", "0") in ("", "0"):
        raise LeftOut("KDKERNELS_CUDA=1 was not set when kdkernels was built")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("KDKERNELS_CUDA=1, but there is no nvcc on PATH")
    archs = os.environ.get("KDKERNELS_CUDA_ARCHS", "").replace(",", " ").split() or list(CUDA_ARCHS)
    codes = [f"-gencode=arch=compute_{x},code=sm_{x}" for x in archs] + [
        f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"
    ]
    command = [nvcc, *CUDA_FLAGS, *codes, f'-DKD_ARCHS="{" ".join(f"sm_{x}" for x in archs)}"']
    pieces = [
        (family, base, other)
        for family in ("Mixture", "Tilted", "Plain")
        for base in (2, 4)
        for other in (2, 4)
    ]
    jobs = {
        f"cuda_{f}_{b}{o}": [f"-DKD_FAMILY={f}", f"-DKD_BASE={b}", f"-DKD_OTHER={o}"] for f, b, o in pieces
    } | {"cuda_api": []}
    print(
        f"kdkernels: compiling the CUDA library for {', '.join(f'sm_{x}' for x in archs)}: "
        f"{len(jobs)} pieces, minutes each",
        flush=True,
    )
    built = compile_all(command, jobs, sources, objects)
    linked = built[0].parent / target.name
    compile_with([nvcc, "-shared", "-cudart", "static", *map(str, built), "-o", str(linked)])
    replace(linked, target)
    version = (
        subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-1]
    )
    return {"nvcc": version, "architectures": " ".join(archs)}


# name -> (source, build function, the library's key in _build.txt when it is missing, what that means)
LIBRARIES = {
    "kdkernels._cpu": (
        "csrc/cpu.cpp",
        build_cpu,
        "error",
        "kdkernels will run on the eager backend only, many times slower",
    ),
    "kdkernels._cuda": ("csrc/cuda.cu", build_cuda, "cuda error", ""),
}


class BuildLibraries(build_ext):
    def run(self) -> None:
        self.found: dict[str, str] = {}
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        _, build, missing, consequence = LIBRARIES[ext.name]
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = build([ROOT / s for s in ext.sources], target, ROOT / "build" / "objects")
        except LeftOut as error:
            target.unlink(missing_ok=True)
            why, *said = error.args
            found = {missing: why}
            if consequence:
                self.warn("\n".join([f"{why}: {consequence}", *said]))
        if found.get("openmp", "yes") != "yes":
            self.warn("the compiler has no OpenMP: the CPU library is single-threaded")
        self.found |= found
        (target.parent / "_build.txt").write_text(
            "".join(f"{key}: {value}\n" for key, value in self.found.items())
        )

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"  # loaded with ctypes: no Python ABI in the name

    def get_outputs(self) -> list[str]:
        return [x for x in super().get_outputs() if Path(x).exists()]

    def copy_extensions_to_source(self) -> None:  # editable installs: build_extension has written in place
        for name in ("_cpu.so", "_cuda.so", "_build.txt"):
            built, target = Path(self.build_lib, "kdkernels", name), ROOT / "kdkernels" / name
            if built.exists():
                replace(built, target)
            else:  # not built this time: what lies there is of other sources
                target.unlink(missing_ok=True)


class AnyPython(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(name, [source]) for name, (source, *_) in LIBRARIES.items()],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPython},
)
