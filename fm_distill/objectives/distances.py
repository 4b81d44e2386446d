"""Distances between the student's and the teacher's outputs: per-example, pure, float32.

Called by `step.py` after both networks have seen their view. To add one: a function and a line in
`DISTANCES`; the tests run over the table.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fm_distill.config import ObjectiveConfig

Logits = Float[Array, "batch classes"]
PerExample = Float[Array, " batch"]


def kl_divergence(student: Logits, teacher: Logits, temperature: float = 1.0) -> PerExample:
    """KL(teacher || student) of the softmaxes at `temperature`, in nats, without T^2.

    Source: Beyer et al. 2021 (arXiv 2106.05237), equation 1. Computed from log-probabilities, so
    that neither a clip nor an underflow hides a gradient.
    """
    log_student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    log_teacher = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    probability = jnp.exp(log_teacher)
    # A class that the teacher rules out (log-probability -inf) adds 0, not 0 * inf.
    terms = jnp.where(probability > 0, probability * (log_teacher - log_student), 0.0)
    return terms.sum(axis=-1)


def kl(student: Logits, teacher: Logits, objective: ObjectiveConfig) -> PerExample:
    """`kl_divergence`, times T^2 unless `temperature_squared` is off.

    Source: the released code multiplies (big_vision, evaluators/proj/distill/distance.py), so that
    the gradient's scale does not depend on T (Hinton et al. 2015, section 2); the paper's
    equation 1 does not.
    """
    factor = objective.temperature**2 if objective.temperature_squared else 1.0
    return factor * kl_divergence(student, teacher, objective.temperature)


def l2(student: Logits, teacher: Logits, objective: ObjectiveConfig) -> PerExample:
    """Squared Euclidean distance of the logits. Source: big_vision's distance `l2`."""
    difference = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    return jnp.square(difference).sum(axis=-1)


def euclidean(student: Logits, teacher: Logits, objective: ObjectiveConfig) -> PerExample:
    """Euclidean distance of the logits, smoothed by 1e-12. Source: big_vision's `euclidean`."""
    return jnp.sqrt(l2(student, teacher, objective) + 1e-12)


def hard(student: Logits, teacher: Logits, objective: ObjectiveConfig) -> PerExample:
    """Cross-entropy to the teacher's most likely class, in nats. Source: big_vision's `hard`."""
    return -_pick(jax.nn.log_softmax(student.astype(jnp.float32)), jnp.argmax(teacher, axis=-1))


def combine(teachers: tuple[Logits, ...], objective: ObjectiveConfig) -> tuple[Logits, ...]:
    """What several teachers say together: one target, or one for each distance of a sum.

    The mean of probabilities is that at `temperature`, given as logits: the softmax of the result
    at this temperature is the mean. Source: Beyer et al. 2021, section 3.6 (mean of logits);
    big_vision's trainer (sum of the distances).
    """
    if len(teachers) == 1 or objective.ensemble == "sum_of_distances":
        return teachers
    return (_mean(teachers, objective),)


def as_one(teachers: tuple[Logits, ...], objective: ObjectiveConfig) -> Logits:
    """`combine` as one network. A sum of KLs has the gradient of the KL to the mean probability."""
    return teachers[0] if len(teachers) == 1 else _mean(teachers, objective)


def _mean(teachers: tuple[Logits, ...], objective: ObjectiveConfig) -> Logits:
    logits = jnp.stack(teachers).astype(jnp.float32)
    if objective.ensemble == "mean_logits":
        return logits.mean(axis=0)
    t = objective.temperature
    return t * jax.nn.logsumexp(jax.nn.log_softmax(logits / t), axis=0, b=1 / len(teachers))


def smooth(probabilities: Float[Array, "batch classes"], share: float) -> Array:
    """`share` of each label spread evenly over all classes. Source: Szegedy et al. 2016."""
    return (1 - share) * probabilities + share / probabilities.shape[-1]


def cross_entropy(logits: Logits, targets: Float[Array, "batch classes"]) -> PerExample:
    """Cross-entropy to class probabilities `targets`, in nats: the objective on labels."""
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(axis=-1)


def _pick(values: Logits, classes: Array) -> PerExample:
    return jnp.take_along_axis(values, classes[:, None], axis=-1)[:, 0]


DISTANCES: dict[str, Callable[[Logits, Logits, ObjectiveConfig], PerExample]] = {
    "kl": kl,
    "l2": l2,
    "euclidean": euclidean,
    "hard": hard,
}
