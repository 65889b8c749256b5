"""TRL's trainers with `fused`: the losses and the weights of real runs, and each hook against what it takes
the place of."""

import contextlib
import os
import subprocess
import sys
import warnings

import pytest
import torch

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

import trl_tiny as tiny  # noqa: E402
from trl import DistillationConfig, DistillationTrainer  # noqa: E402
from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402
from trl.experimental.gold import GOLDConfig, GOLDTrainer  # noqa: E402
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

from kdkernels.integrations import trl as ours  # noqa: E402
from kdkernels.integrations.trl import FusedLinearJSDLoss, fused, generalized_jsd_loss  # noqa: E402

BETAS = (0.0, 0.1, 0.5, 1.0)
LENGTHS = {"lmbda": 0.0, "max_length": 40}


def gkd(folder, student=None, teacher=None, cls=GKDTrainer, **more):
    args = GKDConfig(**tiny.arguments(folder, max_new_tokens=4, **LENGTHS, **more))
    return cls(
        model=student or tiny.llama(0),
        teacher_model=teacher or tiny.llama(1, 24),
        args=args,
        train_dataset=tiny.dataset(tiny.conversations()),
        processing_class=tiny.tokenizer(),
    )


def gold(folder, **more):
    more = {"use_uld_loss": False, "max_completion_length": 4, "temperature": 2.0} | LENGTHS | more
    return GOLDTrainer(
        model=tiny.llama(0),
        teacher_model=tiny.llama(1, 24),
        args=GOLDConfig(**tiny.arguments(folder, **more)),
        train_dataset=tiny.dataset(tiny.conversations()),
        processing_class=tiny.tokenizer(),
    )


def distillation(folder, student=None, teacher=None, cls=DistillationTrainer, **more):
    return cls(
        model=student or tiny.llama(0),
        teacher_model=teacher or tiny.llama(1, 24),
        args=DistillationConfig(**tiny.arguments(folder, max_completion_length=6, **more)),
        train_dataset=tiny.dataset(tiny.prompts()),
        processing_class=tiny.tokenizer(),
    )


def relative(x: torch.Tensor, right: torch.Tensor) -> float:
    return float((x.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30))


