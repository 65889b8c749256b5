"""Bad input: the exception, the argument it names, and nothing computed before it."""

import math

import pytest
import torch
from rows import BACKENDS

from kdkernels import KDLoss, Renyi, fused_kd_loss, logit_matching_loss, ops, parse, tempered_log_softmax

Z, V = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
Y = torch.zeros(2, 3, dtype=torch.int64)
W = torch.ones(2, 3)

OPTION_ERRORS = [
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"temperature": -1.0}, ValueError, "temperature"),
    ({"temperature": math.nan}, ValueError, "temperature"),
    ({"temperature": "2"}, TypeError, "temperature"),
    ({"temperature": True}, TypeError, "temperature"),
    ({"temperature": math.inf}, ValueError, "temperature.*t_squared"),
    (
        {"temperature": math.inf, "t_squared": True, "divergence": "cross_entropy"},
        ValueError,
        "temperature.*cross_entropy",
    ),
    (
        {"temperature": math.inf, "t_squared": True, "divergence": "renyi(inf)"},
        ValueError,
        r"temperature.*renyi\(inf\)",
    ),
    ({"divergence": "renyi(-1)"}, ValueError, "alpha"),
    ({"divergence": "renyi(nan)"}, ValueError, "alpha"),
    ({"divergence": "renyi"}, ValueError, "number of arguments"),
    ({"divergence": "renyi(1,2)"}, ValueError, "number of arguments"),
    ({"divergence": "kl(1)"}, ValueError, "number of arguments"),
    ({"divergence": "renyi(x)"}, ValueError, "divergence"),
    ({"divergence": "renyi(0.5"}, ValueError, "divergence.*unknown"),
    ({"divergence": "hellinger"}, ValueError, "divergence.*known are kl"),
    ({"divergence": 0.5}, TypeError, "divergence"),
    ({"divergence": "logit_matching"}, ValueError, "logit_matching_loss"),
    ({"reduction": "batchmean"}, ValueError, 'reduction.*"mean"'),
    ({"reduction": "avg"}, ValueError, "reduction"),
    ({"vocab_size": 0}, ValueError, "vocab_size"),
    ({"vocab_size": 2.0}, ValueError, "vocab_size"),
    ({"soft_weight": math.nan}, ValueError, "soft_weight"),
    ({"soft_weight": None}, TypeError, "soft_weight"),
    ({"hard_weight": math.inf}, ValueError, "hard_weight"),
    ({"backend": "cuda13"}, ValueError, "backend.*auto"),
]

CALL_ERRORS = [
    ((Z, V[:1]), {}, ValueError, "same leading shape"),
    ((Z, V[0]), {}, ValueError, "same leading shape"),
    ((torch.tensor(1.0), torch.tensor(1.0)), {}, ValueError, "same leading shape"),
    ((Z, V[..., :4]), {}, ValueError, "vocab_size: required"),
    ((Z, V[..., :4]), {"vocab_size": 5}, ValueError, "vocab_size: 5 is more"),
    ((Z[..., :0], V[..., :0]), {}, ValueError, "empty"),
    ((Z.long(), V), {}, TypeError, "student_logits.*int64"),
    ((Z, V.int()), {}, TypeError, "teacher_logits.*int32"),
    ((Z.tolist(), V), {}, TypeError, "student_logits.*list"),
    ((Z, V.to("meta")), {}, ValueError, "teacher_logits.*device"),
    ((Z, V), {"hard_weight": 0.5}, ValueError, "hard_weight.*labels"),
    ((Z, V, Y.int()), {}, TypeError, "labels.*int32"),
    ((Z, V, Y[0]), {}, ValueError, "labels.*leading shape"),
    ((Z, V, Y.to("meta")), {}, ValueError, "labels.*device"),
    ((Z, V, Y + 5), {"hard_weight": 0.5}, ValueError, r"labels: row 0 has label 5; labels are in \[0, 5\)"),
    ((Z, V, Y - 1), {"hard_weight": 0.5}, ValueError, "labels: row 0 has label -1"),
    ((Z, V, Y + 4), {"hard_weight": 0.5, "vocab_size": 4}, ValueError, r"\[0, 4\)"),
    ((Z, V), {"token_weight": W.to(torch.complex64)}, TypeError, "token_weight.*complex64"),
    ((Z, V), {"token_weight": W[0]}, ValueError, "token_weight.*leading shape"),
    ((Z, V), {"token_weight": W.clone().requires_grad_()}, ValueError, "token_weight.*gradient"),
    ((Z, V), {"num_items": -1}, ValueError, "num_items.*negative"),
    ((Z, V), {"num_items": torch.ones(2)}, ValueError, "num_items"),
    ((Z, V), {"num_items": 3, "reduction": "sum"}, ValueError, "num_items.*sum"),
    ((Z, V.clone().requires_grad_()), {}, ValueError, "teacher_logits.*detach"),
    ((Z.clone().requires_grad_(), V), {"inplace": True}, ValueError, "inplace.*leaf"),
    ((Z[:1].expand(2, 3, 5), V), {"inplace": True}, ValueError, "inplace.*expanded"),
    ((torch.randn(2, 5, 3).transpose(1, 2), V), {"inplace": True}, ValueError, "inplace.*copied"),
    (
        (torch.randn(4, 3, 2, 5)[::2].transpose(0, 1), V.expand(2, 2, 3, 5).permute(2, 1, 0, 3)),
        {"inplace": True},
        ValueError,
        "inplace.*copied",
    ),
]


