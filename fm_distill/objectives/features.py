"""Distances between features of student and teacher, in float32, one number per example.

Features are named by the networks: maps (batch, rows, columns, channels), or vectors. Those in
`FEATURE_DISTANCES` need no adapter; those in `ADAPTED_DISTANCES` are of features of one shape. To
add one: a function and a line in a table; the tests run over the tables.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fm_distill.config.objective import BANK_SIMILARITY
from fm_distill.objectives.distances import LEAST_SQUARE, PerExample

Features = Float[Array, "batch ..."]
Maps = Float[Array, "batch _ _ _"]
Vectors = Float[Array, "batch _"]
Square = Float[Array, "batch batch"]


def attention(student: Maps, teacher: Maps) -> PerExample:
    """Mean square of the difference of the attention maps, each of norm 1.

    Attention is the mean over channels of the square. Source: Zagoruyko and Komodakis 2017
    (arXiv 1612.03928), the authors' code; a mean over places, so smaller for larger maps.
    """
    return jnp.square(_attention_difference(student, teacher)).mean(axis=-1)


def attention_norm(student: Maps, teacher: Maps) -> PerExample:
    """Half the norm of the difference of the attention maps: the paper's equation 2, beta 1."""
    squares = jnp.square(_attention_difference(student, teacher)).sum(axis=-1)
    return 0.5 * _root(squares)


def _attention_difference(student: Maps, teacher: Maps) -> Vectors:
    student_map, teacher_map = (
        jnp.square(x.astype(jnp.float32)).mean(axis=-1, keepdims=True) for x in (student, teacher)
    )
    student_map, teacher_map = of_one_size(student_map, teacher_map)
    return _unit(student_map) - _unit(teacher_map)


def _shrunk(x: Maps, side: tuple[int, int]) -> Maps:
    if x.shape[1:3] == side:
        return x
    shape = (len(x), *side, x.shape[-1])
    return jax.image.resize(x, shape, "linear", antialias=True)


def similarity(student: Features, teacher: Features) -> PerExample:
    """Square of the difference of the rows of both Gram matrices over the batch, each of norm 1.

    Source: Tung and Mori 2019 (arXiv 1907.09682), equations 1 to 4. Its mean over the batch is the
    paper's loss.
    """

    def gram(x: Features) -> Square:
        rows = _flat(x)
        return _unit(_products(rows, rows))

    return jnp.square(gram(student) - gram(teacher)).sum(axis=-1) / len(student)


def rkd_distance(student: Features, teacher: Features) -> PerExample:
    """Smooth L1 of the distances between examples, over the mean distance of each side.

    Source: Park et al. 2019 (arXiv 1904.05068), equations 5 to 7, and the authors' code: squares
    no less than 1e-12 before the root, zero on the diagonal, all batch^2 pairs in the mean. Their
    weight is 1 for embeddings that are not normalised.
    """
    return optax.huber_loss(_relative(_flat(student)), _relative(_flat(teacher))).mean(axis=-1)


def _relative(x: Vectors) -> Square:
    squared_norms = jnp.square(x).sum(axis=-1)
    squared_distances = squared_norms[:, None] + squared_norms[None] - 2 * _products(x, x)
    distances = jnp.sqrt(jnp.maximum(squared_distances, 1e-12)) * (1 - jnp.eye(len(x)))
    is_positive = distances > 0
    return distances / (distances.sum() / jnp.maximum(is_positive.sum(), 1))


def rkd_angle(student: Features, teacher: Features) -> PerExample:
    """Smooth L1 of the cosines of the angles at each example, over all batch^2 pairs of others.

    Source: Park et al. 2019, equations 8 and 9, and the authors' code; their weight is 2. It keeps
    batch^3 numbers.
    """

    def cosines(x: Vectors) -> Float[Array, "batch batch batch"]:
        directions = _unit(x[None] - x[:, None])
        return jnp.einsum(
            "ijc,ikc->ijk", directions, directions, precision=jax.lax.Precision.HIGHEST
        )

    return optax.huber_loss(cosines(_flat(student)), cosines(_flat(teacher))).mean(axis=(1, 2))


def hint(student: Features, teacher: Features) -> PerExample:
    """Mean square of the difference.

    Source: Romero et al. 2015 (arXiv 1412.6550), equation 3, which is half the sum; a mean here, as
    in mdistiller, so that the weight does not depend on the size of the map.
    """
    difference = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    return jnp.square(difference).mean(axis=tuple(range(1, difference.ndim)))


def hint_normalised(student: Features, teacher: Features) -> PerExample:
    """Square of the difference of the features, each example's of norm 1: 2 - 2 cosine."""
    return jnp.square(_unit(_flat(student)) - _unit(_flat(teacher))).sum(axis=-1)


def cosine(student: Features, teacher: Features) -> PerExample:
    """1 - the cosine of the channels at each place, in the mean over the places."""
    student_features, teacher_features = (x.astype(jnp.float32) for x in (student, teacher))
    student_features, teacher_features = (
        x / _root(jnp.square(x).sum(axis=-1, keepdims=True))
        for x in (student_features, teacher_features)
    )
    # Of the difference: 1 - a product rounds below zero where both are equal.
    distances = 0.5 * jnp.square(student_features - teacher_features).sum(axis=-1)
    return distances.reshape(len(distances), -1).mean(axis=-1)


def pooled(x: Features) -> Vectors:
    """The mean over all places, in float32: pixels of a map, or tokens; vectors as they are."""
    x = x.astype(jnp.float32)
    return x if x.ndim == 2 else x.mean(axis=tuple(range(1, x.ndim - 1)))


def of_one_size(student: Features, teacher: Features) -> tuple[Features, Features]:
    """Maps, of which the larger is shrunk with antialiasing to the smaller; vectors as they are."""
    if student.ndim != 4:
        return student, teacher
    side = min(student.shape[1], teacher.shape[1]), min(student.shape[2], teacher.shape[2])
    return _shrunk(student, side), _shrunk(teacher, side)


def _flat(x: Features) -> Vectors:
    return x.reshape(len(x), -1).astype(jnp.float32)


def _products(x: Vectors, y: Vectors) -> Square:
    return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)


def _unit(x: Float[Array, "..."]) -> Array:
    """With norm 1 along the last axis, or over a whole map; zero stays zero."""
    x = x.reshape(len(x), -1) if x.ndim == 4 else x
    return x / _root(jnp.square(x).sum(axis=-1, keepdims=True))


def _root(squares: Float[Array, "..."]) -> Array:
    """Whose gradient at zero is finite."""
    return jnp.sqrt(squares + LEAST_SQUARE**2)


FeatureDistance = Callable[[Features, Features], PerExample]

# `(student's features, teacher's features) -> distances`.
FEATURE_DISTANCES: dict[str, FeatureDistance] = {
    "attention": attention,
    "attention_norm": attention_norm,
    "similarity": similarity,
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
}
# The same, where the student's went through an adapter and both are of one shape.
ADAPTED_DISTANCES: dict[str, FeatureDistance] = {
    "hint": hint,
    "hint_normalised": hint_normalised,
    "cosine": cosine,
}
ADAPTED = ADAPTED_DISTANCES.keys() | {BANK_SIMILARITY}
OF_FEATURES = FEATURE_DISTANCES.keys() | ADAPTED
# Those that need maps, and those in which an example's distance depends on the batch.
OF_MAPS = frozenset({"attention", "attention_norm"})
OVER_BATCH = frozenset({"similarity", "rkd_distance", "rkd_angle"})
