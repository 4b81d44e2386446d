"""Quantised students as files: what ONNX Runtime computes in integers is what was trained."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from test_cli import command
from test_export_functions import pixels_of, run_elsewhere
from test_export_onnx import READ_ONNX, of_pixels
from test_quantisation import STUDENT, WITH_BATCH_NORM, rounded_activations, rounded_weights
from tiny import logits_of, tiny_config

from fm_distill.errors import UserError
from fm_distill.evaluation.inference import open_student
from fm_distill.exporting import onnx_file
from fm_distill.exporting.export import export
from fm_distill.exporting.function import Runtime, function_of
from fm_distill.exporting.parity import compare, examples_of
from fm_distill.models import build_network, ranges_of
from fm_distill.models.quantisation import (
    OF_ACTIVATIONS,
    OF_WEIGHTS,
    Range,
    quantised_activations,
    quantised_weights,
)
from fm_distill.runs.open_run import open_run
from fm_distill.runs.student import BATCH
from fm_distill.training.train import train

DATA = ("QuantizeLinear", "DequantizeLinear")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Complete int8 runs, with GroupNorm and with BatchNorm."""
    folder = tmp_path_factory.mktemp("int8")
    for name, student in (("group", STUDENT), ("batch", WITH_BATCH_NORM)):
        train(tiny_config(student=student), folder / name)
    return folder


def trained_logits(workdir, pixels: np.ndarray) -> np.ndarray:
    """By the run's own fake-quantised network, in training's form."""
    student = open_run(workdir).student
    network = build_network(student.network, 10, jnp.dtype("float32"))
    images = (pixels.astype(np.float32) - 127.5) / 127.5
    return np.asarray(logits_of(network, student.variables, jnp.asarray(images)))


