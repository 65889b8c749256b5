"""The geometry of a call: tiles, and programs to a row. Knows no Triton.

Between its sweeps a row has to stay in the second-level cache, or it is read from memory twice (10 bytes a
bf16 logit and its gradient where 6 would do). So a program has so little of a row that all programs' parts
fit there, and programs of one row exchange their sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from .spec import MOST_PARTS

ACCESS = 16  # bytes of the widest access
LANES = 256  # runs of a tile: two to a thread, so that two accesses of each row are in flight
THREADS = 128  # of a program
PART = 32 << 10  # bytes of both rows to a program: 8192 classes in 16 bits, the fastest on an H200
RESIDENT = 6  # programs to a multiprocessor: as many as their registers let there be


@dataclass(frozen=True)
class Device:
    """What a launch depends on."""

    processors: int  # streaming multiprocessors, compute units
    warp: int = 32  # threads
    nvidia: bool = False
    in_turn: bool = False  # programs run one after another: Triton's interpreter
    major: int = 0  # NVIDIA's compute capability


@dataclass(frozen=True)
class Plan:
    """Tiles of `lanes` runs of `run` classes, `warps` warps to a program, `parts` programs to a row, `size`
    places of a row's window to each."""

    lanes: int
    run: int
    warps: int
    parts: int
    size: int


def run_of(student_size: int, teacher_size: int) -> int:
    """The classes of an access, of the narrower logits."""
    return ACCESS // min(student_size, teacher_size)


def plan(
    rows: int, vocab: int, student_size: int, teacher_size: int, device: Device, window: bool = True
) -> Plan:
    """The plan for rows of `vocab` classes whose logits take so many bytes each; window: rows begin anywhere
    in an access."""
    run = run_of(student_size, teacher_size)
    places = vocab + (run - 1 if window else 0)
    lanes = min(LANES, max(device.warp, 1 << (-(-places // run) - 1).bit_length()))
    warps = max(1, lanes * THREADS // (LANES * device.warp))
    tile = lanes * run
    # more programs to a row where rows are too few for the device
    of_row = vocab * (student_size + teacher_size)
    wanted = max(-(-of_row // PART), device.processors * RESIDENT // max(1, rows))
    parts = max(1, min(wanted, MOST_PARTS, vocab // (2 * tile)))
    size = -(-places // (parts * tile)) * tile
    return Plan(lanes, run, warps, -(-places // size), size)
