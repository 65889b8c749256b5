"""The CUDA kernels as compiled, for GPUs that need not be there: registers, spills, occupancy, instructions
to a logit, wide accesses.

    python benchmarks/cuda_aot.py            to results/cuda_aot.csv and docs/results/cuda_aot.md
    python benchmarks/cuda_aot.py --check    nothing is written; an exit status where a kernel does what it
                                             must not

Needs nvcc, kdkernels/_cuda.so as setup.py builds it, and cuobjdump and nvdisasm (of a CUDA toolkit, or those
that come with Triton).
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "kdkernels" / "_cuda.so"
PROBE = ROOT / "benchmarks" / "cuda_probe.cu"
RESULTS = ROOT / "benchmarks" / "results" / "cuda_aot.csv"
TABLE = ROOT / "docs" / "results" / "cuda_aot.md"
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
CLUSTERS = ("sm_90", "sm_100")  # where the plan uses them
MOST_KERNELS = 170
FAMILIES = {"Plain": "plain", "Tilted": "tilted", "Mixture": "mixed"}  # the structs of csrc/row
MIXES = ("tvd", "reverse kl", "mixture, near", "mixture, even", "mixture, skewed")  # MixKind of cuda/second.h
# issue slots and exponentials that a multiprocessor has for a logit at the rate of its memory, bf16
ROOM = {"H100": (59, 7.4), "H200": (47, 5.8), "B200": (29, 3.7)}


def tool(name: str) -> str:
    if found := shutil.which(name):
        return found
    spec = importlib.util.find_spec("triton")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec else None
    if path is None or not path.exists():
        sys.exit(f"needs {name}, of a CUDA toolkit or of Triton")
    return str(path)


def output(*command) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Kernel:
    target: str
    kernel: str
    # plain: KL, cross entropy; tilted: other orders; mixed: the mixture family and TVD
    shape: str
    widths: str  # bytes of a logit of the base and of the other
    threads: int
    chunks: int
    registers: int
    stack: int  # bytes; spills go there
    blocks: int  # to a multiprocessor, as registers have it
    bulk: bool  # copies to shared memory in bulk
    store_bytes: int  # of the widest store


@dataclass(frozen=True)
class Count:
    """Instructions and exponentials for a logit of a row pair: copy, largest, sweep and gradient
    (cuda_probe.cu)."""

    target: str
    shape: (
        # of the mixture family, what a chunk is (MixKind): near, where no x of a warp is above 1, even with
        # JSD's weights, or skewed
        str
    )
    widths: str
    copies: str
    instructions: float
    exponentials: float


def parse(name: str) -> tuple[str, str, str, int, int] | None:
    """(kernel, shape, widths, threads, chunks) of a mangled loss kernel."""
    m = re.search(
        r"\d(loss_\w+?)INS0_8GeometryILi(\d+)ELi(\d+)ELi(\d+)EEENS0_\d+([A-Z][a-z]+)ELi(\d)ELi(\d)E", name
    )
    if m is None:
        return None
    kernel, threads, chunks, teams, family, base, other = m.groups()
    return (
        kernel,
        FAMILIES[family],
        f"{base}/{other}",
        int(threads) * int(teams),
        int(chunks),
    )


def kernels(target: str) -> list[Kernel]:
    """Every loss kernel of the library for a target."""
    usage = output(tool("cuobjdump"), "-res-usage", "-arch", target, LIBRARY)
    code = dict(
        re.findall(
            r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)",
            output(tool("cuobjdump"), "-sass", "-arch", target, LIBRARY),
            re.S,
        )
    )
    out = []
    for name, registers, stack, local in re.findall(
        r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
    ):
        found = parse(name)
        if found is None or (found[0] == "loss_clusters" and target not in CLUSTERS):
            continue
        sass, threads = code[name], found[3]
        granted = -(-int(registers) // 8) * 8 * threads
        widest = max([int(x) // 8 for x in re.findall(r"STG\.E\.EF\.(\d+)", sass)] or [4])
        out.append(
            Kernel(
                target,
                *found,
                int(registers),
                int(stack) + int(local),
                65536 // granted,
                "UBLKCP" in sass,
                widest,
            )
        )
    return sorted(out, key=lambda x: (x.kernel, x.shape, x.widths, x.threads))


def counts(target: str) -> list[Count]:
    out = []
    for copies in ("bulk", "async") if target in CLUSTERS else ("async",):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "probe.cubin")
            arch = target.removeprefix("sm_")
            flags = [
                "-std=c++17",
                "-O3",
                f"-gencode=arch=compute_{arch},code={target}",
                f"-DKD_BULK={int(copies == 'bulk')}",
            ]
            output("nvcc", *flags, "-cubin", "-o", cubin, PROBE)
            text = output(tool("nvdisasm"), "-c", cubin)
        found = {}
        for name, body in re.findall(r"\n\.text\.(\S*probe\S*):\n(.*?)(?=\n\.text\.|\Z)", text, re.S):
            chunks, family, mix, base, other = re.search(
                r"probeILi(\d)ENS0_\d+([A-Z][a-z]+)ELi(\d)ELi(\d)ELi(\d)E", name
            ).groups()
            shape = MIXES[int(mix)] if family == "Mixture" else FAMILIES[family]
            instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", body)
            n = (
                len([x for x in instructions if not x.startswith("NOP")]),
                sum("MUFU.EX2" in x for x in instructions),
            )
            found[shape, f"{base}/{other}", int(chunks)] = n
        for (shape, widths, chunks), n in sorted(found.items()):
            if chunks == 2:
                one = found[shape, widths, 1]
                per_logit = [(a - b) / 8 for a, b in zip(n, one, strict=True)]
                out.append(Count(target, shape, widths, copies, *per_logit))
    return out


def in_flight(x: Kernel) -> int:
    """Threads on a multiprocessor that the launch bounds ask for."""
    return 384 if x.kernel == "loss_rows" and x.shape not in ("plain", "mixed") else 512


def faults(found: list[Kernel], counted: list[Count]) -> list[str]:
    out = [f"{x.target} {x.kernel} {x.shape} {x.widths}: {x.stack} bytes of stack" for x in found if x.stack]
    out += [
        f"{x.target} {x.kernel} {x.shape} {x.widths}: {x.registers} registers leave no {in_flight(x)} threads"
        for x in found
        if x.blocks * x.threads < in_flight(x)
    ]
    out += [f"{x.target} {x.kernel}: stores of {x.store_bytes} bytes" for x in found if x.store_bytes != 16]
    out += [
        f"{x.target} {x.kernel}: no bulk copies" for x in found if x.kernel == "loss_clusters" and not x.bulk
    ]
    most = {"plain": ROOM["H200"], "tilted": (ROOM["H100"][0] * 1.2, ROOM["H200"][1])}
    twice = ROOM["H100"][0] * 2.25, ROOM["H200"][1]  # rows swept twice: 4/9 of the memory's rate
    for x in counted:
        instructions, exponentials = most.get(x.shape, twice)
        if x.widths == "2/2" and (x.instructions > instructions or x.exponentials > exponentials):
            out.append(
                f"{x.target} {x.shape}: {x.instructions} instructions and {x.exponentials} "
                "exponentials a logit"
            )
    bodies = len(
        set(
            re.findall(
                r"Function (\S+?):", output(tool("cuobjdump"), "-res-usage", "-arch", "sm_90", LIBRARY)
            )
        )
    )
    return out + ([f"{bodies} kernels, {MOST_KERNELS} are the most"] if bodies > MOST_KERNELS else [])


def markdown(head: list[str], rows: list[list], numbers_from: int) -> str:
    lines = [head, ["---"] * numbers_from + ["---:"] * (len(head) - numbers_from), *rows]
    return "\n".join(f"| {' | '.join(map(str, x))} |" for x in lines)


def table(found: list[Kernel], counted: list[Count]) -> str:
    rooms = ", ".join(f"{name} {a} / {b}" for name, (a, b) in ROOM.items())
    text = (
        f"Bytes of stack, where spills would go, of all together: {sum(x.stack for x in found)}. "
        "At the rate of its memory a device has, "
    )
    text += f"for each bf16 logit of a row pair, issue slots / exponentials: {rooms}. "
    text += "Counted is what is paid for each logit: copy, largest, sweep, "
    text += (
        "gradient; what is paid once a tile (sums, exchange, closing) comes on top, and in the "
        "mixture family three moves a logit. "
    )
    text += (
        "Its rows are swept twice; near: a chunk of a warp whose |log q/p| are at most 1, even: "
        "others with JSD's weights.\n\n"
    )
    head = ["target", "divergence", "bytes a logit", "copies", "instructions a logit", "exponentials a logit"]
    text += markdown(
        head,
        [
            [x.target, x.shape, x.widths, x.copies, f"{x.instructions:g}", f"{x.exponentials:g}"]
            for x in counted
        ],
        4,
    )
    head = [
        "target",
        "kernel",
        "divergence",
        "bytes a logit",
        "threads",
        "classes a thread",
        "registers",
        "blocks a multiprocessor",
        "bulk copies",
    ]
    rows = [
        [
            x.target,
            x.kernel,
            x.shape,
            x.widths,
            x.threads,
            8 * x.chunks,
            x.registers,
            x.blocks,
            "yes" if x.bulk else "",
        ]
        for x in found
    ]
    return f"{text}\n\n{markdown(head, rows, 4)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where there are faults")
    args = parser.parse_args()
    if not LIBRARY.exists():
        sys.exit(f"no {LIBRARY.name}: python setup.py build_ext --inplace, with nvcc on PATH")
    with ThreadPoolExecutor(2) as pool:
        found = list(itertools.chain.from_iterable(pool.map(kernels, TARGETS)))
        counted = list(itertools.chain.from_iterable(pool.map(counts, TARGETS)))
    bad = faults(found, counted)
    print(*counted, *bad, f"{len(found)} kernels, {len(bad)} faults", sep="\n")
    if args.check:
        sys.exit(bool(bad))
    TABLE.write_text(table(found, counted), encoding="utf-8")
    for path, rows in ((RESULTS, counted), (RESULTS.with_name("cuda_kernels.csv"), found)):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [x.name for x in fields(rows[0])], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, rows))


if __name__ == "__main__":
    main()
