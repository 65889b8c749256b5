"""KDTrainerMixin in the real Trainer: accumulation, processes, hidden states, autocast, logs, errors.

Weights move by 0.01 and more in the trainings that are compared; they agree to 1e-6.
"""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdkernels import LogitTransform, fused_kd_loss

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from small import VOCAB, collate, llama  # noqa: E402
from trainings import (  # noqa: E402
    DATA,
    HELD_OUT,
    LOSS,
    apart,
    arguments,
    logged,
    loop,
    model,
    trained,
    trainer_of,
    weights,
)

from kdkernels.integrations import language  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference():
    """Batches of 8, from logits."""
    trainer = trained(8, 1, options=dict(linear=False))
    assert apart(weights(trainer), model(32, 0).parameters()) > 0.01
    return trainer


def plain_loss(student, teacher, rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the losses, number) of the tokens that count, by PyTorch, shift and all."""
    batch = collate(rows)
    inputs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    z, v = (x(**inputs).logits[:, :-1].double() for x in (student, teacher))
    y = batch["labels"][:, 1:]
    T = LOSS["temperature"]
    soft = F.kl_div((z / T).log_softmax(-1), (v / T).softmax(-1), reduction="none").sum(-1) * T**2
    hard = F.cross_entropy(z.mT, y, reduction="none", ignore_index=-100)
    counts = y != -100
    return ((LOSS["soft_weight"] * soft + LOSS["hard_weight"] * hard) * counts).sum(), counts.sum()


# ---------------------------------------------------------------- the loss of a step


def test_the_loss_is_the_formula(reference):
    total, count = plain_loss(model(32, 0).train(), model(48, 1).eval(), DATA[:8])
    assert logged(reference)[0] == pytest.approx(float(total.detach() / count), rel=1e-6)


@pytest.mark.parametrize("linear", [False, True, None])
def test_four_batches_of_two_are_one_of_eight(reference, linear):
    trainer = trained(2, 4, options=dict(linear=linear))
    assert trainer._kd.linear is (linear is not False)
    assert apart(weights(trainer), weights(reference)) < 1e-6
    assert logged(trainer) == pytest.approx(logged(reference), rel=1e-6)
    # the means of batches of two are others
    means = [
        total / count for total, count in (plain_loss(*_models(), DATA[i : i + 2]) for i in range(0, 8, 2))
    ]
    assert abs(float(sum(means).detach() / 4) - logged(reference)[0]) > 5e-5


def _models():
    return model(32, 0).train(), model(48, 1).eval()


def test_hidden_states_are_logits(reference, monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("logits were taken")

    monkeypatch.setattr(language, "fused_kd_loss", refused)
    trainer = trained(8, 1, options=dict(linear=True, memory_budget=1 << 16))  # several chunks
    assert apart(weights(trainer), weights(reference)) < 1e-6


def test_the_gradient_in_place_of_the_logits(reference):
    trainer = trained(8, 1, options=dict(linear=False, inplace=True))
    assert apart(weights(trainer), weights(reference)) < 1e-6


@pytest.mark.parametrize("linear", [False, True])
def test_bf16_is_autocast(linear, reference):
    """accelerate puts autocast around the model's forward: a model whose layers are called past it trains in
    fp32, and nothing says so."""
    trainer, dtypes = trainer_of(arguments(bf16=True, max_steps=1), linear=linear), set()
    for x in (trainer.model.model.layers[0].mlp.up_proj, trainer._kd.teacher.model.layers[0].mlp.up_proj):
        x.register_forward_hook(lambda module, inputs, output: dtypes.add((module.in_features, output.dtype)))
    trainer.train()
    assert dtypes == {(32, torch.bfloat16), (48, torch.bfloat16)}
    assert logged(trainer)[0] == pytest.approx(logged(reference)[0], rel=2e-2)
    assert logged(trainer)[0] != pytest.approx(logged(reference)[0], rel=1e-6)
    assert all(x.dtype == torch.float32 for x in weights(trainer))


def test_gradient_checkpointing(reference):
    trainer = trained(8, 1, options=dict(linear=True), gradient_checkpointing=True)
    assert apart(weights(trainer), weights(reference)) < 1e-6


def test_a_batch_without_a_token_that_counts():
    trainer = trainer_of(linear=True)
    batch = collate(DATA[:2])
    batch["labels"].fill_(-100)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(5))
    loss.backward()
    assert loss.item() == 0 and not any(
        x.grad is not None and x.grad.any() for x in trainer.model.parameters()
    )


def test_shifted_labels_of_a_collator():
    trainer = trainer_of(linear=True)
    batch = collate(DATA[:2])
    shifted = dict(batch, shift_labels=F.pad(batch["labels"][:, 1:], (0, 1), value=-100))
    del shifted["labels"]
    assert trainer.compute_loss(trainer.model, shifted) == trainer.compute_loss(trainer.model, batch)


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict:
    """What trainings.py saves as two processes of gloo."""
    path = tmp_path_factory.mktemp("two") / "found.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = [ROOT, ROOT / "tests" / "integrations", ROOT / "examples" / "recipes"]
    env = os.environ | dict(
        OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(map(str, [*places, *sys.path[1:]]))
    )
    script = Path(__file__).with_name("trainings.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(rank), port, path],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [x.communicate(timeout=300)[0] for x in processes]
    finally:
        for x in processes:
            x.kill()
    assert all(x.returncode == 0 for x in processes), "\n".join(x[-3000:] for x in said)
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("kind", ["DistributedDataParallel", "FSDPLlamaForCausalLM"])
def test_two_processes_are_one(kind, reference, two_processes):
    found = two_processes["ddp"] if kind.startswith("D") else two_processes["accelerated_fsdp2"]["trainer"]
    evaluated = reference.evaluate()
    for linear in (True, False):
        ends, losses, divergences, metrics, took_hidden_states, wrapper = found[linear]
        assert took_hidden_states is linear and wrapper == kind
        assert apart(ends, weights(reference)) < 1e-6
        assert losses == pytest.approx(logged(reference), rel=1e-6)
        assert divergences == pytest.approx(logged(reference, "divergence"), rel=1e-5)
        for name in ("eval_loss", "eval_divergence", "eval_agree", "eval_student_entropy"):
            assert metrics[name] == pytest.approx(evaluated[name], rel=1e-5), name


def test_a_loop_of_two_processes_is_that_of_one(two_processes):
    """The recipe with accelerate, under DDP and under FSDP2."""
    ends, losses, means = loop(8, 1)
    for found in (two_processes["loop"], two_processes["accelerated_fsdp2"]["loop"]):
        assert apart(found[0], ends) < 1e-6 and found[1] == pytest.approx(losses, rel=1e-6)
        assert found[2] == pytest.approx(means, rel=1e-5)
    assert apart(ends, llama(48).parameters()) > 0.01


def test_sharded_parameters(two_processes):
    found = two_processes["fsdp2"]
    student, teacher = model(32, 0), model(48, 1)
    loss = language.LanguageModelLoss(teacher, False, **LOSS)(student, student, collate(DATA[:8])).loss
    loss.backward()
    for kind in ("whole", "apart"):
        value, grads = found[kind]
        assert float(value) == pytest.approx(float(loss.detach()), rel=1e-6)
        for mine, x in zip(grads, student.parameters(), strict=True):
            assert float((mine - x.grad).norm()) < 1e-6 * float(x.grad.norm()), kind


# ---------------------------------------------------------------- logs and evaluation


def test_figures_in_the_log_are_means_over_its_tokens():
    """Of all the tokens since the last log, whatever batches they were in."""
    trainer = trainer_of(arguments(2, 2, max_steps=4, logging_steps=2, learning_rate=0.0), linear=True)
    trainer.train()
    for log, at in zip([x for x in trainer.state.log_history if "loss" in x], (0, 8), strict=True):
        student, teacher = _models()
        batch = collate(DATA[at : at + 8])
        labels = language.shifted_labels(batch)
        inputs = {x: batch[x] for x in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = student(**inputs).logits, teacher(**inputs).logits
        _, stats = fused_kd_loss(*logits, labels, return_stats=True, **LOSS)
        expected = stats.mean()
        for name in language.FIGURES:
            assert log[name] == pytest.approx(expected[name], rel=1e-5), name
        assert "counted" not in log


def test_no_figures_where_none_are_asked_for():
    trainer = trained(options=dict(log_stats=False), max_steps=1)
    assert not any("divergence" in x for x in trainer.state.log_history)
    assert "eval_divergence" not in trainer.evaluate() and "eval_loss" in trainer.evaluate()


@pytest.mark.parametrize("linear", [False, True])
def test_an_evaluation_is_the_mean_over_tokens(linear):
    trainer = trainer_of(linear=linear)
    student, teacher = model(32, 0).eval(), model(48, 1).eval()
    total, count = plain_loss(student, teacher, HELD_OUT)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(total / count), rel=1e-6)
    batches = [plain_loss(student, teacher, HELD_OUT[i : i + 3]) for i in range(0, 13, 3)]
    by_batch = [float(x / n) for x, n in batches for _ in range(3)][:13]
    assert abs(sum(by_batch) / 13 - metrics["eval_loss"]) > 1e-3
    assert trainer.evaluate(metric_key_prefix="held")["held_loss"] == metrics["eval_loss"]


def test_logits_where_somebody_takes_them():
    seen = {}

    def compute_metrics(found):
        seen["predictions"], seen["labels"] = found.predictions, found.label_ids
        return dict(rows=len(found.predictions))

    trainer = trainer_of(linear=True, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 13 and seen["predictions"].shape[-1] == VOCAB
    first = collate(HELD_OUT[:3])
    with torch.no_grad():
        logits = trainer.model(input_ids=first["input_ids"], attention_mask=first["attention_mask"]).logits
    n = logits.shape[1]
    torch.testing.assert_close(torch.from_numpy(seen["predictions"][:3, :n]), logits, rtol=1e-5, atol=1e-5)
    assert metrics["eval_loss"] == pytest.approx(trainer_of(linear=True).evaluate()["eval_loss"], rel=1e-6)
    loss, outputs = trainer.compute_loss(trainer.model, first, return_outputs=True)
    torch.testing.assert_close(outputs.logits, logits)
    assert loss.requires_grad and "labels" in first


def test_an_evaluation_between_steps_leaves_the_log_alone(reference):
    trainer = trained(8, 1, options=dict(linear=True), eval_strategy="steps", eval_steps=1)
    assert logged(trainer, "divergence") == pytest.approx(logged(reference, "divergence"), rel=1e-5)
    assert sum("eval_loss" in x for x in trainer.state.log_history) == 3


# ---------------------------------------------------------------- models


def test_the_teacher_is_left_alone():
    teacher = model(48, 1).train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = trainer_of(arguments(max_steps=1), teacher=teacher, linear=True)
    trainer.train()
    assert not teacher.training and all(x.grad is None for x in teacher.parameters())
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert all(x.requires_grad for x in teacher.parameters())
    assert "forward" not in vars(teacher) and "forward" not in vars(teacher.lm_head)
    assert "forward" not in vars(trainer.model) and "forward" not in vars(trainer.model.lm_head)


SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB
)
SMALL |= dict(num_key_value_heads=1, head_dim=16, pad_token_id=256, bos_token_id=None, eos_token_id=None)


def other(name: str, **options):
    """A model with logits beyond its softcap, where it has one."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**SMALL | options)
    found = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for x in found.parameters():
            if x.dim() > 1:
                x.normal_(0, 0.3)
    return found


