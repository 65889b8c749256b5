"""What went wrong with the libraries once: missing without a word, a compiler that cannot build one, a file that is not one."""

import contextlib
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kdkernels import backends, decoupled_kd_loss, fused_kd_loss, fused_linear_kd_loss, logit_matching_loss, tempered_log_softmax
from kdkernels.backends import cuda, native

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
