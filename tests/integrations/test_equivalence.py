"""docs/equivalence.md: every line is run, against its package where that is installed and always against its
formula, value and gradient."""

import ast
import importlib
import os
import re
from pathlib import Path

import pytest
import torch

import kdkernels

PAGE = Path(__file__).parents[2] / "docs" / "equivalence.md"
PLACES = {  # of the names in the column of the others
    "GKDTrainer": "trl.experimental.gkd",
    "_chunked_divergence_loss": "trl.trainer.distillation_trainer",
    "LigerFusedLinearJSDLoss": "liger_kernel.chunked_loss",
    "LigerFusedLinearJSD": "liger_kernel.transformers.fused_linear_jsd",
    "LigerJSD": "liger_kernel.transformers.jsd",
    "ForwardKLLoss": "torchtune.modules.loss.kd_losses",
    "ReverseKLLoss": "torchtune.modules.loss.kd_losses",
    "SymmetricKLLoss": "torchtune.modules.loss.kd_losses",
    "KDLoss": "nemo_automodel.components.loss.kd_loss",
    "LogitsDistillationLoss": "modelopt.torch.distill.losses",
    "dense_kl_div": "distillkit.lossfuncs.kl",
    "cross_entropy": "torch.nn.functional",
}
V, H = 50, 12
T, N, R, HARD, SOFT = 2.0, 9, 0.3, 0.4, 1.5


def lines() -> list[tuple[str, str, str]]:
    """(project: line, their code, ours) of the page's tables."""
    found, project = [], None
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            project = line[3:]
        elif (cells := re.fullmatch(r"\| ([^|`]+) \| `(.+)` \| `(.+)` \|", line)) is not None:
            found.append((f"{project}: {cells[1]}", cells[2], cells[3]))
    return found


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, -2) if x.dtype.is_floating_point else x.flatten()


