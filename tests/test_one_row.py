"""docs/one_row.py, which a newcomer reads first, against 60 digits and at the bounds of the kernels."""

import itertools
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import gradient_bound, spread_of, value_bound
from oracle import divergence_row
from rows import make_rows, with_masks

FILE = Path(__file__).parent.parent / "docs" / "one_row.py"
kl = runpy.run_path(str(FILE))["kl"]
TEMPERATURES = (0.5, 1.0, 3.0, 100.0, 1e4)
# outliers are beyond a float's range, which is careful.py's matter
KINDS = ("plain", "independent", "close", "offset", "offset_teacher", "dominant", "peaked_teacher")


def check(z: torch.Tensor, v: torch.Tensor, T: float) -> None:
    D, g = divergence_row(z.numpy(), v.numpy(), "kl", T)
    value, grad = kl(z.numpy(), v.numpy(), T)
    assert grad.dtype == np.float32
    if math.isinf(D):
        assert value == D
    else:
        assert abs(value - float(D)) <= value_bound(1, len(z), T, spread_of(z, v, T), float(D))
    assert float(np.linalg.norm(grad - g)) <= gradient_bound(1, float(np.linalg.norm(g)))


@pytest.mark.parametrize("vocab", [1, 2, 31, 1000, 5001])
@pytest.mark.parametrize("kind", KINDS)
def test_bounds(kind, vocab):
    for T in TEMPERATURES:
        check(*(x[0] for x in make_rows(kind, 1, vocab)), T)


@pytest.mark.parametrize("mask", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_masks(where, mask):
    for vocab, T in itertools.product((10, 3000), (1.0, 4.0)):
        z, v = (x[0].clamp_min(mask) for x in with_masks(*make_rows("plain", 1, vocab), where))
        check(z, v, T)


@pytest.mark.parametrize("gap", [10.0, 20.0, 40.0])
def test_confident_rows(gap):
    """Of one class and of two different ones: q - p of the others is as small as they are."""
    for vocab, other in itertools.product((31, 3000), (0, 1)):
        z, v = (x[0] for x in make_rows("plain", 1, vocab))
        z[vocab // 2 + other] += gap
        v[vocab // 2] += gap
        for T in (1.0, 2.0):
            check(z, v, T)


def test_a_student_that_is_the_teacher():
    for kind in KINDS:
        v = make_rows(kind, 1, 700)[1][0].numpy()
        value, grad = kl(v, v, 2.0)
        assert value == 0 and not grad.any()


def test_near_the_teacher():
    """Differences of 1e-6 of a logit, which fp32 holds: relative bounds, where p and q agree in all of their
    digits."""
    v = make_rows("plain", 1, 1000)[1][0] / 64
    z = v + torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-6
    for T in (1.0, 10.0):
        D, g = divergence_row(z.numpy(), v.numpy(), "kl", T)
        value, grad = kl(z.numpy(), v.numpy(), T)
        assert D < 1e-12 and abs(value / float(D) - 1) < 1e-5
        assert np.linalg.norm(grad - g) <= 1e-5 * np.linalg.norm(g)


def test_its_size():
    lines = FILE.read_text().split('"""', 2)[2].splitlines()
    assert sum(bool(x.strip()) for x in lines) <= 80
