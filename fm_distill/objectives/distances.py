"""Distances between the student's and the teacher's outputs: per-example, pure, float32.

`terms.py` makes the loss of them. To add one: a function and a line in `DISTANCES`; the tests run
over the table.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def l2(student: Logits, teacher: Logits, temperature: float = 1.0) -> PerExample:
    """Squared Euclidean distance of the logits, at any temperature. Source: big_vision's `l2`."""
    difference = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    return jnp.square(difference).sum(axis=-1)


def euclidean(student: Logits, teacher: Logits, temperature: float = 1.0) -> PerExample:
    """Euclidean distance of the logits, smoothed by 1e-12. Source: big_vision's `euclidean`."""
    return jnp.sqrt(l2(student, teacher) + 1e-12)


def hard(student: Logits, teacher: Logits, temperature: float = 1.0) -> PerExample:
    """Cross-entropy to the teacher's most likely class, in nats. Source: big_vision's `hard`."""
    return -_pick(jax.nn.log_softmax(student.astype(jnp.float32)), jnp.argmax(teacher, axis=-1))


def smooth(probabilities: Float[Array, "batch classes"], share: float) -> Array:
    """`share` of each label spread evenly over all classes. Source: Szegedy et al. 2016."""
    return (1 - share) * probabilities + share / probabilities.shape[-1]


def cross_entropy(logits: Logits, targets: Float[Array, "batch classes"]) -> PerExample:
    """Cross-entropy to class probabilities `targets`, in nats: the objective on labels."""
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(axis=-1)


def _pick(values: Logits, classes: Array) -> PerExample:
    return jnp.take_along_axis(values, classes[:, None], axis=-1)[:, 0]


Distance = Callable[[Logits, Logits, float], PerExample]

# `(student logits, teacher logits, temperature) -> distances`.
DISTANCES: dict[str, Distance] = {
    "kl": kl_divergence,
    "l2": l2,
    "euclidean": euclidean,
    "hard": hard,
}