@pytest.fixture
def nothing_runs(monkeypatch):
    def run(*_):
        raise AssertionError("computed before the error")

    for name in ("loss", "loss_into", "log_softmax"):
        monkeypatch.setattr(ops, name, run)


@pytest.mark.parametrize(("options", "error", "match"), OPTION_ERRORS)
def test_options(options, error, match, nothing_runs):
    with pytest.raises(error, match=match):
        fused_kd_loss(Z, V, Y, **options)
    with pytest.raises(error, match=match):
        KDLoss(**options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("arguments", "options", "error", "match"), CALL_ERRORS)
def test_calls(arguments, options, error, match, backend):
    before = [x.clone() if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x for x in arguments]
    with pytest.raises(error, match=match):
        fused_kd_loss(*arguments, backend=backend, **options)
    for x, y in zip(arguments, before, strict=True):
        assert not isinstance(y, torch.Tensor) or y.device.type != "cpu" or torch.equal(x, y)


def test_shapes_are_checked_before_the_operator(nothing_runs):
    for arguments, options, error, match in CALL_ERRORS:
        # the values of labels are read by the operator itself, first thing
        if "row 0" not in match and r"\[0, 4" not in match:
            with pytest.raises(error, match=match):
                fused_kd_loss(*arguments, **options)


def test_an_ignored_label_may_be_anything():
    y = Y.clone()
    y[0, 1] = -100
    assert fused_kd_loss(Z, V, y, hard_weight=0.5).isfinite()
    assert fused_kd_loss(Z, V, y + 1, hard_weight=0.5, ignore_index=-99).isfinite()
    assert fused_kd_loss(Z, V, Y - 1, token_weight=torch.zeros(2, 3), hard_weight=0.5).item() == 0


def test_other_functions():
    with pytest.raises(TypeError, match="logits"):
        tempered_log_softmax(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature"):
        tempered_log_softmax(Z, 0.0)
    with pytest.raises(ValueError, match="logits"):
        tempered_log_softmax(torch.tensor(1.0))
    with pytest.raises(ValueError, match="hard_weight"):
        logit_matching_loss(Z, V, hard_weight=0.5)
    with pytest.raises(TypeError, match="temperature"):
        logit_matching_loss(Z, V, temperature=2.0)
    with pytest.raises(ValueError, match="alpha"):
        Renyi(-0.1)
    with pytest.raises(TypeError, match="alpha"):
        Renyi("0.5")
    with pytest.raises(ValueError, match="unknown"):
        parse("")


def test_a_backend_that_is_not_there(monkeypatch, tmp_path):
    from kdkernels import backends
    from kdkernels.backends import abi, cpu

    record = tmp_path / "_build.txt"
    record.write_text("error: no C++ compiler was found\n")
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(abi, "BUILD_RECORD", record)
    cpu.library.cache_clear()
    backends._resolve.cache_clear()
    try:
        with pytest.raises(
            RuntimeError, match="cpu: no C.. compiler was found; install a C.. compiler and reinstall"
        ):
            fused_kd_loss(Z, V, backend="cpu")
        expected = fused_kd_loss(Z, V, backend="eager")
        torch.testing.assert_close(fused_kd_loss(Z, V), expected)  # auto falls back
        x = Z.clone().requires_grad_()
        fused_kd_loss(x * 1, V, Y, hard_weight=0.1, inplace=True).backward()
        y = Z.clone().requires_grad_()
        fused_kd_loss(y, V, Y, hard_weight=0.1, backend="eager").backward()
        torch.testing.assert_close(x.grad, y.grad)
    finally:
        cpu.library.cache_clear()
        backends._resolve.cache_clear()
