"""Distil a small language model into a smaller one, on text that every machine has: the Python standard library's own sources.

    python examples/quickstart.py            # about half a minute on two cores

The teacher sees 8 tokens of context through a wide layer, the student 3 through a narrow one. The student learns from the teacher's
soft targets at T = 2 (weight 0.9) and from the text (weight 0.1), in one fused pass over both models' logits.
"""

from __future__ import annotations

import argparse
import re
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from kdkernels import KDLoss


def tokens(vocab: int, files: int) -> torch.Tensor:
    """Token ids of the standard library's sources; everything but the commonest vocab - 1 tokens is 0."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:files]
    words = [w for path in sources for w in re.findall(r"\w+|[^\w\s]|\n *", path.read_text(errors="replace"))]
    ids = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(vocab - 1))}
    return torch.tensor([ids.get(w, 0) for w in words])


class Model(nn.Module):
    """Logits of the next token from the last `context` ones: (rows, context) -> (rows, vocab)."""

    def __init__(self, vocab: int, context: int, width: int):
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(vocab, width)
        self.mix = nn.Sequential(nn.Linear(context * width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, vocab)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed(x[:, -self.context :]).flatten(1)))


def batches(text: torch.Tensor, context: int, rows: int, steps: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        at = torch.randint(len(text) - context - 1, (rows,), generator=g).unsqueeze(1) + torch.arange(context + 1)
        yield text[at[:, :-1]], text[at[:, -1]]


def train(model: nn.Module, loss, data, steps: int, name: str) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step, (x, y) in enumerate(data):
        value = loss(x, model(x), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            print(f"{name} step {step:4d}  loss {value.item():.3f}")
    return losses


@torch.no_grad()
def evaluate(student: nn.Module, teacher: nn.Module, data) -> tuple[float, float]:
    """(held-out perplexity, share of tokens where student and teacher agree on the most likely one)."""
    nll, agree, n = 0.0, 0, 0
    for x, y in data:
        logits, reference = student(x), teacher(x)
        nll += F.cross_entropy(logits, y, reduction="sum").item()
        agree += (logits.argmax(-1) == reference.argmax(-1)).sum().item()
        n += len(y)
    return float(torch.tensor(nll / n).exp()), agree / n


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--files", type=int, default=60, help="how many source files to read")
    parser.add_argument("--divergence", default="kl")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    text = tokens(args.vocab, args.files)
    train_text, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    teacher, student = Model(args.vocab, 8, 96), Model(args.vocab, 3, 32)
    train(teacher, lambda x, z, y: F.cross_entropy(z, y), batches(train_text, 8, 512, args.steps, 1), args.steps, "teacher")

    kd = KDLoss(divergence=args.divergence, temperature=2.0, t_squared=True, soft_weight=0.9, hard_weight=0.1)

    def distil(x, z, y):
        with torch.no_grad():
            v = teacher(x)
        return kd(z, v, y)

    before = evaluate(student, teacher, batches(held_out, 8, 512, 4, 2))
    losses = train(student, distil, batches(train_text, 8, 512, args.steps, 3), args.steps, "student")
    after = evaluate(student, teacher, batches(held_out, 8, 512, 4, 2))
    print(f"held-out perplexity {before[0]:.0f} -> {after[0]:.0f}, agreement with the teacher {before[1]:.1%} -> {after[1]:.1%}")
    return {"first": losses[0], "last": losses[-1], "perplexity": after[0], "agreement": after[1]}


if __name__ == "__main__":
    main()
