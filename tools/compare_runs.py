"""Mean and spread of finished runs: one table, a line a group of workdirs; and their speed.

    python tools/compare_runs.py matched=runs/a,runs/b labels=runs/c,runs/d
    python tools/compare_runs.py --save experiments/results/x.json matched=runs/a,runs/b
    python tools/compare_runs.py experiments/results/x.json

Reads each run's `evaluation.json`, and its training's speed from `metrics.jsonl`. The spread is
the sample standard deviation. `--save` keeps the figures, which the third form prints again.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from typing import Any

from fm_distill.errors import UserError
from fm_distill.reports.sweep_table import SweptRun, as_markdown, markdown_lines
from fm_distill.runs.history import read_history
from fm_distill.runs.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Finished:
    """A complete run."""

    group: str
    folder: str  # its name
    commit: str | None
    images_per_second: float | None  # the median over the lines of its log
    figures: dict[str, Any]  # of its last evaluation


def finished(group: str, path: str) -> Finished:
    """Raises `UserError` where the run is not complete."""
    workdir = Workdir(path)
    if not (workdir.path / "evaluation.json").is_file():
        raise UserError(f"{path} has no evaluation.json: the run is not complete")
    speeds = read_history(path).curve("train", "images_per_second")[1]
    return Finished(
        group,
        workdir.path.resolve().name,
        workdir.stored().commit,
        round(statistics.median(speeds), 1) if speeds else None,
        json.loads((workdir.path / "evaluation.json").read_text()),
    )


def table(runs: list[Finished]) -> str:
    """As Markdown: figures of evaluation by group, then what each run trained at."""
    rows = [
        [x.group, x.folder, "-" if x.images_per_second is None else f"{x.images_per_second:,.0f}"]
        for x in runs
    ]
    speed = markdown_lines(["runs", "folder", "images/s in training, median"], rows)
    figures = as_markdown([SweptRun(x.group, x.folder, x.figures) for x in runs])
    return "\n".join([figures, "", *speed])


def read(path: pathlib.Path) -> list[Finished]:
    """What `--save` wrote. Raises `UserError`."""
    try:
        return [Finished(**x) for x in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a file of compare_runs.py --save: {error}") from None


def runs_of(arguments: list[str]) -> list[Finished]:
    """Of NAME=WORKDIR[,WORKDIR...] arguments. Raises `UserError`."""
    if not arguments or any("=" not in x for x in arguments):
        raise UserError(f"expected NAME=WORKDIR[,WORKDIR...] ..., got {arguments}")
    # A name may hold `=`, as those of a sweep's folders do not.
    pairs = [x.split("=", 1) for x in arguments]
    return [finished(name, folder) for name, folders in pairs for folder in folders.split(",")]


def main(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["--save"] and len(arguments) > 2:
            runs = runs_of(arguments[2:])
            lines = (json.dumps(dataclasses.asdict(x)) for x in runs)
            pathlib.Path(arguments[1]).write_text("[\n" + ",\n".join(lines) + "\n]\n")
        elif len(arguments) == 1 and arguments[0].endswith(".json") and "=" not in arguments[0]:
            runs = read(pathlib.Path(arguments[0]))
        else:
            runs = runs_of(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
