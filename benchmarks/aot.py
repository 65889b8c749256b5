"""The Triton kernels, compiled for GPUs that need not be there: registers, spills, width of accesses,
instructions to a logit.

    python benchmarks/aot.py            a covering set for each target, to results/triton_aot.csv and
                                        docs/results/triton_aot.md
    python benchmarks/aot.py --all      every specialisation of the launcher on the shapes below
    python benchmarks/aot.py --check    nothing is written; an exit status where a kernel does what it must
                                        not

What is compiled is what the launcher would launch (`launches`), on tensors without data. Not with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kdkernels import parse
from kdkernels.backends import triton as backend
from kdkernels.backends.triton.plan import Device
from kdkernels.backends.triton.spec import SCALAR, Spec
from kdkernels.call import Call, Numbers
from kdkernels.stats import COLUMNS
from kdkernels.transforms import Modifiers

RESULTS = Path(__file__).parent / "results" / "triton_aot.csv"
TABLE = Path(__file__).parent.parent / "docs" / "results" / "triton_aot.md"
# (instructions a logit, registers) that no change may exceed, of rows in bf16 without labels on an H100,
# whose memory at full speed leaves 59 instructions a logit; exact: at T = 16
LIMITS = {
    "kl": (30, 64),
    "reverse_kl": (32, 64),
    "mixed_kl": (41, 72),
    "cross_entropy": (30, 64),
    "renyi": (36, 64),
    "alpha": (36, 64),
    "tvd": (47, 64),
    "jsd": (55, 64),
    "skew_kl": (64, 64),
    "exact kl": (54, 100),
    "exact jsd": (145, 128),
    "exact mixed_kl": (74, 144),
}
PROGRAMS = 3  # to a multiprocessor at least, which the registers must leave room for
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Target:
    name: str
    gpu: GPUTarget
    device: Device
    file: int  # registers of a multiprocessor


TARGETS = {
    x.name: x
    for x in (
        Target("sm_80", GPUTarget("cuda", 80, 32), Device(108, 32, True, major=8), 64 << 10),
        Target("sm_90", GPUTarget("cuda", 90, 32), Device(132, 32, True, major=9), 64 << 10),
        Target("sm_100", GPUTarget("cuda", 100, 32), Device(148, 32, True, major=10), 64 << 10),
        Target("sm_120", GPUTarget("cuda", 120, 32), Device(170, 32, True, major=12), 64 << 10),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), Device(304, 64), 128 << 10),
        Target("gfx950", GPUTarget("hip", "gfx950", 64), Device(256, 64), 128 << 10),
    )
}


@dataclass(frozen=True)
class Case:
    """A call, from which the launcher derives its kernels."""

    divergence: str = "kl"
    rows: int = 4096
    vocab: int = 32768
    student: str = "bfloat16"
    teacher: str = "bfloat16"
    temperature: float = 2.0
    hard: bool = False
    weighted: bool = False
    grad: bool = True
    modifiers: Modifiers | None = None
    stats: bool = False
    own: bool = False  # temperatures of the rows

    @property
    def text(self) -> str:
        m = self.modifiers or Modifiers()
        flags = [
            ("hard", self.hard),
            ("smoothed", m.label_smoothing),
            ("weighted", self.weighted),
            ("value only", not self.grad),
        ]
        flags += [
            ("stats", self.stats),
            ("own T", self.own),
            ("capped", m.student_softcap),
            ("scaled", not m.student_softcap and m.student_scale != 1),
        ]
        flags = "".join(f" {x}" for x, on in flags if on)
        dtypes = self.student if self.student == self.teacher else f"{self.student}/{self.teacher}"
        return f"{self.divergence} T={self.temperature:g} {self.rows} x {self.vocab} {dtypes}{flags}"

    def launches(self, device: Device) -> list[backend.Launch]:
        z, v = (
            torch.empty(self.rows, self.vocab, dtype=getattr(torch, x), device="meta")
            for x in (self.student, self.teacher)
        )
        per_row = {x: torch.empty(self.rows, dtype=x, device="meta") for x in (torch.int64, torch.float64)}
        hard = 0.1 if self.hard else 0.0
        losses = torch.empty(self.rows, dtype=torch.float64, device="meta")
        call = Call(
            z,
            v,
            self.vocab,
            labels=per_row[torch.int64] if self.hard else None,
            weight=per_row[torch.float64] if self.weighted else None,
            divergence=parse(self.divergence),
            numbers=Numbers(self.temperature, 1.0, 1.0, hard, hard, self.modifiers or Modifiers()),
            grad=torch.empty_like(z) if self.grad else None,
            stats=torch.empty(self.rows, COLUMNS, dtype=torch.float64, device="meta") if self.stats else None,
            temperature=per_row[torch.float64] if self.own else None,
        )
        found, tensors = backend.launches(call, losses, device)
        named = dict(zip(backend.kernel("loss_rows").arg_names, tensors, strict=False))
        return [replace(x, arguments=x.arguments | named) for x in found]


# whole rows, two sweeps, windows, several programs to a row
VOCABS = (2048, 4096, 32768, 50257, 128256, 151665, 262144)


ALL = Modifiers(0.5, 30.0, 2.0, 0.0, 0.1, 1e-4)  # scales, a softcap, label smoothing and the z-loss


def covering() -> list[Case]:
    """A case for each path, family, dtype and flag."""
    return [
        Case(),
        Case(temperature=16.0),
        Case("renyi(0.5)", vocab=32768),
        Case("renyi(0.9)", vocab=32768),
        Case("cross_entropy"),
        Case("alpha(2.0)"),
        Case("renyi(0.5)", vocab=4096, hard=True),
        Case("renyi(2.0)", vocab=128256),
        Case("renyi(0.5)", vocab=50257, hard=True, weighted=True),
        Case("cross_entropy", student="float32", teacher="float32", vocab=50257),
        Case(vocab=262144, hard=True, temperature=1.0),
        Case(vocab=32768, grad=False),
        Case(temperature=math.inf, vocab=32768, student="float16", teacher="float32"),
        Case("reverse_kl"),
        Case("mixed_kl(0.5)"),
        Case("mixed_kl(0.5)", temperature=16.0),
        Case("mixed_kl(0.5)", student="float32", teacher="float32", vocab=50257, hard=True),
        Case("alpha(-2.0)", vocab=4096),
        Case("jsd(0.5)"),
        Case("jsd(0.5)", temperature=16.0),
        Case("jsd(0.5)", student="float32", teacher="float32"),
        Case("jsd(0.1)", vocab=4096, hard=True),
        Case("skew_kl(0.1)", vocab=50257, hard=True),
        Case("skew_reverse_kl(0.1)", student="float32", teacher="float32", grad=False),
        Case("tvd"),
        Case("tvd", student="float32", teacher="float32"),
        Case(student="float32", teacher="float32"),
        Case(hard=True, modifiers=ALL),
        Case("renyi(0.5)", vocab=2048, hard=True, modifiers=ALL, stats=True),
        Case("renyi(inf)", hard=True, modifiers=ALL, stats=True),
        Case(temperature=math.inf, vocab=50257, hard=True, modifiers=ALL, stats=True),
        Case(temperature=1.0, own=True),
        Case("jsd(0.5)", temperature=1.0, vocab=50257, hard=True, weighted=True, own=True),
    ]


def few() -> list[Case]:
    """The longest kernel of each family that sums something of its own."""
    return [
        Case(),
        Case("renyi(0.5)", vocab=50257, hard=True, weighted=True),
        Case("skew_kl(0.1)", vocab=50257, hard=True),
    ]


def everything() -> list[Case]:
    dtypes = (
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
    )
    names = (
        "kl",
        "reverse_kl",
        "mixed_kl(0.5)",
        "cross_entropy",
        "renyi(0.5)",
        "renyi(2.0)",
        "renyi(inf)",
        "reverse_renyi(inf)",
        "renyi(0.0)",
    )
    names += (
        "alpha(-2.0)",
        "alpha(0.5)",
        "alpha(2.0)",
        "jsd(0.5)",
        "jsd(0.1)",
        "skew_kl(0.1)",
        "skew_reverse_kl(0.1)",
        "tvd",
    )
    families = (*((name, 2.0) for name in names), ("kl", math.inf))
    flags = ((False, False, True), (True, True, True), (False, False, False), (True, False, False))
    grid = itertools.product(families, dtypes, VOCABS, flags)
    return [Case(f, 4096, V, z, v, T, *x) for (f, T), (z, v), V, x in grid]


def source(launch: backend.Launch) -> ASTSource:
    """The specialisation that a launch would compile: 16-byte aligned pointers, no integer's value."""
    fn = backend.kernel(launch.kernel)
    signature, constants, attributes = {}, {}, {}
    types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
    types |= {torch.int64: "*i64", torch.int32: "*i32"}
    for i, param in enumerate(fn.params):
        x = launch.arguments[param.name]
        if param.is_constexpr:
            signature[param.name], constants[param.name] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[param.name] = types[x.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if isinstance(x, float) else "i32" if abs(x) < 2**31 else "i64"
    return ASTSource(fn, signature, constexprs=constants, attrs=attributes)


@dataclass(frozen=True)
class Found:
    """What a compiled kernel takes. Instructions and exponentials are those of the sweeps' loops, for each
    logit of a row pair."""

    target: str
    case: str
    kernel: str
    warps: int
    registers: int
    spills: int
    local: int  # bytes of stack
    load_bytes: int  # of the widest access
    store_bytes: int
    instructions: float
    exponentials: float


def compile_for(case: Case, target: Target, seen: set | None = None, careful: bool = True) -> Iterator[Found]:
    """What the kernels of a call take; those of `seen` (target, specialisation) are left out, and added to
    it."""
    seen = set() if seen is None else seen
    for launch in case.launches(target.device):
        if launch.kernel == "careful_rows" and not careful:
            continue
        key = target.name, launch.warps, source(launch).hash()
        if key in seen:
            continue
        seen.add(key)
        compiled = triton.compile(source(launch), target=target.gpu, options=launch.options)
        read = read_nvidia if target.gpu.backend == "cuda" else read_amd
        yield Found(target.name, case.text, launch.kernel, launch.warps, **read(compiled, launch))


def read_nvidia(compiled, launch: backend.Launch) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])

        def run(*command) -> str:
            return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

        usage, text = run(BIN / "cuobjdump", "-res-usage"), run(BIN / "nvdisasm", "-c")
    number = {x: int(y) for x, y in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    widths = {
        op: max([_width(x) for x in re.findall(rf"\b{op}\.([\w.]+)", text)] or [0]) for op in ("LDG", "STG")
    }
    body = _loops(text)
    spec = launch.arguments.get("SPEC")
    per_tile = spec.tile / (32 * launch.warps) if launch.kernel == "loss_rows" else 0
    # The loops of the sweeps: jumps to functions and barriers are in what a row does once. Tiles that need a
    # mask, and so loads with a predicate, have loops of their own. The first sweep is there twice (`poor`).
    sweeps = [
        x
        for x in body
        if any("MUFU.EX2" in y for y in x) and not any(y.startswith(("BAR", "CALL")) for y in x)
        if spec.access == SCALAR or not any(y.startswith("@") and "LDG" in y for y in x)
    ]
    stores = [x for x in sweeps if any("STG" in y for y in x)]
    hot = _stages([x for x in sweeps if x not in stores], spec) + _stages(stores, spec) if per_tile else []
    return dict(
        registers=number["REG"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", text)),
        local=number["STACK"] + number["LOCAL"],
        load_bytes=widths["LDG"],
        store_bytes=widths["STG"],
        instructions=round(sum(len(x) for x in hot) / per_tile, 1) if hot else 0.0,
        exponentials=round(sum("MUFU.EX2" in y for x in hot for y in x) / per_tile, 2) if hot else 0.0,
    )


def _stages(loops: list[list[str]], spec: Spec) -> list[list[str]]:
    """A loop for each sweep; the exact form's first sweep is there twice."""
    if len(loops) == 3:
        a, b, c = map(len, loops)
        loops = [loops[0], loops[2 if a - b < b - c else 1]]
    return loops[: 2 if spec.mixes and len(loops) > 1 else 1]


def _width(modifiers: str) -> int:
    """Bytes of LDG or STG."""
    found = set(modifiers.split(".")) & {"128", "64", "U16", "S16", "U8", "S8"}
    return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}.get(next(iter(found), ""), 4)


def _loops(text: str) -> list[list[str]]:
    """The bodies of innermost loops, longest first: from a label to the branch back to it."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if m := re.match(r"\s*\.(L_x_\d+):", line):
            labels[m.group(1)] = len(instructions)
        elif m := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(m.group(1).strip())
    spans = []
    for i, x in enumerate(instructions):
        if m := re.search(r"BRA.*`\(\.(L_x_\d+)\)", x):
            if labels.get(m.group(1), i + 1) <= i:
                spans.append((labels[m.group(1)], i + 1))
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return sorted((instructions[a:b] for a, b in inner), key=len, reverse=True)


def read_amd(compiled, launch: backend.Launch) -> dict:
    text = compiled.asm["amdgcn"]
    number = {
        x: int(y)
        for x, y in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text
        )
    }
    sizes = {
        "dword": 4,
        "dwordx2": 8,
        "dwordx3": 12,
        "dwordx4": 16,
        "ushort": 2,
        "short": 2,
        "ubyte": 1,
        "byte": 1,
    }
    widths = {
        op: [sizes.get(x, 0) for x in re.findall(rf"(?:global|buffer)_{op}_(\w+?)(?:_d16\w*)?\s", text)]
        for op in ("load", "store")
    }
    return dict(
        registers=number["vgpr_count"],
        spills=number["vgpr_spill_count"],
        local=number["private_segment_fixed_size"],
        load_bytes=max(widths["load"] or [0]),
        store_bytes=max(widths["store"] or [0]),
        instructions=0.0,
        exponentials=0.0,
    )


def limits(found: Found) -> tuple[float, int] | None:
    """Of a kernel that has some; see `LIMITS`."""
    name, T = re.match(r"(\w+).* T=(\w+) ", found.case).groups()
    if found.target != "sm_90" or found.kernel != "loss_rows" or not found.case.endswith("bfloat16"):
        return None
    if "renyi(0.9)" in found.case:  # exact as well
        return None
    return LIMITS.get({"2": "", "16": "exact "}.get(T, "?") + name)


def table(rows: list[Found]) -> str:
    """Markdown: what each kernel takes, beside the goal."""
    head = [
        "target",
        "call",
        "kernel",
        "warps",
        "registers",
        "bytes an access",
        "instructions a logit",
        "exponentials a logit",
    ]
    lines = [head, ["---"] * 3 + ["---:"] * 5]
    for x in rows:
        widths = f"{x.load_bytes}, {x.store_bytes}" if "value" not in x.case else f"{x.load_bytes}"
        counts = [f"{x.instructions:g}", f"{x.exponentials:g}"] if x.exponentials > 1 else ["", ""]
        if most := limits(x):
            counts[0] += f" (at most {most[0]})"
        lines.append([x.target, x.case, x.kernel, f"{x.warps}", f"{x.registers}", widths, *counts])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    spills = sum(x.spills + x.local for x in rows)
    head = (
        f"Spills and bytes of stack, of all together: {spills}. Counts are of the sweeps' loops in "
        "SASS; a value alone takes the first."
    )
    return f"{head}\n\n{text}\n"


def faults(found: Found) -> list[str]:
    """What a kernel does that it must not."""
    out = []
    if found.spills or found.local:
        out.append(f"{found.spills} spills, {found.local} bytes of stack")
    threads = TARGETS[found.target].gpu.warp_size * found.warps
    room = TARGETS[found.target].file // PROGRAMS // threads
    if found.kernel == "loss_rows" and found.registers > room:
        out.append(f"{found.registers} registers leave no room for {PROGRAMS} programs")
    if most := limits(found):
        if found.instructions > most[0] or found.registers > most[1]:
            counts = f"{found.instructions} instructions and {found.registers} registers"
            out.append(f"{counts}, {most} are the limits")
    if found.kernel == "loss_rows" and (
        found.load_bytes < 16 or (found.store_bytes < 16 and "value" not in found.case)
    ):
        out.append(f"accesses of {found.load_bytes} and {found.store_bytes} bytes")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--all", action="store_true", help="every specialisation, not a covering set")
    parser.add_argument("--few", action="store_true", help="three cases")
    parser.add_argument("--brief", action="store_true", help="careful_rows for three cases alone")
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where there are faults")
    args = parser.parse_args()
    rows, bad, seen = [], 0, set()
    for target, case in itertools.product(
        args.targets, everything() if args.all else few() if args.few else covering()
    ):
        for found in compile_for(case, TARGETS[target], seen, careful=not args.brief or case in few()):
            rows.append(found)
            bad += bool(faults(found))
            print(
                *(f"{getattr(found, x.name)}" for x in fields(found)), *faults(found), sep=" | ", flush=True
            )
    print(f"{len(rows)} kernels, {bad} with faults")
    if not args.check:
        TABLE.write_text(table(rows), encoding="utf-8")
        with open(RESULTS, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [x.name for x in fields(Found)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(map(asdict, rows))
    sys.exit(bad > 0 and args.check)


if __name__ == "__main__":
    main()
