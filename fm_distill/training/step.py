"""The arithmetic of one batch: draw, views, teachers, student, distance, gradient, update.

`make_train_step` is the library; everything else here makes programs of it. Nothing in this file
reads a file or knows a device.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from fm_distill.config import MemoryConfig, ObjectiveConfig, ViewConfig
from fm_distill.data.batch import Batch
from fm_distill.models import Output, Variables
from fm_distill.networks.branch import Branch, render_views
from fm_distill.objectives.distances import DISTANCES, combine, cross_entropy, smooth
from fm_distill.runs.state import TrainState
from fm_distill.training.memory import accumulated, in_parts, rematerialised
from fm_distill.views.draws import draws_of, mix
from fm_distill.views.rendering import InputSpec

Metrics = dict[str, Float[Array, ""]]


TrainStep = Callable[
    [TrainState, tuple[Variables, ...], Batch, PRNGKeyArray], tuple[TrainState, Metrics]
]


def make_train_step(
    student: Branch,
    teachers: tuple[Branch, ...],
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

    def predict_split(
        teacher_variables: tuple[Variables, ...], pictures: dict[InputSpec, Array]
    ) -> tuple[Array, ...]:
        with jax.named_scope("teacher"):
            logits = tuple(
                jax.lax.stop_gradient(
                    branch.network.apply_frozen(frozen, pictures[branch.input_spec]).logits
                )
                for branch, frozen in zip(teachers, teacher_variables, strict=True)
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
            pictures = render_views(drawn, batch, (student, *teachers) if together else (student,))
            shown = pictures if together or seen is None else render_views(seen, batch, teachers)
        if labels:
            one_hot = jax.nn.one_hot(batch.labels, student.network.classes)
            targets: tuple[Array, ...] = (mix(drawn, smooth(one_hot, objective.label_smoothing)),)
        elif seen is None:
            targets = tuple(jnp.moveaxis(batch.targets, 1, 0))
        else:
            answer = functools.partial(predict_split, teacher_variables)
            shown = {branch.input_spec: shown[branch.input_spec] for branch in teachers}
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
        part = pictures[student.input_spec], targets
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
