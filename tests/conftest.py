"""Triton kernels run under its interpreter unless TRITON_INTERPRET says otherwise: on any machine, on CPU
tensors."""

import importlib.util
import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.install()


def pytest_collection_modifyitems(config, items):
    """Those that take long first: at the end, one process would wait for the other."""
    if (
        "gpu" in config.option.markexpr.split()
        and "not" not in config.option.markexpr.split()
        and os.environ["TRITON_INTERPRET"] == "1"
    ):
        import torch

        if torch.cuda.is_available():
            raise pytest.UsageError(
                "-m gpu on a machine with a GPU, but under Triton's interpreter every test would be "
                "skipped: TRITON_INTERPRET=0"
            )
    items.sort(key=lambda item: item.path.stem not in ("test_build", "test_aot", "test_triton"))
