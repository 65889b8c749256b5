"""The recipes run, and give what they say."""

import pytest


def test_hf_trainer():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import hf_trainer

    found = hf_trainer.main(steps=20)
    assert found["loss_after"] < 0.5 * found["loss_before"]
    assert found["divergence_after"] < 0.5 * found["divergence_before"]
    assert 0 <= found["agree_after"] <= 1 and found["train_divergence"] < found["divergence_before"]


def test_lightning_module():
    pytest.importorskip("lightning")
    pytest.importorskip("transformers")
    import lightning_module

    found = lightning_module.main(steps=20)
    assert found["loss_after"] < 0.5 * found["loss_before"]
    assert found["divergence_after"] < 0.5 * found["divergence_before"]


def test_accelerate_loop():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    import accelerate_loop

    found = accelerate_loop.main(steps=4)
    assert found["last"] < found["first"]
    assert found["apart"] < 1e-6 < 0.01 < found["moved"]


def test_ddp_accumulation():
    import ddp_accumulation

    found = ddp_accumulation.main()
    assert found["two_processes"] == pytest.approx(found["one_process"], rel=1e-6)
    assert found["apart"] < 1e-6 < 0.01 < found["moved"]


def test_fsdp2():
    import fsdp2

    found = fsdp2.main()
    assert found["two_processes"] == pytest.approx(found["one_process"], rel=1e-6)
    assert found["apart"] < 1e-6 < 0.01 < found["moved"]
    assert found["held"] == 0.5


def test_several_teachers():
    import several_teachers

    found = several_teachers.main()
    assert found["apart"] < 2e-6 and found["values_apart"] > 0.1
    assert found["seconds_of_mixture"] < found["seconds_of_each"]
