"""A float student in eight bits without training: ranges, errors and the file, against NumPy."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import command
from test_export_functions import pixels_of, run_elsewhere
from test_export_onnx import READ_ONNX
from test_quantisation import STUDENT, WITH_BATCH_NORM
from tiny import NETWORK, logits_of, tiny_config

from fm_distill.config import with_options
from fm_distill.errors import UserError
from fm_distill.exporting.calibration import INT8, calibrated, worth_keeping
from fm_distill.exporting.export import export
from fm_distill.exporting.parity import images_of
from fm_distill.models import build_network, ranges_of, with_switches
from fm_distill.runs.open_run import open_run
from fm_distill.training.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a complete float run with BatchNorm."""
    path = tmp_path_factory.mktemp("float") / "run"
    train(tiny_config(student=with_options(NETWORK, {"norm": "batch"})), path)
    return path


def test_ranges_are_the_extremes_on_the_images(run):
    student, pixels = open_run(run).student, pixels_of(40)
    pixels[:-1] = 60 + pixels[:-1] // 4  # the last one alone is as dark and as bright
    found = calibrated(student, pixels).student
    images = (pixels.astype(np.float64) - 127.5) / 127.5
    low, high, _ = ranges_of(found.variables)["root/input"]
    np.testing.assert_allclose([low, high], [images.min(), images.max()], rtol=1e-6)
    assert found.network.quantisation == STUDENT.quantisation
    jax.tree.map(np.testing.assert_array_equal, found.variables.params, student.variables.params)


def test_percentiles_cut_what_is_rare(run):
    student, pixels = open_run(run).student, pixels_of(40)
    asked = dataclasses.replace(INT8, range_percentile=99.0)
    found = calibrated(student, pixels, asked).student
    images = (pixels.astype(np.float64) - 127.5) / 127.5
    low, high, _ = ranges_of(found.variables)["root/input"]
    np.testing.assert_allclose([low, high], np.percentile(images, [1, 99]), rtol=1e-5)


def test_effects_are_those_of_a_network_with_one_rounded_layer(run):
    """Against networks of which all layers but one stay in floats, with the same ranges."""
    student, pixels = open_run(run).student, pixels_of(40)
    found = calibrated(student, pixels)
    images = jnp.asarray((pixels.astype(np.float32) - 127.5) / 127.5)
    layers = [*found.effects]

    def logits(network, variables):
        built = build_network(network, 10, jnp.dtype("float32"))
        return np.asarray(logits_of(built, variables, images), np.float64)

    plain = logits(student.network, student.variables)
    for layer in layers[:: len(layers) - 1]:  # what a block adds is rounded in neither
        others = tuple(x for x in layers if x != layer)
        alone = dataclasses.replace(found.student.network.quantisation, float_layers=others)
        network = dataclasses.replace(student.network, quantisation=alone)
        built = build_network(network, 10, jnp.dtype("float32"))
        ranges = with_switches(found.student.variables.ranges, layer)
        assert built.quantised_layers == (layer,)
        variables = dataclasses.replace(found.student.variables, ranges=ranges)
        apart = logits(network, variables) - plain
        expected = np.linalg.norm(apart) / np.linalg.norm(plain - plain.mean(axis=0))
        assert found.effects[layer] == pytest.approx(expected, rel=1e-3) and expected > 0


def test_layers_that_carry_the_error_stay_in_floats(run, tmp_path):
    """A huge weight in each channel, of an input that is always zero, makes zeros of the others."""
    student = open_run(run).student
    params = jax.tree.map(np.array, student.variables.params)
    params["block1_unit01"]["c_norm"]["bias"][0] = -1e4
    params["block1_unit01"]["c"]["kernel"][0, 0, 0] = 300
    variables = dataclasses.replace(student.variables, params=params)
    broken = dataclasses.replace(student, variables=variables)
    found = calibrated(broken, pixels_of(40))
    mixed = found.mixed_precision
    assert mixed.float_layers == ("block1_unit01/c",)
    assert mixed.error_with_them < 0.1 * mixed.error
    asked = dataclasses.replace(INT8, float_layers=mixed.float_layers)
    kept = calibrated(broken, pixels_of(40), asked)
    assert not {*mixed.float_layers} & {*kept.errors}
    card = export(
        run, tmp_path / "x.onnx", quantise="int8", float_layers=("root",), range_percentile=99.99
    )
    assert "root" not in card.function.layer_errors
    assert card.function.quantisation.float_layers == ("root",)


