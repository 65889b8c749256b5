"""Which kernel runs a call of the Triton backend, and with what geometry: every choice in one place, with its
reason. Knows no Triton.

Between its two sweeps a row has to stay somewhere: in registers, or in the second-level cache together with
all other rows in flight, or it is read from memory twice (10 bytes a bf16 logit and its gradient where 6
would do).
"""

from __future__ import annotations

from dataclasses import dataclass

ACCESS = 16  # bytes of the widest access
THREADS_PER_PROCESSOR = 512  # in flight: enough to hide memory's latency, few enough for 128 registers each
CACHE_SHARE = 0.6  # of the second-level cache for rows between their sweeps; the rest is what passes through
# bytes of a row pair that registers hold: 8 classes of each row to a thread, at 2 bytes, in 512 threads
REGISTERS_WHOLE = 16 << 10
SMALLEST_PART = 8192  # classes; below this an exchange between programs costs more than it saves
MOST_PARTS = 16
WHOLE_CLASSES_PER_THREAD = 8
# with a run of R classes of each row to a thread: twice as many classes take 40 registers more
TILE_WARPS = 4

# What the launcher and the kernels say to each other: KL (from the student's side: reverse KL); with the
# teacher's entropy; T = inf; JSD and the skewed; TVD; other orders, and their
# F itself; what has no sum of terms
FAMILIES = (
    "KL",
    "ENTROPY",
    "MOMENTS",
    "MIXTURE",
    "SKEWED",
    "TVD",
    "POWER",
    "ALPHA",
    "SUPPORT",
    "EXTREME",
)
MIXTURES = ("MIXTURE", "SKEWED", "TVD")  # those with a sweep more
# whose side a row is seen from: the teacher's, the student's, and the student's with a tilt below -1
TEACHER, STUDENT, STEEP = range(3)
# every row starts and ends on 16 bytes; the rows of all tensors are off by the same number of classes; they
# are not: a class an access
EVEN, WINDOW, SCALAR = range(3)
# of the hard term: without and with label smoothing. Of a transform of the logits: scales alone, or a softcap
# too
CROSS_ENTROPY, SMOOTHED = 1, 2
SCALED, CAPPED = 1, 2
# phases of a row that several programs share: the sums, once and again, those of a mixture, and the rest; or
# all of it
PUBLISH, AGAIN, MIX, FINISH, BOTH = range(5)
SUM_SLOTS = 21  # fp64 numbers that a part publishes each time
SLOTS = 47  # of its state: twice those, and what the sweep after them sums, at most 5


@dataclass(frozen=True)
class Device:
    """What a plan depends on."""

    processors: int  # streaming multiprocessors, compute units
    cache: int  # bytes of the second-level cache
    warp: int = 32  # threads


@dataclass(frozen=True)
class Plan:
    """A geometry: tiles of RB runs of R classes, `warps` warps to a program, `parts` programs to a row,
    `grid` programs in all."""

    whole: bool
    parts: int
    RB: int
    R: int
    warps: int
    grid: int


def run(student_size: int, teacher_size: int) -> int:
    """R: the classes of an access, of the narrower logits."""
    return ACCESS // min(student_size, teacher_size)


def plan(
    rows: int,
    vocab: int,
    student_size: int,
    teacher_size: int,
    window: bool,
    device: Device,
    whole: int = REGISTERS_WHOLE,
) -> Plan:
    """The plan for rows of `vocab` classes whose logits take so many bytes each; window: rows begin anywhere
    in an access.

    whole: bytes of the longest row pair that a program keeps in registers.
    """
    R = run(student_size, teacher_size)
    row_bytes = vocab * (student_size + teacher_size)
    classes = max(64 * R, 1 << (vocab - 1 + (R - 1 if window else 0)).bit_length())
    if classes * (student_size + teacher_size) <= whole:
        # one read of the row, nothing to remember; as many programs as rows
        return Plan(
            True, 1, classes // R, R, max(1, classes // (device.warp * WHOLE_CLASSES_PER_THREAD)), rows
        )
    programs = device.processors * THREADS_PER_PROCESSOR // (32 * TILE_WARPS)
    most_rows = max(1, int(CACHE_SHARE * device.cache) // row_bytes)
    parts = 1
    # more programs to a row where rows are too few for the device, or too long for all programs' rows to stay
    # in the cache
    while (
        2 * parts * SMALLEST_PART <= vocab and parts < MOST_PARTS and min(rows, most_rows) * parts < programs
    ):
        parts *= 2
    return Plan(
        False,
        parts,
        device.warp * TILE_WARPS,
        R,
        TILE_WARPS,
        min(rows, most_rows, max(1, programs // parts)) * parts,
    )
