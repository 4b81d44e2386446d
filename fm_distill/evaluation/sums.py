"""What an evaluation adds up over the examples of a batch, from logits on the views."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fm_distill.config import ObjectiveConfig
from fm_distill.evaluation.class_groups import Groups, sums_of_groups
from fm_distill.objectives.distances import kl_divergence

ECE_BINS = 15
Sums = dict[str, Any]


def sums_of(
    student: tuple[Array, ...],
    teacher: tuple[Array, ...],
    labels: Array,
    mask: Bool[Array, " batch"],
    both: Bool[Array, " batch"],
    objective: ObjectiveConfig,
    groups: Groups | None,
) -> Sums:
    """Sums over a batch, of the logits (batch, classes) of each view of `EvaluationViews`."""

    def measured(logits: Array) -> Sums:
        sums = _measure(logits, labels, mask)
        if groups is None:
            return sums
        return sums | {"groups": sums_of_groups(groups, logits, labels, mask)}

    sums: Sums = {"examples": mask.sum(), "student": measured(student[0])}
    if not teacher:
        return sums
    both_correct = _right(student[0], labels, mask) & _right(teacher[0], labels, mask)
    return sums | {
        "teacher": measured(teacher[0]),
        "both_right": both_correct.sum(),
        "match": _compare(student[0], teacher[0], mask, objective.temperature),
        "training_view": _compare(student[1], teacher[1], both, objective.temperature),
    }


def _right(
    logits: Float[Array, "batch classes"], labels: Array, mask: Array
) -> Bool[Array, " batch"]:
    """Whether an example's label is known and the first class."""
    return (jnp.argmax(logits, -1) == labels) & (labels >= 0) & mask


def _measure(logits: Float[Array, "batch classes"], labels: Array, mask: Array) -> Sums:
    """Sums over the labelled examples, and over 15 equal bins of confidence.

    Expected calibration error: Guo et al. 2017 (arXiv 1706.04599), bins (0, 1/15], (1/15, 2/15]...
    """
    labelled = mask & (labels >= 0)
    log_probabilities = jax.nn.log_softmax(logits)
    label = jnp.maximum(labels, 0)
    correct = _right(logits, labels, mask)
    top5 = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    log_likelihood = jnp.take_along_axis(log_probabilities, label[:, None], axis=-1)[:, 0]
    confidence = jnp.exp(log_probabilities.max(axis=-1))
    bins = jnp.clip(jnp.ceil(confidence * ECE_BINS).astype(jnp.int32) - 1, 0, ECE_BINS - 1)
    in_bin = jax.nn.one_hot(bins, ECE_BINS) * labelled[:, None]
    return {
        "labelled": labelled.sum(),
        "top1": correct.sum(),
        "top5": ((top5 == label[:, None]).any(-1) & labelled).sum(),
        "cross_entropy": -jnp.where(labelled, log_likelihood, 0.0).sum(),
        "bin_confidence": (in_bin * confidence[:, None]).sum(0),
        "bin_right": (in_bin * correct[:, None]).sum(0),
    }


def _compare(
    student: Float[Array, "batch classes"],
    teacher: Float[Array, "batch classes"],
    mask: Array,
    temperature: float,
) -> Sums:
    first = jnp.argmax(teacher, -1)
    top5 = jax.lax.top_k(student, min(5, student.shape[-1]))[1]

    def total(values: Array) -> Array:
        return jnp.where(mask, values, 0).sum()

    return {
        "examples": mask.sum(),
        "top1": total(jnp.argmax(student, -1) == first),
        "top5": total((top5 == first[:, None]).any(-1)),
        "kl_train_temperature": total(kl_divergence(student, teacher, temperature)),
        "kl_one": total(kl_divergence(student, teacher)),
    }
