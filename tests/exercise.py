"""Walks the CPU library through its paths on small inputs, against the eager backend: for builds under
sanitizers and odd compilers."""

import itertools
import math
import os
from pathlib import Path

import torch
from rows import KINDS, make_rows, with_masks

from kdkernels import LogitTransform, fused_kd_loss, tempered_log_softmax
from kdkernels.backends import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compare(z, v, y, **options):
    """Both gradients: of the student, and, where one is asked for, of the teacher. temperatures: of the
    rows."""
    if options.pop("temperatures", False):
        options["temperature"] = torch.linspace(1.0, 4.0, len(z))
    a, b = (z.clone().requires_grad_() for _ in range(2))
    v, expected_v = (v.clone().requires_grad_(options.get("teacher_grad", False)) for _ in range(2))
    x = a * 1
    loss = fused_kd_loss(x, v, y, hard_weight=0.25, backend="cpu", **options)
    loss.sum().backward()
    options.pop("inplace", None)
    expected = fused_kd_loss(b, expected_v, y, hard_weight=0.25, backend="eager", **options)
    expected.sum().backward()
    spread = 60 / float(torch.as_tensor(options.get("temperature", 1)).min())
    torch.testing.assert_close(loss, expected, rtol=1e-4 + 1e-6 * spread, atol=1e-6, equal_nan=True)
    if options.get("divergence") == "tvd":  # the sign of what is within rounding of 0 is anybody's guess
        return
    for x, right in ((a, b), (v, expected_v)):
        if x.requires_grad:
            atol = 1e-2 if x.dtype in (torch.bfloat16, torch.float16) else 1e-5
            torch.testing.assert_close(x.grad, right.grad, rtol=2e-2, atol=atol, equal_nan=True)


def main():
    if path := os.environ.get("KDKERNELS_TEST_LIBRARY"):
        cpu.LIBRARY = Path(path)
    if threads := os.environ.get("KDKERNELS_TEST_THREADS"):
        torch.set_num_threads(int(threads))
    assert not isinstance(cpu.library(), str), cpu.library()
    divergences = (
        "kl",
        "cross_entropy",
        "renyi(0)",
        "renyi(0.3)",
        "renyi(0.7)",
        "renyi(3)",
        "renyi(inf)",
        "reverse_renyi(inf)",
        "alpha(0.3)",
    )
    divergences += ("reverse_kl", "jsd(0.1)", "jsd(0.5)", "skew_kl(0.9)", "skew_reverse_kl(0.9)", "tvd")
    y = torch.tensor([0, -100, 2, 1])
    # an odd number of kinds: all of them, with all divergences
    every_other = list(itertools.product(divergences, KINDS))[::2]
    for vocab, (divergence, kind) in zip(
        itertools.cycle((1, 7, 16, 33, 130, 4096, 4099, 9001)), every_other, strict=False
    ):
        for T in (0.05, 2.0, math.inf):
            if math.isinf(T) and divergence in ("cross_entropy", "renyi(inf)", "reverse_renyi(inf)", "tvd"):
                continue
            z, v = make_rows(kind, 4, vocab)
            compare(
                z,
                v,
                y % vocab if vocab > 2 else None,
                divergence=divergence,
                temperature=T,
                t_squared=math.isinf(T),
            ) if vocab > 2 else None
            if T == 2 and vocab in (16, 4099, 9001) and divergence != "cross_entropy":
                compare(z, v, y % vocab, divergence=divergence, temperature=T, teacher_grad=True)
            fused_kd_loss(z, v, divergence=divergence, temperature=T, t_squared=True, backend="cpu")
    for student, teacher in itertools.product(DTYPES, DTYPES):
        for vocab in (5, 4100):
            z, v = make_rows("plain", 4, vocab, student, teacher)
            compare(z, v, y.clamp(max=4), temperature=2.0)
            compare(z, v, y.clamp(max=4), divergence="renyi(0.7)", inplace=True)
            compare(z, v, y.clamp(max=2), vocab_size=vocab - 1, reduction="none")
    modifiers = dict(
        student_transform=LogitTransform(0.5, 5.0),
        teacher_transform=LogitTransform(2.0),
        label_smoothing=0.1,
        z_loss=1e-3,
    )
    for dtype, vocab, divergence in itertools.product(DTYPES, (5, 4100), ("kl", "renyi(0)", "jsd(0.3)")):
        z, v = make_rows("plain", 4, vocab, dtype)
        compare(z, v, y.clamp(max=4), divergence=divergence, **modifiers)
        compare(z, v, y.clamp(max=4), divergence=divergence, label_smoothing=0.1)
        fused_kd_loss(z, v, divergence=divergence, return_stats=True, backend="cpu")
    for where in ("both", "teacher", "student"):
        for divergence in divergences:
            z, v = with_masks(*make_rows("plain", 4, 4100), where)
            fused_kd_loss(z, v, divergence=divergence, backend="cpu")
    # the tail of the gradient is the workspace; then a split row; then a broken one
    z, v = make_rows("plain", 40, 9000)
    for divergence in ("renyi(0.7)", "jsd(0.3)"):
        compare(z, v, torch.zeros(40, dtype=torch.int64), divergence=divergence)
        compare(z, v, torch.zeros(40, dtype=torch.int64), divergence=divergence, temperatures=True)
        compare(
            z, v, torch.zeros(40, dtype=torch.int64), divergence=divergence, teacher_grad=True, inplace=True
        )
    z, v = make_rows("plain", 1, 70000)
    for divergence in ("kl", "jsd(0.3)"):
        compare(z, v, torch.tensor([69999]), divergence=divergence)
        compare(z, v, torch.tensor([69999]), divergence=divergence, temperatures=True)
        compare(z, v, torch.tensor([69999]), divergence=divergence, teacher_grad=True)
    z[0, 5] = math.nan
    fused_kd_loss(z, v, backend="cpu")
    for dtype in DTYPES:
        x = make_rows("plain", 3, 4100, dtype)[0].requires_grad_()
        tempered_log_softmax(x, 2.0, backend="cpu").sum().backward()


if __name__ == "__main__":
    main()
