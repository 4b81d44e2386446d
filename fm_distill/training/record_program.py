"""The teachers' forward passes over some steps of a run as one compiled program.

The same order, draws and rendering as in `step.py`, without a student.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fm_distill.config import Config
from fm_distill.config.regime import ViewLaw
from fm_distill.data.resident import Resident
from fm_distill.models import Variables
from fm_distill.networks.branch import Branch, Views, teacher_outputs_with_features
from fm_distill.objectives.features import pooled
from fm_distill.system.sharding import Layout
from fm_distill.train_step.memory import in_parts
from fm_distill.views.draws import Draw, ViewRoot, step_draws
from fm_distill.views.rendering import InputSpec, render

# `(frozen teachers, resident data, fed, root of views, first step) -> outputs`; `fed` is a batch,
# of one step, or `ResidentSteps`.
RecordProgram = Callable[..., "PassOutputs"]
Rows = TypeVar("Rows", Array, np.ndarray)


class PassOutputs(NamedTuple):
    """What the devices return for some steps."""

    # Of the teachers that are networks; None where there is none.
    logits: Float[Array, "steps batch teachers classes"] | None
    draws: Draw
    # What the teachers that are functions see, all steps in one batch.
    views: Views
    # Of the first teacher, each its mean over the positions.
    features: dict[str, Float[Array, "steps batch _"]]


def make_record_program(
    config: Config,
    law: ViewLaw,
    teachers: tuple[Branch, ...],
    layout: Layout,
    shown: tuple[InputSpec, ...] = (),
    taps: tuple[str, ...] = (),
) -> RecordProgram:
    """The compiled outputs of all teachers for some steps, which share one forward pass.

    `shown` is the input that teachers need that are functions; `taps` are features of the first
    one.
    """

    def program(
        frozen: tuple[Variables, ...],
        data: Resident | None,
        fed: Any,
        root: ViewRoot,
        first: Int[Array, ""],
    ) -> PassOutputs:
        def outputs(views: Views) -> tuple[tuple[Array, ...], dict[str, Array]]:
            logits, features = teacher_outputs_with_features(teachers, frozen, views, taps)
            return logits, {name: pooled(x) for name, x in features.items()}

        batches = [fed] if data is None else [data.at(ids) for ids in fed.ids]
        draws, rendered = [], []
        for i, batch in enumerate(batches):
            batch = jax.lax.with_sharding_constraint(batch, layout.batch)
            step_draw = step_draws(law, root, first + i, batch.sizes, config.views).teacher
            draws.append(step_draw)
            specs = sorted({*shown, *(x.input_spec for x in teachers)})
            rendered.append({x: render(step_draw, batch.canvases, x, root.spectra) for x in specs})
        views = jax.tree.map(_joined, *rendered)
        logits, features = None, {}
        if teachers:
            rows, features = in_parts(outputs, config.memory.teacher_parts, views)
            logits = by_step(jnp.stack(rows, axis=1), len(batches))
        features = {name: by_step(x, len(batches)) for name, x in features.items()}
        draws = jax.tree.map(lambda *x: jnp.stack(x), *draws)
        return PassOutputs(logits, draws, {x: views[x] for x in shown}, features)

    return jax.jit(program, out_shardings=layout.replicated)


def _joined(*steps: Array) -> Array:
    """Batches of several steps as one, so that each device keeps the rows that it has."""
    return jnp.stack(steps, axis=1).reshape(-1, *steps[0].shape[1:])


def by_step(rows: Rows, steps: int) -> Rows:
    """The inverse of `_joined`, with steps first."""
    return rows.reshape(-1, steps, *rows.shape[1:]).swapaxes(0, 1)
