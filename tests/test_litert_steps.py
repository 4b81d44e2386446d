"""What LiteRT's converter gets, without TensorFlow: the steps are the fake-quantised function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from test_export_functions import pixels_of
from test_quantisation import rounded_activations, rounded_weights

from fm_distill.exporting.litert_conversion import HIGHEST, LOWEST
from fm_distill.exporting.litert_quantisation import Step, steps_of
from fm_distill.models.quantisation import (
    OF_ACTIVATIONS,
    OF_WEIGHTS,
    Range,
    quantised_activations,
    quantised_weights,
)

FACTOR = np.float32([1.5, -0.7, 0.0, 1e-3, 2.0, -1.0])
BIAS = np.float32([0.5, 1, -1, 2, -0.5, 0.3])
OFFSET = np.float32([0.1, 0.2, 0.3, -0.4, 0, 1])


def computed(steps: list[Step], pixels: np.ndarray) -> np.ndarray:
    """By NumPy in float64, but for what JAX exported."""
    known: dict[int, np.ndarray] = {0: pixels}
    for step in steps:
        inputs, values = [known[x] for x in step.reads], step.values
        if step.kind == "round":
            whole = np.rint(inputs[0] / values["scale"]) + values["zero_point"]
            whole = np.clip(whole, LOWEST, HIGHEST)
            found = [(whole - values["zero_point"]) * values["scale"]]
        elif step.kind == "kernel":
            whole = np.rint(values["weights"] / values["scales"].astype(np.float64))
            assert np.abs(whole).max() <= values["highest"]
            found = [whole * values["scales"]]
        elif step.kind == "convolution":
            assert inputs[1].shape[:2] == (1, 1) and values["strides"] == (1, 1)
            found = [inputs[0] @ inputs[1][0, 0] + values["offset"]]
        else:
            function = export.deserialize(bytearray(values["function"]))
            arrays = [
                np.asarray(x, y.dtype) for x, y in zip(inputs, function.in_avals, strict=True)
            ]
            found = [np.asarray(x) for x in jax.tree.leaves(function.call(*arrays))]
        known.update(zip(step.makes, found, strict=True))
    return known[steps[-1].makes[0]]


def layer(kernel: np.ndarray, depthwise: bool):
    """Rounded pixels and weights; behind a name a bias, a norm's factor and offset; a ReLU."""

    def function(pixels):
        x = quantised_activations(
            pixels.astype(jnp.float32) / 127.5 - 1,
            Range(jnp.float32(-1), jnp.float32(1)),
            OF_ACTIVATIONS["int8"],
        )
        x = x[..., jnp.array([0, 1, 2, 0, 1, 2])] if depthwise else x
        out = jax.lax.conv_general_dilated(
            x,
            quantised_weights(jnp.asarray(kernel), OF_WEIGHTS["int8"]),
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=6 if depthwise else 1,
        )
        out = jax.ad_checkpoint.checkpoint_name(out, "convolution")
        return jax.nn.relu((out + BIAS) * FACTOR + OFFSET)

    return function


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
def test_the_steps_are_the_function_by_numpy(depthwise):
    """Factors of both signs and zero go into scales of the weights; integers stay as they are."""
    shape = (1, 1, 1 if depthwise else 3, 6)
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    pixels = pixels_of(2, 4)
    spec = jax.ShapeDtypeStruct(pixels.shape, np.uint8)
    steps = steps_of(layer(kernel, depthwise), spec)
    images = rounded_activations(pixels.astype(np.float64) / 127.5 - 1, -1, 1)
    weights = rounded_weights(kernel, 8)[0, 0]
    out = images[..., [0, 1, 2, 0, 1, 2]] * weights[0] if depthwise else images @ weights
    expected = np.maximum((out + BIAS) * FACTOR + OFFSET, 0)
    found = computed(steps, pixels)
    # Pixels lie midway between two numbers nowhere, but float32 may move one to the next.
    np.testing.assert_allclose(found, expected, atol=2e-2)
    assert np.abs(found - expected).mean() < 2e-3
    (rounding,) = (x for x in steps if x.kind == "round")
    assert rounding.values["scale"] == pytest.approx(2 / 254)
    (made,) = (x for x in steps if x.kind == "kernel")
    largest = np.abs(kernel).max(axis=(0, 1, 2)) / 127 * np.abs(FACTOR)
    largest[2] = 1  # nothing is left of this channel
    np.testing.assert_allclose(made.values["scales"], largest, rtol=1e-6)
    assert [x.kind for x in steps].count("convolution") == (not depthwise)


def test_floats_stay_one_function():
    spec = jax.ShapeDtypeStruct((1, 4, 4, 3), np.uint8)
    (step,) = steps_of(lambda x: x.astype(jnp.float32).mean(axis=(1, 2)), spec)
    assert step.kind == "call" and step.reads == (0,)
