"""The table of `fm-distill compress`, printed from its figures.

    python tools/compression_table.py runs/mine/compressed experiments/results/digits_compression

Each argument is a folder with `compression.json`, or that file.
"""

import pathlib
import sys

from fm_distill.errors import UserError
from fm_distill.reports.compression_table import FIGURES, as_markdown, load


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    for argument in arguments:
        path = pathlib.Path(argument)
        try:
            found = load(path.parent if path.name == FIGURES else path)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        if found is None:
            print(f"{argument} has no {FIGURES}; expected a folder of `compress`", file=sys.stderr)
            return 2
        print(f"{as_markdown(found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
