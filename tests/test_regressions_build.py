"""What went wrong with the libraries once: missing without a word, a compiler that cannot build one, a file
that is not one."""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kdkernels import (
    backends,
    decoupled_kd_loss,
    fused_kd_loss,
    fused_linear_kd_loss,
    logit_matching_loss,
    tempered_log_softmax,
)
from kdkernels.backends import abi, cpu, cuda

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
Z, V, Y = torch.randn(4, 9), torch.randn(4, 9), torch.tensor([0, 3, -100, 8])
HIDDEN, HEAD = torch.randn(4, 5), torch.randn(9, 5)
CALLS = {
    "fused_kd_loss": lambda **o: fused_kd_loss(Z, V, Y, hard_weight=0.5, **o),
    "with a gradient": lambda **o: fused_kd_loss(Z.clone().requires_grad_(), V, **o).backward(),
    "statistics": lambda **o: fused_kd_loss(Z, V, return_stats=True, **o),
    "both gradients": lambda **o: (
        fused_kd_loss(
            Z.clone().requires_grad_(), V.clone().requires_grad_(), teacher_grad=True, reduction="none", **o
        )
        .sum()
        .backward()
    ),
    "float64": lambda **o: fused_kd_loss(Z.double(), V.bfloat16(), divergence="jsd(0.5)", **o),
    "logit_matching_loss": lambda **o: logit_matching_loss(Z, V, **o),
    "decoupled_kd_loss": lambda **o: decoupled_kd_loss(Z, V, Y.clamp_min(0), **o),
    "fused_linear_kd_loss": lambda **o: fused_linear_kd_loss(
        HIDDEN.clone().requires_grad_(), HEAD, HIDDEN, HEAD, **o
    ).backward(),
    "tempered_log_softmax": lambda **o: tempered_log_softmax(Z, **o),
    "compiled": lambda **o: torch.compile(
        lambda z: fused_kd_loss(z, V, **o), fullgraph=True, backend="aot_eager"
    )(Z),
}