def gradients(trainer, **options) -> list[torch.Tensor]:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, collate(DATA[:4]), **options).backward()
    return [x.grad.clone() for x in trainer.model.parameters()]


@pytest.mark.parametrize(
    "student, teacher",
    [
        (("Gemma2", dict(final_logit_softcapping=3.0)), ("Granite", dict(logits_scaling=4.0))),
        (("Cohere", dict(logit_scale=0.25)), ("Gemma2", dict(final_logit_softcapping=2.0))),
        (("Phi", dict(partial_rotary_factor=0.5)), ("Llama", {})),  # with a bias
    ],
    ids=lambda x: x[0],
)
def test_scales_softcaps_and_biases_are_the_models(student, teacher):
    found = []
    for linear in (True, False):
        trainer = trainer_of(
            student=other(student[0], **student[1]), teacher=other(teacher[0], **teacher[1]), linear=linear
        )
        assert trainer._kd.linear is linear
        found.append(gradients(trainer))
    for mine, right in zip(*found, strict=True):
        assert float((mine - right).norm()) < 2e-5 * float(right.norm())
    wrong = trainer_of(
        student=other(*student[:1], **student[1]),
        teacher=other(teacher[0], **teacher[1]),
        linear=True,
        teacher_transform=LogitTransform(0.5, 30.0),
    )
    with pytest.raises(ValueError, match="teacher_transform: the teacher makes other logits.*linear=False"):
        gradients(wrong)


