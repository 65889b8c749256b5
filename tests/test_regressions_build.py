"""What went wrong with the libraries once: missing without a word, a compiler that cannot build one, a file that is not one."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kdkernels import backends, decoupled_kd_loss, fused_kd_loss, fused_linear_kd_loss, logit_matching_loss, tempered_log_softmax
from kdkernels.backends import abi, cuda, native

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
        fused_kd_loss(Z.clone().requires_grad_(), V.clone().requires_grad_(), teacher_grad=True, reduction="none", **o).sum().backward()
    ),
    "float64": lambda **o: fused_kd_loss(Z.double(), V.bfloat16(), divergence="jsd(0.5)", **o),
    "logit_matching_loss": lambda **o: logit_matching_loss(Z, V, **o),
    "decoupled_kd_loss": lambda **o: decoupled_kd_loss(Z, V, Y.clamp_min(0), **o),
    "fused_linear_kd_loss": lambda **o: fused_linear_kd_loss(HIDDEN.clone().requires_grad_(), HEAD, HIDDEN, HEAD, **o).backward(),
    "tempered_log_softmax": lambda **o: tempered_log_softmax(Z, **o),
    "compiled": lambda **o: torch.compile(lambda z: fused_kd_loss(z, V, **o), fullgraph=True, backend="aot_eager")(Z),
}


def run(*command, env=None, cwd=ROOT, check=True):
    done = subprocess.run([*map(str, command)], env={**os.environ, **(env or {})}, cwd=cwd, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@contextlib.contextmanager
def forgotten():
    """As in a process that has called nothing yet, and so again afterwards."""
    caches = native.library, cuda.library, cuda.unavailable, backends._resolve, backends._say_what_is_missing
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
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_cpu.so")
    with forgotten() as said:
        CALLS[name]()
        (message,) = about_the_library(said)
        assert "python -m kdkernels info" in message and "there is no _cpu.so" in message and "eager" in message
        for call in CALLS.values():
            call()
        assert len(about_the_library(said)) == 1


@pytest.mark.parametrize("name", CALLS)
def test_who_asks_for_eager_is_told_nothing(monkeypatch, tmp_path, name):
    torch.compiler.reset()
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_cpu.so")
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
        changed.setattr(native, "unavailable", lambda device, dtypes=(): "no float64" if torch.float64 in dtypes else None)
        assert backends.resolve("auto", torch.device("cpu"), torch.float64).name == "eager"
        assert not about_the_library(said)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_cpu.so")
    with forgotten() as said:
        assert backends.resolve("auto", torch.device("meta"), torch.float32).name == "eager"
        assert not about_the_library(said)
        assert backends.resolve("auto", torch.device("cpu"), torch.float32).name == "eager"
        assert len(about_the_library(said)) == 1


def test_a_missing_library_is_seen_by_a_user(tmp_path):
    """With Python's own filters, on stderr."""
    shutil.copytree(ROOT / "kdkernels", tmp_path / "kdkernels", ignore=shutil.ignore_patterns("*.so", "_build.txt", "__pycache__"))
    code = "import torch, kdkernels as k\nfor _ in range(3): k.fused_kd_loss(torch.ones(2, 3), torch.zeros(2, 3))"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.stderr.count("RuntimeWarning") == 1 and "python -m kdkernels info" in done.stderr


# ---------------------------------------------------------------- files that are not what they should be


def falls_back(monkeypatch, path, reason):
    """auto takes the eager backend and says why, backend="cpu" says why, and so does info."""
    monkeypatch.setattr(native, "LIBRARY", path)
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
    """It would be mapped, and kill the process at the first call into what is missing. The end: also its last byte alone."""
    whole = native.LIBRARY.read_bytes()
    path = tmp_path / "_cpu.so"
    path.write_bytes(whole[:-1] if left == -1 else whole[: int(left * len(whole))])
    monkeypatch.setattr(abi.ctypes, "CDLL", load := Loader(abi.ctypes.CDLL))
    with pytest.raises(OSError):
        abi.Library(path)
    assert not load.loaded
    monkeypatch.undo()
    falls_back(monkeypatch, path, "_cpu.so: the file is damaged" if len(path.read_bytes()) > 64 else "_cpu.so")


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
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_cpu.so")
    with forgotten() as said:
        fused_kd_loss(Z, V)
        assert "_cpu.so" in about_the_library(said)[0]


def test_what_tools_have_rewritten_is_loaded(tmp_path):
    """A library that was stripped, as packagers do, is whole."""
    if not shutil.which("strip"):
        pytest.skip("no strip")
    shutil.copy(native.LIBRARY, tmp_path / "_cpu.so")
    run("strip", tmp_path / "_cpu.so")
    assert (tmp_path / "_cpu.so").stat().st_size < native.LIBRARY.stat().st_size
    assert abi.Library(tmp_path / "_cpu.so", "cpu").isa != "none"


FOREIGN = {  # what a library of that name has, and what is said of it
    "none of ours": ("int something_else(void) { return 1; }", "not a library of this version of kdkernels .*kd_abi_version"),
    "older": ("long kd_call_size(void) { return %(size)d; }", "not a library of this version of kdkernels .*kd_abi_version"),
    "half": ("int kd_abi_version(void) { return %(version)d; }", "not a library of this version of kdkernels .*kd_call_size"),
    "newer": ("int kd_abi_version(void) { return %(version)d + 1; }", "its ABI has version %(newer)d, this package's %(version)d"),
    "cuda": ("int kd_abi_version(void) { return %(version)d; } int kd_scale(void *x) { return 0; }", "it is the CUDA library"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_library_is_refused(monkeypatch, tmp_path, name):
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler")
    source, reason = (x % {"size": abi.ctypes.sizeof(abi.Call), "version": abi.VERSION, "newer": abi.VERSION + 1} for x in FOREIGN[name])
    (tmp_path / "foreign.c").write_text(source)
    run(compiler, "-shared", "-fPIC", tmp_path / "foreign.c", "-o", tmp_path / "_cpu.so")
    falls_back(monkeypatch, tmp_path / "_cpu.so", f"_cpu.so: {reason}")
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "_cpu.so")
    with forgotten():
        assert isinstance(cuda.library(), str) and "reinstall kdkernels" in cuda.library()


def test_the_cpu_library_is_not_cudas(monkeypatch):
    monkeypatch.setattr(cuda, "LIBRARY", native.LIBRARY)
    with forgotten():
        assert "it is the CPU library; reinstall kdkernels" in cuda.library()


def test_a_library_of_equal_sizes_and_another_meaning_is_refused(monkeypatch):
    monkeypatch.setattr(abi, "VERSION", abi.VERSION + 1)
    falls_back(monkeypatch, native.LIBRARY, f"its ABI has version {abi.VERSION - 1}, this package's {abi.VERSION}")


def test_both_languages_count_the_same_version():
    header = (ROOT / "csrc" / "api.h").read_text()
    assert int(re.search(r"#define KD_ABI_VERSION (\d+)", header)[1]) == abi.VERSION
    for name in ("cpu.cpp", "cuda.cu"):
        assert "kd_abi_version(void) { return KD_ABI_VERSION; }" in (ROOT / "csrc" / name).read_text()
