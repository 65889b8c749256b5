"""What the C++ library returns, bit for bit: a change of its shape that is none of its arithmetic changes no
line of bits.json.

    python tests/bits.py            compares this machine's results with bits.json
    python tests/bits.py --write    puts them there, where a change is one of the arithmetic

A line is a digest of losses, gradients and statistics of a divergence and options, over all kinds of rows
(rows.py), vocabularies of one block and of several, and dtypes. They depend on the compiler, the C library
and the instruction set (KDKERNELS_CPU_ISA), which are the key.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from names import USUAL
from rows import KINDS, make_rows, with_masks

from kdkernels import LogitTransform, fused_kd_loss
from kdkernels.backends import abi, cpu

FILE = Path(__file__).with_name("bits.json")
LEVELS = ("v2", "v3", "v4")
DIVERGENCES = (*USUAL, "renyi(0)", "renyi(0.9999)", "renyi(inf)")
SHAPES = (
    (33, torch.float32),
    (5000, torch.bfloat16),
    (9001, torch.float32),
    (33, torch.float16),
    (700, torch.float64),
)
OPTIONS = {
    "T=1": {},
    "T=2, hard term": dict(temperature=2.0, t_squared=True, hard_weight=0.3, soft_weight=0.7),
    "T=0.1, sum": dict(temperature=0.1, reduction="sum"),
    "T=100, both gradients": dict(temperature=100.0, t_squared=True, teacher_grad=True),
    "T=inf": dict(temperature=float("inf"), t_squared=True),
    "smoothing, z-loss, softcaps": dict(
        hard_weight=0.5,
        label_smoothing=0.1,
        z_loss=1e-3,
        student_transform=LogitTransform(softcap=30.0),
        teacher_transform=LogitTransform(0.5),
    ),
    "masked, by row": dict(temperature=2.0, reduction="none"),
}


def inputs(
    kind: str, vocab: int, dtype: torch.dtype, option: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z, v = make_rows(kind, 2, vocab, dtype)
    z, v = with_masks(z, v, "both") if option.startswith("masked") else (z, v)
    return z.requires_grad_(), v.requires_grad_("both gradients" in option), torch.tensor([vocab // 3, -100])


def digest(divergence: str, option: str) -> str:
    found = hashlib.sha256()
    for kind, (vocab, dtype) in itertools.product(KINDS, SHAPES):
        z, v, y = inputs(kind, vocab, dtype, option)
        loss, stats = fused_kd_loss(
            z, v, y, divergence=divergence, backend="cpu", return_stats=True, **OPTIONS[option]
        )
        loss.sum().backward()
        for x in (
            loss.detach(),
            z.grad,
            v.grad,
            stats.divergence,
            stats.student_entropy,
            stats.teacher_entropy,
        ):
            if x is not None:
                # any nan is as good as another
                found.update(
                    torch.where(x == x, x, torch.nan).reshape(-1).view(torch.uint8).numpy().tobytes()
                )
    return found.hexdigest()[:12]


def key() -> str:
    """Of what the bits depend on."""
    return f"{abi.build_record()['compiler']}, {' '.join(platform.libc_ver())}, {cpu.library().isa}"


def digests() -> dict[str, str]:
    return {
        f"{divergence}; {option}": digest(divergence, option)
        for divergence, option in itertools.product(DIVERGENCES, OPTIONS)
        if "inf" not in option or divergence not in ("cross_entropy", "tvd", "renyi(inf)")
        if "both" not in option or divergence != "cross_entropy"
    }


def of_level(level: str) -> tuple[str, dict[str, str]]:
    """(key, digests) of an instruction-set level, in a process of its own: a level is chosen once."""
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder.parent), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"KDKERNELS_CPU_ISA": level, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import bits, json; print(json.dumps([bits.key(), bits.digests()]))"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def changed(known: dict[str, dict[str, str]], levels: tuple[str, ...] = LEVELS) -> tuple[list[str], int]:
    """(lines that are not as they were, lines that were compared)."""
    found, compared = [], 0
    for level in levels:
        name, now = of_level(level)
        before = known.get(name, {})
        compared += len(before.keys() & now.keys())
        found += [f"{name}: {line}" for line in before if before[line] != now.get(line)]
    return found, compared


def main() -> None:
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    if "--write" in sys.argv:
        known |= dict(of_level(level) for level in LEVELS)
        FILE.write_text(json.dumps(known, indent=0) + "\n")
        return
    found, compared = changed(known)
    print("\n".join([*found, f"{compared} digests compared, {len(found)} changed"]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
