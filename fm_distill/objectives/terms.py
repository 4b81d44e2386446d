"""The loss: a sum of named terms, each a distance of the student's output with its weight.

To add a kind of term: a line in a table of `distances.py`. Each is a value per example, so that the
loss is a mean over the batch whatever the devices and the parts it is computed in.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fm_distill.config import CurveConfig, ObjectiveConfig, TermConfig
from fm_distill.config.objective import BANK_SIMILARITY, BY_DIFFICULTY, LABELS, terms_of
from fm_distill.errors import UserError
from fm_distill.objectives.adapters import AdapterParams, adapt
from fm_distill.objectives.bank import Bank, bank_similarity
from fm_distill.objectives.curves import Progress, value_at
from fm_distill.objectives.distances import (
    BATCH_DISTANCES,
    DISTANCES,
    LABELLED_DISTANCES,
    SQUARED,
    Distance,
    LabelledDistance,
    Logits,
    PerExample,
    Temperature,
    cross_entropy,
)
from fm_distill.objectives.features import (
    ADAPTED_DISTANCES,
    FEATURE_DISTANCES,
    OF_FEATURES,
    Features,
    of_one_size,
    pooled,
)
from fm_distill.system.references import entry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """What a student's output is compared with, for each example of a batch."""

    # One for each distance of a sum, else one; none without a teacher that has a head. Of a top-K
    # recording they have fewer columns than there are classes.
    teacher_logits: tuple[Float[Array, "*batch classes"], ...] = ()
    # Class probabilities, smoothed and mixed as the student's view is; None without labels.
    labels: Float[Array, "*batch all_classes"] | None = None
    # Those of the teacher that a term reads.
    teacher_features: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    # The classes of `teacher_logits` where only the most likely ones are known: these columns,
    # and one more for all the others together.
    indices: tuple[Int[Array, "*batch kept"], ...] = ()
    # By class, mixed as the student's view is; None where examples are not weighted by class.
    class_weights: Float[Array, "*batch"] | None = None


class Outputs(NamedTuple):
    """What a term reads of the student, and what the terms have of their own, by their names."""

    logits: Logits
    features: Mapping[str, Array] = {}
    adapters: Mapping[str, AdapterParams] = {}
    banks: Mapping[str, Bank] = {}


Value = Callable[[Outputs, Targets, Temperature], PerExample]


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of the loss: a value for each example, with a weight that may follow a curve."""

    name: str
    weight: float
    value: Value
    temperature: float = 1.0
    # Whether the weight is multiplied by the square of the temperature.
    squared: bool = False
    schedule: CurveConfig = CurveConfig()
    temperature_schedule: CurveConfig = CurveConfig()

    def temperature_at(self, progress: Progress) -> Temperature:
        return self.temperature * value_at(self.temperature_schedule, progress)

    def weight_at(self, progress: Progress) -> Float[Array, ""]:
        weight = self.weight * value_at(self.schedule, progress)
        return weight * jnp.square(self.temperature_at(progress)) if self.squared else weight


def make_terms(objective: ObjectiveConfig) -> tuple[Term, ...]:
    """The terms of `objective`.

    The KL is multiplied by T^2 unless `temperature_squared` is off. Source: the released code
    multiplies (big_vision, evaluators/proj/distill/distance.py), so that the gradient's scale does
    not depend on T (Hinton et al. 2015, section 2); the paper's equation 1 does not.
    """
    return tuple(
        Term(
            name,
            config.weight,
            _value(name, config),
            config.temperature or objective.temperature,
            objective.temperature_squared and config.kind in SQUARED,
            config.schedule,
            objective.temperature_schedule,
        )
        for name, config in named_terms(objective)
    )


def named_terms(objective: ObjectiveConfig) -> tuple[tuple[str, TermConfig], ...]:
    """Each term with its name: its kind, or `kind_2` for the second of a kind."""
    configs = terms_of(objective)
    names = [x.kind.rpartition(":")[2] for x in configs]  # of a reference, the function's
    return tuple(
        (f"{name}_{earlier + 1}" if (earlier := names[:i].count(name)) else name, config)
        for i, (name, config) in enumerate(zip(names, configs, strict=True))
    )


def needs_labels(objective: ObjectiveConfig) -> bool:
    """Whether a term compares with labels, beside a teacher or alone."""
    return any(x.kind == LABELS or x.kind in LABELLED_DISTANCES for x in terms_of(objective))


def temperatures_of(objective: ObjectiveConfig) -> set[float]:
    """Those at which terms and the weights of examples read the teacher's logits."""
    terms = (x for x in terms_of(objective) if x.kind != LABELS and x.kind not in OF_FEATURES)
    temperatures = {x.temperature or objective.temperature for x in terms}
    weighted_by_difficulty = objective.example_weights.kind in BY_DIFFICULTY
    return temperatures | ({objective.temperature} if weighted_by_difficulty else set())


def temperature_of_rest(objective: ObjectiveConfig) -> float:
    """That at which a recording of the largest logits lumps the other classes together.

    Raises `UserError` where there is no single one.
    """
    temperatures = temperatures_of(objective) or {objective.temperature}
    scheduled = objective.temperature_schedule.points
    if len(temperatures) > 1 or scheduled:
        description = "a schedule of it" if scheduled else ", ".join(map(str, sorted(temperatures)))
        raise UserError(
            "--top-k lumps the other classes together at one temperature, and this objective has "
            f"{description}; record all classes, or give all terms one temperature"
        )
    return temperatures.pop()


