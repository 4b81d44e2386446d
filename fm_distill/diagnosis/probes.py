"""What is measured on one batch: two programs, one on its training view and one on its centre.

The views are those of `step_views` and the targets those of the step's own `Teach`, so that what
is measured is what the run learns from.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from fm_distill.data.batch import Batch
from fm_distill.diagnosis.cka import FEWEST, centred_gram, hsic
from fm_distill.diagnosis.opened import Examined
from fm_distill.models import Output, Variables
from fm_distill.networks.batch_statistics import batch_moments
from fm_distill.networks.branch import (
    Branch,
    render_central_views,
    render_views,
    step_views,
    teacher_outputs_with_features,
)
from fm_distill.objectives.curves import value_at
from fm_distill.objectives.distances import kl_divergence
from fm_distill.objectives.ensemble import combine
from fm_distill.objectives.terms import Targets, first_choice, student_columns
from fm_distill.runs.state import TermState
from fm_distill.views.draws import ViewRoot, mix
from fm_distill.views.rendering import INPUT_RANGES, CentralCrop

# Of a batch, all that is worth keeping of it.
Found = dict[str, Any]
# `(evaluated student, trained student, terms, frozen teachers, batch, root of views, step as drawn,
# step)`.
TrainingProbe = Callable[
    [Variables, Variables, TermState, tuple[Variables, ...], Batch, ViewRoot, Array, Array],
    Found,
]
# `(evaluated student, the same with BatchNorm's moments of central crops, if it has any, frozen
# teachers, batch)`.
CentralProbe = Callable[[Variables, Variables | None, tuple[Variables, ...], Batch], Found]
# The student's logits with these moments.
RECOMPUTED = "recomputed"


def taps_of(branch: Branch) -> tuple[str, ...]:
    """The names of its features, from the input to the output."""
    return tuple(branch.network.feature_shapes())


def training_probe(examined: Examined) -> TrainingProbe:
    """Agreement, distances, teacher, features, BatchNorm and gradients on the training view."""
    config, student, teachers = examined.config, examined.student, examined.teachers
    objective, classes = config.objective, examined.run.classes
    live_teachers = teachers if examined.regime.targets == "teachers" else ()
    loss = examined.loss
    student_taps = taps_of(student)
    teacher_taps = taps_of(teachers[0]) if teachers else ()
    compare = config.batch_size >= FEWEST and bool(student_taps and teacher_taps)

    def probe(
        evaluated: Variables,
        trained: Variables,
        term_state: TermState,
        frozen: tuple[Variables, ...],
        batch: Batch,
        root: ViewRoot,
        view_step: Int[Array, ""],
        step: Int[Array, ""],
    ) -> Found:
        schedule = value_at(objective.temperature_schedule, loss.progress(step))
        temperature = objective.temperature * schedule
        views = step_views(
            examined.regime.views, config.views, student, teachers, batch, root, view_step
        )
        targets = examined.teach(frozen[: len(live_teachers)], batch, views)
        output = student.network.apply(
            evaluated, views.student, train=False, features=student_taps if compare else ()
        )
        mixed = mix(views.draw, jax.nn.one_hot(batch.labels, classes))
        measured: Found = {"label": jnp.where((batch.labels >= 0).all(), mixed.argmax(-1), -1)}
        if targets.teacher_logits:
            first = first_choice(targets)
            measured |= {
                "same_class": output.logits.argmax(-1) == first,
                "kl_nats": kl_to(targets, output.logits, temperature),
                "teacher_class": first,
                **_teacher_of(targets, temperature, classes),
            }
        if teachers:
            teacher_views = render_views(views.draw, batch, teachers, root.spectra)
            logits, features = teacher_outputs_with_features(
                teachers, frozen, teacher_views, teacher_taps if compare else ()
            )
            if logits and not targets.indices:
                same_view_logits = combine(logits, objective.ensemble, objective.temperature)
                measured["views_kl_nats"] = kl_divergence(
                    same_view_logits[0], targets.teacher_logits[0]
                )
            if compare:
                measured["cka"] = _similarities(
                    [output.features[x] for x in student_taps], [features[x] for x in teacher_taps]
                )
        if targets.teacher_logits and jax.tree.leaves(evaluated.statistics):
            measured["moments"] = batch_moments(student, evaluated, views.student)
            batch_output = student.network.apply(evaluated, views.student, train=True)
            measured["kl_batch_nats"] = kl_to(targets, batch_output.logits, temperature)

        def losses(params: PyTree) -> Float[Array, " terms"]:
            variables = dataclasses.replace(trained, params=params)
            values = loss.evaluate(
                variables, term_state.params, term_state.banks, views.student, targets, step
            ).values
            slices = (slice(i, i + 1) for i in range(len(values)))
            return jnp.stack([loss.mean(values, step, x) for x in slices])

        measured["products"] = gradient_products(losses, trained.params)
        return measured

    return jax.jit(probe, out_shardings=examined.layout.replicated)


def gradient_products(
    losses: Callable[[PyTree], Float[Array, " terms"]], params: PyTree
) -> Float[Array, "terms terms"]:
    """The inner products of the gradients of `losses`: squared norms on the diagonal."""
    values, pullback = jax.vjp(losses, params)
    gradients = [pullback(cotangent)[0] for cotangent in jnp.eye(len(values))]
    return jnp.stack([jnp.stack([optax.tree.vdot(x, y) for y in gradients]) for x in gradients])


def kl_to(targets: Targets, logits: Array, temperature: Array) -> Float[Array, " batch"]:
    """KL(target || student) in nats, the sum over the targets, without T^2."""
    columns = student_columns(logits, targets, temperature)
    pairs = zip(columns, targets.teacher_logits, strict=True)
    return jnp.stack([kl_divergence(x, y, temperature) for x, y in pairs]).sum(axis=0)


def _teacher_of(targets: Targets, temperature: Array, classes: int) -> Found:
    """Entropies over their largest value, and the probabilities at temperature 1, of the first."""
    logits = _of_all_classes(targets, temperature, classes)

    def entropy(t: Array | float) -> Array:
        logs = jax.nn.log_softmax(logits.astype(jnp.float32) / t)
        return -(jnp.exp(logs) * logs).sum(-1) / jnp.log(logits.shape[-1])

    return {
        "teacher_entropy": entropy(temperature),
        "teacher_entropy_one": entropy(1.0),
        "teacher_probabilities": jax.nn.softmax(logits).mean(axis=0),
    }


def _of_all_classes(targets: Targets, temperature: Array, classes: int) -> Array:
    """The first teacher's logits; those that a recording lumps together share their mass evenly."""
    logits = targets.teacher_logits[0]
    if not targets.indices:
        return logits
    indices = targets.indices[0]
    others = max(classes - indices.shape[-1], 1)
    even = logits[:, -1:] - temperature * jnp.log(others)
    rows = jnp.arange(len(logits))[:, None]
    return jnp.repeat(even, classes, axis=-1).at[rows, indices].set(logits[:, :-1])