class Cut(transformers.LlamaForCausalLM):
    """With a vocabulary that is cut off behind the head."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits[..., :256]
        return found


def test_classes_that_are_cut_off_behind_the_head():
    student = Cut(model(32, 0).config)
    with pytest.raises(
        ValueError, match="vocab_size: the student's head has 258 classes, and its logits 256"
    ):
        gradients(trainer_of(student=student, linear=True))
    found = [gradients(trainer_of(student=student, linear=x, vocab_size=256)) for x in (True, False)]
    assert apart(*found) < 1e-6


@pytest.mark.parametrize("targets", ["head", "saved"])
def test_adapters_on_the_head_are_refused(targets):
    peft = pytest.importorskip("peft")
    of_head = dict(target_modules=["q_proj", "lm_head"]) if targets == "head" else {}
    config = peft.LoraConfig(r=2, **dict(target_modules=["q_proj"], **{}) | of_head)
    if targets == "saved":
        config.modules_to_save = ["lm_head"]
    student = peft.get_peft_model(model(32, 0), config)
    with pytest.raises(ValueError, match="linear: the head of .* has adapters.*linear=False"):
        trainer_of(student=student, linear=True)
    trainer = trainer_of(student=student)
    assert not trainer._kd.linear
    trainer.compute_loss(trainer.model, collate(DATA[:4])).backward()
    learns = [x for name, x in student.named_parameters() if "lm_head" in name and x.requires_grad]
    assert learns and any(x.grad is not None and x.grad.any() for x in learns)


def test_adapters_elsewhere():
    peft = pytest.importorskip("peft")
    found = []
    for linear in (True, False):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        trainer = trainer_of(student=peft.get_peft_model(model(32, 0), config), linear=linear)
        trainer.compute_loss(trainer.model, collate(DATA[:4])).backward()
        found.append([x.grad for x in trainer.model.parameters() if x.grad is not None])
    assert len(found[0]) == 8 and apart(*found) < 1e-6 and max(float(x.abs().max()) for x in found[0]) > 1e-4


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_heads_that_are_more_than_a_weight_are_refused():
    hooked = model(32, 0)
    hooked.lm_head.register_forward_hook(lambda *_: None)
    other_class = model(32, 0)
    other_class.lm_head = Scaled(32, VOCAB, bias=False)
    replaced = model(32, 0)
    replaced.lm_head.forward = replaced.lm_head.forward
    for student, says in (
        (hooked, "hooks"),
        (other_class, "not a plain nn.Linear"),
        (replaced, "forward replaced"),
    ):
        with pytest.raises(ValueError, match=f"linear: the head of LlamaForCausalLM.*{says}.*linear=False"):
            trainer_of(student=student, linear=True)
        with pytest.raises(ValueError, match=f"linear: the head of LlamaForCausalLM.*{says}"):
            trainer_of(teacher=student, linear=True)
        assert not trainer_of(student=student)._kd.linear
        # of a teacher the logits are taken instead
        trainer = trainer_of(teacher=student)
        assert trainer._kd.linear and not trainer._kd.teacher_linear
        mine, right = (gradients(x) for x in (trainer, trainer_of(teacher=student, linear=False)))
        assert apart(mine, right) < 1e-6


def test_a_hook_that_comes_later_is_seen():
    trainer = trainer_of(linear=True)
    trainer.model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="linear: .*hooks"):
        gradients(trainer)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, error, says",
    [
        (dict(temperature=0.0), ValueError, "temperature"),
        (dict(divergence="hellinger"), ValueError, "divergence: unknown"),
        (dict(memory_budget=0), ValueError, "memory_budget"),
        (dict(reduction="sum"), TypeError, "reduction"),
        (dict(ignore_index=3), TypeError, "ignore_index"),
        (dict(teacher="gpt2"), TypeError, "teacher: must be a module, got str"),
        (dict(compute_loss_func=lambda *_: 0), ValueError, "compute_loss_func"),
    ],
)
def test_wrong_options_are_errors_at_construction(options, error, says):
    with pytest.raises(error, match=says):
        trainer_of(**options)


def test_trainings_that_this_loss_is_not_for():
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer_of(arguments(label_smoothing_factor=0.1))
    small = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=300)
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(**small, **heads))
    with pytest.raises(ValueError, match="encoder-decoder"):
        trainer_of(student=bart)
    student = model(32, 0)
    student.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits"):
        trainer_of(student=student)


def test_batches_that_do_not_fit():
    trainer = trainer_of(linear=True)
    batch = collate(DATA[:2])
    with pytest.raises(ValueError, match="labels: the batch has none"):
        trainer.compute_loss(trainer.model, {x: batch[x] for x in ("input_ids", "attention_mask")})
    with pytest.raises(ValueError, match="labels: must be .*, a label for each position"):
        trainer.compute_loss(trainer.model, dict(batch, labels=batch["labels"][:, :-1]))
    assert "forward" not in vars(trainer.model) and "forward" not in vars(trainer.model.lm_head)


def test_importing_the_library_imports_none_of_the_trainers():
    code = (
        "import sys, kdkernels, kdkernels.integrations;"
        "assert not {'transformers', 'accelerate', 'lightning', 'peft', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
