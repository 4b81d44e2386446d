"""Mean and spread of finished runs: one table, a line a group of workdirs.

    python tools/compare_runs.py matched=runs/a,runs/b labels=runs/c,runs/d

Reads each run's `evaluation.json`. The spread is the sample standard deviation.
"""

import json
import pathlib
import sys

from fm_distill.reports.sweep_table import SweptRun, as_markdown


def main(arguments: list[str]) -> None:
    if not arguments or any("=" not in x for x in arguments):
        raise SystemExit(f"expected NAME=WORKDIR[,WORKDIR...] ..., got {arguments}")
    runs = []
    for argument in arguments:
        # A name may hold `=`, as those of a sweep's folders do not.
        name, folders = argument.split("=", 1)
        paths = [pathlib.Path(folder) / "evaluation.json" for folder in folders.split(",")]
        for path in paths:
            if not path.is_file():
                raise SystemExit(f"{path} is not there: the run is not complete")
        runs += [SweptRun(name, str(x.parent), json.loads(x.read_text())) for x in paths]
    print(as_markdown(runs))


if __name__ == "__main__":
    main(sys.argv[1:])
