"""The arithmetic of one batch: draw, views, teachers, student, distance, gradient, update.

`make_train_step` is the library; everything else here makes programs of it. Nothing in this file
reads a file or knows a device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from fm_distill.config import MemoryConfig, ObjectiveConfig, ViewConfig
from fm_distill.data.feeding import Batch
from fm_distill.data.resident import Resident
from fm_distill.distances import DISTANCES, combine, cross_entropy, smooth
from fm_distill.memory import accumulated, in_parts, rematerialised
from fm_distill.models import Network, Output, Variables
from fm_distill.sharding import Layout
from fm_distill.views import Draw, Picture, draws_of, mix, render, render_central

Metrics = dict[str, Float[Array, ""]]
# Metrics without which the state after a step is worth nothing.
FINITE = ("loss", "gradient_norm", "update_norm")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes in training, and nothing else: `step` batches have been consumed.

    A tree of arrays, so its fields may also hold what a tree is mapped to, e.g. shardings.
    """

    step: PyTree  # int32 ()
    student: PyTree  # Variables
    opt_state: PyTree
    ema: PyTree  # Variables: moving average of the student; or None


@dataclasses.dataclass(frozen=True)
class Seat:
    """A network and the picture that it sees."""

    network: Network
    picture: Picture


TrainStep = Callable[
    [TrainState, tuple[Variables, ...], Batch, PRNGKeyArray], tuple[TrainState, Metrics]
]


def look(drawn: Draw, batch: Batch, seats: tuple[Seat, ...]) -> dict[Picture, Array]:
    """What the networks in `seats` see of a draw, rendered once for all that want the same."""
    wanted = sorted({seat.picture for seat in seats})
    return {picture: render(drawn, batch.canvases, picture) for picture in wanted}


def look_centrally(batch: Batch, seats: tuple[Seat, ...], fraction: float) -> dict[Picture, Array]:
    """What they see in evaluation: the central crop."""
    wanted = sorted({seat.picture for seat in seats})
    return {p: render_central(batch.canvases, batch.sizes, fraction, p) for p in wanted}


def init_state(
    key: PRNGKeyArray,
    student: Network,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
) -> TrainState:
    """The state before the first step."""
    variables = student.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=variables,
        opt_state=optimizer.init(variables.params),
        # A copy: the same buffer cannot be donated twice.
        ema=None if ema_decay is None else jax.tree.map(jnp.copy, variables),
    )


