"""A result of benchmarks/gpu as tables: what is right, how fast it is beside a copy, which goals are reached,
what `auto` should take.

    python benchmarks/gpu/report.py RESULTS.jsonl             prints them
    python benchmarks/gpu/report.py RESULTS.jsonl --write     keeps the result as
                                                              benchmarks/results/gpu_CARD.jsonl and the tables
                                                              as docs/results/gpu_CARD.md; prints the lines
                                                              that the README must have

Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("triton", "cuda")
DIVERGENCES = {"kl": "KL", "renyi(0.5)": "Renyi(0.5)"}
BIG = (4096, 128256)
MANY_ROWS = 1024  # a device is full
MARGIN = 1.03  # by which a backend must be faster to be preferred: less is noise
TIME = re.compile(r"(?P<kind>time|graph) (?P<name>.+) (?P<divergence>\S+) (?P<rows>\d+)x(?P<vocab>\d+) bf16")


@dataclass(frozen=True)
class Time:
    """Loss and gradient of bf16 logits, in ms; graph: replayed from one."""

    name: str
    divergence: str
    rows: int
    vocab: int
    graph: bool
    ms: float
    p20: float
    p80: float
    memory: float | None  # peak beyond the logits, in gradients

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.vocab


@dataclass
class Result:
    """The outcomes of a run, by key."""

    outcomes: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def of(cls, lines: Iterable[dict]) -> Result:
        return cls({x["key"]: x for x in lines if not x.get("begun") and not x.get("cut")})

    @property
    def here(self) -> dict:
        return self.outcomes.get("here", {})

    @property
    def card(self) -> str:
        return next((x["card"] for x in self.outcomes.values() if x.get("card")), "no card")

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "_", self.card.lower()).strip("_")

    @cached_property
    def copy(self) -> float | None:
        """Bytes a second, read and written."""
        found = [
            x["gb_s"] * 1e9
            for key, x in self.outcomes.items()
            if key.startswith("time copy ") and "gb_s" in x
        ]
        return found[0] if found else None

    @cached_property
    def times(self) -> list[Time]:
        found = []
        for key, x in self.outcomes.items():
            match = TIME.fullmatch(key)
            if match and "ms" in x:
                shape = int(match["rows"]), int(match["vocab"])
                spread = x.get("p20", x["ms"]), x.get("p80", x["ms"])
                found.append(
                    Time(
                        match["name"],
                        match["divergence"],
                        *shape,
                        match["kind"] == "graph",
                        x["ms"],
                        *spread,
                        x.get("memory"),
                    )
                )
        return found

    def time(self, name: str, divergence: str, shape: tuple[int, int], graph: bool = False) -> Time | None:
        wanted = name, divergence, shape, graph
        return next((x for x in self.times if (x.name, x.divergence, x.shape, x.graph) == wanted), None)

    def best(self, divergence: str, shape: tuple[int, int], matches: str) -> Time | None:
        """The fastest contender whose name matches."""
        found = [
            x
            for x in self.times
            if (x.divergence, x.shape, x.graph) == (divergence, shape, False) and re.match(matches, x.name)
        ]
        return min(found, key=lambda x: x.ms, default=None)

    def of_copy(self, time: Time | None) -> float | None:
        """3 N V b bytes over the time, as a fraction of the copy speed; b = 2."""
        return 6 * time.rows * time.vocab / (time.ms / 1e3) / self.copy if time and self.copy else None

    def right(self, backend: str) -> list[tuple[str, dict]]:
        """(case, what came of it) of what was compared with fp64."""
        return [
            (key.split(" ", 2)[2], x)
            for key, x in self.outcomes.items()
            if key.startswith(f"right {backend} ")
        ]

    def is_right(self, backend: str) -> bool:
        found = self.right(backend)
        return bool(found) and all(x.get("right") for _, x in found)

    def starting(self, prefix: str) -> list[tuple[str, dict]]:
        return [(key[len(prefix) :], x) for key, x in self.outcomes.items() if key.startswith(prefix)]


@dataclass(frozen=True)
class Goal:
    """What a backend is to reach, and what it does: at least, or for bytes and memory at most; None where it
    was not measured."""

    backend: str
    what: str
    goal: float
    found: float | None
    most: bool = False

    @property
    def verdict(self) -> str:
        if self.found is None:
            return "not measured"
        return (
            "reached"
            if (self.found <= self.goal if self.most else self.found >= self.goal)
            else "not reached"
        )


def goals(result: Result) -> list[Goal]:
    found = []
    for backend in BACKENDS:
        found += _bandwidth_goals(result, backend) + _speed_goals(result, backend)
    return found


def _bandwidth_goals(result: Result, backend: str) -> list[Goal]:
    """Of copy speed, the least over vocabularies of a range at many rows, and bytes of memory beside the
    floor's."""
    h200 = "H200" in result.card
    ranges = {
        "triton": (("V <= 50k", 0, 60000, 0.85, 0.75), ("V >= 128k", 100000, 1 << 30, 0.78, 0.70)),
        "cuda": (
            ("V = 32k to 152k", 30000, 160000, 0.90, 0.80 if h200 else 0.85),
            ("V = 256k", 200000, 1 << 30, 0.85, 0.80 if h200 else 0.85),
        ),
    }
    out = []
    for text, low, high, *least in ranges[backend]:
        for divergence, goal in zip(DIVERGENCES, least, strict=True):
            those = [
                x
                for x in result.times
                if (x.name, x.divergence, x.graph) == (backend, divergence, False)
                and x.rows >= MANY_ROWS
                and low <= x.vocab <= high
            ]
            shares = [share for x in those if (share := result.of_copy(x)) is not None]
            out.append(
                Goal(
                    backend,
                    f"{DIVERGENCES[divergence]}, {text}: of copy speed",
                    goal,
                    min(shares, default=None),
                )
            )
    profiled = result.outcomes.get(f"ncu {backend} kl T=2 {BIG[0]}x{BIG[1]} bfloat16", {})
    moved = profiled["bytes_read"] + profiled["bytes_written"] if "bytes_read" in profiled else None
    floor = 6 * BIG[0] * BIG[1]
    most = {"triton": 1.3, "cuda": 1.03}[backend]
    return [
        *out,
        Goal(
            backend, "KL, V = 128k: bytes of memory over the floor", most, moved and moved / floor, most=True
        ),
    ]


