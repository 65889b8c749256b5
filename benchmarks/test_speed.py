"""Regressions in time, with pytest-benchmark: `make regress` compares with the last saved run of this
machine.

A step is loss and gradient. Each is compared with the fp64 backend before it is timed; pytest's
--benchmark-disable checks only that.
"""

from __future__ import annotations

import pytest
import torch

from kdkernels import KDLoss, LogitTransform, tempered_log_softmax
from kdkernels.bench.logits import draw

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def logits(rows: int, vocab: int, dtype: str, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(0))
    return *(x.to(device, DTYPES[dtype]) for x in draw(rows, vocab)), labels.to(device)


# what is covered: each family, each dtype, few and many rows, small and odd vocabularies, what is computed
# besides the divergence
CASES = {
    "kl": (256, 128256, "fp32", {"divergence": "kl"}),
    "kl-bf16": (256, 128256, "bf16", {"divergence": "kl"}),
    "kl-fp16": (256, 128256, "fp16", {"divergence": "kl"}),
    "kl-fp64": (32, 128256, "fp64", {"divergence": "kl"}),
    "kl-one-row": (1, 262144, "fp32", {"divergence": "kl"}),
    "kl-gpt2": (512, 50257, "fp32", {"divergence": "kl"}),
    "kl-tiny": (1, 1000, "fp32", {"divergence": "kl"}),
    "kl-labels": (256, 128256, "fp32", {"divergence": "kl", "soft_weight": 0.9, "hard_weight": 0.1}),
    "kl-rows": (256, 128256, "fp32", {"divergence": "kl", "reduction": "none"}),
    "kl-T=inf": (256, 128256, "fp32", {"divergence": "kl", "temperature": float("inf")}),
    "cross-entropy": (256, 128256, "fp32", {"divergence": "cross_entropy"}),
    "renyi-half": (256, 128256, "fp32", {"divergence": "renyi(0.5)"}),
    "renyi-half-bf16": (256, 128256, "bf16", {"divergence": "renyi(0.5)"}),
    "renyi-two": (256, 128256, "fp32", {"divergence": "renyi(2)"}),
    "renyi-inf": (64, 128256, "fp32", {"divergence": "renyi(inf)"}),
    "alpha": (256, 128256, "fp32", {"divergence": "alpha(2)"}),
    "reverse-kl": (256, 128256, "fp32", {"divergence": "reverse_kl"}),
    "jsd": (256, 128256, "fp32", {"divergence": "jsd(0.5)"}),
    "jsd-bf16": (256, 128256, "bf16", {"divergence": "jsd(0.5)"}),
    "skew-kl": (256, 128256, "fp32", {"divergence": "skew_kl(0.1)"}),
    "tvd": (256, 128256, "fp32", {"divergence": "tvd"}),
    "softcap": (256, 128256, "fp32", {"divergence": "kl", "student_transform": LogitTransform(softcap=30.0)}),
    "smoothing": (
        256,
        128256,
        "fp32",
        {"divergence": "kl", "hard_weight": 0.1, "label_smoothing": 0.1, "z_loss": 1e-4},
    ),
}
TOLERANCE = {"fp32": 3e-6, "bf16": 4e-3, "fp16": 1e-3, "fp64": 1e-12}


@pytest.mark.parametrize("name", CASES)
def test_step(benchmark, device, name):
    rows, vocab, dtype, options = CASES[name]
    z, v, labels = logits(rows, vocab, dtype, device)
    options = {"temperature": 2.0, "t_squared": True} | options
    labels = labels if options.get("hard_weight") else None
    loss, exact = KDLoss(**options), KDLoss(**options, backend="eager")

    few = slice(0, 2)
    grads = []
    for which, dtype_of in ((loss, z.dtype), (exact, torch.float64)):
        x = z[few].to(dtype_of).requires_grad_()
        which(x, v[few].to(dtype_of), None if labels is None else labels[few]).sum().mul(2.0**12).backward()
        grads.append(x.grad.double())
    assert (grads[0] - grads[1]).norm() <= TOLERANCE[dtype] * grads[1].norm()

    z.requires_grad_()

    def step() -> None:
        loss(z, v, labels).sum().backward()
        z.grad = None
        if z.device.type != "cpu":
            torch.accelerator.synchronize()

    benchmark(step)


def test_log_softmax(benchmark, device):
    z, _, _ = logits(256, 128256, "fp32", device)
    assert (tempered_log_softmax(z[:2], 2.0) - torch.log_softmax(z[:2].double() / 2.0, -1)).abs().max() < 1e-5
    benchmark(tempered_log_softmax, z, 2.0)