def assert_same_run(found, right, limit: float = 1e-5) -> None:
    """Logged losses and entropies, and the change of all weights together."""
    (logs, weights), (right_logs, right_weights) = found, right
    assert len(logs) == len(right_logs) > 1
    for x, y in zip(logs, right_logs, strict=True):
        for name in {"loss", "entropy"} & y.keys():
            assert x[name] == pytest.approx(y[name], rel=limit), name
    start = {name: x.double() for name, x in tiny.llama(0).state_dict().items()}
    off = sum(float((weights[k] - right_weights[k]).square().sum()) for k in start) ** 0.5
    moved = sum(float((right_weights[k] - start[k]).square().sum()) for k in start) ** 0.5
    rounding = sum(float(right_weights[k].square().sum()) for k in start) ** 0.5 * 2**-23  # of fp32 weights
    assert moved > 1e-3 and off < limit * moved + rounding


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("linear", [False, True, None])
@pytest.mark.parametrize("beta", BETAS)
def test_gkd(beta, linear, tmp_path):
    """Against TRL's own in fp64, with and without gradient accumulation."""
    steps = 2 if beta == 0.5 else 1
    options = {"beta": beta, "gradient_accumulation_steps": steps, "per_device_train_batch_size": 4 // steps}
    double = gkd(tmp_path, tiny.llama(0).double(), tiny.llama(1, 24).double(), **options)
    assert_same_run(tiny.run(fused(gkd(tmp_path, **options), linear)), tiny.run(double))


@pytest.mark.parametrize("beta", BETAS)
def test_distillation(beta, tmp_path):
    """Against TRL's own in fp32; on policy, with padded completions, accumulation and the logged entropy."""
    options = {"beta": beta, "temperature": 2.0, "gradient_accumulation_steps": 2}
    right = tiny.run(distillation(tmp_path, **options))
    assert_same_run(tiny.run(fused(distillation(tmp_path, **options))), right, limit=2e-5)
    assert "entropy" in right[0][0]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_gold(beta, linear, tmp_path):
    """With its temperature, which GKDTrainer does not pass on."""
    right = tiny.run(gold(tmp_path, beta=beta))
    assert_same_run(tiny.run(fused(gold(tmp_path, beta=beta), linear)), right, limit=2e-5)


def test_iw_opd_divergence(tmp_path):
    """From logits, of which it does more than this. It looks for the teacher's tokenizer where the teacher
    was."""
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")

    def make():
        teacher = tiny.llama(1, 24)
        teacher.config._name_or_path = str(tmp_path / "teacher")
        more = {
            "lmbda": 0.0,
            "max_completion_length": 6,
            "loss_top_k": 0,
            "distillation_objective": "jsd",
        }
        return IWOPDTrainer(
            model=tiny.llama(0),
            teacher_model=teacher,
            args=IWOPDConfig(**tiny.arguments(tmp_path, **more)),
            train_dataset=tiny.dataset(tiny.conversations()),
            processing_class=tiny.tokenizer(),
        )

    with pytest.raises(ValueError, match="elsewhere than in the loss"):
        fused(make(), linear=True)
    right = tiny.run(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same_run(tiny.run(fused(make())), right, limit=2e-5)


def test_evaluation_takes_logits(tmp_path):
    """TRL asks for the models' outputs then, which stay whole."""
    losses, batch = [], None
    for linear in ("TRL's", False, True):
        trainer = gkd(tmp_path, beta=0.5)
        trainer = trainer if linear == "TRL's" else fused(trainer, linear)
        batch, forward = (
            batch or next(iter(trainer.get_train_dataloader())),
            vars(trainer.model).get("forward"),
        )
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        losses.append(float(loss))
        assert torch.equal(outputs.logits, trainer.model(batch["input_ids"], batch["attention_mask"]).logits)
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(losses[0], rel=1e-5)
        assert vars(trainer.model).get("forward") is forward
    assert losses[1:] == pytest.approx(2 * losses[:1], rel=1e-5)


@pytest.mark.parametrize("linear", [False, True])
def test_bf16_models(linear, tmp_path):
    """The loss of their bf16 logits, or of the unrounded ones, in fp64, where TRL's own bf16 loss is far from
    it; the gradient in the hidden states to bf16's rounding."""
    student, teacher = tiny.llama(0).bfloat16(), tiny.llama(0).bfloat16()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.1)
    trainer = fused(gkd(tmp_path, student, teacher, beta=0.5), linear)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    kept = {}
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    grad = student.lm_head.weight.grad.clone()
    with torch.no_grad():
        for name, model in (("student", student), ("teacher", teacher)):
            hidden, weight = model.model(**inputs).last_hidden_state, model.lm_head.weight.double()
            kept[name] = hidden.double(), (hidden @ model.lm_head.weight.t()).double(), weight
    (h, z, w), (th, v, tw) = kept["student"], kept["teacher"]
    w.requires_grad_()
    exact = z if not linear else h @ w.t()
    exact = exact.requires_grad_() if not linear else exact
    teachers = v if not linear else th @ tw.t()
    labels = batch["labels"][:, 1:]
    right = GKDTrainer.generalized_jsd_loss(exact[:, :-1], teachers[:, :-1], labels, beta=0.5)
    right.backward()
    assert float(loss) == pytest.approx(float(right), rel=1e-5)
    dw = w.grad if linear else exact.grad.flatten(0, 1).t() @ h.flatten(0, 1)
    assert relative(grad, dw) < 5e-3
    theirs = GKDTrainer.generalized_jsd_loss(z[:, :-1].bfloat16(), v[:, :-1].bfloat16(), labels, beta=0.5)
    assert abs(float(theirs) / float(right) - 1) > 0.02


@pytest.mark.parametrize("linear", [False, True])
def test_tied_heads_and_checkpoints(linear, tmp_path):
    """The embedding's weight gets the gradient of both its uses; layers are computed anew in the backward."""

    def make():
        models = [tiny.llama(i, 16, tie_word_embeddings=True) for i in (0, 1)]
        return gkd(tmp_path, *models, beta=0.5, gradient_checkpointing=True)

    trainer, own = fused(make(), linear), make()
    batch = next(iter(own.get_train_dataloader()))
    grads = []
    for x in (trainer, own):
        x.model.train()
        x.compute_loss(x.model, batch).backward()
        grads.append({name: p.grad for name, p in x.model.named_parameters()})
    assert "lm_head.weight" not in grads[0] and grads[0].keys() == grads[1].keys()
    for name, right in grads[1].items():
        assert relative(grads[0][name], right) < 2e-5, name


def test_mixed_precision(tmp_path):
    """bf16=True: the backbone is under autocast in the linear path as well, and the head's gradient is
    fp32."""
    losses = {}
    for linear in (False, True):
        trainer = fused(gkd(tmp_path, beta=0.5, bf16=True), linear)
        seen = []
        trainer.model.model.layers[0].mlp.register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(out.dtype)
        )
        logs, _ = tiny.run(trainer)
        losses[linear] = [x["loss"] for x in logs]
        assert set(seen) == {torch.bfloat16}
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", ["Gemma2", "Granite", "Cohere"])
def test_scale_and_softcap(name, linear, tmp_path):
    """Of the models' configs, which TRL's trainer of hidden states reads as well."""
    more = {"Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0}, "Granite": {"logits_scaling": 4.0}}
    more |= {"Cohere": {"logit_scale": 0.25}}
    make = [getattr(transformers, name + x) for x in ("ForCausalLM", "Config")]
    models = [tiny.llama(i, 16, cls=make[0], config=make[1], **more[name]) for i in (0, 1)]
    trainer = gkd(tmp_path, *models, beta=0.5)
    batch = next(iter(trainer.get_train_dataloader()))

    def step():
        models[0].zero_grad()
        trainer.compute_loss(models[0], batch).backward()
        return models[0].get_output_embeddings().weight.grad.clone()

    right = step()
    fused(trainer, linear)
    assert relative(step(), right) < 1e-5


def test_distributed_data_parallel(tmp_path):
    """One process of gloo: with find_unused_parameters DDP looks for the head in the graph of what forward
    returns."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    trainer = fused(gkd(tmp_path, beta=0.5), linear=True)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch).backward()
    right = {name: x.grad.clone() for name, x in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(trainer.model, find_unused_parameters=True)
        for _ in range(2):
            trainer.model.zero_grad()
            trainer.compute_loss(wrapped, batch).backward()
            for name, x in trainer.model.named_parameters():
                assert relative(x.grad, right[name]) < 1e-6, name
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------- the losses


def logits(*shape: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=g) * 2).requires_grad_(i == 0) for i in range(2)]


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)], ids=["own", "number", "tensor"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ours.REDUCTIONS)
@pytest.mark.parametrize("beta", BETAS)
def test_reductions(beta, reduction, masked, num_items):
    """Of logits, and of hidden states that make the same ones, against TRL's in fp64; "none" is its sum over
    classes."""
    z, v = logits(3, 5, 40)
    labels = torch.arange(15).view(3, 5).where(torch.rand(3, 5) < 0.7, -100) if masked else None
    options = {"beta": beta, "temperature": 2.0, "reduction": reduction, "num_items_in_batch": num_items}
    z64 = z.detach().double().requires_grad_()
    right = GKDTrainer.generalized_jsd_loss(z64, v.double(), labels, **options)
    right = right.sum(-1) if reduction == "none" and num_items is None else right
    upstream = torch.linspace(0.5, 1.5, max(right.numel(), 1), dtype=torch.float64).view(right.shape)
    (dz,) = torch.autograd.grad(right, z64, upstream)
    heads = [torch.nn.Linear(40, 40, bias=False) for _ in range(2)]
    for head in heads:
        torch.nn.init.eye_(head.weight)
    models = [ours._Model(None, None, head, ours.LogitTransform()) for head in heads]
    for found in (
        generalized_jsd_loss(z, v, labels, **options),
        ours._hidden_loss(models, student_logits=z, teacher_logits=v, labels=labels, **options),
    ):
        assert found.shape == right.shape
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-8)
        (g,) = torch.autograd.grad(found, z, upstream.float())
        assert relative(g, dz) < 1e-5


def test_flat_rows_are_a_batch():
    """(rows, V) without labels: "batchmean" divides by the rows, and by the sequences where there are
    sequences."""
    z, v = logits(6, 40)
    with torch.no_grad():
        assert generalized_jsd_loss(z, v).item() == pytest.approx(
            GKDTrainer.generalized_jsd_loss(z, v).item(), rel=1e-5
        )
        sequences = z.view(2, 3, 40), v.view(2, 3, 40)
        assert generalized_jsd_loss(*sequences).item() == pytest.approx(
            3 * generalized_jsd_loss(z, v).item(), rel=1e-5
        )


def test_nothing_counts():
    """0, with a gradient of 0."""
    z, v = logits(2, 3, 40)
    loss = generalized_jsd_loss(z, v, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0 == z.grad.abs().sum()


@pytest.mark.parametrize("num_items", [None, torch.tensor(9.0)], ids=["own", "given"])
@pytest.mark.parametrize("beta", BETAS)
def test_chunked_divergence(beta, num_items):
    """Biases, scale, softcap, temperature, mask and number of items against TRL's function, with all
    gradients."""
    g = torch.Generator().manual_seed(0)
    h, th = torch.randn(2, 6, 8, generator=g), torch.randn(2, 6, 12, generator=g)
    w, tw = torch.randn(30, 8, generator=g), torch.randn(30, 12, generator=g).requires_grad_()
    b, tb = torch.randn(30, generator=g), torch.randn(30, generator=g)
    mask = (torch.rand(2, 6, generator=g) < 0.6).long()
    leaves = [x.requires_grad_() for x in (h, w, b)]
    options = {
        "num_items_in_batch": num_items,
        "student_lm_head_bias": b,
        "teacher_lm_head_bias": tb,
        "student_logit_scale": 0.5,
        "teacher_logit_scale": 2.0,
        "student_final_logit_softcapping": 5.0,
        "teacher_final_logit_softcapping": 4.0,
        "temperature": 1.5,
    }
    arguments = h, th, w, tw, mask, beta
    right = distillation_trainer._chunked_divergence_loss(*arguments, **options)
    found = ours.chunked_divergence_loss(*arguments, **options)
    for x, y in zip(found, right, strict=True):
        assert float(x) == pytest.approx(float(y), rel=2e-5)
    for x, y in zip(
        torch.autograd.grad(found[0], leaves), torch.autograd.grad(right[0], leaves), strict=True
    ):
        assert relative(x, y) < 2e-5


def test_heads_of_another_dtype():
    """bf16 hidden states and a head kept in fp32, without autocast: the head's gradient is fp32."""
    h, th = torch.randn(1, 6, 8, requires_grad=True), torch.randn(1, 6, 12)
    w, tw = torch.randn(30, 8, requires_grad=True), torch.randn(30, 12)
    mask = torch.ones(1, 6)
    loss = ours.chunked_divergence_loss(h.bfloat16(), th.bfloat16(), w, tw, mask, 0.5)[0]
    right = ours.chunked_divergence_loss(h, th, w, tw, mask, 0.5)[0]
    found, exact = torch.autograd.grad(loss, w)[0], torch.autograd.grad(right, w)[0]
    assert found.dtype == torch.float32 and relative(found, exact) < 0.03


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.3, 2.0)])
@pytest.mark.parametrize("beta", BETAS)
def test_fused_linear_jsd(beta, weights, parts, bias):
    """Against Liger's in fp32, value and every gradient; positional and by name."""
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    g = torch.Generator().manual_seed(0)
    h, th = torch.randn(12, 8, generator=g).requires_grad_(), torch.randn(12, 6, generator=g)
    w, tw = torch.randn(30, 8, generator=g).requires_grad_(), torch.randn(30, 6, generator=g)
    b, tb = (torch.randn(30, generator=g) for _ in range(2)) if bias else (None, None)
    labels = torch.arange(12).where(torch.arange(12) % 3 != 1, 77)
    leaves = [h, w] + ([b.requires_grad_()] if bias else [])
    results = []
    for cls in (chunked_loss.LigerFusedLinearJSDLoss, FusedLinearJSDLoss):
        criterion = cls(*weights, beta, 77, 2.0, False, chunk_size=4, return_soft_hard_loss=parts)
        found = criterion(h, w, th, tw, true_labels=labels, student_bias=b, teacher_bias=tb)
        losses = found if parts else (found,)
        results.append((losses, torch.autograd.grad(losses[0] * 3, leaves)))
    (right, right_grads), (found, grads) = results
    assert len(found) == (3 if parts else 1)
    for x, y in zip(found, right, strict=True):
        assert float(x) == pytest.approx(float(y), rel=1e-5, abs=1e-7)
    for x, y in zip(grads, right_grads, strict=True):
        assert relative(x, y) < 1e-5