def _speed_goals(result: Result, backend: str) -> list[Goal]:
    """Beside the other spellings, at 4096 x 128256."""
    own = result.time(backend, "kl", BIG)
    others = {
        "torch.compile": r"torch\.compile",
        "the best eager spelling": r"kl_div\(",
        "log_softmax + Liger KLDiv": "log_softmax .*Liger",
    }
    times = {"triton": (3, 6, 4.5), "cuda": (4.5, 9, 7)}[backend]
    out = []
    for (text, pattern), goal in zip(others.items(), times, strict=True):
        other = result.best("kl", BIG, pattern)
        out.append(
            Goal(backend, f"KL: times as fast as {text}", goal, other.ms / own.ms if own and other else None)
        )
    return [
        *out,
        Goal(
            backend,
            "KL: memory beyond the logits, in gradients",
            1.01,
            own.memory if own else None,
            most=True,
        ),
    ]


def auto(result: Result) -> list[str]:
    """What backend="auto" should take on this card."""
    wrong = [x for x in BACKENDS if result.right(x) and not result.is_right(x)]
    lines = [f"{x} is not right here: `auto` does not take it." for x in wrong]
    faster: dict[str, list[str]] = {"cuda": [], "triton": [], "either": []}
    for divergence in DIVERGENCES:
        for shape in sorted({x.shape for x in result.times}, key=lambda s: (s[1], s[0])):
            a, b = (result.time(x, divergence, shape) for x in BACKENDS)
            if a and b:
                name = "cuda" if b.ms * MARGIN < a.ms else "triton" if a.ms * MARGIN < b.ms else "either"
                faster[name].append(f"{DIVERGENCES[divergence]} {shape[0]} x {shape[1]} ({a.ms / b.ms:.2f})")
    if not any(faster.values()):
        return [*lines, "Triton and CUDA were not timed beside each other: `auto` stays as it is."]
    names = {"cuda": "CUDA is faster", "triton": "Triton is faster", "either": f"Within {MARGIN - 1:.0%}"}
    lines += [
        f"{names[x]} (Triton's time over CUDA's): {', '.join(those)}." for x, those in faster.items() if those
    ]
    if not wrong:
        best = "cuda" if len(faster["cuda"]) > len(faster["triton"]) else "triton"
        exceptions = faster["triton" if best == "cuda" else "cuda"]
        lines.append(
            f"`auto` should take {best}"
            + (f", and the other one for {', '.join(exceptions)}." if exceptions else ".")
        )
    return lines


