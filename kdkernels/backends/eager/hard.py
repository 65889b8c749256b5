"""The hard term of rows of logits in plain PyTorch: cross entropy at T = 1, label smoothing, z-loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...transforms import Modifiers
from .families import log_total
from .row import Row, total


class Labelled(NamedTuple):
    """A row as seen from r: the label where that is a largest class, else a largest class.

    The other classes alone are then what value and gradient are made of where q of the label rounds to 1.
    """

    label: Tensor  # (rows, 1), in the vocabulary
    r: Tensor  # (rows, 1)
    x: Tensor  # z - z_r
    of_label: Tensor  # (rows, 1): x of the label; -inf, with its gradient of 1, where the label is masked
    others: Tensor  # (rows, 1): sum of e^x over the classes but r

    @staticmethod
    def of(row: Row, labels: Tensor) -> Labelled:
        label = labels.clamp(0, row.z.shape[-1] - 1).unsqueeze(-1)
        z = row.fill(row.no_z, -math.inf, row.z.detach())
        r = torch.where(z.gather(-1, label) == row.top_z, label, z.argmax(-1, keepdim=True))
        of_r = row.z.gather(-1, r)
        # of a masked class e^x may be inf, whose derivative times 0 is nan
        x = row.fill(row.no_z, 0.0, row.z - of_r)
        e = row.fill(row.no_z, 0.0, x.exp()).scatter(-1, r, 0.0)
        return Labelled(label, r, x, row.given_z.gather(-1, label) - of_r, total(e))


def cross_entropy(row: Row, labels: Tensor) -> Tensor:
    """At T = 1, (rows,); nan for a label outside the vocabulary."""
    label, r, _, of_label, others = Labelled.of(row, labels)
    value = torch.log1p(others) - torch.where(r == label, 0.0, of_label)
    return torch.where(label == labels.unsqueeze(-1), value, math.nan).squeeze(-1)


def cross_entropy_gradient(row: Row, labels: Tensor) -> Tensor:
    """softmax(z) - onehot(label), (rows, vocab)."""
    label, r, x, _, others = Labelled.of(row, labels)
    q = row.fill(row.no_z, 0.0, x.exp()) / (1 + others)
    at_label = torch.where(r == label, -others / (1 + others), q.gather(-1, label) - 1)
    return torch.where(label == labels.unsqueeze(-1), q.scatter(-1, label, at_label), math.nan)


def evenly(row: Row) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-sum-exp at T = 1 and mean of the logits, less the largest one; softmax, 1 / N) over the N classes
    that are not masked."""
    e = row.scaled_exp(row.z, row.top_z, row.no_z, 1.0)
    present = row.fill(row.no_z, 0.0, torch.ones_like(row.z))
    each = present / total(present)
    mean = total(row.fill(row.no_z, 0.0, row.z - row.top_z) * each)
    return log_total(e, row.z, row.top_z, row.no_z), mean, e / total(e), each


def hard(row: Row, labels: Tensor, modifiers: Modifiers) -> Tensor:
    """(1 - eps) CE + eps (lse - mean z) + z_loss lse^2, (rows,)."""
    value, smooth = cross_entropy(row, labels), modifiers.label_smoothing
    if not (smooth or modifiers.z_loss):
        return value
    log_sum, mean, _, _ = evenly(row)
    more = smooth * (log_sum - mean) + modifiers.z_loss * (log_sum + row.top_z) ** 2
    return (1 - smooth) * value + more.squeeze(-1)


def hard_gradient(row: Row, labels: Tensor, modifiers: Modifiers) -> Tensor:
    """Of `hard`, (rows, vocab)."""
    g, smooth = cross_entropy_gradient(row, labels), modifiers.label_smoothing
    if not (smooth or modifiers.z_loss):
        return g
    log_sum, _, q, each = evenly(row)
    return (1 - smooth) * g + smooth * (q - each) + 2 * modifiers.z_loss * (log_sum + row.top_z) * q
