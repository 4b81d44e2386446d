"""The teachers' forward passes over some steps of a run as one compiled program.

The same order, draws and rendering as in `step.py`, without a student.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fm_distill.config import Config
from fm_distill.config.regime import ViewLaw
from fm_distill.data.resident import Resident
from fm_distill.models import Variables
from fm_distill.networks.branch import Branch, Views, teacher_outputs
from fm_distill.system.sharding import Layout
from fm_distill.training.memory import in_parts
from fm_distill.views.draws import Draw, step_draws
from fm_distill.views.rendering import InputSpec, render

# `(frozen teachers, resident data, fed, draws_key, first step) -> outputs`; `fed` is a batch, of
# one step, or `ResidentSteps`.
RecordProgram = Callable[..., "PassOutputs"]
Rows = TypeVar("Rows", Array, np.ndarray)


class PassOutputs(NamedTuple):
    """What the devices return for some steps."""

    # Of the teachers that are networks; None where there is none.
    logits: Float[Array, "steps batch teachers classes"] | None
    draws: Draw
    # What the teachers that are functions see, all steps in one batch.
    views: Views


def make_record_program(
    config: Config,
    law: ViewLaw,
    teachers: tuple[Branch, ...],
    layout: Layout,
    shown: tuple[InputSpec, ...] = (),
) -> RecordProgram:
    """The compiled outputs of all teachers for some steps, which share one forward pass.

    `shown` is what the teachers want to see that are functions.
    """

    def program(
        frozen: tuple[Variables, ...],
        data: Resident | None,
        fed: Any,
        draws_key: PRNGKeyArray,
        first: Int[Array, ""],
    ) -> PassOutputs:
        def outputs(views: Views) -> tuple[Array, ...]:
            return teacher_outputs(teachers, frozen, views)

        batches = [fed] if data is None else [data.at(ids) for ids in fed.ids]
        draws, rendered = [], []
        for i, batch in enumerate(batches):
            batch = jax.lax.with_sharding_constraint(batch, layout.batch)
            drawn = step_draws(law, draws_key, first + i, batch.sizes, config.views).teacher
            draws.append(drawn)
            specs = {*shown, *(x.input_spec for x in teachers)}
            rendered.append({x: render(drawn, batch.canvases, x) for x in sorted(specs)})
        views = jax.tree.map(_joined, *rendered)
        logits = None
        if teachers:
            rows = jnp.stack(in_parts(outputs, config.memory.teacher_parts, views), axis=1)
            logits = by_step(rows, len(batches))
        draws = jax.tree.map(lambda *x: jnp.stack(x), *draws)
        return PassOutputs(logits, draws, {x: views[x] for x in shown})

    return jax.jit(program, out_shardings=layout.replicated)


def _joined(*steps: Array) -> Array:
    """Batches of several steps as one, so that each device keeps the rows that it has."""
    return jnp.stack(steps, axis=1).reshape(-1, *steps[0].shape[1:])


def by_step(rows: Rows, steps: int) -> Rows:
    """The inverse of `_joined`, with steps first."""
    return rows.reshape(-1, steps, *rows.shape[1:]).swapaxes(0, 1)
