"""Mean and spread of finished runs: one table, a line a group of workdirs.

    python tools/compare_runs.py matched=runs/a,runs/b labels=runs/c,runs/d

Reads each run's `evaluation.json`. The spread is the sample standard deviation.
"""

import json
import pathlib
import statistics
import sys
from typing import Any

COLUMNS = {
    "student top-1, %": lambda x: _percent(x["student"]["top1"]),
    "teacher top-1, %": lambda x: _percent(x["teacher"]["top1"]),
    "kept, %": lambda x: _percent(x["retention"]),
    "agreement, %": lambda x: _percent(x["agreement"]["top1"]),
    "KL at T=1, nats": lambda x: x["kl"]["one"],
}


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def cell(values: list[float | None]) -> str:
    known = [x for x in values if x is not None]
    if not known:
        return "-"
    digits = 2 if max(known) > 2 else 4
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def main(arguments: list[str]) -> None:
    if not arguments or any("=" not in x for x in arguments):
        raise SystemExit(f"expected NAME=WORKDIR[,WORKDIR...] ..., got {arguments}")
    print("| runs | seeds | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for argument in arguments:
        name, folders = argument.split("=", 1)
        found: list[dict[str, Any]] = []
        for folder in folders.split(","):
            path = pathlib.Path(folder) / "evaluation.json"
            if not path.is_file():
                raise SystemExit(f"{path} is not there: the run is not complete")
            found.append(json.loads(path.read_text()))
        cells = [cell([column(x) for x in found]) for column in COLUMNS.values()]
        print(f"| {name} | {len(found)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