def _similarities(own: list[Array], theirs: list[Array]) -> dict[str, Array]:
    student_grams, teacher_grams = ([centred_gram(x) for x in side] for side in (own, theirs))
    return {
        "between": hsic(student_grams, teacher_grams),
        "student": jnp.stack([hsic([x], [x])[0, 0] for x in student_grams]),
        "teacher": jnp.stack([hsic([x], [x])[0, 0] for x in teacher_grams]),
    }


def central_probe(examined: Examined) -> CentralProbe:
    """The logits of each network on the central crop, by its input range.

    Keys are the place of the network, the student first, and the input range.
    """
    config, branches = examined.config, (examined.student, *examined.teachers)
    inputs = [(i, name) for i, x in enumerate(branches) for name in ranges_to_try(x)]
    range_branches = tuple(_in_range(branches[i], name) for i, name in inputs)

    @functools.partial(jax.jit, out_shardings=examined.layout.batch)
    def views(batch: Batch) -> list[Array]:
        rendered = render_central_views(batch, range_branches, CentralCrop.of(config.views))
        return [rendered[x.input_spec] for x in range_branches]

    def compiled(apply: Callable[..., Output]) -> Callable[[Variables, Array], Array]:
        def forward(variables: Variables, images: Array) -> Array:
            return apply(variables, images).logits

        return jax.jit(forward, out_shardings=examined.layout.replicated)

    # Compiled once a network, not once an input range.
    student = functools.partial(examined.student.network.apply, train=False)
    networks = [compiled(student)]
    networks += [compiled(x.network.apply_frozen) for x in examined.teachers]

    def probe(
        evaluated: Variables,
        recomputed: Variables | None,
        frozen: tuple[Variables, ...],
        batch: Batch,
    ) -> Found:
        networks_with_variables = [*zip(networks, (evaluated, *frozen), strict=True)]
        outputs: Found = {}
        for (i, name), images in zip(inputs, views(batch), strict=True):
            network, variables = networks_with_variables[i]
            outputs[f"{i} {name}"] = network(variables, images)
            if recomputed and i == 0 and name == examined.student.input_spec.input_range:
                outputs[RECOMPUTED] = network(recomputed, images)
        return outputs

    return probe


def ranges_to_try(branch: Branch) -> tuple[str, ...]:
    """The input ranges that have a name, and its own where that was adapted to data."""
    return tuple(dict.fromkeys((*INPUT_RANGES, branch.input_spec.input_range)))


def _in_range(branch: Branch, input_range: str) -> Branch:
    if input_range == branch.input_spec.input_range:
        return branch
    return dataclasses.replace(branch, input_spec=branch.input_spec.in_range(input_range))
