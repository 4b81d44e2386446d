"""A float student in eight bits without training: ranges of its activations on some images.

Weights and activations are rounded as by `student.quantisation` in training; ranges are the lowest
and the highest number on the images. Source: Krishnamoorthi 2018 (arXiv 1806.08342), section 3.1.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fm_distill.config import QuantisationConfig
from fm_distill.errors import UserError
from fm_distill.exporting.function import Pixels
from fm_distill.models import Network, Variables, build_network
from fm_distill.runs.student import Student
from fm_distill.views.rendering import InputSpec, normalise

# Of the output of a layer that is zero throughout.
SMALLEST_NORM = 1e-12
INT8 = QuantisationConfig(weights="int8", activations="int8")


def calibrated(student: Student, pixels: Pixels) -> tuple[Student, dict[str, float]]:
    """`student` in eight bits with ranges on `pixels`, and the error of each layer by its path.

    The error is that of the layer's output on `pixels`, all layers before it rounded too: its root
    mean square over that of the float network's. Raises `UserError` where a layer cannot be
    quantised.
    """
    if student.network.quantisation.quantised:
        raise UserError(
            "the student was quantised in training and leaves with its own ranges; leave out "
            "--quantise"
        )
    chosen = dataclasses.replace(student.network, quantisation=INT8)
    try:
        network = build_network(chosen, student.classes, jnp.dtype("float32"))
    except ValueError as error:
        raise UserError(str(error)) from None
    observing = network.apply_observing
    if observing is None or not network.quantised_layers:
        raise UserError(f"{chosen.model} has no layer that can be quantised; leave out --quantise")
    images = normalise(jnp.asarray(pixels, jnp.float32), InputSpec.of(student.network))
    initial = jax.eval_shape(network.init, jax.random.key(0)).ranges
    unseen = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), initial)
    variables = dataclasses.replace(jax.tree.map(np.asarray, student.variables), ranges=unseen)

    @jax.jit
    def observed(variables: Variables, images: Array) -> Variables:
        # All images at once: the first batch's ranges are taken as they are.
        ranges = observing(variables, images, train=False).ranges
        return dataclasses.replace(variables, ranges=ranges)

    variables = observed(variables, images)
    plain = build_network(student.network, student.classes, jnp.dtype("float32"))
    errors = layer_errors(plain, network, student.variables, variables, images)
    return dataclasses.replace(student, network=chosen, variables=variables), errors


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
