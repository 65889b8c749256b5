"""Walks a backend's kernels through their paths on small inputs on a GPU, for compute-sanitizer: gpu_exercise.py [triton | cuda]."""

import itertools
import math
import sys

import torch
from rows import make_rows

from kdkernels import fused_kd_loss, tempered_log_softmax


def main(backend: str) -> None:
    cases = itertools.product((31, 1003, 9001, 40007), ("kl", "cross_entropy", "renyi(0.3)", "renyi(3)", "renyi(inf)"), (2.0, math.inf))
    for vocab, divergence, T in cases:
        if math.isinf(T) and divergence in ("cross_entropy", "renyi(inf)"):
            continue
        z, v = (x.cuda() for x in make_rows("plain", 3, vocab, torch.bfloat16))
        z.requires_grad_()
        y = torch.tensor([0, -100, vocab - 1], device="cuda")
        options = {
            "divergence": divergence,
            "temperature": T,
            "t_squared": True,
            "hard_weight": 0.1,
            "soft_weight": 0.9,
            "backend": backend,
        }
        fused_kd_loss(z, v, y, **options).mul(2).backward()
        fused_kd_loss(z * 1, v, y, inplace=True, **options).backward()
        assert fused_kd_loss(z.detach(), v, y, **options).isfinite() and z.grad.isfinite().all()
    tempered_log_softmax(z, 2.0, backend=backend).sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "triton")
