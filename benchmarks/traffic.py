"""A model of the Triton and the CUDA backend's time: bytes to and from memory, instructions and exponentials
of each logit, against a device's rates.

    python benchmarks/traffic.py              a table for the devices below
    python benchmarks/traffic.py --here       beside measured times, on a GPU
    python benchmarks/traffic.py --write      Triton's, to docs/results/triton_predicted.md

Loss and gradient of rows of V logits move at least 3 V b bytes a row (each logit read once, the gradient
written once). The plan (`kdkernels.backends.triton.plan`) keeps what all programs have of their rows between
their sweeps in the second-level cache; where that does not fit, each later sweep reads from memory again. A
row's time is the longest of three: its bytes over the copy bandwidth, its instructions over the issue rate,
its exponentials over the rate of the special-function units; the first overlaps the others, as several
programs share a multiprocessor. What a tile of the CUDA kernels takes once (sums, exchange, closing) is not
in it.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import itertools
from dataclasses import dataclass
from pathlib import Path

from kdkernels import parse
from kdkernels.backends import abi, cuda
from kdkernels.backends.triton.plan import RESIDENT, Device, Plan, plan
from kdkernels.call import Call, Numbers

CACHE_SHARE = 0.6  # of the second-level cache for rows between their sweeps; the rest passes through
COUNTS = Path(__file__).parent / "results" / "triton_aot.csv"
CUDA_COUNTS = COUNTS.with_name("cuda_aot.csv")
# of a block, of all
SHARED = {"sm_80": (163 << 10, 164 << 10), "sm_90": (227 << 10, 228 << 10), "sm_100": (227 << 10, 228 << 10)}
SHAPES = (
    (4096, 32768),
    (4096, 50257),
    (4096, 128256),
    (4096, 151936),
    (4096, 262144),
    (64, 262144),
    (1, 262144),
)


DIVERGENCES = ("kl", "renyi(0.5)", "jsd(0.5)")
PREDICTED = Path(__file__).parent.parent / "docs" / "results" / "triton_predicted.md"
HEAD = """# Predictions

