"""A float student in eight bits without training: ranges of its activations on some images.

Weights and activations are rounded as by `student.quantisation` in training; ranges are the lowest
and the highest number on the images, or percentiles. Sources: Krishnamoorthi 2018 (arXiv
1806.08342), section 3.1; Wu et al. 2020 (arXiv 2004.09602), sections 4.2 and 6.1, for percentiles
and for layers that alone are rounded, by which those that stay in floats are chosen.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from fm_distill.config import QuantisationConfig
from fm_distill.errors import UserError
from fm_distill.exporting.function import Pixels
from fm_distill.models import Network, Variables, build_network, with_switches
from fm_distill.runs.student import Student
from fm_distill.views.rendering import InputSpec, normalise
from fm_distill.weights.card import MixedPrecision

# Of the output of a layer that is zero throughout.
SMALLEST_NORM = 1e-12
INT8 = QuantisationConfig(weights="int8", activations="int8")
FLOAT32 = jnp.dtype("float32")
# Share of the layers that may stay in floats.
MOST_KEPT = 0.25


class Calibration(NamedTuple):
    """A student in eight bits, and its error, by the paths of its layers."""

    student: Student
    # Of a layer's output, all layers before it rounded too: root mean square of the difference over
    # that of the float network's.
    errors: dict[str, float]
    # Of the logits, where the layer alone is rounded; see `MixedPrecision`.
    effects: dict[str, float]
    # None where no few layers carry most of the error.
    mixed_precision: MixedPrecision | None


def calibrated(
    student: Student, pixels: Pixels, quantisation: QuantisationConfig = INT8
) -> Calibration:
    """`student` in eight bits with ranges on `pixels`, and the errors on them.

    Raises `UserError` where a layer cannot be quantised.
    """
    if student.network.quantisation.quantised:
        raise UserError(
            "the student was quantised in training and is exported with its own ranges; leave "
            "out --quantise"
        )
    images = normalise(jnp.asarray(pixels, jnp.float32), InputSpec.of(student.network))
    rounded, network = _observed(student, images, quantisation)
    plain = build_network(student.network, student.classes, FLOAT32)
    errors = layer_errors(plain, network, student.variables, rounded.variables, images)
    effects, error = layer_effects(network, rounded.variables, images)
    mixed = None
    if kept := worth_keeping(effects):
        chosen = dataclasses.replace(quantisation, float_layers=(*quantisation.float_layers, *kept))
        other, other_network = _observed(student, images, chosen)
        _, with_them = layer_effects(other_network, other.variables, images, layers=())
        mixed = MixedPrecision(
            float_layers=chosen.float_layers, error=error, error_with_them=with_them
        )
    return Calibration(rounded, errors, effects, mixed)


def _observed(
    student: Student, images: Array, quantisation: QuantisationConfig
) -> tuple[Student, Network]:
    """`student` rounded so, with the ranges on `images`, and its network."""
    chosen = dataclasses.replace(student.network, quantisation=quantisation)
    try:
        network = build_network(chosen, student.classes, FLOAT32)
    except ValueError as error:
        raise UserError(str(error)) from None
    observing = network.apply_observing
    if observing is None or not network.quantised_layers:
        raise UserError(f"{chosen.model} has no layer that can be quantised; leave out --quantise")
    initial = jax.eval_shape(network.init, jax.random.key(0)).ranges
    unseen = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), initial)
    variables = dataclasses.replace(jax.tree.map(np.asarray, student.variables), ranges=unseen)

    @jax.jit
    def observed(variables: Variables, images: Array) -> Variables:
        # All images at once: the first batch's ranges are taken as they are.
        ranges = observing(variables, images, train=False).ranges
        return dataclasses.replace(variables, ranges=ranges)

    found = observed(variables, images)
    return dataclasses.replace(student, network=chosen, variables=found), network


def layer_errors(
    plain: Network, quantised: Network, before: Variables, after: Variables, images: Array
) -> dict[str, float]:
    """By path, in the order of the calls; of layers whose output is a map or a vector."""
    there = plain.feature_shapes(modules=True)
    paths = tuple(x for x in quantised.quantised_layers if x in there)

    @jax.jit
    def errors(before: Variables, after: Variables, images: Array) -> Array:
        expected = plain.apply(before, images, train=False, features=paths).features
        found = quantised.apply(after, images, train=False, features=paths).features
        norms = [jnp.maximum(jnp.linalg.norm(expected[x]), SMALLEST_NORM) for x in paths]
        apart = [jnp.linalg.norm(found[x] - expected[x]) for x in paths]
        return jnp.stack(apart) / jnp.stack(norms)

    ratios = np.asarray(errors(jax.tree.map(np.asarray, before), after, images))
    return {path: float(x) for path, x in zip(paths, ratios, strict=True)}


def layer_effects(
    network: Network, variables: Variables, images: Array, layers: tuple[str, ...] | None = None
) -> tuple[dict[str, float], float]:
    """How far each of `layers` (None: all) alone changes the logits, and how far all do."""

    @jax.jit
    def logits(ranges: PyTree) -> Array:
        rounded = dataclasses.replace(variables, ranges=ranges)
        return network.apply(rounded, images, train=False).logits

    plain = np.asarray(logits(with_switches(variables.ranges, "")), np.float64)
    spread = max(float(np.sqrt(np.square(plain - plain.mean(axis=0)).mean())), SMALLEST_NORM)

    def error(ranges: PyTree) -> float:
        apart = np.asarray(logits(ranges), np.float64) - plain
        return float(np.sqrt(np.square(apart).mean())) / spread

    paths = network.quantised_layers if layers is None else layers
    effects = {path: error(with_switches(variables.ranges, path)) for path in paths}
    return effects, error(variables.ranges)


def worth_keeping(effects: dict[str, float]) -> tuple[str, ...]:
    """The fewest layers without which half of the error is left, were the layers independent.

    None where these are more than `MOST_KEPT` of them: then all share the error.
    """
    squares = {path: x**2 for path, x in effects.items()}
    total = left = sum(squares.values())
    kept: list[str] = []
    for path in sorted(squares, key=lambda x: -squares[x]):
        if left <= total / 4:
            break
        kept.append(path)
        left -= squares[path]
    return tuple(kept) if len(kept) <= MOST_KEPT * len(effects) else ()
