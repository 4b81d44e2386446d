"""Distances between the student's and the teacher's outputs: per-example, pure, float32.

`terms.py` makes the loss of them. To add one: a function and a line in `DISTANCES` (or in
`BATCH_DISTANCES` or `LABELLED_DISTANCES`); the tests run over the tables.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Logits = Float[Array, "batch classes"]
PerExample = Float[Array, " batch"]
# Class probabilities, mixed as the student's view is.
Labels = Float[Array, "batch classes"]
Temperature = Float[Array, ""] | float

# The least square of a norm or deviation whose root is differentiated: the head starts at zero,
# where all logits are equal and the root's own gradient is infinite.
LEAST_SQUARE = 1e-12


def kl_divergence(student: Logits, teacher: Logits, temperature: Temperature = 1.0) -> PerExample:
    """KL(teacher || student) of the softmaxes at `temperature`, in nats, without T^2.

    Source: Beyer et al. 2021 (arXiv 2106.05237), equation 1. Computed from log-probabilities, so
    that neither a clip nor an underflow hides a gradient.
    """
    log_student = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    log_teacher = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    return _kl_terms(log_student, log_teacher).sum(axis=-1)


def l2(student: Logits, teacher: Logits, temperature: Temperature = 1.0) -> PerExample:
    """Squared Euclidean distance of the logits, at any temperature. Source: big_vision's `l2`."""
    difference = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    return jnp.square(difference).sum(axis=-1)


def euclidean(student: Logits, teacher: Logits, temperature: Temperature = 1.0) -> PerExample:
    """Euclidean distance of the logits, smoothed by 1e-12. Source: big_vision's `euclidean`."""
    return jnp.sqrt(l2(student, teacher) + 1e-12)


def hard(student: Logits, teacher: Logits, temperature: Temperature = 1.0) -> PerExample:
    """Cross-entropy to the teacher's most likely class, in nats. Source: big_vision's `hard`."""
    return -_pick(jax.nn.log_softmax(student.astype(jnp.float32)), jnp.argmax(teacher, axis=-1))


def standardised_kl(student: Logits, teacher: Logits, temperature: Temperature = 1.0) -> PerExample:
    """`kl_divergence` of logits less their mean and over their deviation, without T^2.

    Source: Sun et al. 2024 (arXiv 2403.01427) and its code: the deviation with n - 1, plus 1e-7.
    """

    def standardised(logits: Logits) -> Logits:
        centred = _centred(logits.astype(jnp.float32))
        variance = jnp.square(centred).sum(-1, keepdims=True) / (logits.shape[-1] - 1)
        return centred / (1e-7 + jnp.sqrt(variance + LEAST_SQUARE))

    return kl_divergence(standardised(student), standardised(teacher), temperature)


def dist_rows(student: Logits, teacher: Logits, temperature: Temperature = 1.0) -> PerExample:
    """1 - Pearson's correlation of an example's probabilities at `temperature`.

    Source: Huang et al. 2022 (DIST, arXiv 2205.10536), the relation between classes; its code has
    1e-8 in the denominator and no temperature.
    """
    return 1 - _correlation(*_probabilities(student, teacher, temperature))


def dist_columns(student: Logits, teacher: Logits, temperature: Temperature = 1.0) -> PerExample:
    """1 - Pearson's correlation of a class over the batch, the mean over classes, for each example.

    Source: DIST, the relation within classes. It depends on the batch size.
    """
    columns = (x.T for x in _probabilities(student, teacher, temperature))
    return jnp.full(len(student), (1 - _correlation(*columns)).mean())


def _probabilities(
    student: Logits, teacher: Logits, temperature: Temperature
) -> tuple[Logits, Logits]:
    student_probabilities, teacher_probabilities = (
        jax.nn.softmax(x.astype(jnp.float32) / temperature) for x in (student, teacher)
    )
    return student_probabilities, teacher_probabilities


def _centred(x: Float[Array, "rows columns"]) -> Array:
    return x - x.mean(axis=-1, keepdims=True)


