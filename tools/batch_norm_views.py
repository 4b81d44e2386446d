"""How a finished student does with BatchNorm's moments of other views of the training images.

    python tools/batch_norm_views.py runs/mine [--split validation] [--batches 200]

Training keeps the moments of mixed crops, and evaluation shows central crops, whose moments differ.
Prints the figures with the moments that were kept, with those of training views anew, and with
those of central views, each the mean over the batches of the run's last steps. Source of the idea:
Wu and Johnson 2021 (arXiv 2105.07576), sections 3 and 5. Nothing is written.
"""

import argparse
import dataclasses
import sys

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from fm_distill.cli.options import guarded
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import evaluation_batches
from fm_distill.diagnosis.opened import Examined, examine
from fm_distill.diagnosis.probes import batch_moments
from fm_distill.errors import EXIT_COMPLETE, UserError
from fm_distill.evaluation.evaluate import Evaluator
from fm_distill.evaluation.inference import open_split
from fm_distill.models import Variables
from fm_distill.networks.branch import render_central_views, step_views
from fm_distill.runs.open_run import open_run
from fm_distill.system.sharding import on_devices


def moments_of_views(examined: Examined, batches: int) -> dict[str, PyTree]:
    """Means of the moments over the batches of the newest steps, by the views of the student."""
    config, student = examined.config, examined.student

    @jax.jit
    def of_batch(
        variables: Variables, batch: Batch, key: PRNGKeyArray, step: Array
    ) -> dict[str, PyTree]:
        law, fraction = examined.regime.views, config.views.central_fraction
        views = {
            "training views": step_views(law, config.views, student, (), batch, key, step).student,
            "central views": render_central_views(batch, (student,), fraction)[student.input_spec],
        }
        return {name: batch_moments(student, variables, x) for name, x in views.items()}

    found = [
        of_batch(examined.evaluated, batch, examined.draws_key, jnp.int32(step))
        for step, _, batch in examined.batches(examined.steps(batches * config.batch_size))
    ]
    return jax.tree.map(lambda *x: sum(x) / len(x), *found)


def main(own: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--batches", type=int, default=200)
    asked = parser.parse_args(own)
    run = open_run(asked.run)
    student = run.student.variables
    if not jax.tree.leaves(student.statistics):
        raise UserError(f"the student of {asked.run} has no BatchNorm, whose moments could differ")
    moments = {"as kept": student.statistics}
    moments |= moments_of_views(examine(run, run.config), asked.batches)
    opened = open_split(asked.run, asked.split)
    evaluator = Evaluator.make(
        opened.config, opened.student_branch, opened.teacher_branches, opened.layout
    )
    print(f"{asked.split}; moments of | top-1, % | agreement, % | KL at T=1, nats")
    for name, statistics in moments.items():
        variables = dataclasses.replace(student, statistics=statistics)
        variables = on_devices(variables, opened.layout.variables(variables))
        batches = evaluation_batches(opened.reader, opened.batch_size)
        found = evaluator(variables, opened.frozen, batches, asked.split, run.step)
        figures = (found["student"]["top1"], found["agreement"]["top1"], found["kl"]["one"])
        top1, agreement, kl = ("-" if x is None else x for x in figures)
        cells = [f"{100 * x:.2f}" if isinstance(x, float) else x for x in (top1, agreement)]
        cells.append(f"{kl:.4f}" if isinstance(kl, float) else kl)
        print(f"{name} | {' | '.join(cells)}", flush=True)
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
