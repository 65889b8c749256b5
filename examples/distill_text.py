"""Distil a language model on text that every machine has: the Python standard library's own sources.

    python examples/distill_text.py             # under five minutes on two cores; needs: pip install
                                                '.[examples]'

A byte-pair vocabulary of 32768 is learned from the sources, a small transformer (the teacher) is trained on
them, and then four students, half as wide and half as deep, on far fewer tokens: from the text alone, with
the teacher's soft targets at T = 2 (weights 0.9 and 0.1, Grätzer's eq. 1.13), with the Renyi divergence of
order 1/2 in KL's place, and once more with KL written in eager PyTorch. All four start from the same weights
and see the same batches, so their differences are the losses'.

Everything is kept in --out, and a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels import KDLoss, fused_kd_loss
from kdkernels.bench.measure import resident_peak
from kdkernels.integrations.running import Running


@dataclass(frozen=True)
class Config:
    vocab: int = 32768
    files: int = 0  # how many source files to read; 0: all
    context: int = 64
    batch: int = 8
    student_tokens: int = 100000  # the first of the training text: what the student learns from
    student_lr: float = 1e-3
    teacher_width: int = 192
    teacher_layers: int = 4
    student_width: int = 96
    student_layers: int = 2
    teacher_steps: int = 300
    student_steps: int = 120
    held_out: int = 128  # windows of `context` tokens
    seed: int = 0


QUICK = Config(
    vocab=600, files=30, context=32, teacher_width=64, student_width=32, teacher_layers=2, student_layers=1,
    teacher_steps=120, student_steps=48, student_lr=3e-3, held_out=128,
)  # fmt: skip
T = 2.0
WEIGHTS = {"temperature": T, "t_squared": True, "soft_weight": 0.9, "hard_weight": 0.1}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (student logits, teacher logits, labels)


def hard(z: Tensor, v: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def eager(z: Tensor, v: Tensor, y: Tensor) -> Tensor:
    """The loss of KDLoss(**WEIGHTS) as it is usually written."""
    z, v = z.flatten(0, 1), v.flatten(0, 1)
    soft = F.kl_div(
        F.log_softmax(z / T, -1), F.log_softmax(v / T, -1), log_target=True, reduction="batchmean"
    )
    return 0.9 * T**2 * soft + 0.1 * F.cross_entropy(z, y.flatten())


LOSSES: dict[str, Loss] = {
    "hard labels": hard,
    "KL": KDLoss(divergence="kl", **WEIGHTS),
    "Renyi(0.5)": KDLoss(divergence="renyi(0.5)", **WEIGHTS),
    "KL, eager PyTorch": eager,
}


# ---------------------------------------------------------------- text


def sources(files: int) -> tuple[list[str], list[str]]:
    """(training, held-out) texts: every tenth file of the standard library is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idle_test"}
    paths = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    texts = [
        p.read_text(errors="replace") for p in (paths[:: max(1, len(paths) // files)] if files else paths)
    ]
    return [t for i, t in enumerate(texts) if i % 10], texts[::10]


def load_tokens(config: Config, out: Path) -> tuple[Tensor, Tensor]:
    """Token ids, (training, held-out), in a byte-pair encoding learned from the training text."""
    path = out / "tokens.npz"
    if not path.exists():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        texts = sources(config.files)
        print(f"learning a vocabulary of {config.vocab} from {sum(map(len, texts))} files", flush=True)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            texts[0],
            trainers.BpeTrainer(vocab_size=config.vocab, initial_alphabet=alphabet, show_progress=False),
        )
        tokenizer.save(str(out / "tokenizer.json"))
        ids = [
            np.concatenate([np.array(e.ids, np.int32) for e in tokenizer.encode_batch(part)])
            for part in texts
        ]
        np.savez(path, train=ids[0], held_out=ids[1])
    with np.load(path) as ids:
        return torch.from_numpy(ids["train"]).long(), torch.from_numpy(ids["held_out"]).long()


def counts(tokens: Tensor, config: Config) -> Tensor:
    return torch.bincount(tokens, minlength=config.vocab).float()


def batch(tokens: Tensor, config: Config, step: int) -> tuple[Tensor, Tensor]:
    """(inputs, labels), each (batch, context), of one step: the same for whoever asks, so that a run can be
    resumed."""
    g = torch.Generator().manual_seed(1000003 * config.seed + step)
    at = torch.randint(len(tokens) - config.context, (config.batch, 1), generator=g) + torch.arange(
        config.context + 1
    )
    return tokens[at[:, :-1]], tokens[at[:, 1:]]


# ---------------------------------------------------------------- models


class Transformer(nn.Module):
    """Logits of the next token, (batch, context) -> (batch, context, vocab); the head is the embedding, with
    a bias."""

    def __init__(self, config: Config, width: int, layers: int, counts: Tensor):
        super().__init__()
        self.embed, self.place = nn.Embedding(config.vocab, width), nn.Embedding(config.context, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 16, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.02)
        self.bias = nn.Parameter((counts + 0.1).log())  # starts at the tokens' frequencies
        self.register_buffer(
            "mask", nn.Transformer.generate_square_subsequent_mask(config.context), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(self.embed(x) + self.place.weight, mask=self.mask, is_causal=True)
        return F.linear(h, self.embed.weight, self.bias)


class Learner:
    """A model with its optimizer, a warm-up and a cosine to zero."""

    def __init__(self, model: nn.Module, steps: int, peak: float = 3e-3):
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )
        warm = max(1, steps // 10)
        shape = lambda i: min((i + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * i / steps))  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, shape)
        self.step_seconds: list[float] = []

    def step(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> float:
        start = time.perf_counter()
        value = loss(self.model(x))
        self.optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step_seconds.append(time.perf_counter() - start)
        self.schedule.step()
        return value.item()

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load(self, state: dict) -> None:
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)


@torch.no_grad()
def evaluate(
    models: dict[str, nn.Module], teacher: nn.Module, tokens: Tensor, config: Config, windows: int
) -> dict[str, dict]:
    """Of each model on held-out windows: perplexity, the share of tokens it gets right, and that on which it
    agrees with the teacher."""
    starts = torch.linspace(0, len(tokens) - config.context - 1, windows).long().unsqueeze(1)
    figures = {name: Running() for name in models}
    for at in (starts + torch.arange(config.context + 1)).split(config.batch):
        x, y = tokens[at[:, :-1]], tokens[at[:, 1:]]
        v = teacher(x)
        for name, model in models.items():
            _, stats = fused_kd_loss(model(x), v, y, hard_weight=1.0, return_stats=True)
            figures[name].add(stats.masked())
    means = {name: x.take() for name, x in figures.items()}
    return {
        name: {"perplexity": math.exp(x["cross_entropy"]), "accuracy": x["correct"], "agreement": x["agree"]}
        for name, x in means.items()
    }


def part(config: Config) -> int:
    """Windows for a look on the way."""
    return max(1, config.held_out // 4)


# ---------------------------------------------------------------- training


def train_teacher(tokens: Tensor, config: Config, path: Path) -> nn.Module:
    torch.manual_seed(0)  # one teacher, whatever the students' seed
    config = Config(**asdict(config) | {"seed": 0})
    learner = Learner(
        Transformer(config, config.teacher_width, config.teacher_layers, counts(tokens, config)),
        config.teacher_steps,
    )
    done = resume(path, {"": learner})["step"]
    for step in (steps := Progress(range(done, config.teacher_steps), "teacher", done=done)):
        x, y = batch(tokens, config, step)
        steps.note(f"loss {learner.step(x, lambda z, y=y: hard(z, z, y)):.3f}")
        if step % 50 == 49 or step == config.teacher_steps - 1:
            keep(path, {"": learner}, step + 1)
    return learner.model.eval().requires_grad_(False)


def distil(
    teacher: nn.Module,
    whole: Tensor,
    held_out: Tensor,
    config: Config,
    losses: dict[str, Loss],
    path: Path | None,
) -> dict:
    """Train one student for each loss, in lockstep, so that the teacher reads each batch once. {name: figures
    and curve}.

    path: where its state is kept, None for nowhere.
    """
    torch.manual_seed(config.seed + 1)
    train = whole[: config.student_tokens]
    start = Transformer(config, config.student_width, config.student_layers, counts(train, config))
    learners = {
        name: Learner(copy.deepcopy(start), config.student_steps, config.student_lr) for name in losses
    }
    saved = resume(path, learners)
    done, figures = saved["step"], saved.get("figures") or {name: {"curve": []} for name in losses}
    models, every = {name: x.model for name, x in learners.items()}, max(1, config.student_steps // 8)

    def look(step: int) -> None:
        for name, x in evaluate(models, teacher, held_out, config, part(config)).items():
            figures[name]["curve"].append((step, x["perplexity"]))

    if not done:
        look(0)
    for step in (steps := Progress(range(done, config.student_steps), "students", done=done)):
        x, y = batch(train, config, config.teacher_steps + step)
        with torch.no_grad():
            v = teacher(x)
        for name, learner in learners.items():
            act = lambda learner=learner, name=name: learner.step(x, lambda z: losses[name](z, v, y))  # noqa: B023, E731
            if step == 1:  # when optimizers have their memory
                figures[name]["peak_bytes"] = resident_peak(act)
            else:
                steps.note(f"{name}: {act():.3f}")
        if (step + 1) % every == 0 or step == config.student_steps - 1:
            look(step + 1)
            for name in losses:
                figures[name]["step_ms"] = 1e3 * float(np.median(learners[name].step_seconds))
            keep(path, learners, step + 1, figures=figures)
    return {
        name: figures[name] | x
        for name, x in evaluate(models, teacher, held_out, config, config.held_out).items()
    }


def keep(path: Path | None, learners: dict[str, Learner], step: int, **more) -> None:
    if path is None:
        return
    half = path.with_suffix(".part")  # an interruption while writing leaves the last state whole
    torch.save({"step": step, "learners": {name: x.state() for name, x in learners.items()}} | more, half)
    half.replace(path)


def resume(path: Path | None, learners: dict[str, Learner]) -> dict:
    if path is None or not path.exists():
        return {"step": 0}
    saved = torch.load(path, weights_only=True)
    for name, learner in learners.items():
        learner.load(saved["learners"][name])
    return saved


# ---------------------------------------------------------------- report


def report(results: dict, out: Path) -> str:
    rows = [
        "| student learns from | held-out perplexity | agrees with teacher | ms a step | peak memory "
        "of a step, MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, x in results["students"].items():
        memory = "" if x["peak_bytes"] is None else f"{x['peak_bytes'] / 1e6:.0f}"
        rows.append(
            f"| {name} | {x['perplexity']:.0f} | {x['agreement']:.1%} | {x['step_ms']:.0f} | {memory} |"
        )
    text = "\n".join([*rows, f"| (the teacher) | {results['teacher']['perplexity']:.0f} | | | |"])
    (out / "distill_text.md").write_text(text + "\n")
    (out / "distill_text.json").write_text(json.dumps(results, indent=1) + "\n")
    return text


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.style.context(
        [
            "tableau-colorblind10",
            {"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False},
        ]
    ):
        figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
        for (name, x), line in zip(results["students"].items(), ("-", "-", "--", ":"), strict=False):
            axis.semilogy(
                *zip(*x["curve"], strict=True), line, label=name, linewidth=3 if line == ":" else 1.5
            )
        axis.axhline(results["teacher"]["on_a_part"], color="0.5", linewidth=1, label="the teacher")
        axis.set(xlabel="step of the student", ylabel="held-out perplexity (a quarter)")
        axis.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/distill_text"))
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see it run")
    parser.add_argument("--seed", type=int, default=0, help="of the students and their batches")
    args = parser.parse_args(argv)
    config = Config(**asdict(QUICK if args.quick else Config()) | {"seed": args.seed})
    out = args.out / f"{'quick' if args.quick else 'full'}-{args.seed}"
    out.mkdir(parents=True, exist_ok=True)

    train, held_out = load_tokens(config, out)
    teacher = train_teacher(train, config, out / "teacher.pt")
    results = {
        "config": asdict(config),
        "tokens": {"train": len(train), "held_out": len(held_out)},
        "students": distil(teacher, train, held_out, config, LOSSES, out / "students.pt"),
        "teacher": evaluate({"": teacher}, teacher, held_out, config, config.held_out)[""]
        | {"on_a_part": evaluate({"": teacher}, teacher, held_out, config, part(config))[""]["perplexity"]},
    }
    print(report(results, out), flush=True)
    plot(results, out / "distill_text.svg")
    return results


if __name__ == "__main__":
    main()
