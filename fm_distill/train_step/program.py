"""The train step as one compiled, sharded program."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from fm_distill.data.batch import Batch
from fm_distill.data.resident import Fed, Resident, ResidentSteps
from fm_distill.runs.state import TrainState
from fm_distill.system.sharding import Layout
from fm_distill.train_step.step import Metrics, TrainStep
from fm_distill.views.draws import ViewRoot

# Metrics without which the state after a step is worth nothing.
FINITE = ("loss", "gradient_norm", "update_norm")


def make_program(
    train_step: TrainStep,
    state: TrainState,
    teachers: PyTree,
    data: Resident | None,
    layout: Layout,
) -> jax.stages.Wrapped:
    """The compiled `(state, teachers, data, fed, root of views) -> (state, metrics)`.

    `fed` is a batch, or `ResidentSteps` on the resident `data`. The state is donated; the
    teachers are arguments, so that they are neither baked into the program nor copied. `state`
    and `teachers` may be shapes. Metrics are the last step's; the loss is NaN where any of
    `FINITE` was not finite in any step.
    """

    def program(
        state: TrainState,
        teachers: PyTree,
        data: Resident | None,
        fed: Fed,
        root: ViewRoot,
    ) -> tuple[TrainState, Metrics]:
        if data is None:
            assert isinstance(fed, Batch)
            return train_step(state, teachers, fed, root)

        def one(state: TrainState, fed: ResidentSteps) -> tuple[TrainState, Metrics]:
            batch = dataclasses.replace(data.at(fed.ids), recorded=fed.recorded)
            batch = jax.lax.with_sharding_constraint(batch, layout.batch)
            return train_step(state, teachers, batch, root)

        assert isinstance(fed, ResidentSteps)
        if fed.ids.shape[0] == 1:  # a convolution in a loop is many times slower on a CPU
            return one(state, fed.step(0))
        state, metrics = jax.lax.scan(one, state, fed)
        last_values = {name: values[-1] for name, values in metrics.items()}
        all_finite = jnp.isfinite(jnp.stack([metrics[name] for name in FINITE])).all()
        return state, last_values | {"loss": jnp.where(all_finite, last_values["loss"], jnp.nan)}

    state_shardings = layout.variables(state)
    fed_sharding = layout.batch if data is None else layout.ids
    return jax.jit(
        program,
        in_shardings=(
            state_shardings,
            layout.variables(teachers),
            None if data is None else layout.replicated,
            fed_sharding,
            layout.replicated,
        ),
        # The same as the inputs', or the second call compiles again.
        out_shardings=(state_shardings, layout.replicated),
        donate_argnums=0,
    )
