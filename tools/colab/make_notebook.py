"""A Colab notebook from an experiment, which keeps its run in Drive or in a bucket.

    python tools/colab/make_notebook.py experiments/flowers102.py --out flowers.ipynb \\
        -- --data.data-dir /content/drive/MyDrive/tfds --teacher.weights hf://OWNER/REPO

Upload it to Colab, choose a runtime and run all cells: that starts the run. The same in a new
runtime continues it. Behind `--` stand options of `fm-distill train`. The experiment's files and
the package of this checkout are in the notebook. Needs the extra `kits`.
"""

import dataclasses
import pathlib
import re
import sys

import tyro

from fm_distill.cli.command import guarded, quiet
from fm_distill.errors import EXIT_COMPLETE, UserError
from fm_distill.notebooks.packing import archive, make_notebook, pack, read_options, tool_options

NOTEBOOK = pathlib.Path(__file__).with_name("colab_notebook.py")


@dataclasses.dataclass(frozen=True)
class Notebook:
    """Behind `--`: options of `fm-distill train`."""

    # An experiment file.
    experiment: tyro.conf.Positional[str]
    # The .ipynb file that is made.
    out: str
    # Where copies are kept: a folder of the mounted Drive, or a URL such as gs://BUCKET/runs.
    keep: str = "/content/drive/MyDrive/fm-distill"
    # Hours from one copy to the next: what may be lost with a runtime.
    stretch_hours: float = 0.5
    # Of one runtime, from the start of the notebook to the last copy; Colab may end it earlier.
    max_hours: float = 11.0
    # For pip; `installed`: the image has it; empty: the package of this checkout.
    package: str = ""
    # Replace what is there.
    overwrite: bool = False
    # Where the run lies while it is trained.
    work_dir: str = "/content/fm-distill"


def main(arguments: list[str]) -> int:
    quiet(arguments)
    asked, _, options = tool_options(Notebook, arguments, "make_notebook.py")
    check(asked)
    config = read_options(asked.experiment, options, "make_notebook.py EXPERIMENT.py ... --")
    values = {
        "NAME": config.name,
        "EXPERIMENT": pathlib.Path(asked.experiment).name,
        "OPTIONS": options,
        "KEEP": asked.keep,
        "STRETCH": asked.stretch_hours,
        "HOURS": asked.max_hours,
        "PACKAGE": asked.package,
        "WORK": asked.work_dir,
        "ARCHIVE": "" if asked.package else archive(),
    }
    notebook = make_notebook(NOTEBOOK, values, pack(asked.experiment))
    out = pathlib.Path(asked.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(notebook)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from None
    print(f"upload {out} to Colab and run all cells; the same in a new runtime continues the run")
    return EXIT_COMPLETE


def check(asked: Notebook) -> None:
    """Raises `UserError`."""
    out = pathlib.Path(asked.out)
    if out.suffix != ".ipynb":
        raise UserError(f"--out is {asked.out}; expected the name of an .ipynb file")
    if out.exists() and not asked.overwrite:
        raise UserError(f"--out {out} already exists; choose another, or give --overwrite")
    if not 0 < asked.stretch_hours <= asked.max_hours:
        raise UserError(
            f"--stretch-hours is {asked.stretch_hours:g} and --max-hours {asked.max_hours:g}; "
            "expected a stretch above zero and no longer than the whole"
        )
    if not re.match(r"/|\w+://", asked.keep):
        raise UserError(
            f"--keep is {asked.keep!r}; expected a folder such as /content/drive/MyDrive/runs, or "
            "a URL such as gs://BUCKET/runs"
        )


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