def _correlation(
    x: Float[Array, "rows columns"], y: Float[Array, "rows columns"]
) -> Float[Array, " rows"]:
    x, y = _centred(x), _centred(y)
    norms = (jnp.sqrt(jnp.square(z).sum(-1) + LEAST_SQUARE) for z in (x, y))
    return (x * y).sum(-1) / (jnp.prod(jnp.stack([*norms]), axis=0) + 1e-8)


def dkd_target(
    student: Logits, teacher: Logits, labels: Labels, temperature: Temperature = 1.0
) -> PerExample:
    """KL of (the classes of the label, all others together): the teacher's weight of the label.

    Source: Zhao et al. 2022 (DKD, arXiv 2203.08679), TCKD, with one class a label. A mixed view
    has two, each of its own (mdistiller, issue 13). Without T^2; computed from log-probabilities.
    """
    log_probabilities = [
        jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (student, teacher)
    ]
    is_label = labels > 0
    rest_student, rest_teacher = (
        jax.nn.logsumexp(_only(~is_label, x), axis=-1) for x in log_probabilities
    )
    label_terms = jnp.where(is_label, _kl_terms(*log_probabilities), 0.0).sum(axis=-1)
    return label_terms + _kl_terms(rest_student, rest_teacher)


def dkd_others(
    student: Logits, teacher: Logits, labels: Labels, temperature: Temperature = 1.0
) -> PerExample:
    """KL of the classes that are not the label's, among themselves.

    Source: DKD, NCKD; the authors' weights are 1 for `dkd_target` and 8 for this one (CIFAR-100,
    temperature 4). Without T^2.
    """
    is_other = labels <= 0
    scaled_logits = (x.astype(jnp.float32) / temperature for x in (student, teacher))
    log_probabilities = (jax.nn.log_softmax(_only(is_other, x)) for x in scaled_logits)
    return jnp.where(is_other, _kl_terms(*log_probabilities), 0.0).sum(axis=-1)


def _kl_terms(log_student: Array, log_teacher: Array) -> Array:
    probability = jnp.exp(log_teacher)
    # A class that the teacher rules out (log-probability -inf) adds 0, not 0 * inf.
    return jnp.where(probability > 0, probability * (log_teacher - log_student), 0.0)


def _only(classes: Bool[Array, "batch classes"], logs: Logits) -> Logits:
    """All but `classes` ruled out, by a number whose gradients are finite where none is left."""
    return jnp.where(classes, logs, -1e30)


def smooth(probabilities: Float[Array, "batch classes"], share: float) -> Array:
    """`share` of each label spread evenly over all classes. Source: Szegedy et al. 2016."""
    return (1 - share) * probabilities + share / probabilities.shape[-1]


def cross_entropy(logits: Logits, targets: Float[Array, "batch classes"]) -> PerExample:
    """Cross-entropy to class probabilities `targets`, in nats: the objective on labels."""
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(axis=-1)


def _pick(values: Logits, classes: Array) -> PerExample:
    return jnp.take_along_axis(values, classes[:, None], axis=-1)[:, 0]


Distance = Callable[[Logits, Logits, Temperature], PerExample]

# `(student logits, teacher logits, temperature) -> distances`.
DISTANCES: dict[str, Distance] = {
    "kl": kl_divergence,
    "l2": l2,
    "euclidean": euclidean,
    "hard": hard,
    "standardised_kl": standardised_kl,
    "dist_rows": dist_rows,
}
# The same, where an example's distance depends on the batch.
BATCH_DISTANCES: dict[str, Distance] = {"dist_columns": dist_columns}
LabelledDistance = Callable[[Logits, Logits, Labels, Temperature], PerExample]

# `(student logits, teacher logits, labels, temperature) -> distances`.
LABELLED_DISTANCES: dict[str, LabelledDistance] = {
    "dkd_target": dkd_target,
    "dkd_others": dkd_others,
}
# Those that have no temperature.
WITHOUT_TEMPERATURE = frozenset({"l2", "euclidean", "hard"})
# Those that are multiplied by T^2 where the objective says so: their gradient goes with 1 / T^2.
SQUARED = frozenset({"kl", "standardised_kl", "dkd_target", "dkd_others"})
