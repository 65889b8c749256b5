"""The oracle agrees with itself (two engines), with golden numbers, and with theory."""

import json
import math
from pathlib import Path

import golden
import numpy as np
import oracle
import pytest
import torch
from names import ENDS, USUAL
from rows import make_rows, with_masks

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
OTHERS = (
    *(f"renyi({a})" for a in (0.01, 1.0001, 20)),
    *(f"reverse_renyi({a})" for a in (0.01, 1, 1.0001, 5)),
    *(f"alpha({a})" for a in (0, 0.01, 0.9999, 1)),
    *(f"{name}({a})" for name in ("skew_kl", "skew_reverse_kl") for a in (0, 0.5, 0.9)),
    *("jsd(0)", "jsd(1)"),
)
NAMES = (*USUAL, *ENDS, *OTHERS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [0.05, 1.0, 4.0, 1e4, 1e6])
def test_engines_agree(name, T):
    for kind, where in (
        ("plain", ""),
        ("close", ""),
        ("dominant", ""),
        ("offset", ""),
        ("plain", "student"),
        ("plain", "teacher"),
        ("plain", "both"),
    ):
        z, v = make_rows(kind, 1, 101)
        z, v = (x[0].numpy() for x in (with_masks(z, v, where) if where else (z, v)))
        D, g = oracle.divergence_row(z, v, name, T, "mpmath")
        E, h = oracle.divergence_row(z, v, name, T, "longdouble")
        # the rounding of one difference of logits of this size over T, in a sum of squares: what 80 bits can
        # give
        room = 1e-12 if kind == "offset" else 1e-13
        if not np.isfinite(D):
            assert E == D
            np.testing.assert_array_equal(g.astype(float), h.astype(float))
            continue
        # TVD is a sum of differences of probabilities
        assert abs(D - E) <= room * (1 + 300 / T * 1e-3) * abs(D) + (1e-18 if name == "tvd" else 1e-33)
        # alpha / (alpha - 1) times a difference of two numbers that are alike
        near_one = 100 if name == "reverse_renyi(1.0001)" else 1
        assert np.linalg.norm(g - h) <= near_one * (1e-12 * np.linalg.norm(g) + 1e-18 * (1 + float(D)))


def test_golden_numbers():
    """As golden.py makes them."""
    values = golden.values(GOLDEN["student_logits"], GOLDEN["teacher_logits"])
    assert list(values) == list(GOLDEN["values"]) and len(values) > len(USUAL)
    for name, by_temperature in values.items():
        for T, found in by_temperature.items():
            assert found == pytest.approx(GOLDEN["values"][name][T], rel=1e-14)


@pytest.mark.parametrize("name", [x for x in NAMES if "(0)" not in x])
def test_gradient_is_the_derivative(name):
    z, v = (x[0].double() for x in make_rows("plain", 1, 12))
    T, eps = 2.0, 1e-6
    _, g = oracle.divergence_row(z.numpy(), v.numpy(), name, T)
    for k in range(12):
        up, down = z.clone(), z.clone()
        up[k] += eps
        down[k] -= eps
        slope = (
            oracle.divergence_row(up.numpy(), v.numpy(), name, T)[0]
            - oracle.divergence_row(down.numpy(), v.numpy(), name, T)[0]
        ) / (2 * eps)
        assert float(slope * T) == pytest.approx(float(g[k]), abs=1e-8)


@pytest.mark.parametrize("order", [0, 0.01, 0.5, 1, 2, 20, math.inf])
@pytest.mark.parametrize("engine", ["mpmath", "longdouble"])
def test_restricted_support(order, engine):
    """P = Q restricted to A: D_alpha = -log Q(A) for every order (Grätzer, eq. 1.20)."""
    z = make_rows("plain", 1, 40)[0][0].numpy().astype(np.longdouble)
    v = z.copy()
    v[::3] = -np.inf
    q = np.exp(z - z.max())
    expected = -np.log(q[np.isfinite(v)].sum() / q.sum())
    D, g = oracle.divergence_row(z, v, "kl" if order == 1 else f"renyi({order})", 1.0, engine)
    assert float(D) == pytest.approx(float(expected), rel=1e-15)
    assert abs(g.sum()) < 1e-17


def test_hard_and_log_softmax():
    z = make_rows("plain", 1, 50)[0][0].double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(z[None], torch.tensor([7]))
    (g,) = torch.autograd.grad(loss, z)
    D, h = oracle.hard_row(z.detach().numpy(), 7)
    assert float(D) == pytest.approx(loss.item(), rel=1e-14)
    np.testing.assert_allclose(h.astype(float), g.numpy(), atol=1e-16)
    np.testing.assert_allclose(
        oracle.log_softmax_row(z.detach().numpy(), 3.0).astype(float),
        (z.detach() / 3).log_softmax(-1).numpy(),
        rtol=1e-14,
    )


@pytest.mark.parametrize("engine", ["mpmath", "longdouble"])
@pytest.mark.parametrize("name", ["reverse_kl", "jsd(0.3)", "skew_kl(0.2)", "skew_reverse_kl(0.2)", "tvd"])
def test_a_finite_mask_is_one(name, engine):
    """The smallest fp32 number in one model, where D is finite: as -inf there."""
    for of_teacher in (False, True) if name != "reverse_kl" else (False,):
        rows = [x[0].numpy().astype(np.longdouble) for x in make_rows("plain", 1, 40)]
        found = []
        for mask in (np.longdouble("-inf"), np.longdouble(np.finfo(np.float32).min)):
            rows[of_teacher][-13:] = mask
            found.append(oracle.divergence_row(*rows, name, 2.0, engine))
        (value, gradient), (finite, of_finite) = found
        assert float(finite) == pytest.approx(float(value), rel=1e-15)
        np.testing.assert_allclose(of_finite.astype(float), gradient.astype(float), rtol=1e-13, atol=1e-18)