def test_layers_worth_keeping():
    equal = {str(i): 1.0 for i in range(8)}
    assert worth_keeping(equal) == () == worth_keeping({})
    assert worth_keeping(equal | {"a": 5.0, "b": 4.0}) == ("a", "b")


def test_errors_are_those_of_the_layers_outputs(run):
    """Of the first one by hand, in float64."""
    student, pixels = open_run(run).student, pixels_of(40)
    found, errors, effects, _ = calibrated(student, pixels)
    network = build_network(found.network, 10, jnp.dtype("float32"))
    assert [*errors] == list(network.quantised_layers) == [*effects]
    images = ((pixels.astype(np.float32) - 127.5) / 127.5).astype(np.float64)
    kernel = np.asarray(student.variables.params["root"]["kernel"], np.float64)

    def convolved(x, kernel):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        parts = [
            padded[:, i : i + 16, j : j + 16] @ kernel[i, j] for i in range(3) for j in range(3)
        ]
        return sum(parts)

    step = (images.max() - images.min()) / 254
    rounded = np.rint(images / step) * step
    scale = np.abs(kernel).max(axis=(0, 1, 2)) / 127
    expected = convolved(images, kernel)
    error = np.linalg.norm(
        convolved(rounded, np.rint(kernel / scale) * scale) - expected
    ) / np.linalg.norm(expected)
    assert errors["root"] == pytest.approx(error, rel=0.02) and 1e-4 < error < 0.05


def test_the_file_computes_the_calibrated_student(run, tmp_path):
    path, pixels = tmp_path / "x.onnx", pixels_of(64)
    card = export(run, path, batch="dynamic", output="logits", quantise="int8")
    opened = open_run(run)
    shown = images_of(opened.config, opened.student, "train").pixels
    student, errors, effects, _ = calibrated(opened.student, shown)
    network = build_network(student.network, 10, jnp.dtype("float32"))
    images = jnp.asarray((pixels.astype(np.float32) - 127.5) / 127.5)
    expected = np.asarray(logits_of(network, student.variables, images))
    found, _ = run_elsewhere(READ_ONNX, path, pixels, tmp_path)
    assert (np.abs(found - expected) <= np.ptp(expected) / 255).mean() >= 0.99
    assert card.function.quantise == "int8" and card.function.layer_errors == errors
    assert card.function.layer_effects == effects
    assert card.network.quantisation.activations == "none"  # of the run
    assert card.function.parity.relative_bound == 0.35
    assert 0 < card.function.parity.relative_error < 0.35
    assert card.function.bytes < card.function.float32_bytes * 1.5


def test_the_command_names_the_worst_layers_and_judges_the_file(run, tmp_path, capsys):
    path = tmp_path / "x.onnx"
    code, out, _ = command(capsys, "export", run, path, "--quantise", "int8")
    assert code == 0 and "layers with the largest errors" in out
    assert "layers whose quantisation alone changes the logits most" in out
    code, out, _ = command(capsys, "evaluate", path, "--json")
    assert code == 0
    of_run = json.loads((run / "evaluation.json").read_text())["student"]["top1"]
    assert json.loads(out)["student"]["top1"] == pytest.approx(of_run, abs=0.05)


def test_a_student_of_eight_bits_and_other_formats_are_refused(run, tmp_path):
    train(tiny_config(student=WITH_BATCH_NORM), tmp_path / "int8")
    with pytest.raises(UserError, match="was quantised in training"):
        export(tmp_path / "int8", tmp_path / "x.onnx", quantise="int8")
    with pytest.raises(UserError, match=r"int8 is for .onnx or .tflite"):
        export(run, tmp_path / "x.stablehlo", quantise="int8")
    with pytest.raises(UserError, match=r"dynamic is for .tflite"):
        export(run, tmp_path / "x.onnx", quantise="dynamic")
    for options, message in (
        ({"quantise": "int8", "float_layers": ("rot",)}, "names rot, .*; did you mean root"),
        (
            {"quantise": "int8", "range_percentile": 40.0},
            "range_percentile is 40.0; expected more than 50, and 100 or",
        ),
        ({"float_layers": ("root",)}, "are for --quantise int8 of an .onnx"),
    ):
        with pytest.raises(UserError, match=message):
            export(run, tmp_path / "x.onnx", **options)
    assert not [*tmp_path.glob("x.*")]
