"""A student beside its teacher on a held-out set: perplexities, divergence, agreement and accuracy, as means
over tokens: `python examples/recipes/evaluation.py`.

One pass over the logits gives all of them. Batches have different numbers of tokens, so that a mean over
batches would be another number, and one that depends on how the set was cut into batches.
"""

import math
from collections.abc import Iterable

import torch
from small import collate, llama, sequences, trained, trained_teacher
from torch import Tensor

from kdkernels import fused_kd_loss
from kdkernels.integrations.language import shifted_labels
from kdkernels.integrations.running import Running


@torch.no_grad()
def evaluate(student, teacher, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Figures at T = 1 of two causal language models, in nats or as shares of the tokens that count."""
    figures = Running()  # sums, in fp64
    for batch in batches:
        labels = shifted_labels(batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        z, v = student(**inputs).logits, teacher(**inputs).logits
        _, stats = fused_kd_loss(z, v, labels, hard_weight=1.0, return_stats=True)
        # the statistics have the teacher's logsumexp, but not its logit of the label
        of_label = v.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        surprise = torch.where(stats.mask, stats.teacher_logsumexp - of_label, 0.0)
        figures.add(stats.masked() | dict(teacher_cross_entropy=surprise))
    means = figures.take()
    return dict(
        perplexity=math.exp(means["cross_entropy"]),
        teacher_perplexity=math.exp(means["teacher_cross_entropy"]),
        divergence=means["divergence"],
        agree=means["agree"],
        accuracy=means["correct"],
    )


def main(steps: int = 60, batch: int = 16) -> dict[str, dict[str, float]]:
    """The figures of a student before and after it has read some text, beside a larger model that has."""
    data = sequences()
    train, held_out = data[:-64], data[-64:]
    batches = [collate(held_out[i : i + batch]) for i in range(0, len(held_out), batch)]
    student, teacher = llama(48).eval(), trained_teacher(train)
    before = evaluate(student, teacher, batches)
    trained(student, train, steps)
    return dict(before=before, after=evaluate(student, teacher, batches))


if __name__ == "__main__":
    for when, figures in main().items():
        print(when, *(f"{name} {x:.4g}" for name, x in figures.items()), sep="  ")
