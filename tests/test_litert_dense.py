"""Dense layers and convolutions of a ViT and a ConvNeXt in LiteRT: eight bits, and the function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from test_export_functions import pixels_of
from test_litert_steps import transposed, transposed_by_numpy
from test_quantisation import INT8, STUDENT, rounded_weights, with_head
from tiny import tiny_config

from fm_distill.config import NetworkConfig, QuantisationConfig
from fm_distill.exporting import litert_file
from fm_distill.exporting.export import export
from fm_distill.models.assembly import make_network
from fm_distill.models.convnext import ConvNeXt
from fm_distill.models.convnext import Design as ConvNeXtDesign
from fm_distill.models.layers import identity
from fm_distill.models.vit import VisionTransformer
from fm_distill.models.vit_designs import Design
from fm_distill.training.train import train

FLOAT32 = jnp.dtype("float32")
NETWORKS = {
    "vit": VisionTransformer(Design(16, 1, 2, patch=8, resolution=32), (32,), 10, FLOAT32),
    "convnext": ConvNeXt(ConvNeXtDesign((1,), 16, second_version=True), 10, FLOAT32),
}
FLOATS = QuantisationConfig()
ROUNDED_4 = QuantisationConfig(weights="int4", first_layer="none", head="none")


def network_of(name: str, quantisation: QuantisationConfig):
    """A small one and its variables, with ranges of `images_of(...)` where it has any."""
    config = NetworkConfig(model=name, resolution=32, quantisation=quantisation)
    network = make_network(NETWORKS[name], NETWORKS[name], identity, config, 10, FLOAT32)
    variables = with_head(jax.jit(network.init)(jax.random.key(0)))
    if variables.ranges:
        images = images_of(pixels_of(16, 32))
        variables = jax.jit(lambda x: dataclasses.replace(
            x, ranges=network.apply_observing(x, images, train=False).ranges
        ))(variables)  # fmt: skip
    return network, variables


def images_of(pixels) -> jax.Array:
    return (jnp.asarray(pixels, jnp.float32) - 127.5) / 127.5


def written(network, variables, quantise: str) -> bytes:
    frozen = jax.jit(network.freeze)(variables)
    return litert_file.to_quantised(
        lambda x: network.apply_portable(frozen, images_of(x)),
        32, 1, "mine", quantise, pixels_of(16, 32) if quantise == "int8" else None,
    )  # fmt: skip


def compared(network, variables, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the file, and of the network in training's form."""
    pixels = pixels_of(24, 32)[16:]
    call = litert_file.load_function(data).call
    found = np.concatenate([call(pixels[i : i + 1]) for i in range(len(pixels))])
    logits = jax.jit(lambda x: network.apply(variables, x, train=False).logits)
    return found, np.asarray(logits(images_of(pixels)))


def read(data: bytes):
    """Constant kernels of layers or of what makes them floats: array, scales and axis; and kinds.

    A kind is an operation's name with the types of its first input and output.
    """
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    (graph,) = model.subgraphs
    codes = {x: name for name, x in vars(schema.BuiltinOperator).items()}
    types = {x: name for name, x in vars(schema.TensorType).items()}
    constants, kinds = {}, []
    for x in graph.operators:
        name = codes[model.operatorCodes[x.opcodeIndex].builtinCode]
        ends = graph.tensors[x.inputs[0]], graph.tensors[x.outputs[0]]
        kinds.append((name, *(types[end.type] for end in ends)))
        for number in (number for number in x.inputs if number >= 0):
            tensor = graph.tensors[number]
            content = model.buffers[tensor.buffer].data
            kind = types[tensor.type]
            if content is None or kind not in ("INT4", "INT8", "FLOAT32"):
                continue
            array = np.asarray(content, np.uint8).view(np.float32 if kind == "FLOAT32" else np.int8)
            if kind == "INT4":  # two in a byte, the lower half first
                array = np.stack([array << 4 >> 4, array >> 4], axis=-1).reshape(-1)
            array = array[: np.prod(tensor.shape)].reshape(tensor.shape)
            of = tensor.quantization
            constants[int(number)] = (array, of and of.scale, of and of.quantizedDimension)
    return [*constants.values()], kinds


