"""How a finished student does with BatchNorm's moments of other views of the training images.

    python tools/batch_norm_views.py collect RESULTS.json validation runs/a runs/b ...
    python tools/batch_norm_views.py table RESULTS.json

Training keeps the moments of mixed crops, and evaluation shows central crops, whose moments differ.
`collect` evaluates on a split with the moments that were kept, with those of training views anew,
and with those of central views, each the mean over 200 batches of the run's last steps, and adds
the figures to what the file has; nothing is written to the run. Source of the idea: Wu and Johnson
2021 (arXiv 2105.07576), sections 3 and 5.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fm_distill.cli.command import guarded
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import evaluation_batches
from fm_distill.diagnosis.opened import Examined, examine
from fm_distill.errors import EXIT_COMPLETE, UserError
from fm_distill.evaluation.evaluate import Evaluator
from fm_distill.evaluation.inference import open_split
from fm_distill.models import Variables
from fm_distill.networks.batch_statistics import batch_moments
from fm_distill.networks.branch import render_central_views, step_views
from fm_distill.runs.open_run import open_run
from fm_distill.system.sharding import on_devices
from fm_distill.views.draws import ViewRoot
from fm_distill.views.rendering import CentralCrop

BATCHES = 200  # of the newest steps, or all that there are


def moments_of_views(examined: Examined, batches: int) -> dict[str, PyTree]:
    """Means of the moments over the batches of the newest steps, by the views of the student."""
    config, student = examined.config, examined.student

    @jax.jit
    def of_batch(
        variables: Variables, batch: Batch, root: ViewRoot, step: Array
    ) -> dict[str, PyTree]:
        law, crop = examined.regime.views, CentralCrop.of(config.views)
        views = {
            "training views": step_views(law, config.views, student, (), batch, root, step).student,
            "central views": render_central_views(batch, (student,), crop)[student.input_spec],
        }
        return {name: batch_moments(student, variables, x) for name, x in views.items()}

    found = [
        of_batch(examined.evaluated, batch, examined.root, jnp.int32(step))
        for step, _, batch in examined.batches(examined.steps(batches * config.batch_size))
    ]
    return jax.tree.map(lambda *x: sum(x) / len(x), *found)


def rows_of(path: str, split: str) -> Iterator[dict[str, Any]]:
    """The figures of the run in a workdir, by the moments. Raises `UserError`."""
    run = open_run(path)
    student = run.student.variables
    if not jax.tree.leaves(student.statistics):
        raise UserError(f"the student of {path} has no BatchNorm, whose moments could differ")
    moments = {"as kept": student.statistics}
    moments |= moments_of_views(examine(run, run.config), BATCHES)
    opened = open_split(path, split)
    evaluator = Evaluator.make(
        opened.config, opened.student_branch, opened.teacher_branches, opened.layout
    )
    for name, statistics in moments.items():
        variables = dataclasses.replace(student, statistics=statistics)
        variables = on_devices(variables, opened.layout.variables(variables))
        batches = evaluation_batches(opened.reader, opened.batch_size)
        found = evaluator(variables, opened.frozen, batches, split, run.step)
        yield {
            "name": pathlib.Path(path).resolve().name,
            "split": split,
            "moments": name,
            "student_top1": found["student"]["top1"],
            "agreement": found["agreement"]["top1"],
            "kl": found["kl"]["one"],
        }


def collect(out: str, split: str, workdirs: list[str]) -> None:
    path = pathlib.Path(out)
    before = json.loads(path.read_text()) if path.exists() else []
    rows = {(x["name"], x["split"], x["moments"]): x for x in before}
    for workdir in workdirs:
        rows |= {(x["name"], x["split"], x["moments"]): x for x in rows_of(workdir, split)}
    path.write_text("[\n" + ",\n".join(json.dumps(rows[x]) for x in sorted(rows)) + "\n]\n")


def table(path: str) -> str:
    """Markdown."""
    lines = [
        "| run | split | moments of | top-1, % | agreement, % | KL at T=1, nats |",
        "|---|---|---|---|---|---|",
    ]
    for row in json.loads(pathlib.Path(path).read_text()):
        shares = (row["student_top1"], row["agreement"])
        cells = ["" if x is None else f"{100 * x:.2f}" for x in shares]
        cells.append("" if row["kl"] is None else f"{row['kl']:.4f}")
        lines.append(f"| {' | '.join([row['name'], row['split'], row['moments'], *cells])} |")
    return "\n".join(lines)


def main(own: list[str]) -> int:
    match own:
        case ["collect", out, split, _, *_]:
            collect(out, split, own[3:])
        case ["table", path]:
            print(table(path))
        case _:
            raise UserError(f"expected collect FILE SPLIT RUN ..., or table FILE; got {own}")
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
