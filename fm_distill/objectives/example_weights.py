"""What the loss of each example is multiplied by: by class or by difficulty, of mean one.

To add a kind: a function and a line in `CLASS_WEIGHTS` or `DIFFICULTIES`, and its name in
`config/objective.py`. The loss stays a mean over the batch, so that the step size does too.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fm_distill.config import ExampleWeightsConfig, ObjectiveConfig
from fm_distill.config.objective import BY_CLASS
from fm_distill.objectives.curves import Progress, value_at
from fm_distill.objectives.distances import PerExample, Temperature, kl_divergence
from fm_distill.objectives.terms import Outputs, Targets, to_teachers

# Below this mean, in nats, a difficulty is the rounding of float32, and all weights are one.
LEAST_DIFFICULTY = 1e-6

PerClass = Float[np.ndarray, " classes"]
# `(student, targets, progress) -> weights`, of the whole batch.
ExampleWeights = Callable[[Outputs, Targets, Progress], PerExample]
Difficulty = Callable[[Outputs, Targets, Temperature], PerExample]


def inverse_frequency(counts: PerClass, beta: float) -> PerClass:
    """1 / n_c."""
    return 1 / counts


def effective_number(counts: PerClass, beta: float) -> PerClass:
    """(1 - beta) / (1 - beta^n_c), one over the effective number of examples of a class.

    Source: Cui et al. 2019 (arXiv 1901.05555), equation 2. By expm1, since beta^n_c is near one
    where beta is.
    """
    with np.errstate(divide="ignore"):  # beta = 0: each class counts as one example
        return (1 - beta) / -np.expm1(counts * np.log(beta))


def teacher_entropy(student: Outputs, targets: Targets, temperature: Temperature) -> PerExample:
    """Entropy of the teacher's probabilities at `temperature`, in nats; summed over teachers."""

    def entropy(logits: Float[Array, "batch classes"]) -> PerExample:
        log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
        return -(jnp.exp(log_probabilities) * log_probabilities).sum(axis=-1)

    return functools.reduce(jnp.add, map(entropy, targets.teacher_logits))


def teacher_distance(student: Outputs, targets: Targets, temperature: Temperature) -> PerExample:
    """KL(teacher || student) at `temperature`, in nats, as it is now; summed over teachers."""
    return to_teachers(kl_divergence, student, targets, temperature)


CLASS_WEIGHTS: dict[str, Callable[[PerClass, float], PerClass]] = {
    "inverse_frequency": inverse_frequency,
    "effective_number": effective_number,
}
DIFFICULTIES: dict[str, Difficulty] = {
    "teacher_entropy": teacher_entropy,
    "teacher_distance": teacher_distance,
}


def class_weights(config: ExampleWeightsConfig, counts: Sequence[int]) -> PerClass:
    """The weight of each class of `counts` examples, none of them 0, in float64.

    Scaled so that the mean over the training examples is one: the mean gradient keeps its scale.
    The authors' code (class-balanced-loss) lets the weights of C classes sum to C instead, so that
    the mean over the classes is one, and the loss of a long tail shrinks with its head.
    """
    class_counts = np.asarray(counts, np.float64)
    weights = CLASS_WEIGHTS[config.kind](class_counts, config.beta)
    return weights * class_counts.sum() / (weights * class_counts).sum()


def make_example_weights(objective: ObjectiveConfig) -> ExampleWeights | None:
    """The weights of a batch; None where all are one.

    Weights by class come with the targets. A difficulty is divided by its mean over the batch,
    which therefore has to be whole. The caller stops the gradient.
    """
    kind = objective.example_weights.kind
    if kind == "none":
        return None
    if kind in BY_CLASS:
        return _of_class
    difficulty = DIFFICULTIES[kind]

    def weights(student: Outputs, targets: Targets, progress: Progress) -> PerExample:
        factor = value_at(objective.temperature_schedule, progress)
        difficulties = difficulty(student, targets, objective.temperature * factor)
        return mean_one(difficulties)

    return weights


def _of_class(student: Outputs, targets: Targets, progress: Progress) -> PerExample:
    assert targets.class_weights is not None
    return targets.class_weights


def mean_one(difficulty: PerExample) -> PerExample:
    """`difficulty` over its mean; ones where no example has any."""
    clipped = jnp.maximum(difficulty, 0)  # a KL of nothing may round below it
    mean = clipped.mean()
    return jnp.where(mean > LEAST_DIFFICULTY, clipped / jnp.maximum(mean, LEAST_DIFFICULTY), 1)


def effective_share(weights: PerExample) -> Float[Array, ""]:
    """Kish's effective sample size, (sum w)^2 / sum w^2, over the size of the batch."""
    return jnp.square(weights.sum()) / (jnp.square(weights).sum() * weights.size)
