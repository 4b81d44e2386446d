"""The loss: a sum of named terms, each a distance of the student's output with its weight.

To add a term: an entry in what `make_terms` returns. Each is a value per example, so that the loss
is a mean over the batch whatever the devices and the parts it is computed in.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fm_distill.config import ObjectiveConfig
from fm_distill.objectives.distances import DISTANCES, Logits, PerExample, cross_entropy
from fm_distill.system.references import entry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What a student's output is compared with, for each example of a batch."""

    # One for each distance of a sum, else one; none without a teacher.
    teacher_logits: tuple[Float[Array, "*batch classes"], ...] = ()
    # Class probabilities, smoothed and mixed as the student's view is; None without labels.
    labels: Float[Array, "*batch classes"] | None = None
    # The classes of `teacher_logits` where only the most likely ones are known: these columns,
    # and one more for all the others together.
    indices: tuple[Int[Array, "*batch kept"], ...] = ()


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of the loss."""

    name: str
    weight: float
    value: Callable[[Logits, Targets], PerExample]


def make_terms(objective: ObjectiveConfig) -> tuple[Term, ...]:
    """The terms of `objective`.

    The KL is multiplied by T^2 unless `temperature_squared` is off. Source: the released code
    multiplies (big_vision, evaluators/proj/distill/distance.py), so that the gradient's scale does
    not depend on T (Hinton et al. 2015, section 2); the paper's equation 1 does not.
    """
    if objective.target == "labels":
        return (Term("cross_entropy", 1.0, _to_labels),)
    distance = entry(DISTANCES, objective.distance, "objective.distance")
    temperature = objective.temperature

    def to_teachers(logits: Logits, targets: Targets) -> PerExample:
        students = student_columns(logits, targets, temperature)
        pairs = zip(students, targets.teacher_logits, strict=True)
        first, *others = (distance(x, y, temperature) for x, y in pairs)
        return sum(others, start=first)

    squared = objective.distance == "kl" and objective.temperature_squared
    return (Term(objective.distance, temperature**2 if squared else 1.0, to_teachers),)


def student_columns(
    logits: Logits, targets: Targets, temperature: float
) -> tuple[Float[Array, "batch columns"], ...]:
    """The student's logits in the columns of each of the `teacher_logits`.

    Where only K classes are known, the others become one column, T logsumexp(logits / T): the KL
    of what is lumped together is exact in the K, and at most that of all classes.
    """
    if not targets.indices:
        return (logits,) * len(targets.teacher_logits)

    def lumped(indices: Int[Array, "batch kept"]) -> Array:
        kept = jnp.take_along_axis(logits, indices, axis=-1)
        rows = jnp.arange(len(logits))[:, None]
        others = logits.at[rows, indices].set(-jnp.inf) / temperature
        rest = temperature * jax.nn.logsumexp(others, axis=-1, keepdims=True)
        return jnp.concatenate([kept, rest], axis=-1)

    return tuple(map(lumped, targets.indices))


def first_choice(targets: Targets) -> Int[Array, " batch"]:
    """The class that the first teacher finds most likely."""
    if targets.indices:
        return targets.indices[0][:, 0]
    return jnp.argmax(targets.teacher_logits[0], -1)


def _to_labels(logits: Logits, targets: Targets) -> PerExample:
    assert targets.labels is not None
    return cross_entropy(logits, targets.labels)


def weighted_sum(terms: tuple[Term, ...], logits: Logits, targets: Targets) -> PerExample:
    """The loss of each example."""
    first, *others = (term.weight * term.value(logits, targets) for term in terms)
    return sum(others, start=first)
