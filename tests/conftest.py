"""Triton kernels run under its interpreter unless TRITON_INTERPRET says otherwise: on any machine, on CPU tensors."""

import importlib.util
import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.install()


# What the interpreter and nvcc's stand-ins take longest for while others come near it: with the slow tests (`make slow`), for CI's time.
RARELY = (
    ("test_rows_of_few_classes", "parts]"),
    ("test_masked_classes[False", "triton]"),
    ("test_shift_and_permutation[triton", "renyi(0.3)]"),
    ("test_zero_at_the_teacher[triton", "renyi(0.3)]"),
    ("test_nonnegative_and_zero_sum[triton", "renyi(0.3)]"),
    ("test_orders[triton", "]"),
    ("test_golden_numbers[triton", "dtype5]"),
    ("test_covering_set[gfx942", "]"),
    *(("test_every_kernel_shape[" + x, "parts]") for x in ("cross_entropy", "hard-", "order below", "order above 1-", "limit")),
    ("test_bounds_of_the_others[triton", "]"),
    ("test_mirrors[triton", "]"),
    ("test_every_level_is_right", "v2]"),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if any(begin in item.nodeid and item.nodeid.endswith(end) for begin, end in RARELY):
            item.add_marker(pytest.mark.slow)