def make_train_step(
    student: Seat,
    teachers: tuple[Seat, ...],
    optimizer: optax.GradientTransformation,
    views: ViewConfig,
    objective: ObjectiveConfig,
    teaching: str = "function_matching",
    ema_decay: float | None = None,
    keep_statistics: bool = False,
    memory: MemoryConfig = MemoryConfig(),
) -> TrainStep:
    """`(state, teacher_variables, batch, root_key) -> (state, metrics)`, pure.

    `teacher_variables` holds the frozen variables of each teacher. Everything random comes from
    `fold_in(root_key, state.step)`. `teaching` says which draw each network sees: a key of
    `TEACHINGS`; with `fixed` the targets are the batch's own, and no teacher is run. Nor is one
    with `objective.target == "labels"`. With `keep_statistics` BatchNorm stays as it is. `memory`
    changes what is kept at a time, not what comes out.
    """
    labels = objective.target == "labels"
    distance = DISTANCES[objective.distance]
    draws = draws_of(objective.target, teaching)

    def apply(variables: Variables, images: Array) -> Output:
        return student.network.apply(variables, images, train=not keep_statistics)

    def answers(
        teacher_variables: tuple[Variables, ...], pictures: dict[Picture, Array]
    ) -> tuple[Array, ...]:
        with jax.named_scope("teacher"):
            logits = tuple(
                jax.lax.stop_gradient(
                    seat.network.apply_frozen(frozen, pictures[seat.picture]).logits
                )
                for seat, frozen in zip(teachers, teacher_variables, strict=True)
            )
            return combine(logits, objective) if logits else ()

    def per_example(logits: Array, targets: tuple[Array, ...]) -> Array:
        if labels:
            return cross_entropy(logits, targets[0])
        return jnp.stack([distance(logits, target, objective) for target in targets]).sum(axis=0)

    def train_step(
        state: TrainState,
        teacher_variables: tuple[Variables, ...],
        batch: Batch,
        root_key: PRNGKeyArray,
    ) -> tuple[TrainState, Metrics]:
        with jax.named_scope("views"):
            drawn, seen = draws(jax.random.fold_in(root_key, state.step), batch.sizes, views)
            together = seen is drawn
            pictures = look(drawn, batch, (student, *teachers) if together else (student,))
            shown = pictures if together or seen is None else look(seen, batch, teachers)
        if labels:
            one_hot = jax.nn.one_hot(batch.labels, student.network.classes)
            targets: tuple[Array, ...] = (mix(drawn, smooth(one_hot, objective.label_smoothing)),)
        elif seen is None:
            targets = tuple(jnp.moveaxis(batch.targets, 1, 0))
        else:
            answer = functools.partial(answers, teacher_variables)
            shown = {seat.picture: shown[seat.picture] for seat in teachers}
            targets = in_parts(answer, memory.teacher_parts, shown)

        def loss_of(
            params: PyTree, part: tuple[Array, tuple[Array, ...]]
        ) -> tuple[Array, tuple[PyTree, Array]]:
            images, expected = part
            with jax.named_scope("student"):
                variables = dataclasses.replace(state.student, params=params)
                output = rematerialised(apply, memory.rematerialise)(variables, images)
            values = per_example(output.logits, expected)
            return values.mean(), (output.statistics, output.logits)

        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        part = pictures[student.picture], targets
        (loss, (statistics, logits)), gradients = accumulated(
            gradient_of, memory.accumulate, state.student.params, part
        )
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.student.params)
            new = Variables(optax.apply_updates(state.student.params, updates), statistics)
            ema = state.ema
            if ema_decay is not None:
                ema = jax.tree.map(lambda e, x: ema_decay * e + (1 - ema_decay) * x, ema, new)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.global_norm(gradients),
            "update_norm": optax.global_norm(updates),
        }
        if not labels:
            same = jnp.argmax(logits, -1) == jnp.argmax(targets[0], -1)
            metrics["agreement"] = same.mean(dtype=jnp.float32)
        return TrainState(state.step + 1, new, opt_state, ema), metrics

    return train_step


def make_program(
    train_step: TrainStep,
    state: TrainState,
    teachers: PyTree,
    data: Resident | None,
    layout: Layout,
) -> jax.stages.Wrapped:
    """The compiled `(state, teachers, data, fed, root_key) -> (state, metrics)`.

    `fed` is a batch, or (steps, batch) ids into the resident `data`. The state is donated; the
    teachers are arguments, so that they are neither baked into the program nor copied. `state`
    and `teachers` may be shapes. Metrics are the last step's; the loss is NaN where any of
    `FINITE` was not finite in any step.
    """

    def program(
        state: TrainState, teachers: PyTree, data: Resident | None, fed: Any, root_key: PRNGKeyArray
    ) -> tuple[TrainState, Metrics]:
        if data is None:
            return train_step(state, teachers, fed, root_key)

        def one(state: TrainState, ids: Array) -> tuple[TrainState, Metrics]:
            batch = jax.lax.with_sharding_constraint(data.at(ids), layout.batch)
            return train_step(state, teachers, batch, root_key)

        if fed.shape[0] == 1:  # a convolution in a loop is many times slower on a CPU
            return one(state, fed[0])
        state, metrics = jax.lax.scan(one, state, fed)
        last = {name: values[-1] for name, values in metrics.items()}
        finite = jnp.isfinite(jnp.stack([metrics[name] for name in FINITE])).all()
        return state, last | {"loss": jnp.where(finite, last["loss"], jnp.nan)}

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
