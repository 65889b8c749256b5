"""Is a projection fused with its loss, so that no chunk of logits reaches memory, faster than chunks?
Counted, for training with KL.

    python benchmarks/projection.py

For each pair of a token and a class, with hidden states of width H on both sides, bf16:

chunks      four products (student's and teacher's logits, gradients in hidden states and weight), 8 H flops,
            while whose logits and gradient come and go beside the arithmetic; and the loss kernel on its own:
            both logits read and the gradient written, 6 bytes, 10 where a row's second sweep finds it no
            longer in the cache, or its instructions, whichever takes longer.
recomputed  a pass that keeps the sums of each row alone, and a second one that computes both logits again and
            knows the gradient of each as it comes: 12 H flops. The loss is taken to cost nothing: all of it
            beside the products.
one kernel  the same, and the gradient of a tile goes into the sums of hidden states and weight without
            reaching memory: these sums do not fit a multiprocessor (128 x H in fp32), so each tile of 128 x
            256 adds to them in the second-level cache, 8 H (1/128 + 1/256) bytes, at twice memory's speed at
            best.
loss alone  no gradient: 4 H flops either way, and 4 bytes that chunks read.
"""

from __future__ import annotations

from dataclasses import dataclass

from traffic import DEVICES, Rates

# bf16 flops a second that cuBLAS reaches on such shapes
PRODUCTS = {"H100 SXM": 700e12, "H200": 750e12, "B200": 1600e12}
# of two sweeps of KL, a bf16 logit: docs/results/triton_aot.md
INSTRUCTIONS = {"H100 SXM": 60, "H200": 60, "B200": 53}
WIDTHS = (512, 1024, 2048, 4096)
PICO = 1e12


@dataclass(frozen=True)
class Count:
    """Picoseconds a pair."""

    chunks: float
    recomputed: float
    one_kernel: float
    value_chunks: float
    value_fused: float


def loss_kernel(device: Rates, bytes_: float) -> float:
    return max(bytes_ / device.copy, INSTRUCTIONS[device.name] / device.instructions)


def count(device: Rates, width: int, loss_bytes: float = 6.0) -> Count:
    rate = PRODUCTS[device.name]
    sums = 8 * width * (1 / 128 + 1 / 256) / (2 * device.copy)
    seconds = (
        8 * width / rate + loss_kernel(device, loss_bytes),
        12 * width / rate,
        max(12 * width / rate, sums),
        4 * width / rate + 4 / device.copy,
        4 * width / rate,
    )
    return Count(*(PICO * x for x in seconds))


def even(device: Rates, loss_bytes: float) -> float:
    """The width below which recomputing would win."""
    return loss_kernel(device, loss_bytes) * PRODUCTS[device.name] / 4


def weight_chunk(device: Rates) -> float:
    """Tokens C of a chunk from which the weight gradient's product is bound by its arithmetic: 2 H C flops, 8
    H bytes a class."""
    return 8 / device.copy * PRODUCTS[device.name] / 2


def main() -> None:
    print(
        "| | H | chunks | recomputed | one kernel | loss alone: chunks | fused |\n| --- | ---: | ---: "
        "| ---: | ---: | ---: | ---: |"
    )
    devices = [d for d in DEVICES if d.name in PRODUCTS]
    for device in devices:
        for width in WIDTHS:
            x = count(device, width)
            row = (f"{y:.1f}" for y in (x.chunks, x.recomputed, x.one_kernel, x.value_chunks, x.value_fused))
            print(f"| {device.name} | {width} | {' | '.join(row)} |")
    for device in devices:
        print(
            f"{device.name}: recomputing wins below H = {even(device, 6):.0f} ({even(device, 10):.0f} "
            "where second sweeps read memory); "
            f"a chunk's weight gradient is bound by arithmetic from {weight_chunk(device):.0f} tokens"
        )


if __name__ == "__main__":
    main()
