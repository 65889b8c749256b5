"""Triton kernels run under its interpreter unless TRITON_INTERPRET says otherwise: on any machine, on CPU tensors."""

import importlib.util
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.install()


def pytest_collection_modifyitems(items):
    """Those that take long first: at the end, one process would wait for the other."""
    items.sort(key=lambda item: item.path.stem not in ("test_build", "test_aot", "test_triton"))
