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
    live = teachers if examined.regime.targets == "teachers" else ()
    loss = examined.loss
    own_taps = taps_of(student)
    their_taps = taps_of(teachers[0]) if teachers else ()
    compare = config.batch_size >= FEWEST and bool(own_taps and their_taps)

    def probe(
        evaluated: Variables,
        trained: Variables,
        own: TermState,
        frozen: tuple[Variables, ...],
        batch: Batch,
        root: ViewRoot,
        drawn: Int[Array, ""],
        step: Int[Array, ""],
    ) -> Found:
        schedule = value_at(objective.temperature_schedule, loss.progress(step))
        temperature = objective.temperature * schedule
        views = step_views(
            examined.regime.views, config.views, student, teachers, batch, root, drawn
        )
        targets = examined.teach(frozen[: len(live)], batch, views)
        output = student.network.apply(
            evaluated, views.student, train=False, features=own_taps if compare else ()
        )
        mixed = mix(views.draw, jax.nn.one_hot(batch.labels, classes))
        found: Found = {"label": jnp.where((batch.labels >= 0).all(), mixed.argmax(-1), -1)}
        if targets.teacher_logits:
            first = first_choice(targets)
            found |= {
                "same_class": output.logits.argmax(-1) == first,
                "kl_nats": kl_to(targets, output.logits, temperature),
                "teacher_class": first,
                **_teacher_of(targets, temperature),
            }
        if teachers:
            seen = render_views(views.draw, batch, teachers, root.spectra)
            logits, features = teacher_outputs_with_features(
                teachers, frozen, seen, their_taps if compare else ()
            )
            if logits and not targets.indices:
                same_view = combine(logits, objective.ensemble, objective.temperature)
                found["views_kl_nats"] = kl_divergence(same_view[0], targets.teacher_logits[0])
            if compare:
                found["cka"] = _similarities(
                    [output.features[x] for x in own_taps], [features[x] for x in their_taps]
                )
        if targets.teacher_logits and jax.tree.leaves(evaluated.statistics):
            found["moments"] = batch_moments(student, evaluated, views.student)
            of_batch = student.network.apply(evaluated, views.student, train=True)
            found["kl_batch_nats"] = kl_to(targets, of_batch.logits, temperature)

        def losses(params: PyTree) -> Float[Array, " terms"]:
            variables = dataclasses.replace(trained, params=params)
            values = loss.evaluate(
                variables, own.params, own.banks, views.student, targets, step
            ).values
            one_by_one = (slice(i, i + 1) for i in range(len(values)))
            return jnp.stack([loss.mean(values, step, x) for x in one_by_one])

        found["products"] = gradient_products(losses, trained.params)
        return found

    return jax.jit(probe, out_shardings=examined.layout.replicated)


def gradient_products(
    losses: Callable[[PyTree], Float[Array, " terms"]], params: PyTree
) -> Float[Array, "terms terms"]:
    """The inner products of the gradients of `losses`: squared norms on the diagonal."""
    values, pullback = jax.vjp(losses, params)
    gradients = [pullback(one)[0] for one in jnp.eye(len(values))]
    return jnp.stack([jnp.stack([optax.tree.vdot(x, y) for y in gradients]) for x in gradients])


def kl_to(targets: Targets, logits: Array, temperature: Array) -> Float[Array, " batch"]:
    """KL(target || student) in nats, the sum over the targets, without T^2."""
    columns = student_columns(logits, targets, temperature)
    pairs = zip(columns, targets.teacher_logits, strict=True)
    return jnp.stack([kl_divergence(x, y, temperature) for x, y in pairs]).sum(axis=0)


def _teacher_of(targets: Targets, temperature: Array) -> Found:
    """Entropies over their largest value, and the probabilities at temperature 1, of the first."""
    logits = targets.teacher_logits[0]

    def entropy(t: Array | float) -> Array:
        logs = jax.nn.log_softmax(logits.astype(jnp.float32) / t)
        return -(jnp.exp(logs) * logs).sum(-1) / jnp.log(logits.shape[-1])

    return {
        "teacher_entropy": entropy(temperature),
        "teacher_entropy_one": entropy(1.0),
        "teacher_probabilities": jax.nn.softmax(logits).mean(axis=0),
    }


def _similarities(own: list[Array], theirs: list[Array]) -> dict[str, Array]:
    grams, others = ([centred_gram(x) for x in side] for side in (own, theirs))
    return {
        "between": hsic(grams, others),
        "student": jnp.stack([hsic([x], [x])[0, 0] for x in grams]),
        "teacher": jnp.stack([hsic([x], [x])[0, 0] for x in others]),
    }


def central_probe(examined: Examined) -> CentralProbe:
    """The logits of each network on the central crop, by its input range.

    Keys are the place of the network, the student first, and the input range.
    """
    config, branches = examined.config, (examined.student, *examined.teachers)
    inputs = [(i, name) for i, x in enumerate(branches) for name in ranges_to_try(x)]
    every = tuple(_in_range(branches[i], name) for i, name in inputs)

    @functools.partial(jax.jit, out_shardings=examined.layout.batch)
    def views(batch: Batch) -> list[Array]:
        rendered = render_central_views(batch, every, CentralCrop.of(config.views))
        return [rendered[x.input_spec] for x in every]

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
        of_networks = [*zip(networks, (evaluated, *frozen), strict=True)]
        found: Found = {}
        for (i, name), images in zip(inputs, views(batch), strict=True):
            network, variables = of_networks[i]
            found[f"{i} {name}"] = network(variables, images)
            if recomputed and i == 0 and name == examined.student.input_spec.input_range:
                found[RECOMPUTED] = network(recomputed, images)
        return found

    return probe


def ranges_to_try(branch: Branch) -> tuple[str, ...]:
    """The input ranges that have a name, and its own where that was adapted to data."""
    return tuple(dict.fromkeys((*INPUT_RANGES, branch.input_spec.input_range)))


def _in_range(branch: Branch, input_range: str) -> Branch:
    if input_range == branch.input_spec.input_range:
        return branch
    return dataclasses.replace(branch, input_spec=branch.input_spec.in_range(input_range))
