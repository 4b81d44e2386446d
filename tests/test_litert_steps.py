"""What LiteRT's converter gets, without TensorFlow: the steps are the fake-quantised function."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from test_export_functions import pixels_of
from test_quantisation import rounded_activations, rounded_weights

from fm_distill.exporting.litert_conversion import HIGHEST, LOWEST, padding_of
from fm_distill.exporting.litert_quantisation import traced
from fm_distill.exporting.litert_ranges import with_ranges
from fm_distill.exporting.litert_steps import Step, joined
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


def steps_of(function, pixels: jax.ShapeDtypeStruct) -> list[Step]:
    found = traced(function, pixels)
    return [*joined(found.steps, found.result)]


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


@pytest.mark.parametrize("places", [(), (5,), (2, 3)], ids=["vector", "tokens", "map"])
def test_a_dense_layer_of_any_places_is_a_convolution_of_one_pixel(places):
    """As a ViT's and a ConvNeXt's are; a bias and a layer scale behind it go into it."""
    kernel = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    images = np.prod(places, dtype=int)

    def function(pixels):
        x = quantised_activations(
            pixels.reshape(-1, 16, 3)[:, :images].reshape(-1, *places, 3) / 127.5 - 1,
            Range(jnp.float32(-1), jnp.float32(1)),
            OF_ACTIVATIONS["int8"],
        )
        weights = quantised_weights(jnp.asarray(kernel), OF_WEIGHTS["int8"])
        return (jnp.matmul(x, weights) + BIAS) * FACTOR + OFFSET

    pixels = pixels_of(2, 4)
    steps = steps_of(function, jax.ShapeDtypeStruct(pixels.shape, np.uint8))
    x = pixels.reshape(-1, 16, 3)[:, :images].reshape(-1, *places, 3).astype(np.float64)
    out = rounded_activations(x / 127.5 - 1, -1, 1) @ rounded_weights(kernel, 8)
    found = computed(steps, pixels)
    assert found.shape == (2, *places, 6)
    np.testing.assert_allclose(found, (out + BIAS) * FACTOR + OFFSET, atol=2e-2)
    kinds = [x.kind for x in steps]
    assert kinds.count("convolution") == kinds.count("kernel") == kinds.count("round") == 1


def test_what_several_read_is_computed_once():
    """A GELU reads its layer twice, and each of both has a factor: once more, it would be two."""
    kernel = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)

    def function(pixels):
        x = pixels.astype(jnp.float32) / 127.5 - 1
        out = jnp.matmul(x, quantised_weights(jnp.asarray(kernel), OF_WEIGHTS["int8"])) + BIAS
        return jax.nn.gelu(out, approximate=False)

    pixels = pixels_of(2, 4)
    steps = steps_of(function, jax.ShapeDtypeStruct(pixels.shape, np.uint8))
    assert [x.kind for x in steps].count("convolution") == 1
    out = (pixels / 127.5 - 1) @ rounded_weights(kernel, 8) + BIAS
    expected = out * (1 + np.vectorize(math.erf)(out / math.sqrt(2))) / 2
    np.testing.assert_allclose(computed(steps, pixels), expected, atol=1e-4)


@pytest.mark.parametrize("name", [None, "int4"])
def test_ranges_are_those_of_the_images(name):
    """Of what a layer reads and makes, by NumPy; its weights are rounded, or were before."""
    kernel = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)

    def function(pixels):
        weights = jnp.asarray(kernel)
        weights = weights if name is None else quantised_weights(weights, OF_WEIGHTS[name])
        x = pixels.reshape(-1, 16, 3).astype(jnp.float32) / 100
        return jnp.tanh(jnp.matmul(x, weights) + BIAS)

    pixels = pixels_of(6, 4)
    found = traced(
        function, jax.ShapeDtypeStruct((2, 4, 4, 3), np.uint8), calibrated=True, floats=name is None
    )
    steps = with_ranges(found.steps, pixels.reshape(3, 2, 4, 4, 3))
    weights = rounded_weights(kernel, 8 if name is None else 4)
    x = pixels.reshape(-1, 16, 3) / 100
    out = x @ weights + BIAS
    read, made = (x.values for x in steps if x.kind == "round")
    assert read["scale"] == pytest.approx(x.max() / 255) and read["zero_point"] == -128
    assert made["scale"] == pytest.approx((out.max() - out.min()) / 254, rel=1e-5)
    assert made["zero_point"] == np.rint(-128 - out.min() / made["scale"])
    (step,) = (x for x in steps if x.kind == "kernel")
    np.testing.assert_allclose(step.values["weights"][0, 0], weights, rtol=1e-5, atol=1e-7)
    assert step.values["highest"] == (127 if name is None else 7)
    rounded = computed([*joined(steps, found.result)], pixels[:2])
    np.testing.assert_allclose(rounded, np.tanh(out[:2]), atol=2 * made["scale"])


def transposed(pixels: jax.Array) -> jax.Array:
    """A convolution that sets its pixels apart by zeros, with rounded weights."""
    kernel = np.arange(12, dtype=np.float32).reshape(2, 2, 3, 1) / 12 - 0.4
    return jax.lax.conv_general_dilated(
        pixels.astype(jnp.float32),
        quantised_weights(jnp.asarray(kernel), OF_WEIGHTS["int8"]),
        (1, 1),
        ((1, 1), (1, 1)),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def transposed_by_numpy(pixels: np.ndarray) -> np.ndarray:
    kernel = rounded_weights(np.arange(12).reshape(2, 2, 3, 1) / 12 - 0.4, 8)
    rows, side = len(pixels), pixels.shape[1]
    apart = np.zeros((rows, 2 * side + 1, 2 * side + 1, 3))
    apart[:, 1::2, 1::2] = pixels
    out = np.zeros((rows, 2 * side, 2 * side, 1))
    for i in range(2):
        for j in range(2):
            out += apart[:, i : i + 2 * side, j : j + 2 * side] @ kernel[i, j]
    return out


def test_a_transposed_convolution_is_no_plain_one():
    pixels = pixels_of(2, 4)
    (step,) = steps_of(transposed, jax.ShapeDtypeStruct(pixels.shape, np.uint8))
    assert step.kind == "call"
    expected = transposed_by_numpy(pixels)
    np.testing.assert_allclose(computed([step], pixels), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
def test_same_padding_is_named_so(kernel, stride):
    """Against JAX's own count of zeros; a padding that differs from it stands by itself."""
    for sizes in ((7, 12), (16, 5)):
        for dilation in (1, 2):
            window = ((kernel - 1) * dilation + 1,) * 2
            zeros = jax.lax.padtype_to_pads(sizes, window, (stride, stride), "SAME")
            layer = sizes, (kernel, kernel), (stride, stride)
            name, before = padding_of(*layer, zeros, (dilation, dilation))
            assert (name, before) == (("SAME", []) if np.any(zeros) else ("VALID", []))
            other = [[low + 1, high] for low, high in zeros]
            assert padding_of(*layer, other, (dilation, dilation)) == ("VALID", other)