def test_fused_linear_jsd_of_sequences_and_padded_teachers():
    """(batch, tokens, H) with labels of any shape; a padded vocabulary is cut; no label at all gives 0."""
    h, th = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 6, 6)
    w, tw, labels = torch.randn(30, 8), torch.randn(34, 6), torch.arange(12)
    criterion = FusedLinearJSDLoss(0.5, 0.5, return_soft_hard_loss=True)
    found = criterion(h, w, th, tw, labels)
    flat = criterion(h.flatten(0, 1), w, th.flatten(0, 1), tw[:30], labels)
    assert [float(x) for x in found] == pytest.approx([float(x) for x in flat], rel=1e-6)
    assert [float(x) for x in criterion(h, w, th, tw, torch.full((12,), -100))] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"temperature": 0}, "temperature"),
        ({"beta": 1.5}, "beta"),
        ({"weight_hard_loss": float("nan")}, "hard_weight"),
    ],
)
def test_bad_options_of_the_module(bad, says):
    with pytest.raises(ValueError, match=says):
        FusedLinearJSDLoss(**bad)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="reduction"):
        generalized_jsd_loss(*logits(2, 3), reduction="median")


# ---------------------------------------------------------------- what is refused, and what goes to TRL


@pytest.mark.parametrize(
    "make, options", [(gold, {"logits_are_probs": True}), (gkd, {"reduction": "median"})]
)
def test_what_is_not_known_is_left_to_trl(make, options, tmp_path):
    trainer = fused(make(tmp_path))
    p, q = (x.softmax(-1) for x in logits(4, 20))
    with pytest.warns(UserWarning, match="leaves this loss to TRL"):
        found = trainer.generalized_jsd_loss(p, q, **options)
    assert torch.equal(found, type(trainer).generalized_jsd_loss(p, q, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.generalized_jsd_loss(p, q, **dict.fromkeys(options.keys() & {"logits_are_probs"}, False))


def test_top_k_is_left_to_trl():
    z, v = logits(2, 5, 40)
    hook = ours._Hook(generalized_jsd_loss, IWOPDTrainer.generalized_jsd_loss, ours._unknown_reduction)
    with pytest.warns(UserWarning, match="top_k is not known here"):
        found = hook(z, v, top_k=5, add_tail=True)
    assert torch.equal(found, IWOPDTrainer.generalized_jsd_loss(z, v, top_k=5, add_tail=True))


def test_sharded_heads_are_left_to_trl():
    h, w, mask = torch.randn(1, 4, 8), torch.nn.Parameter(torch.randn(20, 8)), torch.ones(1, 4)
    hook = ours._Hook(
        ours.chunked_divergence_loss, distillation_trainer._chunked_divergence_loss, ours._sharded
    )
    w.ds_id = 3  # as DeepSpeed marks them
    assert ours._sharded({"student_lm_head_weight": w}) == "student_lm_head_weight is sharded"
    assert ours._sharded({"student_hidden_states": h, "teacher_lm_head_weight": torch.randn(2, 2)}) is None
    assert hook.declined({"student_lm_head_weight": w, "completion_mask": mask})


def test_hidden_states_in_place_of_logits_go_to_trl_as_logits(tmp_path):
    """A call that TRL has to answer while the models give hidden states."""
    trainer = fused(gkd(tmp_path, beta=0.5), linear=True)
    batch = next(iter(trainer.get_train_dataloader()))
    right = trainer.compute_loss(trainer.model, batch).item()
    with contextlib.ExitStack() as stack:
        _, theirs = ours._of_hidden_states(trainer, trainer.model, GKDTrainer.generalized_jsd_loss, stack)
        inputs = batch["input_ids"], batch["attention_mask"]
        z, v = (model(*inputs).logits[:, :-1] for model in (trainer.model, trainer.teacher_model))
        assert z.shape[-1] == 16 and v.shape[-1] == 24
        assert theirs(z, v, batch["labels"][:, 1:], beta=0.5).item() == pytest.approx(right, rel=1e-5)


def test_other_trainers_stay_as_they_are(tmp_path):
    original = distillation_trainer._chunked_divergence_loss
    trainer, other = fused(distillation(tmp_path)), distillation(tmp_path)
    tiny.run(trainer)
    assert distillation_trainer._chunked_divergence_loss is original
    assert "compute_loss" not in vars(other)
    assert "generalized_jsd_loss" not in vars(gkd(tmp_path))


def test_a_second_call_replaces_the_first(tmp_path):
    trainer = gkd(tmp_path)
    before = set(vars(trainer))
    fused(fused(fused(trainer), linear=False), linear=True)
    assert trainer.compute_loss.__wrapped__.__func__ is GKDTrainer.compute_loss
    ours._undo(trainer)
    assert set(vars(trainer)) == before


class Custom(GKDTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **more):
        return super().compute_loss(model, inputs, return_outputs, **more)


class OtherHead(torch.nn.Linear):
    pass


def test_when_hidden_states_are_refused(tmp_path, monkeypatch):
    """Each with its reason; without linear=True the logits are taken."""

    def refused(trainer, says):
        with pytest.raises(ValueError, match=says):
            fused(trainer, linear=True)
        assert "compute_loss" not in vars(trainer)
        fused(trainer)
        batch = next(iter(trainer.get_train_dataloader()))
        assert trainer.compute_loss(trainer.model, batch).item() > 0

    refused(gkd(tmp_path, cls=Custom), "elsewhere than in the loss")
    hooked = tiny.llama(0)
    hooked.lm_head.register_forward_hook(lambda *_: None)
    refused(gkd(tmp_path, hooked), "student's head has hooks")
    other = tiny.llama(1, 24)
    other.lm_head = OtherHead(24, tiny.VOCAB, bias=False)
    refused(gkd(tmp_path, teacher=other), "teacher's head is a OtherHead")
    scaled = tiny.llama(0)
    monkeypatch.setattr(scaled, "forward", lambda *a, f=scaled.forward, **k: doubled(f(*a, **k)))
    refused(gkd(tmp_path, scaled), "are not what head, scale and softcap make")
    trainer = gkd(tmp_path)
    monkeypatch.setattr(trainer.args, "torch_compile", True)
    refused(trainer, "torch_compile")
    for flag in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        trainer = gkd(tmp_path)
        monkeypatch.setattr(trainer, flag, True)
        with pytest.raises(ValueError, match="sharded"):
            fused(trainer, linear=True)


def doubled(outputs):
    outputs.logits = outputs.logits * 2
    return outputs


def test_what_cannot_be_fused(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="trainer of TRL's, got int"):
        fused(3)
    with pytest.raises(ValueError, match="hidden states alone"):
        fused(distillation(tmp_path), linear=False)
    trainer = distillation(tmp_path)
    monkeypatch.delattr(distillation_trainer, "_chunked_divergence_loss")
    with pytest.raises(RuntimeError, match=rf"trl {trl.__version__} has neither .* 0.29 to 1.16 are known"):
        fused(trainer)
    trainer = gkd(tmp_path)
    monkeypatch.delattr(GKDTrainer, "generalized_jsd_loss")
    with pytest.raises(RuntimeError, match="GKDTrainer .* are known"):
        fused(trainer)


class Elsewhere(GKDTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs["input_ids"]).logits.square().mean()


def test_a_hook_that_is_not_called(tmp_path):
    """The first step says so."""
    trainer = fused(gkd(tmp_path, cls=Elsewhere))
    with pytest.raises(RuntimeError, match="computes its loss elsewhere"):
        trainer.train()


class WithLiger(GKDTrainer):
    """As trainers of hidden states were up to 1.13: a module, and nothing of logits."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.liger_loss = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
            0.0, 1.0, self.beta, compiled=False
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden, others = (
            x.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[:, :-1].flatten(0, 1)
            for x in (model, self.teacher_model)
        )
        labels = inputs["labels"][:, 1:].flatten()
        heads = model.lm_head.weight, self.teacher_model.lm_head.weight.detach()
        loss = self.liger_loss(
            student_input=hidden,
            student_weight=heads[0],
            teacher_input=others.detach(),
            teacher_weight=heads[1],
            true_labels=labels,
        )
        return loss if num_items_in_batch is None else loss * (labels != -100).sum() / num_items_in_batch


def test_trainers_with_ligers_module(tmp_path):
    right = tiny.run(gkd(tmp_path, cls=WithLiger, beta=0.1))
    trainer = fused(gkd(tmp_path, cls=WithLiger, beta=0.1))
    assert isinstance(trainer.liger_loss, FusedLinearJSDLoss) and trainer.liger_loss.beta == 0.1
    assert_same_run(tiny.run(trainer), right, limit=2e-5)
    with pytest.raises(ValueError, match="hidden states alone"):
        fused(trainer, linear=False)


def test_nothing_is_imported_with_kdkernels():
    program = (
        "import sys, kdkernels, kdkernels.integrations; "
        "others = {'trl', 'transformers', 'liger_kernel', 'accelerate'}; "
        "found = {x.split('.')[0] for x in sys.modules} & others; "
        "assert not found, found; assert 'kdkernels.integrations.trl' not in sys.modules; "
        "import kdkernels.integrations.trl; assert 'trl' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)
