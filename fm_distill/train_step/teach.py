"""The targets of a batch: where they come from, and what terms need beside them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fm_distill.config import MemoryConfig, ObjectiveConfig
from fm_distill.config.objective import BY_CLASS
from fm_distill.config.regime import TargetSource
from fm_distill.data.batch import Batch
from fm_distill.models import Variables
from fm_distill.networks.branch import Branch, StepViews, Views, teacher_outputs_with_features
from fm_distill.objectives.distances import smooth
from fm_distill.objectives.ensemble import combine
from fm_distill.objectives.example_weights import class_weights
from fm_distill.objectives.terms import Targets, features_of, needs_labels
from fm_distill.recordings.rows import decode, decode_features, indices_of
from fm_distill.train_step.memory import in_parts
from fm_distill.views.draws import mix

# `(frozen teachers, batch, views) -> targets`.
Teach = Callable[[tuple[Variables, ...], Batch, StepViews], Targets]


def teach_live(
    teachers: tuple[Branch, ...], classes: int, objective: ObjectiveConfig, memory: MemoryConfig
) -> Teach:
    """Targets are the outputs of the teachers on their views of this step."""

    _, names = features_of(objective)

    def teach(frozen: tuple[Variables, ...], batch: Batch, views: StepViews) -> Targets:
        def combined(part: Views) -> tuple[tuple[Array, ...], dict[str, Array]]:
            with jax.named_scope("teacher"):
                logits, features = teacher_outputs_with_features(teachers, frozen, part, names)
                return combine(logits, objective.ensemble, objective.temperature), features

        logits, features = in_parts(combined, memory.teacher_parts, views.teachers)
        return Targets(logits, teacher_features=features)

    return teach


def teach_labels(
    teachers: tuple[Branch, ...], classes: int, objective: ObjectiveConfig, memory: MemoryConfig
) -> Teach:
    """Targets are the labels, smoothed, and mixed as the student's view is."""

    def teach(frozen: tuple[Variables, ...], batch: Batch, views: StepViews) -> Targets:
        one_hot = jax.nn.one_hot(batch.labels, classes)
        return Targets(labels=mix(views.draw, smooth(one_hot, objective.label_smoothing)))

    return teach


def teach_table(
    teachers: tuple[Branch, ...], classes: int, objective: ObjectiveConfig, memory: MemoryConfig
) -> Teach:
    """Targets were computed before training, one row for each example, and came with the batch."""

    def teach(frozen: tuple[Variables, ...], batch: Batch, views: StepViews) -> Targets:
        assert batch.targets is not None
        return Targets(tuple(jnp.moveaxis(batch.targets, 1, 0)))

    return teach


def teach_recorded(
    teachers: tuple[Branch, ...], classes: int, objective: ObjectiveConfig, memory: MemoryConfig
) -> Teach:
    """Targets are the teachers' recorded outputs for the same views."""

    def teach(frozen: tuple[Variables, ...], batch: Batch, views: StepViews) -> Targets:
        assert batch.recorded is not None
        logits, features = decode(batch.recorded), decode_features(batch.recorded)
        indices = indices_of(batch.recorded)
        if not indices:
            logits = combine(logits, objective.ensemble, objective.temperature)
        return Targets(logits, teacher_features=features, indices=indices)

    return teach


TARGET_SOURCES: dict[
    TargetSource, Callable[[tuple[Branch, ...], int, ObjectiveConfig, MemoryConfig], Teach]
] = {
    "teachers": teach_live,
    "labels": teach_labels,
    "table": teach_table,
    "recording": teach_recorded,
}


def with_labels(teach: Teach, classes: int) -> Teach:
    """The targets of `teach`, and the labels, mixed as the student's view is, for other terms."""

    def teach_both(frozen: tuple[Variables, ...], batch: Batch, views: StepViews) -> Targets:
        labels = mix(views.draw, jax.nn.one_hot(batch.labels, classes))
        return dataclasses.replace(teach(frozen, batch, views), labels=labels)

    return teach_both


def with_class_weights(teach: Teach, of_class: Float[np.ndarray, " classes"]) -> Teach:
    """The targets of `teach`, and the weight of each example, mixed as the student's view is."""

    def teach_weighted(frozen: tuple[Variables, ...], batch: Batch, views: StepViews) -> Targets:
        weights = mix(views.draw, jnp.asarray(of_class, jnp.float32)[batch.labels])
        return dataclasses.replace(teach(frozen, batch, views), class_weights=weights)

    return teach_weighted


def make_teach(
    source: TargetSource,
    teachers: tuple[Branch, ...],
    classes: int,
    objective: ObjectiveConfig,
    memory: MemoryConfig = MemoryConfig(),
    class_counts: tuple[int, ...] | None = None,
) -> Teach:
    """All that the terms of `objective` compare the student with.

    `class_counts`, the training examples of each class, are needed by weights by class.
    """
    teach = TARGET_SOURCES[source](teachers, classes, objective, memory)
    if source != "labels" and needs_labels(objective):
        teach = with_labels(teach, classes)
    if objective.example_weights.kind in BY_CLASS:
        assert class_counts is not None
        teach = with_class_weights(teach, class_weights(objective.example_weights, class_counts))
    return teach