def features_of(objective: ObjectiveConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the student's and of the teacher's features that the terms read."""
    terms = [x for x in terms_of(objective) if x.kind in OF_FEATURES]
    student = {x.student_tap for x in terms if x.student_tap}
    teacher = {x.teacher_tap for x in terms if x.teacher_tap}
    return tuple(sorted(student)), tuple(sorted(teacher))


def student_feature(term: TermConfig, features: Mapping[str, Array]) -> Features:
    """What `term` reads of the student's features."""
    assert term.student_tap
    return _read(term, features[term.student_tap])


def teacher_feature(term: TermConfig, features: Mapping[str, Array]) -> Features:
    """What `term` reads of the teacher's, those of a recording being means already."""
    assert term.teacher_tap
    return _read(term, features[term.teacher_tap])


def _read(term: TermConfig, feature: Features) -> Features:
    return pooled(feature) if term.pool == "mean" else feature


def _value(name: str, config: TermConfig) -> Value:
    if config.kind == LABELS:
        return _to_labels
    if config.kind in LABELLED_DISTANCES:
        return functools.partial(_to_labelled_teachers, LABELLED_DISTANCES[config.kind])
    if config.kind in OF_FEATURES:
        return functools.partial(_to_features, name, config)
    distance = entry(DISTANCES | BATCH_DISTANCES, config.kind, "objective.distance")
    return functools.partial(to_teachers, distance)


def to_teachers(
    distance: Distance, student: Outputs, targets: Targets, temperature: Temperature
) -> PerExample:
    """The sum over the teachers."""
    columns = student_columns(student.logits, targets, temperature)
    pairs = zip(columns, targets.teacher_logits, strict=True)
    return functools.reduce(jnp.add, (distance(x, y, temperature) for x, y in pairs))


def _to_labelled_teachers(
    distance: LabelledDistance, student: Outputs, targets: Targets, temperature: Temperature
) -> PerExample:
    labels = targets.labels
    assert labels is not None
    teachers = targets.teacher_logits
    distances = (distance(student.logits, x, labels, temperature) for x in teachers)
    return functools.reduce(jnp.add, distances)


def _to_labels(student: Outputs, targets: Targets, temperature: Temperature) -> PerExample:
    assert targets.labels is not None
    return cross_entropy(student.logits, targets.labels)


def _to_features(
    name: str, config: TermConfig, student: Outputs, targets: Targets, temperature: Temperature
) -> PerExample:
    """Between the two features of a term; those of `ADAPTED` on one size, through its adapter."""
    student_values = student_feature(config, student.features)
    teacher_values = teacher_feature(config, targets.teacher_features)
    if config.kind in FEATURE_DISTANCES:
        return FEATURE_DISTANCES[config.kind](student_values, teacher_values)
    student_values, teacher_values = of_one_size(student_values, teacher_values)
    if (params := student.adapters.get(name)) is not None:
        student_values = adapt(params, student_values)
    if config.kind == BANK_SIMILARITY:
        return bank_similarity(student_values, teacher_values, student.banks[name], config.bank)
    return ADAPTED_DISTANCES[config.kind](student_values, teacher_values)


def student_columns(
    logits: Logits, targets: Targets, temperature: Temperature
) -> tuple[Float[Array, "batch columns"], ...]:
    """The student's logits in the columns of each of the `teacher_logits`.

    Where only K classes are known, the others become one column, T logsumexp(logits / T): the KL
    of what is lumped together is exact in the K, and at most that of all classes.
    """
    if not targets.indices:
        return (logits,) * len(targets.teacher_logits)

    def lumped(indices: Int[Array, "batch kept"]) -> Array:
        kept_logits = jnp.take_along_axis(logits, indices, axis=-1)
        rows = jnp.arange(len(logits))[:, None]
        other_logits = logits.at[rows, indices].set(-jnp.inf) / temperature
        rest_column = temperature * jax.nn.logsumexp(other_logits, axis=-1, keepdims=True)
        return jnp.concatenate([kept_logits, rest_column], axis=-1)

    return tuple(map(lumped, targets.indices))


def first_choice(targets: Targets) -> Int[Array, " batch"]:
    """The class that the first teacher finds most likely."""
    if targets.indices:
        return targets.indices[0][:, 0]
    return jnp.argmax(targets.teacher_logits[0], -1)


def values_of(
    terms: tuple[Term, ...], student: Outputs, targets: Targets, progress: Progress
) -> tuple[PerExample, ...]:
    """The value of each term, without its weight, for each example."""
    return tuple(x.value(student, targets, x.temperature_at(progress)) for x in terms)


def weighted_sum(
    terms: tuple[Term, ...], values: tuple[PerExample, ...], progress: Progress
) -> PerExample:
    """The loss of each example."""
    weighted = (x.weight_at(progress) * y for x, y in zip(terms, values, strict=True))
    return functools.reduce(jnp.add, weighted)