def stored(model) -> dict[str, np.ndarray]:
    return {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_int8_file_computes_what_was_trained(runs, tmp_path, norm):
    path, pixels = tmp_path / "x.onnx", pixels_of(64)
    card = export(runs / norm, path, batch="dynamic", output="logits")
    found, _ = run_elsewhere(READ_ONNX, path, pixels, tmp_path)
    expected = trained_logits(runs / norm, pixels)
    step = np.ptp(expected) / 255
    assert (np.abs(found - expected) <= step).mean() >= 0.99 and step > 1e-4
    parity = card.function.parity
    assert parity.within_bound >= 0.99 and parity.images == 128
    # Every kernel is there once, as integers, and nothing of its size in float.
    weights = stored(onnx.load(path))
    params = open_run(runs / norm).student.variables.params
    kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
    integers = [x for x in weights.values() if x.dtype == np.uint8 and x.ndim > 1]
    assert sorted(x.size for x in integers) == sorted(x.size for x in kernels)
    assert max(x.size for x in weights.values() if x.dtype == np.float32) < 200
    assert card.function.bytes < path.stat().st_size
    assert card.function.float32_bytes > sum(4 * x.size for x in kernels)


def test_runtimes_compute_in_integers(runs, tmp_path):
    """The convolutions behind which a norm was folded, and each with an int32 bias."""
    function = function_of(open_run(runs / "batch").student, "logits")
    data = onnx_file.to_onnx(function, 16, 1, "bit")
    nodes = onnx.ModelProto.FromString(data).graph.node
    made = {x.output[0]: x for x in nodes}
    kinds = [x.op_type for x in nodes]
    assert "Max" not in kinds and kinds.count("Relu") == 4
    biased = [x for x in nodes if x.op_type == "Conv" and len(x.input) == 3]
    assert len(biased) == 3 and {made[x.input[2]].op_type for x in biased} == {"DequantizeLinear"}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    optimised = [x.op_type for x in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert optimised.count("QLinearConv") == 4


def scaled_convolution(x, kernel, factor, offset, activation):
    seen = Range(jnp.float32(-1), jnp.float32(1))
    x = quantised_activations(x, seen, OF_ACTIVATIONS["int8"])
    kernel = quantised_weights(jnp.asarray(kernel), OF_WEIGHTS["int8"])
    out = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return activation(out * factor + offset)


@pytest.mark.parametrize(
    "activation", [jax.nn.relu, jax.nn.relu6, jnp.tanh], ids=["relu", "relu6", "tanh"]
)
def test_what_is_folded_against_numpy(activation):
    """Factors of both signs and zero, and a bias that does not fit into 32 bits."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(1, 1, 3, 6)).astype(np.float32)
    factor = np.float32([1.5, -0.7, 0.0, 1e-3, 2.0, -1.0])
    for offset in (np.float32([0.1, 0.2, 0.3, -0.4, 0, 1]), np.float32([1e9, 0, 0.5, 0, 0, 0])):
        data = onnx_file.to_onnx(
            of_pixels(lambda x, o=offset: scaled_convolution(x, kernel, factor, o, activation)),
            4, 2, "mine",
        )  # fmt: skip
        model = onnx.ModelProto.FromString(data)
        assert not {"Mul", "Max", "Min"} & {x.op_type for x in model.graph.node[4:]}
        pixels = pixels_of(2, 4)
        images = pixels.astype(np.float64) / 127.5 - 1
        out = rounded_activations(images, -1, 1) @ rounded_weights(kernel, 8)[0, 0]
        expected = np.asarray(activation(jnp.asarray(out * factor + offset)))
        found = onnx_file.load_function(data).call(pixels)
        np.testing.assert_allclose(found, expected, atol=2e-2, rtol=1e-6)
        assert np.abs(found - expected).mean() < 2e-3
        types = {x.dtype for x in stored(model).values()}
        assert (np.dtype(np.int32) in types) == (offset.max() < 1e8)


def test_four_bits_are_random_integers_up_to_seven(runs, tmp_path):
    student = dataclasses.replace(STUDENT, quantisation=dataclasses.replace(
        STUDENT.quantisation, weights="int4", activations="none",
    ))  # fmt: skip
    train(tiny_config(student=student), tmp_path / "run")
    card = export(tmp_path / "run", tmp_path / "x.onnx")
    assert card.function.parity.within_bound == 1
    weights = [x for x in stored(onnx.load(tmp_path / "x.onnx")).values() if x.dtype == np.uint8]
    largest = {int(np.abs(np.int16(x) - 128).max()) for x in weights if x.ndim == 4}
    assert largest == {7, 127}  # the first layer keeps eight bits
    # Weights alone need no ranges, so that they can leave as weights, too.
    export(tmp_path / "run", tmp_path / "x.safetensors")
    images = np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), np.uint8)
    both = [open_run(tmp_path / "run").student, open_student(tmp_path / "x.safetensors")]
    np.testing.assert_array_equal(*(x.logits(images) for x in both))


def test_a_quantised_student_leaves_as_stablehlo(runs, tmp_path):
    card = export(runs / "batch", tmp_path / "x.stablehlo", output="logits")
    assert card.function.parity.within_bound >= 0.99


def test_the_command_says_what_a_file_weighs(runs, tmp_path, capsys):
    code, out, _ = command(capsys, "export", runs / "batch", tmp_path / "x.onnx")
    facts = json.loads(onnx.load(tmp_path / "x.onnx").metadata_props[0].value)["function"]
    share = facts["bytes"] / facts["float32_bytes"]
    assert (
        "of the spread of the run's outputs (0.05 allowed)" in out
        and code == 0
        and f"{facts['bytes']:,} bytes without its card, {share:.2f} of the size" in out
    )


def test_a_changed_range_is_refused(runs):
    """What the file computes is compared with the run before anything is written."""
    run = open_run(runs / "batch")
    examples = examples_of(run.config, run.student)
    ranges = jax.tree.map(lambda x: 0.7 * x, run.student.variables.ranges)
    variables = dataclasses.replace(run.student.variables, ranges=ranges)
    changed = dataclasses.replace(run.student, variables=variables)
    data = onnx_file.to_onnx(function_of(changed, "logits"), 16, "dynamic", "bit")
    runtime = onnx_file.load_function(data)
    with pytest.raises(
        UserError, match=r"of the spread .* where 0.05 is allowed, and .* where 99% would"
    ):
        compare(runtime, "onnx", run.student, "logits", "dynamic", examples)


@pytest.mark.parametrize(("error", "refused"), [(0.04, False), (0.06, True), (np.nan, True)])
def test_a_twentieth_of_the_spread_is_what_rounding_may_do(runs, error, refused):
    """In a deep network fewer than 99 % of the outputs are within a step."""
    run = open_run(runs / "batch")
    examples = examples_of(run.config, run.student)
    function = jax.jit(function_of(run.student, "logits"))
    expected = np.asarray(function(jnp.asarray(examples.pixels)))
    changed = np.random.default_rng(0).permutation(expected.size) < 0.02 * expected.size
    difference = np.where(changed, error * (expected - expected.mean(0)).std() / 0.02**0.5, 0)
    outputs = expected + difference.reshape(expected.shape)
    if np.isnan(error):
        outputs = expected.copy()
        outputs[0, 0] = np.nan  # a single one
    batches = iter(np.split(outputs, range(BATCH, len(outputs), BATCH)))
    runtime = Runtime("mine", lambda pixels: next(batches))
    if refused:
        with pytest.raises(UserError, match="so nothing was written"):
            compare(runtime, "onnx", run.student, "logits", "dynamic", examples)
    else:
        parity = compare(runtime, "onnx", run.student, "logits", "dynamic", examples)
        assert parity.within_bound < 0.99
        assert parity.relative_error == pytest.approx(error, rel=0.1)


def test_what_is_refused(runs, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="would hold weights only"):
        export(runs / "group", tmp_path / "x.safetensors")
    path = tmp_path / "x.onnx"
    export(runs / "group", path)
    model = onnx.load(path)
    scale = next(x.input[1] for x in model.graph.node if x.op_type in DATA)
    weight = next(x for x in model.graph.initializer if x.name == scale)
    weight.raw_data = np.float32(np.nan).tobytes()
    digest = next(x for x in model.metadata_props if x.key == onnx_file.DIGEST_KEY)
    digest.value = onnx_file._digest(model)
    onnx.save(model, path)
    with pytest.raises(UserError, match=rf"scale that is not positive, {scale}; export it again"):
        open_student(path)
    run = open_run(runs / "group")
    layers = build_network(run.network, 10, jnp.dtype("float32")).quantised_layers
    places = {f"{x}/input" for x in layers} | {"block1_unit01/branch"}
    assert set(ranges_of(run.student.variables)) == places
    broken = jax.tree.map(lambda x: x * np.nan, run.student.variables.ranges)
    student = dataclasses.replace(
        run.student, variables=dataclasses.replace(run.student.variables, ranges=broken)
    )
    monkeypatch.setattr(
        "fm_distill.exporting.export.open_run", lambda *_: dataclasses.replace(run, student=student)
    )
    with pytest.raises(UserError, match="an invalid range for block1_unit01/a/input, nan to nan"):
        export(runs / "group", path, overwrite=True)
