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
    if (
        student.network.quantisation.activations == "none"
        and student.network.quantisation.quantised
    ):
        raise UserError(
            "only the student's weights were quantised in training, and its activations are "
            "calibrated for .tflite alone; export it so, or leave out --quantise"
        )
    if student.network.quantisation.quantised:
        raise UserError(
            "the student was quantised in training and is exported with its own ranges; leave "
            "out --quantise"
        )
    images = normalise(jnp.asarray(pixels, jnp.float32), InputSpec.of(student.network))
    quantised_student, network = _observed(student, images, quantisation)
    float_network = build_network(student.network, student.classes, FLOAT32)
    errors = layer_errors(
        float_network, network, student.variables, quantised_student.variables, images
    )
    effects, total_error = layer_effects(network, quantised_student.variables, images)
    mixed_precision = None
    if kept_layers := worth_keeping(effects):
        mixed_quantisation = dataclasses.replace(
            quantisation, float_layers=(*quantisation.float_layers, *kept_layers)
        )
        mixed_student, mixed_network = _observed(student, images, mixed_quantisation)
        _, mixed_error = layer_effects(mixed_network, mixed_student.variables, images, layers=())
        mixed_precision = MixedPrecision(
            float_layers=mixed_quantisation.float_layers,
            error=total_error,
            error_with_them=mixed_error,
        )
    return Calibration(quantised_student, errors, effects, mixed_precision)


def _observed(
    student: Student, images: Array, quantisation: QuantisationConfig
) -> tuple[Student, Network]:
    """`student` rounded so, with the ranges on `images`, and its network."""
    network_config = dataclasses.replace(student.network, quantisation=quantisation)
    try:
        network = build_network(network_config, student.classes, FLOAT32)
    except ValueError as error:
        raise UserError(str(error)) from None
    apply_observing = network.apply_observing
    if apply_observing is None or not network.quantised_layers:
        raise UserError(
            f"{network_config.model} has no layer that can be quantised; leave out --quantise"
        )
    initial = jax.eval_shape(network.init, jax.random.key(0)).ranges
    empty_ranges = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), initial)
    variables = dataclasses.replace(
        jax.tree.map(np.asarray, student.variables), ranges=empty_ranges
    )

    @jax.jit
    def observed(variables: Variables, images: Array) -> Variables:
        # All images at once: the first batch's ranges are taken as they are.
        ranges = apply_observing(variables, images, train=False).ranges
        return dataclasses.replace(variables, ranges=ranges)

    observed_variables = observed(variables, images)
    return dataclasses.replace(
        student, network=network_config, variables=observed_variables
    ), network


def layer_errors(
    plain: Network, quantised: Network, before: Variables, after: Variables, images: Array
) -> dict[str, float]:
    """By path, in the order of the calls; of layers whose output is a map or a vector."""
    float_shapes = plain.feature_shapes(modules=True)
    paths = tuple(x for x in quantised.quantised_layers if x in float_shapes)

    @jax.jit
    def errors(before: Variables, after: Variables, images: Array) -> Array:
        float_features = plain.apply(before, images, train=False, features=paths).features
        quantised_features = quantised.apply(after, images, train=False, features=paths).features
        norms = [
            jnp.maximum(jnp.linalg.norm(float_features[path]), SMALLEST_NORM) for path in paths
        ]
        differences = [
            jnp.linalg.norm(quantised_features[path] - float_features[path]) for path in paths
        ]
        return jnp.stack(differences) / jnp.stack(norms)

    ratios = np.asarray(errors(jax.tree.map(np.asarray, before), after, images))
    return {path: float(x) for path, x in zip(paths, ratios, strict=True)}


def layer_effects(
    network: Network, variables: Variables, images: Array, layers: tuple[str, ...] | None = None
) -> tuple[dict[str, float], float]:
    """How far each of `layers` (None: all) alone changes the logits, and how far all do."""

    @jax.jit
    def logits(ranges: PyTree) -> Array:
        quantised_variables = dataclasses.replace(variables, ranges=ranges)
        return network.apply(quantised_variables, images, train=False).logits

    float_logits = np.asarray(logits(with_switches(variables.ranges, "")), np.float64)
    spread = max(
        float(np.sqrt(np.square(float_logits - float_logits.mean(axis=0)).mean())), SMALLEST_NORM
    )

    def error(ranges: PyTree) -> float:
        differences = np.asarray(logits(ranges), np.float64) - float_logits
        return float(np.sqrt(np.square(differences).mean())) / spread

    paths = network.quantised_layers if layers is None else layers
    effects = {path: error(with_switches(variables.ranges, path)) for path in paths}
    return effects, error(variables.ranges)


def worth_keeping(effects: dict[str, float]) -> tuple[str, ...]:
    """The fewest layers without which half of the error is left, were the layers independent.

    None where these are more than `MOST_KEPT` of them: then all share the error.
    """
    squares = {path: x**2 for path, x in effects.items()}
    total = remaining = sum(squares.values())
    kept_layers: list[str] = []
    for path in sorted(squares, key=lambda x: -squares[x]):
        if remaining <= total / 4:
            break
        kept_layers.append(path)
        remaining -= squares[path]
    return tuple(kept_layers) if len(kept_layers) <= MOST_KEPT * len(effects) else ()
