"""How long a run will take, about: the time of an eager step on a part of the first case, times the steps
that are to be done."""

from __future__ import annotations

from types import ModuleType

from . import contenders, linear, logits, measure

Job = tuple[ModuleType, logits.Case | linear.Case]  # a case, and the module that runs it
PART = 16  # the step is timed on this share of the rows
ONCE = 5  # steps of a contender beside the timed ones: its errors, memory and first round
# of one case; and of one of the vocabulary's classes, whose rows are computed in extended precision
COMPILE_SECONDS, REFERENCE_SECONDS = 8.0, 1e-5


def seconds(bench: measure.Bench, jobs: list[Job]) -> float:
    unit: dict[ModuleType, float] = {}
    total = 0.0
    for module, case in jobs:
        if module not in unit:
            part = case.part(PART)
            eager = measure.step(part.eager(), part.inputs(bench.device))
            unit[module] = bench.times({"eager": eager})["eager"]["ms"] / 1e3 / part.size
        names = module.ways(case, bench)[0]
        slow = sum(not x.startswith((contenders.FUSED, contenders.COMPILED)) for x in names)
        total += unit[module] * case.size * slow * (bench.repeats + ONCE)
        total += COMPILE_SECONDS * bench.compiled + REFERENCE_SECONDS * case.vocab
    return total


def words(estimate: float) -> str:
    if estimate < 100:
        return f"about {max(10, round(estimate, -1)):.0f} seconds"
    return f"about {estimate / 60:.0f} minutes"