No GPU has run these kernels: ms for loss and gradient in bf16, and the share of copy speed that they would
reach, by `benchmarks/traffic.py` from the [compiled kernels' instructions](triton_aot.md), the bytes of the
plan, and the devices' rates. What a program does once (the exchange, closing a row) is not in it.

"""


@dataclass(frozen=True)
class Rates:
    """A device: copy bandwidth in bytes a second, clock in Hz; a multiprocessor has four schedulers and 16
    special functions a clock."""

    name: str
    target: str
    device: Device
    cache: int  # bytes of the second-level cache
    copy: float
    clock: float

    @property
    def instructions(self) -> float:
        """Thread instructions a second."""
        return self.device.processors * 4 * 32 * self.clock

    @property
    def exponentials(self) -> float:
        return self.device.processors * 16 * self.clock


# copy bandwidth as the best copies reach it, nine tenths of the data sheet's; boost clocks
DEVICES = (
    Rates("A100 80GB", "sm_80", Device(108, 32, True), 40 << 20, 1.75e12, 1.41e9),
    Rates("H100 SXM", "sm_90", Device(132, 32, True), 50 << 20, 3.0e12, 1.83e9),
    Rates("H200", "sm_90", Device(132, 32, True), 60 << 20, 4.3e12, 1.83e9),
    Rates("B200", "sm_100", Device(148, 32, True), 126 << 20, 7.2e12, 1.85e9),
)


def bytes_per_logit(chosen: Plan, rates: Rates, rows: int, vocab: int, size: int, sweeps: int) -> float:
    """Of memory, for a logit of the student with its teacher's and its gradient's, `size` bytes each."""
    programs = min(rows * chosen.parts, rates.device.processors * RESIDENT)
    kept = programs * 2 * size * vocab / chosen.parts <= CACHE_SHARE * rates.cache
    return (3 if kept else 1 + 2 * sweeps) * size


@dataclass(frozen=True)
class Prediction:
    bytes: float  # of memory, a logit
    seconds: float
    bound: str

    def floor_share(self, rates: Rates, rows: int, vocab: int, size: int) -> float:
        """3 N V b over the time, as a share of copy bandwidth."""
        return 3 * rows * vocab * size / self.seconds / rates.copy


def predict(
    rates: Rates, rows: int, vocab: int, size: int, instructions: float, exponentials: float, sweeps: int = 2
) -> Prediction:
    """The time of loss and gradient; a device that is not full is slower by the programs it lacks."""
    chosen = plan(rows, vocab, size, size, rates.device, vocab * size % 16 != 0)
    moved = bytes_per_logit(chosen, rates, rows, vocab, size, sweeps)
    logits = rows * vocab
    # a program a multiprocessor is what memory needs, and one a scheduler what arithmetic needs
    programs = chosen.parts * rows
    memory_share = min(1.0, programs / rates.device.processors)
    compute_share = min(1.0, programs * chosen.warps / (4 * rates.device.processors))
    times = {
        "memory": logits * moved / rates.copy / memory_share,
        "instructions": logits * instructions / rates.instructions / compute_share,
        "exponentials": logits * exponentials / rates.exponentials / compute_share,
    }
    bound = max(times, key=times.get)
    return Prediction(moved, times[bound], bound)


def counts(target: str, divergence: str) -> tuple[float, float]:
    """(instructions, exponentials) to a logit of the two sweeps in bf16, as compiled."""
    with open(COUNTS, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            plain = (
                row["case"].startswith(divergence)
                and row["case"].endswith("bfloat16")
                and float(row["exponentials"]) > 3
            )
            if row["target"] == target and plain:
                return float(row["instructions"]), float(row["exponentials"])
    raise LookupError(f"{COUNTS.name} has no {divergence} for {target}: python benchmarks/aot.py")


def cuda_geometry(rates: Rates, rows: int, vocab: int, divergence: str) -> tuple[bool, int, int, int]:
    """(a cluster's kernel, blocks to a row, tiles to a block, threads to a block) of the library's own plan
    (csrc/cuda/plan.h), bf16."""
    import torch

    library = cuda.library()
    if isinstance(library, str):
        raise LookupError(library)
    z = torch.empty(rows, vocab, dtype=torch.bfloat16, device="meta")
    call, _, alive = abi.loss_call(Call(z, z, vocab, None, None, parse(divergence), Numbers(2.0), grad=z))
    figures = (ctypes.c_int32 * 4)(int(rates.target[3:]), rates.device.processors, *SHARED[rates.target])
    found = (ctypes.c_int32 * 10)()
    if library.c.kd_plan(ctypes.byref(call), figures, found):
        raise LookupError(f"{vocab} classes have no geometry")
    kind, parts, tiles, _, cluster, threads, *_ = found
    return kind >= 3, max(parts, cluster), tiles, threads


def predict_cuda(rates: Rates, rows: int, vocab: int, divergence: str) -> Prediction:
    """As `predict`, of the CUDA kernels, bf16: exponentials are taken once where a row's tiles are all in
    registers."""
    cluster, parts, tiles, threads = cuda_geometry(rates, rows, vocab, divergence)
    instructions, exponentials = cuda_counts(
        rates.target, "plain" if divergence == "kl" else "tilted", "bulk" if cluster else "async"
    )
    again = (tiles - 1) / tiles  # the share that is read and computed twice
    blocks = min(rows * parts, rates.device.processors * max(1, 512 // threads))
    in_cache = blocks / parts * 4 * vocab <= CACHE_SHARE * rates.cache
    moved = 6.0 if in_cache else 6.0 + 4 * again
    logits = rows * vocab
    share = min(1.0, blocks * threads / 512 / rates.device.processors)
    times = {
        "memory": logits * moved / rates.copy / min(1.0, blocks / rates.device.processors),
        "instructions": logits * instructions * (1 + 0.8 * again) / rates.instructions / share,
        "exponentials": logits * exponentials * (1 + again) / rates.exponentials / share,
    }
    bound = max(times, key=times.get)
    return Prediction(moved, times[bound], bound)


def cuda_counts(target: str, shape: str, copies: str) -> tuple[float, float]:
    with open(CUDA_COUNTS, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (row["target"], row["shape"], row["widths"], row["copies"]) == (target, shape, "2/2", copies):
                return float(row["instructions"]), float(row["exponentials"])
    raise LookupError(f"{CUDA_COUNTS.name} has no {shape} for {target}: python benchmarks/cuda_aot.py")


def measured(rows: int, vocab: int, divergence: str, backend: str) -> tuple[float, float]:
    """(seconds of loss and gradient, bytes a second of a copy) on this GPU, bf16."""
    import torch
    from triton.testing import do_bench

    from kdkernels import fused_kd_loss

    v = torch.randn(rows, vocab, device="cuda").bfloat16() * 3
    z = (v + torch.randn_like(v) * 0.5).requires_grad_()
    step = do_bench(
        lambda: fused_kd_loss(z, v, divergence=divergence, temperature=2.0, backend=backend).backward(),
        grad_to_none=[z],
        return_mode="median",
    )
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copy = do_bench(lambda: big.clone(), return_mode="median")
    return step * 1e-3, 2 * big.numel() / (copy * 1e-3)


def table() -> str:
    """Markdown: the Triton backend's predicted times for loss and gradient in bf16."""
    lines = [["rows x V", *(f"{r.name}, {d}" for r in DEVICES for d in DIVERGENCES)]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for rows, vocab in SHAPES:
        cells = [f"{rows} x {vocab}"]
        for rates, divergence in itertools.product(DEVICES, DIVERGENCES):
            found = of_triton(rates, divergence, rows, vocab)
            cells.append(f"{found.seconds * 1e3:.3g} ({found.floor_share(rates, rows, vocab, 2):.2f})")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def of_triton(rates: Rates, divergence: str, rows: int, vocab: int) -> Prediction:
    sweeps = 3 if divergence.startswith("jsd") else 2
    return predict(rates, rows, vocab, 2, *counts(rates.target, divergence), sweeps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--here", action="store_true", help="measure the same shapes on this machine's GPU")
    parser.add_argument("--write", action="store_true", help=f"the table to {PREDICTED.name}")
    args = parser.parse_args()
    if args.write:
        PREDICTED.write_text(f"{HEAD}{table()}\n", encoding="utf-8")
        return
    print(
        f"{'device':10} {'divergence':10} {'rows x V':>14} {'B/logit':>8} {'ms':>8} {'of copy':>8}  "
        "bound, backend"
    )
    models = {"triton": of_triton}
    if isinstance(cuda.library(), str):
        print(f"cuda: {cuda.library()}")
    else:
        models["cuda"] = lambda r, d, *shape: predict_cuda(r, *shape, d)
    for rates in DEVICES:
        for divergence in DIVERGENCES:
            for (rows, vocab), (backend, model) in itertools.product(SHAPES, models.items()):
                found = model(rates, divergence, rows, vocab)
                share = found.floor_share(rates, rows, vocab, 2)
                ms, shape = found.seconds * 1e3, f"{rows} x {vocab}"
                print(
                    f"{rates.name:10} {divergence:10} {shape:>14} {found.bytes:8.1f} {ms:8.3f} "
                    f"{share:8.2f}  {found.bound}, {backend}"
                )
    if args.here:
        for divergence, (rows, vocab), backend in itertools.product(DIVERGENCES, SHAPES, models):
            seconds, copy = measured(rows, vocab, divergence, backend)
            share = 6 * rows * vocab / seconds / copy
            print(
                f"measured {backend:6} {divergence:10} {rows} x {vocab}: {seconds * 1e3:.3f} ms, "
                f"{share:.2f} of copy"
            )


if __name__ == "__main__":
    main()
