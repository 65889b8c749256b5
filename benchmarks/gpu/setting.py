"""What a stage's process knows: where results go, whether it is a rehearsal, which share of the cases is its
own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .log import Log, wrong_cases

# on a CPU: Triton's interpreter, and the C++ library in the CUDA kernels' place
STAND_INS = {"triton": "triton", "cuda": "cpu"}


@dataclass(frozen=True)
class Setting:
    log: Log
    rehearsal: bool = False  # small shapes on a CPU
    share: tuple[int, int] = (0, 1)  # i of n processes that divide the cases
    case_seconds: float = 45.0

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    @property
    def folder(self) -> Path:
        return self.log.path.parent

    def backend(self, kind: str) -> str:
        return STAND_INS[kind] if self.rehearsal else kind

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def lost(self) -> bool:
        """Whether the device answers no more, as after an illegal access: whatever else this process launched
        would fail."""
        try:
            self.wait()
        except RuntimeError:
            return True
        return False

    def once(self, key: str, measure: Callable[[], dict], seconds: float | None = None) -> None:
        self.log.once(key, measure, (seconds or self.case_seconds) * self.patience, self.lost)

    @property
    def patience(self) -> int:
        """What a box of seconds is multiplied with: a rehearsal is about what runs, on machines that are busy
        with other things."""
        return 8 if self.rehearsal else 1

    def own(self, cases: list) -> list:
        """This process's share."""
        i, n = self.share
        return cases[i::n]

    def wrong(self, backend: str) -> set[str]:
        """Divergences of which a result of this backend was wrong, or was none."""
        found = wrong_cases(self.log)
        return {case.split()[0] for name, case in found if name == backend}