def tuned(result: Result) -> list[list[str]]:
    """The values of the plans' knobs: as they are, and the best, with what it gains."""
    times: dict[tuple[str, str, str], dict[str, dict]] = {}
    for key, x in result.starting("tune "):
        backend, divergence, setting = key.split(" ")
        knob, value = setting.split("=")
        if "ms" in x:
            times.setdefault((backend, knob, divergence), {})[value] = x
    rows = []
    for (backend, knob, divergence), found in times.items():
        best = min(found, key=lambda value: found[value]["ms"])
        now = next((value for value, x in found.items() if x.get("default")), None)
        gain = f"{found[now]['ms'] / found[best]['ms']:.2f} x" if now else ""
        spread = ", ".join(f"{value}: {x['ms']:.3f}" for value, x in found.items())
        rows.append([backend, knob, DIVERGENCES.get(divergence, divergence), now or "", best, gain, spread])
    return rows


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; columns but the first are aligned to the right."""
    if not rows:
        return "Not measured.\n"
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def number(x: float | None, form: str = ".2f") -> str:
    return "" if x is None else format(x, form)


def text(lines: Iterable[dict]) -> str:
    """All tables, in Markdown."""
    result = Result.of(lines)
    sections = [
        _head(result),
        _right(result),
        _times(result),
        _shapes(result),
        _tools(result),
        _models(result),
    ]
    knobs = table(["backend", "knob", "divergence", "now", "best", "gain", "ms"], tuned(result))
    reached = [
        [x.backend, x.what, f"{'at most' if x.most else 'at least'} {x.goal:g}", number(x.found), x.verdict]
        for x in goals(result)
    ]
    sections += [f"## The plans' knobs, 4096 x 128256 bf16\n\n{knobs}"]
    sections += [
        f"## Goals\n\n{table(['backend', 'what', 'goal', 'found', ''], reached)}",
        "## What `auto` should take\n\n" + "\n".join(auto(result)) + "\n",
    ]
    return "\n".join(sections)


def _head(result: Result) -> str:
    here = result.here
    versions = ", ".join(f"{x} {here[x]}" for x in ("torch", "triton", "python") if x in here)
    title = (
        f"# {result.card}" if result.card != "cpu" else "# A rehearsal on a CPU: no figure here is a GPU's"
    )
    copy = f"; a copy moves {result.copy / 1e12:.2f} TB/s, bytes read and written" if result.copy else ""
    about = f"{versions}{copy}. " if versions else ""
    notes = "".join(f"\n\n{x['text']}" for key, x in result.outcomes.items() if key.startswith("note"))
    return (
        f"{title}\n\n{about}Times are medians of loss and gradient, with the second-level cache "
        f"flushed before each.{notes}\n"
    )


def _right(result: Result) -> str:
    rows = []
    for backend in BACKENDS:
        found = result.right(backend)
        measured = [x for _, x in found if "value_of_bound" in x]
        worst = [max((x[y] for x in measured), default=None) for y in ("value_of_bound", "gradient_of_bound")]
        wrong = [f"{case}: {x.get('error', 'beyond its bound')}" for case, x in found if not x.get("right")]
        rows.append(
            [
                backend,
                f"{len(found) - len(wrong)} of {len(found)}",
                *(number(x) for x in worst),
                "; ".join(wrong).replace("|", "/") or "none",
            ]
        )
    head = ["backend", "cases right", "value, of its bound", "gradient, of its bound", "wrong"]
    return f"## Right\n\n{table(head, rows)}"


def _times(result: Result) -> str:
    parts = []
    for divergence, name in DIVERGENCES.items():
        own = [x for x in result.times if x.divergence == divergence and x.shape == BIG]
        rows = []
        for x in sorted(own, key=lambda x: x.ms):
            share = number(result.of_copy(x))
            rows.append(
                [
                    x.name + (", from a graph" if x.graph else ""),
                    f"{x.ms:.3f}",
                    f"{x.p20:.3f}, {x.p80:.3f}",
                    share,
                    number(x.memory),
                ]
            )
        parts.append(
            f"## {name}, {BIG[0]} x {BIG[1]} bf16\n\n"
            + table(["", "ms", "20 %, 80 %", "of copy", "memory, gradients"], rows)
        )
    return "\n".join(parts)


def _shapes(result: Result) -> str:
    rows = []
    for shape in sorted({x.shape for x in result.times if not x.graph}, key=lambda s: (s[1], s[0])):
        for divergence, name in DIVERGENCES.items():
            found = [result.time(x, divergence, shape) for x in BACKENDS] + [
                result.best(divergence, shape, "simple")
            ]
            if any(found):
                cells = [f"{x.ms:.3f} ({number(result.of_copy(x))})" if x else "" for x in found]
                rows.append([f"{name}, {shape[0]} x {shape[1]}", *cells])
    return f"## Shapes: ms (of copy), bf16\n\n{table(['', 'triton', 'cuda', 'simple'], rows)}"


def _tools(result: Result) -> str:
    tests = result.outcomes.get("tests", {})
    counts = ", ".join(f"{tests[x]} {x}" for x in ("passed", "failed", "skipped") if x in tests) or "not run"
    failed = [
        f"* `{key}`: {x.get('error', '')}"
        for key, x in result.starting("test ")
        if x.get("outcome") == "failed"
    ]
    checked = [
        [key, "clean" if x.get("status") == 0 and "error" not in x else x.get("error", "")]
        for key, x in result.starting("sanitize ")
    ]
    profiled = []
    for key, x in result.starting("ncu "):
        if "ns" in x:
            match = re.search(r"(\d+)x(\d+)", key)
            logits = int(match[1]) * int(match[2])
            cells = [
                f"{x['ns'] / 1e6:.3f}",
                number((x["bytes_read"] + x["bytes_written"]) / logits),
                number(32 * x["warp_instructions"] / logits, ".1f"),
            ]
            profiled.append(
                [
                    key,
                    *cells,
                    *(
                        number(x.get(y), ".0f")
                        for y in ("registers", "issue_percent", "memory_percent", "occupancy_percent")
                    ),
                ]
            )
    head = [
        "",
        "ms",
        "bytes a logit",
        "instructions a logit",
        "registers",
        "issue %",
        "memory %",
        "occupancy %",
    ]
    sections = [
        f"## Tests\n\n{counts}\n" + "\n".join(failed),
        f"## Sanitizers\n\n{table(['', ''], checked)}",
        f"## ncu\n\n{table(head, profiled)}",
    ]
    return "\n".join(sections)


def _models(result: Result) -> str:
    steps = [
        [key, number(x.get("ms")), number(x.get("peak_gib"))]
        for key, x in result.starting("train ")
        if "ms" in x
    ]
    hidden = []
    for key, x in result.starting("linear "):
        for name, y in x.get("contenders", {}).items():
            size = y.get("memory_bytes")
            hidden.append(
                [
                    f"{key}: {name}",
                    f"{y['ms']:.2f}",
                    number(y["of_floor"]),
                    number(size and size / 2**30),
                    f"{y['weight_error']:.0e}",
                ]
            )
    step = f"## A whole training step\n\n{table(['', 'ms', 'peak GiB beyond'], steps)}"
    head = ["", "ms", "of the floor", "GiB beyond the inputs", "weight's error"]
    return f"{step}\n## From hidden states\n\n{table(head, hidden)}"


def readme(lines: Iterable[dict]) -> list[str]:
    """The lines of the README's table: ms, and how many times as fast as the best eager spelling and
    torch.compile."""
    result, rows = Result.of(lines), []
    for divergence, name in DIVERGENCES.items():
        own = min(
            (x for y in BACKENDS if (x := result.time(y, divergence, BIG))), key=lambda x: x.ms, default=None
        )
        eager = result.best(divergence, BIG, r"kl_div\(|logsumexp of")
        compiled = result.best(divergence, BIG, r"torch\.compile")
        if own and eager and compiled:
            others = " | ".join(f"{x.ms:.1f} ({x.ms / own.ms:.1f} x)" for x in (eager, compiled))
            rows.append(
                f"| {name}, {BIG[0]} x {BIG[1]} bf16, {result.card}, {own.name} | **{own.ms:.2f}** | "
                f"{others} |"
            )
    return rows


def kept(folder: Path) -> list[Path]:
    """The results of GPUs that are committed."""
    return sorted((folder / "benchmarks" / "results").glob("gpu_*.jsonl"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument(
        "--write", action="store_true", help="keep the result and the tables in the repository"
    )
    args = parser.parse_args()
    lines = [
        json.loads(x) for x in args.results.read_text().splitlines() if x.startswith("{") and x.endswith("}")
    ]
    found = text(lines)
    print(found)
    if args.write:
        slug = Result.of(lines).slug
        outcomes = [x for x in lines if not x.get("begun") and not x.get("cut")]
        (ROOT / "benchmarks" / "results" / f"gpu_{slug}.jsonl").write_text(
            "".join(json.dumps(x) + "\n" for x in outcomes)
        )
        (ROOT / "docs" / "results" / f"gpu_{slug}.md").write_text(found)
        print("The README needs these lines:\n" + "\n".join(readme(lines)))


if __name__ == "__main__":
    main()