def kernels_of(variables) -> list[np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(variables.params)
    return [np.asarray(x) for path, x in found if path[-1].key == "kernel"]


def check_kernels(variables, data: bytes, bits: int) -> None:
    """Each kernel of the run is there once, in integers: by NumPy, in every one of its numbers.

    First layer and head have eight bits, or with weights of four bits none of their own.
    """
    whole = [x for x in read(data)[0] if x[0].dtype == np.int8 and x[0].size > 1]
    kernels = kernels_of(variables)
    inner = [x for x in kernels if x.shape[-1] != 10 and x.ndim == 2]
    assert len(inner) >= 2
    for kernel in kernels if bits == 8 else inner:
        expected = rounded_weights(kernel, bits).reshape(-1, kernel.shape[-1])
        there = []
        for array, scales, axis in whole:
            flat = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]) * scales
            there.append(flat.shape == expected.shape and np.allclose(flat, expected, rtol=1e-5))
        assert sum(there) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_a_float_student_is_calibrated_layer_by_layer(name):
    """The converter's own calibration rounds norms and GELU too, and LiteRT aborts in its file."""
    network, variables = network_of(name, FLOATS)
    data = written(network, variables, "int8")
    found, expected = compared(network, variables, data)
    error = np.sqrt(np.square(found - expected).mean()) / expected.std()
    assert 1e-4 < error < 0.1
    _, kinds = read(data)
    layers = {"vit": 6, "convnext": 5}[name]
    of_layers = [x for x in kinds if x[0] in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")]
    assert len(of_layers) == layers and {x[1:] for x in of_layers} == {("INT8", "INT8")}
    assert {x[1:] for x in kinds if x[0] == "RSQRT"} == {("FLOAT32", "FLOAT32")}
    check_kernels(variables, data, 8)


@pytest.mark.parametrize(("name", "bits"), [("vit", 8), ("convnext", 8), ("vit", 4)])
def test_kernels_of_a_rounded_student_are_its_integers(name, bits):
    """Also where the sum or the norm that follows is in floats; by NumPy, in every bit."""
    network, variables = network_of(name, INT8 if bits == 8 else ROUNDED_4)
    data = written(network, variables, "none")
    found, expected = compared(network, variables, data)
    step = np.ptp(expected) / 255 if bits == 8 else 1e-4 * np.abs(expected).max()
    assert (np.abs(found - expected) <= step).mean() >= 0.97
    check_kernels(variables, data, bits)


def test_weights_alone_are_calibrated_with_their_integers():
    """`--quantise int8` of a student with weights of four bits keeps them."""
    network, variables = network_of("vit", ROUNDED_4)
    data = written(network, variables, "int8")
    found, expected = compared(network, variables, data)
    assert np.sqrt(np.square(found - expected).mean()) < 0.1 * expected.std()
    _, kinds = read(data)
    of_layers = [x for x in kinds if x[0] in ("CONV_2D", "FULLY_CONNECTED")]
    of_floats = ("FLOAT32", "FLOAT32")  # first layer and head, as in training
    assert [x[1:] for x in of_layers].count(of_floats) == 2
    assert len(of_layers) == 6 and {x[1:] for x in of_layers} == {("INT8", "INT8"), of_floats}
    check_kernels(variables, data, 4)


def test_a_run_with_rounded_weights_alone_is_exported_in_integers(tmp_path):
    student = dataclasses.replace(STUDENT, quantisation=QuantisationConfig(weights="int4"))
    train(tiny_config(student=student), tmp_path / "run")
    card = export(tmp_path / "run", tmp_path / "x.tflite", output="logits", quantise="int8")
    assert card.function.quantise == "int8" and card.function.parity.within_bound == 1


def test_a_transposed_convolution_is_converted_as_what_it_is():
    pixels = pixels_of(1, 4)
    data = litert_file.to_litert(lambda x: transposed(x).reshape(1, -1), 4, 1, "mine")
    found = litert_file.load_function(data).call(pixels)
    expected = transposed_by_numpy(pixels).reshape(1, -1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)
