"""The results of `python -m kdkernels bench --json FILE` as a CSV file beside it: a line for each contender of each case."""

import csv
import json
import sys
from pathlib import Path


def main(path: Path) -> None:
    cases = json.loads(path.read_text())["cases"]
    head = [x for x in cases[0] if x != "contenders"]
    body = list(next(iter(cases[0]["contenders"].values())))
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*head, "contender", *body], lineterminator="\n")
        writer.writeheader()
        for case in cases:
            shared = {x: case[x] for x in head}
            writer.writerows(shared | {"contender": name} | found for name, found in case["contenders"].items())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