def run(*command, env=None, cwd=ROOT, check=True):
    # the package in cwd also for a script that lies elsewhere
    env = {**os.environ, "PYTHONPATH": str(cwd), **(env or {})}
    done = subprocess.run([*map(str, command)], env=env, cwd=cwd, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@contextlib.contextmanager
def forgotten():
    """As in a process that has called nothing yet, and so again afterwards."""
    caches = cpu.library, cuda.library, cuda.unavailable, backends._resolve, backends._say_what_is_missing
    for cache in caches:
        cache.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield said
    finally:
        for cache in caches:
            cache.cache_clear()


def about_the_library(said):
    return [str(x.message) for x in said if x.category is RuntimeWarning and "kdkernels" in str(x.message)]


# ---------------------------------------------------------------- without the CPU library


@pytest.mark.parametrize("name", CALLS)
def test_a_missing_library_is_said_once(monkeypatch, tmp_path, name):
    """By whatever is called first, compiled or not; then never again."""
    torch.compiler.reset()
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_cpu.so")
    with forgotten() as said:
        CALLS[name]()
        (message,) = about_the_library(said)
        assert (
            "python -m kdkernels info" in message and "there is no _cpu.so" in message and "eager" in message
        )
        for call in CALLS.values():
            call()
        assert len(about_the_library(said)) == 1


@pytest.mark.parametrize("name", CALLS)
def test_who_asks_for_eager_is_told_nothing(monkeypatch, tmp_path, name):
    torch.compiler.reset()
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_cpu.so")
    with forgotten() as said:
        CALLS[name](backend="eager")
        assert not about_the_library(said)


@pytest.mark.parametrize("name", CALLS)
def test_who_has_the_library_is_told_nothing(name):
    torch.compiler.reset()
    with forgotten() as said:
        CALLS[name]()
        assert not about_the_library(said)


def test_other_devices_and_refused_dtypes_are_told_nothing(monkeypatch, tmp_path):
    """Only CPU tensors miss the CPU library, and it is not missing where it takes no such floats."""
    with forgotten() as said, monkeypatch.context() as changed:
        changed.setattr(
            cpu, "unavailable", lambda device, dtypes=(): "no float64" if torch.float64 in dtypes else None
        )
        assert backends.resolve("auto", torch.device("cpu"), torch.float64).name == "eager"
        assert not about_the_library(said)
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_cpu.so")
    with forgotten() as said:
        assert backends.resolve("auto", torch.device("meta"), torch.float32).name == "eager"
        assert not about_the_library(said)
        assert backends.resolve("auto", torch.device("cpu"), torch.float32).name == "eager"
        assert len(about_the_library(said)) == 1


def test_a_missing_library_is_seen_by_a_user(tmp_path):
    """With Python's own filters, on stderr."""
    shutil.copytree(
        ROOT / "kdkernels",
        tmp_path / "kdkernels",
        ignore=shutil.ignore_patterns("*.so", "_build.txt", "__pycache__"),
    )
    code = (
        "import torch, kdkernels as k\nfor _ in range(3): k.fused_kd_loss(torch.ones(2, 3), "
        "torch.zeros(2, 3))"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.stderr.count("RuntimeWarning") == 1 and "python -m kdkernels info" in done.stderr


# ---------------------------------------------------------------- compilers


def script(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def copy_sources(tmp_path):
    for name in SOURCES:
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("csrc", "kdkernels"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            ignore=shutil.ignore_patterns("*.so", "_build.txt", "__pycache__"),
        )


def build(tmp_path, compiler, *how):
    copy_sources(tmp_path)
    how = how or ("build", "--build-lib", "out")
    return run(
        sys.executable, "setup.py", "-q", *how, env={"KDKERNELS_CUDA": "", "CXX": str(compiler)}, cwd=tmp_path
    )


KNOWS = (
    'for x in "$@"; do case "$x" in -march=x86-64-v[34]|-fopenmp) exit 1;; *probe.cpp) exit 0;; esac; done'
)
FAILURES = {  # what a compiler does after it has accepted its flags, and what is said of it
    "an error": (
        [
            "echo 'a line before' >&2",
            "echo 'cpu.cpp:7:1: error: not today' >&2",
            "echo 'the end' >&2",
            "exit 1",
        ],
        "not today",
    ),
    "silence": (["exit 3"], "exit status 3"),
    "no link": (
        ['case "$*" in *-shared*) echo "ld: error: no library" >&2; exit 1;; *) touch "$out";; esac'],
        "no library",
    ),
}


@pytest.mark.parametrize("name", [*FAILURES, "no program", "no level"])
def test_a_compiler_that_fails_does_not_stop_the_installation(tmp_path, name):
    """It is left out, said while building, kept in _build.txt, and said again by the first call and by
    info."""
    compiler = tmp_path / "c++-broken"
    if name == "no program":
        compiler.write_bytes(b"\x00 not a program")
        compiler.chmod(0o755)
        reason = "c++-broken"
    elif name == "no level":
        script(compiler, 'for x in "$@"; do case "$x" in -march=*) exit 1;; esac; done', "exit 0")
        reason = "it does not know -march=x86-64-v2"
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("levels of x86-64")
    else:
        lines, reason = FAILURES[name]
        script(compiler, KNOWS, 'out=; for x in "$@"; do [ "$last" = -o ] && out=$x; last=$x; done', *lines)
    done = build(tmp_path, compiler)
    package = tmp_path / "out" / "kdkernels"
    assert not (package / "_cpu.so").exists()
    assert (
        "could not build the C++ library" in done.stderr
        and reason in done.stderr
        and "eager backend only" in done.stderr
    )
    if name == "an error":
        assert (
            "a line before\ncpu.cpp:7:1: error: not today\nthe end"
            in done.stderr.split("eager backend only")[1]
        )
    (record,) = [x for x in (package / "_build.txt").read_text().splitlines() if x.startswith("error: ")]
    assert "could not build the C++ library" in record and reason in record
    code = (
        "import torch, kdkernels, kdkernels.__main__ as main\n"
        "print(main.info(), kdkernels.fused_kd_loss(torch.ones(2, 3), torch.zeros(2, 3)).item(), sep='\\n')"
    )
    done = run(sys.executable, "-c", code, cwd=package.parent)
    assert 'backend="auto" is eager' in done.stdout and reason in done.stdout
    assert done.stdout.endswith("\n0.0\n") and reason in done.stderr


def test_a_library_of_other_sources_is_not_left_in_place(tmp_path):
    """An editable install whose compiler fails takes away what an earlier one has built."""
    compiler = script(tmp_path / "c++-broken", KNOWS, "exit 3")
    copy_sources(tmp_path)
    (tmp_path / "kdkernels" / "_cpu.so").write_bytes(b"of yesterday")
    env = {"KDKERNELS_CUDA": "", "CXX": str(compiler)}
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", env=env, cwd=tmp_path)
    assert not (tmp_path / "kdkernels" / "_cpu.so").exists()
    assert "could not build" in (tmp_path / "kdkernels" / "_build.txt").read_text()


@pytest.mark.skipif(not shutil.which("clang++"), reason="no clang++")
@pytest.mark.slow
def test_clang_builds_it(tmp_path):
    """Every path of the library, as clang compiles it for one level."""
    quick = 'for x in "$@"; do case "$x" in -march=x86-64-v[24]) exit 1;; esac; done'
    compiler = script(tmp_path / "clang++-quick", quick, 'exec clang++ "$@" -O1')
    build(tmp_path, compiler)
    package = tmp_path / "out" / "kdkernels"
    record = (package / "_build.txt").read_text()
    assert "clang" in record and "error" not in record.replace("cuda error", "")
    if platform.machine() == "x86_64" and abi.Library(package / "_cpu.so").isa == "none":
        pytest.skip("a processor without AVX2")
    assert (
        "CPU library: none" not in run(sys.executable, "-m", "kdkernels", "info", cwd=package.parent).stdout
    )
    run(sys.executable, TESTS / "exercise.py", cwd=package.parent)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(),
    reason="reads Linux's list of x86 features",
)
def test_the_level_is_the_processors():
    """As the system lists its features, which it does where it saves their registers."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(x for x in lines if x.startswith("flags")).split(":")[1].split())
    v2 = {"pni", "ssse3", "cx16", "sse4_1", "sse4_2", "popcnt", "lahf_lm"}
    v3 = v2 | {"fma", "movbe", "avx", "f16c", "bmi1", "avx2", "bmi2", "abm"}
    v4 = v3 | {"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"}
    expected = next(
        (level for level, wanted in (("v4", v4), ("v3", v3), ("v2", v2)) if wanted <= flags), None
    )
    if expected is None:
        pytest.skip("no level of the library's")
    code = (
        f"import ctypes; lib = ctypes.CDLL({str(cpu.LIBRARY)!r}); lib.kd_isa.restype = "
        "ctypes.c_char_p; print(lib.kd_isa().decode())"
    )
    for asked in ("v2", "v3", "v4", "v9", ""):
        isa = run(sys.executable, "-c", code, env={"KDKERNELS_CPU_ISA": asked}).stdout.strip()
        assert isa == f"x86-64-{min(expected, asked or expected)}"


# ---------------------------------------------------------------- files that are not what they should be


def falls_back(monkeypatch, path, reason):
    """auto takes the eager backend and says why, backend="cpu" says why, and so does info."""
    monkeypatch.setattr(cpu, "LIBRARY", path)
    with forgotten() as said:
        torch.testing.assert_close(fused_kd_loss(Z, V), fused_kd_loss(Z, V, backend="eager"))
        (message,) = about_the_library(said)
        assert re.search(reason, message) and "reinstall kdkernels" in message
        with pytest.raises(RuntimeError, match=reason):
            fused_kd_loss(Z, V, backend="cpu")
        from kdkernels.__main__ import info

        assert re.search(reason, info())


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
@pytest.mark.parametrize("left", [0.0, 1e-5, 0.001, 0.3, 0.9, 0.999, -1])
def test_a_library_without_its_end_is_not_loaded(monkeypatch, tmp_path, left):
    """It would be mapped, and kill the process at the first call into what is missing. The end: also its last
    byte alone."""
    whole = cpu.LIBRARY.read_bytes()
    path = tmp_path / "_cpu.so"
    path.write_bytes(whole[:-1] if left == -1 else whole[: int(left * len(whole))])
    monkeypatch.setattr(abi.ctypes, "CDLL", load := Loader(abi.ctypes.CDLL))
    with pytest.raises(OSError):
        abi.Library(path)
    assert not load.loaded
    monkeypatch.undo()
    falls_back(
        monkeypatch, path, "_cpu.so: the file is damaged" if len(path.read_bytes()) > 64 else "_cpu.so"
    )


class Loader:
    """ctypes.CDLL; which files it has mapped."""

    def __init__(self, load):
        self.load, self.loaded = load, []

    def __call__(self, path):
        library = self.load(path)
        self.loaded.append(path)
        return library


@pytest.mark.parametrize("content", ["", "not a library", "#!/bin/sh\n" * 100])
def test_a_file_that_is_no_library_is_not_loaded(monkeypatch, tmp_path, content):
    (tmp_path / "_cpu.so").write_text(content)
    with pytest.raises(OSError):
        abi.Library(tmp_path / "_cpu.so")
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "_cpu.so")
    with forgotten() as said:
        fused_kd_loss(Z, V)
        assert "_cpu.so" in about_the_library(said)[0]


def test_what_tools_have_rewritten_is_loaded(tmp_path):
    """A library that was stripped, as packagers do, is whole."""
    if not shutil.which("strip"):
        pytest.skip("no strip")
    shutil.copy(cpu.LIBRARY, tmp_path / "_cpu.so")
    run("strip", tmp_path / "_cpu.so")
    assert (tmp_path / "_cpu.so").stat().st_size < cpu.LIBRARY.stat().st_size
    assert abi.Library(tmp_path / "_cpu.so", "cpu").isa != "none"


FOREIGN = {  # what a library of that name has, and what is said of it
    "none of ours": (
        "int something_else(void) { return 1; }",
        "not a library of this version of kdkernels .*kd_abi_version",
    ),
    "older": (
        "long kd_call_size(void) { return %(size)d; }",
        "not a library of this version of kdkernels .*kd_abi_version",
    ),
    "half": (
        "int kd_abi_version(void) { return %(version)d; }",
        "not a library of this version of kdkernels .*kd_call_size",
    ),
    "newer": (
        "int kd_abi_version(void) { return %(version)d + 1; }",
        "its ABI has version %(newer)d, this package's %(version)d",
    ),
    "cuda": (
        "int kd_abi_version(void) { return %(version)d; } int kd_scale(void *x) { return 0; }",
        "it is the CUDA library",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_library_is_refused(monkeypatch, tmp_path, name):
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler")
    source, reason = (
        x % {"size": abi.ctypes.sizeof(abi.Loss), "version": abi.VERSION, "newer": abi.VERSION + 1}
        for x in FOREIGN[name]
    )
    (tmp_path / "foreign.c").write_text(source)
    run(compiler, "-shared", "-fPIC", tmp_path / "foreign.c", "-o", tmp_path / "_cpu.so")
    falls_back(monkeypatch, tmp_path / "_cpu.so", f"_cpu.so: {reason}")
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_cpu.so")
    with forgotten():
        assert isinstance(cuda.library(), str) and "reinstall kdkernels" in cuda.library()


def test_the_cpu_library_is_not_cudas(monkeypatch):
    monkeypatch.setattr(cuda, "LIBRARY", cpu.LIBRARY)
    with forgotten():
        assert "it is the CPU library; reinstall kdkernels" in cuda.library()


def test_a_library_of_equal_sizes_and_another_meaning_is_refused(monkeypatch):
    monkeypatch.setattr(abi, "VERSION", abi.VERSION + 1)
    falls_back(
        monkeypatch, cpu.LIBRARY, f"its ABI has version {abi.VERSION - 1}, this package's {abi.VERSION}"
    )


def test_both_languages_count_the_same_version():
    header = (ROOT / "csrc" / "api.h").read_text()
    assert int(re.search(r"#define KD_ABI_VERSION (\d+)", header)[1]) == abi.VERSION
    for name in ("cpu.cpp", "cuda.cu"):
        assert "kd_abi_version(void) { return KD_ABI_VERSION; }" in (ROOT / "csrc" / name).read_text()


# ---------------------------------------------------------------- small stacks


def test_512_kib_of_stack_are_enough():
    """What docs/architecture.md states, for a thread of Python's and for OpenMP's."""
    code = (
        f"import sys, threading; sys.path.insert(0, {str(TESTS)!r})\n"
        "import exercise\n"
        "threading.stack_size(512 << 10)\n"
        "done = []\n"
        "thread = threading.Thread(target=lambda: (exercise.main(), done.append(1)))\n"
        "thread.start(); thread.join()\n"
        "assert done\n"
    )
    run(
        sys.executable,
        "-c",
        code,
        env={
            "OMP_STACKSIZE": "512k",
            "OMP_NUM_THREADS": "2",
            "KDKERNELS_TEST_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",
        },
    )
