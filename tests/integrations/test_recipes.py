"""The recipes run, and give what they say."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.fixture(autouse=True)
def lines_alone(capfd):
    """What a recipe writes to a file has no bars."""
    yield
    out, err = capfd.readouterr()
    assert "\r" not in out + err


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


def test_vision():
    import vision

    found = vision.main()
    accuracy = {name: x["accuracy"] for name, x in found.items()}
    assert accuracy["teacher"] > 0.9 and accuracy["before"] < 0.2 < accuracy["hard"]
    for name in ("kl", "decoupled"):
        assert accuracy[name] > accuracy["hard"] + 0.1
        assert found[name]["divergence"] < 0.75 * found["hard"]["divergence"]


def test_losses_of_vision():
    """In plain PyTorch, by the formulas."""
    import vision

    z, v = torch.randn(2, 64, vision.CLASSES, generator=torch.Generator().manual_seed(0)).double()
    labels, T = torch.arange(64) % vision.CLASSES, vision.T
    p, q = (v / T).softmax(-1), (z / T).softmax(-1)
    soft = T**2 * F.kl_div(q.log(), p, reduction="batchmean")
    right = 0.9 * soft + 0.1 * F.cross_entropy(z, labels, label_smoothing=0.1)
    torch.testing.assert_close(vision.KL(z, v, labels), right)

    def split(x):
        """The probability of the target and of the others, and the distribution among the others."""
        target = x.gather(-1, labels[:, None])
        others = x[F.one_hot(labels, vision.CLASSES) == 0].view(64, -1)
        return torch.cat([target, 1 - target], -1), others / others.sum(-1, keepdim=True)

    pairs = zip(split(p), split(q), (1.0, 4.0), strict=True)
    right = sum(weight * T**2 * F.kl_div(b.log(), a, reduction="batchmean") for a, b, weight in pairs)
    right += F.cross_entropy(z, labels)
    torch.testing.assert_close(vision.decoupled(z, v, labels), right)


def figures_by_sequence(student, teacher, sequences) -> dict[str, float]:
    """Those of the evaluation in fp64, a sequence at a time: no padding and no batch."""
    sums, student, teacher = torch.zeros(6, dtype=torch.float64), student.double(), teacher.double()
    for x in sequences:
        at = x["labels"][1:] != -100
        labels = x["labels"][1:][at]
        with torch.no_grad():
            z, v = (m(x["input_ids"][None]).logits[0, :-1][at].log_softmax(-1) for m in (student, teacher))
        mine, theirs = z.argmax(-1), v.argmax(-1)
        columns = [-z[range(len(z)), labels], -v[range(len(v)), labels], (v.exp() * (v - z)).sum(-1)]
        columns += [mine == theirs, mine == labels, torch.ones(len(z))]
        sums += torch.stack([c.double().sum() for c in columns])
    hard, of_teacher, divergence, agree, accuracy = (sums[:5] / sums[5]).tolist()
    perplexities = dict(perplexity=math.exp(hard), teacher_perplexity=math.exp(of_teacher))
    return perplexities | dict(divergence=divergence, agree=agree, accuracy=accuracy)


def test_evaluation():
    pytest.importorskip("transformers")
    import evaluation
    from small import collate, llama, sequences, trained

    found = evaluation.main(steps=20)
    assert found["after"]["perplexity"] < 0.2 * found["before"]["perplexity"]
    assert found["after"]["divergence"] < 0.5 * found["before"]["divergence"]
    assert found["before"]["teacher_perplexity"] == found["after"]["teacher_perplexity"]

    data = sequences()[:64]
    student, teacher, held_out = trained(llama(48), data, 8), trained(llama(96, seed=1), data, 8), data[:37]
    batches = [[collate(held_out[i : i + n]) for i in range(0, 37, n)] for n in (1, 16)]
    ones, sixteens = (evaluation.evaluate(student, teacher, x) for x in batches)
    by_batch = [evaluation.evaluate(student, teacher, [x])["divergence"] for x in batches[1]]
    right = figures_by_sequence(student, teacher, held_out)
    assert ones == pytest.approx(right, rel=1e-5) and sixteens == pytest.approx(right, rel=1e-5)
    assert sum(by_batch) / 3 != pytest.approx(right["divergence"], rel=1e-4)


def test_tensorboard_log(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("transformers")
    import evaluation
    import tensorboard_log
    from small import collate, llama, sequences, trained_teacher
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tensorboard_log.main(tmp_path, steps=8, every=4)))
    events.Reload()
    curves = {name: {x.step: x.value for x in events.Scalars(name)} for name in events.Tags()["scalars"]}
    train, held_out = (
        {name.partition("/")[2]: x for name, x in curves.items() if name.startswith(part)}
        for part in ("train/", "held_out/")
    )
    for step in (4, 8):  # the loss is a sum of its terms, and so is its mean over tokens
        right = 0.9 * 4 * train["divergence"][step] + 0.1 * train["cross_entropy"][step]
        assert train["loss"][step] == pytest.approx(right, rel=1e-5)
    assert train["loss"][8] < train["loss"][4] and 0 <= train["agree"][8] <= 1
    data = sequences()
    right = evaluation.evaluate(llama(48), trained_teacher(data[:-64]), [collate(data[-64:])])
    assert {name: x[0] for name, x in held_out.items()} == pytest.approx(right, rel=1e-4)
    assert held_out["divergence"][8] < held_out["divergence"][4] < held_out["divergence"][0]


@pytest.mark.parametrize(
    "name, says",
    [
        ("several_teachers", "'seconds_of_mixture': "),
        ("vision", "decoupled   accuracy 0."),
        ("evaluation", "after  perplexity "),
        ("tensorboard_log", "events in build/tensorboard"),
    ],
)
def test_a_script_prints_lines(name, says, tmp_path):
    if name in ("evaluation", "tensorboard_log"):
        pytest.importorskip("transformers")
    if name == "tensorboard_log":
        pytest.importorskip("tensorboard")
    script = str(RECIPES / f"{name}.py")
    env = os.environ | dict(PYTHONPATH=str(RECIPES.parents[1]))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and says in done.stdout and "\r" not in done.stdout, done.stderr
