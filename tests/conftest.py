"""Triton kernels run under its interpreter unless TRITON_INTERPRET says otherwise: on any machine, on CPU tensors."""

import importlib.util
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.install()