def values(beta: float, dtype: torch.dtype = torch.float32) -> dict:
    """What the page calls by letters, the student's with a gradient; logits are not those of the hidden
    states."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (2 * torch.randn(*shape, generator=g)).to(dtype)

    labels = torch.randint(V, (2, 6), generator=g)
    made = {"z": draw(2, 6, V), "v": draw(2, 6, V), "h": draw(2, 6, H), "th": draw(2, 6, H + 4)}
    made |= {"w": draw(V, H) / 4, "tw": draw(V, H + 4) / 4}
    made = {name: x.requires_grad_(name in ("z", "h", "w")) for name, x in made.items()}
    labels[torch.rand(2, 6, generator=g) < 0.3] = -100
    numbers = {"n": N, "T": T, "r": R, "beta": beta, "hard": HARD, "soft": SOFT}
    return made | numbers | {"labels": labels, "mask": (labels != -100).long(), "rows": rows}


# ---------------------------------------------------------------- formulas, in probabilities


def kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def jsd(p, q, beta):
    """Agarwal et al. (2024), eq. 1, and its limits over its weights at 0 and 1."""
    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


class Formula:
    """A loss of the probabilities p and q at temperature T, with what the reductions need."""

    def __init__(self, x: dict, t: float = 1.0, of: str = "logits", transform=lambda z: z):
        z, v = (x["z"], x["v"]) if of == "logits" else (x["h"] @ x["w"].t(), x["th"] @ x["tw"].t())
        self.z = transform(z)
        self.p, self.q = (v / t).softmax(-1), (self.z / t).softmax(-1)
        self.counts, self.labels, self.beta = x["mask"].double(), x["labels"], x["beta"]

    @property
    def jsd(self):
        return jsd(self.p, self.q, self.beta)

    @property
    def kl(self):
        return kl(self.p, self.q)

    def mean(self, per_row, by=None):
        return (per_row * self.counts).sum() / (self.counts.sum() if by is None else by)

    @property
    def hard(self):
        return self.mean(-self.z.softmax(-1).log().gather(-1, self.labels.clamp_min(0)[..., None])[..., 0])

    @property
    def soft(self):
        return -(self.p * self.q.log()).sum(-1)


def softcapped(z):
    return 5 * torch.tanh(0.5 * z / 5)


HEADS = {"of": "heads"}
FORMULAS = {
    "TRL: GKD, labels": lambda x: (f := Formula(x, T)).mean(f.jsd),
    "TRL: GKD, number of items": lambda x: (f := Formula(x)).mean(f.jsd, N),
    "TRL: GKD, no labels: by sequence": lambda x: Formula(x).jsd.sum() / 2,
    "TRL: GKD, sum": lambda x: (f := Formula(x)).mean(f.jsd, 1),
    "TRL: GKD, mean over logits": lambda x: (f := Formula(x)).mean(f.jsd) / V,
    "TRL: Distillation": lambda x: (f := Formula(x, T, **HEADS)).mean(f.jsd),
    "TRL: Distillation, number of items": lambda x: (f := Formula(x, **HEADS)).mean(f.jsd, N),
    "TRL: Distillation, scale and softcap": lambda x: (f := Formula(x, transform=softcapped, **HEADS)).mean(
        f.jsd
    ),
    "Liger-Kernel: chunked JSD": lambda x: SOFT * (f := Formula(x, T, **HEADS)).mean(f.jsd) + HARD * f.hard,
    "Liger-Kernel: Triton linear JSD": lambda x: (f := Formula(x, T, **HEADS)).mean(f.jsd),
    "Liger-Kernel: Triton JSD": lambda x: (f := Formula(x)).mean(f.jsd),
    "torchtune: forward KL": lambda x: (f := Formula(x)).mean(f.soft),
    "torchtune: forward KL, sum": lambda x: (f := Formula(x)).mean(f.soft, 1),
    "torchtune: reverse KL": lambda x: (f := Formula(x)).mean(kl(f.q, f.p)),
    "torchtune: symmetric KL": lambda x: (f := Formula(x)).mean(R * f.soft + (1 - R) * kl(f.q, f.p)),
    "torchtune: forward KL and hard loss": lambda x: R * (f := Formula(x)).mean(f.soft) + (1 - R) * f.hard,
    "NeMo Automodel: KD loss": lambda x: T**2 * (f := Formula(x, T)).mean(f.kl),
    "NeMo Automodel: KD loss, number of labels": lambda x: T**2 * (f := Formula(x, T)).mean(f.kl, N),
    "NeMo Automodel: KD loss and hard loss": lambda x: (
        R * T**2 * (f := Formula(x, T)).mean(f.kl) + (1 - R) * f.hard
    ),
    "NVIDIA Model-Optimizer: batchmean": lambda x: T**2 * Formula(x, T).kl.mean(),
    "NVIDIA Model-Optimizer: mean over logits": lambda x: T**2 * Formula(x, T).kl.mean() / V,
    "NVIDIA Model-Optimizer: none": lambda x: T**2 * Formula(x, T).kl.flatten(),
    "DistillKit: KL": lambda x: T**2 * (f := Formula(x, T)).mean(f.kl),
    "DistillKit: KL, number of items": lambda x: T**2 * (f := Formula(x, T)).mean(f.kl, N),
}

# what the other project's value has besides, without a gradient
CONSTANTS = {"torchtune: symmetric KL": lambda x: R * (f := Formula(x)).mean(f.soft - f.kl)}


# ---------------------------------------------------------------- the page


def result(loss: torch.Tensor, x: dict) -> list[torch.Tensor]:
    """The loss and its gradients, of each row with a weight of its own, in fp64."""
    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    leaves = [x[name] for name in ("z", "h", "w")]
    grads = torch.autograd.grad(loss, leaves, upstream, allow_unused=True)
    return [loss.detach().double(), *(g.double() for g in grads if g is not None)]


def assert_same(found: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(found) == len(right) > 1
    for x, y in zip(found, right, strict=True):
        assert x.shape == y.shape and float((x - y).norm() / y.norm()) < 1e-5


def named(code: str) -> dict | None:
    """The names of another project's code; None where it is not installed or does not run here."""
    found = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and node.id in PLACES:
            try:
                found[node.id] = getattr(importlib.import_module(PLACES[node.id]), node.id)
            except ImportError:
                return None
    return found


def test_every_line_has_a_formula():
    assert len(lines()) == len(FORMULAS) and {name for name, *_ in lines()} == set(FORMULAS)


@pytest.mark.parametrize("name, theirs, ours", lines(), ids=[name for name, *_ in lines()])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_line(beta, name, theirs, ours):
    if beta != 0.3 and "beta" not in ours:
        pytest.skip("has no beta")
    x = values(beta)
    right = result(FORMULAS[name](exact := values(beta, torch.float64)), exact)
    public = {name: getattr(kdkernels, name) for name in kdkernels.__all__}
    found = result(eval(ours, public | x), x)
    if name in CONSTANTS:
        found[0] += CONSTANTS[name](exact).detach()
    assert_same(found, right)
    others = named(theirs)
    triton = "Triton" in name and os.environ.get("TRITON_INTERPRET") != "1"
    if others is not None and not triton:
        x = values(beta)
        assert_same(result(eval(theirs, others | x), x), right)


def test_the_packages_are_run():
    """Of those that CI installs, so that none is left out unseen."""
    pytest.importorskip("trl")
    pytest.importorskip("liger_kernel")
    assert all(named(code) for name, code, _ in lines() if name.startswith(("TRL", "Liger")))
