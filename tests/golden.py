"""golden.json: values of every divergence on three rows, 50 digits rounded to a double. `python
tests/golden.py` makes it from the oracle.

The logits are those of the file, which a bfloat16 holds.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracle
from names import USUAL

FILE = Path(__file__).with_name("golden.json")
TEMPERATURES = ("0.5", "1", "2", "100")
DIVERGENCES = (
    *USUAL,
    "renyi(0)",
    "renyi(0.9999)",
    "reverse_renyi(0.9999)",
    "renyi(3)",
    "reverse_renyi(3)",
    "renyi(inf)",
)


def values(students: list, teachers: list) -> dict[str, dict[str, list[float]]]:
    """divergence -> temperature -> its value for each row."""
    rows = [(np.array(z), np.array(v)) for z, v in zip(students, teachers, strict=True)]

    def value(z: np.ndarray, v: np.ndarray, divergence: str, T: str) -> float:
        found = float(oracle.divergence_row(z, v, divergence, float(T))[0])
        return found if abs(found) > 1e-40 else 0.0  # 0 to 60 digits

    return {d: {T: [value(z, v, d, T) for z, v in rows] for T in TEMPERATURES} for d in DIVERGENCES}


def main() -> None:
    golden = json.loads(FILE.read_text())
    golden["values"] = values(golden["student_logits"], golden["teacher_logits"])
    FILE.write_text(json.dumps(golden, indent=0) + "\n")


if __name__ == "__main__":
    main()
