"""Means over many batches, whose sums stay on the device until somebody asks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Running:
    """Sums of figures, and of how many tokens they are: `KDStats.masked` of each batch."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, figures: dict[str, Tensor]) -> None:
        """Figures per token or per sequence, and counted, all of them sums or to be summed."""
        for name, x in figures.items():
            # fp32 stops counting tokens one by one at 16 million
            total = x.detach().sum(dtype=torch.float32 if x.device.type == "mps" else torch.float64)
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    def take(self, reduce: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, float]:
        """The means by name, nan where no token counts, nothing where no batch was added; starts anew.

        reduce: sums a tensor over processes, each of which must call it.
        """
        if not self.sums:
            return {}
        names, numbers = list(self.sums), reduce(torch.stack(list(self.sums.values()))).tolist()
        self.sums = {}
        found = dict(zip(names, numbers, strict=True))
        counted = found.pop("counted")
        return {name: x / counted if counted else float("nan") for name, x in found.items()}
