"""KDMixin in the real Lightning: hidden states, accumulation, precision, what is logged, what is saved."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

lightning = pytest.importorskip("lightning")
pytest.importorskip("transformers")

from small import collate, llama, sequences  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from kdkernels import fused_kd_loss  # noqa: E402
from kdkernels.integrations import language  # noqa: E402
from kdkernels.integrations.lightning import KDMixin  # noqa: E402

DATA = sequences()[:24]
LOSS = dict(temperature=2.0, t_squared=True, soft_weight=0.75, hard_weight=0.25)


class Distilled(KDMixin, lightning.LightningModule):
    items: list | None = None  # for each batch, what its loss is divided by

    def __init__(self, student, teacher, **options):
        super().__init__()
        self.student = student
        self.distil_language_model(student, teacher, **LOSS | options)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.kd_step(batch, "train", None if self.items is None else self.items[batch_idx])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def module(**options) -> Distilled:
    return Distilled(llama(32), llama(48, seed=1), **options)


def fitted(found, batch: int = 8, **more):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer = lightning.Trainer(**quiet | dict(enable_model_summary=False, max_steps=3) | more)
    trainer.fit(found, DataLoader(DATA, batch, collate_fn=collate))
    return trainer


def apart(x: nn.Module, y: nn.Module) -> float:
    return max(
        float((a - b).detach().abs().max()) for a, b in zip(x.parameters(), y.parameters(), strict=True)
    )


def test_hidden_states_are_logits():
    hidden, logits = module(linear=True), module(linear=False)
    fitted(hidden)
    fitted(logits)
    assert apart(hidden, logits) < 1e-6 and apart(hidden, module()) > 1e-2
    batch = collate(DATA[:8])
    inputs = {x: batch[x] for x in ("input_ids", "attention_mask")}
    with torch.no_grad():
        both = llama(32)(**inputs).logits, llama(48, seed=1)(**inputs).logits
    expected = fused_kd_loss(*both, language.shifted_labels(batch), **LOSS)
    assert float(hidden.losses[0]) == pytest.approx(float(expected), rel=1e-6)


def test_four_batches_of_two_are_one_of_eight():
    """With the tokens of a step, over its batches, as each batch's denominator."""
    whole, parts, unweighted = module(), module(), module()
    counts = [int((collate(DATA[i : i + 8])["labels"][:, 1:] != -100).sum()) for i in range(0, 24, 8)]
    parts.items = [n / 4 for n in counts for _ in range(4)]
    fitted(whole)
    fitted(parts, 2, accumulate_grad_batches=4)
    fitted(unweighted, 2, accumulate_grad_batches=4)
    assert apart(whole, parts) < 1e-6 < 1e-5 < apart(whole, unweighted)


def test_the_precision_is_the_trainers():
    found, dtypes = module(linear=True), set()
    for x in (found.student, found._kd.teacher):
        x.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: dtypes.add(args[2].dtype))
    fitted(found, precision="bf16-mixed", max_steps=1)
    plain = module(linear=True)
    fitted(plain, max_steps=1)
    assert dtypes == {torch.bfloat16}
    assert float(found.losses[0]) == pytest.approx(float(plain.losses[0]), rel=2e-2)


@pytest.mark.parametrize("linear", [True, False])
def test_a_validation_is_the_mean_over_tokens(linear):
    found = module(linear=linear)
    trainer = lightning.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", barebones=False)
    held_out = sequences()[24:37]
    (metrics,) = trainer.validate(found, DataLoader(held_out, 3, collate_fn=collate), verbose=False)
    batch = collate(held_out)
    inputs = {x: batch[x] for x in ("input_ids", "attention_mask")}
    with torch.no_grad():
        both = found.student.eval()(**inputs).logits, found._kd.teacher(**inputs).logits
    loss, stats = fused_kd_loss(*both, language.shifted_labels(batch), return_stats=True, **LOSS)
    assert metrics["val_loss"] == pytest.approx(float(loss), rel=1e-5)
    expected = stats.mean()
    for name in language.FIGURES:
        assert metrics[f"val_{name}"] == pytest.approx(expected[name], rel=1e-5), name


def test_the_teacher_is_no_part_of_the_module():
    found = module()
    teacher = found._kd.teacher
    before = [x.clone() for x in teacher.parameters()]
    trainer = fitted(found)
    assert len(list(found.parameters())) == len(list(found.student.parameters()))
    assert all(name.startswith("student.") for name in found.state_dict())
    assert not teacher.training and all(x.grad is None for x in teacher.parameters())
    assert all(torch.equal(x, y) for x, y in zip(before, teacher.parameters(), strict=True))
    assert {"train_loss", "train_divergence", "train_agree"} <= set(trainer.callback_metrics)


class Classifies(KDMixin, lightning.LightningModule):
    def __init__(self, student, teacher, **options):
        super().__init__()
        self.student = student
        self.distil_classifier(student, teacher, **options)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_classifiers():
    torch.manual_seed(0)
    rows = [(x, y) for x, y in zip(torch.randn(20, 5), torch.randint(7, (20,)), strict=True)]
    teacher = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5))
    found = Classifies(nn.Linear(5, 7), teacher, **LOSS)
    start = nn.Linear(5, 7)
    start.load_state_dict(found.student.state_dict())
    trainer = lightning.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(found, DataLoader(rows[:8], 8))
    x, y = (torch.stack(t) for t in zip(*rows[:8], strict=True))
    z, v, T = start(x), teacher[0](x).detach(), LOSS["temperature"]  # the teacher without its dropout
    soft = F.kl_div((z / T).log_softmax(-1), (v / T).softmax(-1), reduction="batchmean") * T**2
    loss = LOSS["soft_weight"] * soft + LOSS["hard_weight"] * F.cross_entropy(z, y)
    loss.backward()
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for mine, x in zip(found.student.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(mine.detach(), (x - 0.1 * x.grad).detach(), rtol=1e-5, atol=1e-6)
    (metrics,) = trainer.test(found, DataLoader(rows, 6), verbose=False)
    x, y = (torch.stack(t) for t in zip(*rows, strict=True))
    with torch.no_grad():
        expected = fused_kd_loss(found.student(x), teacher(x), y, **LOSS)
    assert metrics["test_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_errors():
    student, teacher = llama(32), llama(48, seed=1)
    with pytest.raises(
        TypeError, match="unexpected keyword argument 'temprature'; did you mean 'temperature'"
    ):
        Distilled(student, teacher, temprature=2.0)
    with pytest.raises(TypeError, match="'reduction'"):
        Classifies(nn.Linear(2, 2), nn.Linear(2, 2), reduction="sum")
    with pytest.raises(ValueError, match="temperature"):
        Distilled(student, teacher, temperature=-1.0)
    with pytest.raises(TypeError, match="teacher: must be a module, got NoneType"):
        Distilled(student, None)

    class Forgot(KDMixin, lightning.LightningModule):
        pass

    with pytest.raises(RuntimeError, match="call distil_language_model or distil_classifier in __init__"):
        Forgot().kd_step({}, "train")
    student.lm_head.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="linear: .*hooks"):
        Distilled(student, teacher, linear=True)
