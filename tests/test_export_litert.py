"""Exports to LiteRT: run by its interpreter, without this package, as the run computes."""

import dataclasses
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import command
from test_export_functions import (
    expected_logits,
    pixels_of,
    run_elsewhere,
    softmax,
    with_one_weight_changed,
    workdir,
)

from fm_distill.config import CanvasConfig, NetworkConfig
from fm_distill.errors import UserError
from fm_distill.evaluation.inference import open_student
from fm_distill.exporting import export as exporting
from fm_distill.exporting import litert_file
from fm_distill.exporting.export import export
from fm_distill.exporting.function import Runtime, function_of
from fm_distill.exporting.parity import Examples, compare
from fm_distill.models import build_network, resolve
from fm_distill.runs.student import Student
from fm_distill.views.rendering import CentralCrop

__all__ = ["workdir"]  # a fixture


# What somebody else would write, who has LiteRT alone.
READ_LITERT = """
import json, sys, zipfile
import numpy as np
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_path=sys.argv[1])
interpreter.allocate_tensors()
given, = interpreter.get_input_details()
assert given["dtype"] == np.uint8
interpreter.set_tensor(given["index"], np.load(sys.argv[2]))
interpreter.invoke()
np.save(sys.argv[3], interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
assert not {"fm_distill", "jax", "tensorflow"} & {x.split(".")[0] for x in sys.modules}
archive = zipfile.ZipFile(sys.argv[1])
assert json.loads(archive.read("card.json"))["function"]["format"] == "tflite"
print(archive.read("labels.txt").decode().splitlines()[0])
"""


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    path = tmp_path_factory.mktemp("litert") / "student.tflite"
    export(workdir, path)
    return path


def lite() -> Student:
    """An efficientnet_lite0 whose logits differ, at 32 pixels."""
    network = resolve(NetworkConfig(model="efficientnet_lite0", resolution=32))
    init = build_network(network, 10, jnp.dtype("float32")).init
    variables = jax.tree.map(np.array, jax.jit(init)(jax.random.key(0)))
    kernel = variables.params["head"]["kernel"]
    kernel[:] = np.random.default_rng(0).normal(size=kernel.shape) * 0.1
    names = tuple("0123456789")
    return Student(
        network, 10, names, CanvasConfig(size=32), CentralCrop(1.0), "float32", variables
    )


@pytest.fixture(scope="module")
def lite_in_floats() -> bytes:
    """The file of `lite`."""
    return litert_file.to_litert(function_of(lite(), "logits"), 32, 1, "lite")


def smooth_pixels(rows: int, side: int) -> np.ndarray:
    """With what images have: large areas that differ from image to image."""
    coarse = np.random.default_rng(5).uniform(0, 255, (rows, 4, 4, 3))
    return coarse.repeat(side // 4, axis=1).repeat(side // 4, axis=2).astype(np.uint8)


def test_a_file_runs_without_this_package(workdir, exported, tmp_path):
    pixels = pixels_of(1)
    found, name = run_elsewhere(READ_LITERT, exported, pixels, tmp_path)
    assert found.dtype == np.float32 and found.shape == (1, 10) and name == "0"
    np.testing.assert_allclose(found, softmax(expected_logits(workdir, pixels)), atol=1e-5)
    student = open_student(exported)
    assert student.facts.parity.largest_difference <= student.facts.parity.bound == 5e-4
    assert student.facts.operations["CONV_2D"] > 0 and student.card.class_names == (*"0123456789",)


def test_each_depthwise_convolution_is_one_operation_and_int8_is_small(lite_in_floats):
    """EfficientNet-Lite0 has 16; and the int8 file is the float function, coarser."""
    student = lite()
    pixels = smooth_pixels(32, 32)
    function = function_of(student, "logits")
    small = litert_file.to_quantised(function, 32, 1, "lite", "int8", pixels[:16])
    assert len(small) < 0.35 * len(lite_in_floats)
    runtimes = [litert_file.load_function(x) for x in (lite_in_floats, small)]
    for runtime in runtimes:
        assert runtime.operations["DEPTHWISE_CONV_2D"] == 16
        assert runtime.operations["CONV_2D"] == 33 and "MUL" not in runtime.operations
    examples = Examples("validation", pixels[16:], np.full(16, -1, np.int32))
    for runtime, kind in zip(runtimes, ("tflite", "tflite int8"), strict=True):
        found = compare(runtime, kind, student, "logits", 1, examples)
        assert (found.relative_error < 1e-3) == (kind == "tflite")
    # Another normalisation is another function, of either kind.
    other = dataclasses.replace(student.network, input_range="imagenet")
    wrong = dataclasses.replace(student, network=other)
    for runtime, kind in zip(runtimes, ("tflite", "tflite int8"), strict=True):
        with pytest.raises(UserError, match="so nothing was written"):
            compare(runtime, kind, wrong, "logits", 1, examples)


@pytest.mark.parametrize(("kind", "share"), [("float16", 0.55), ("dynamic", 0.35)])
def test_weights_alone_are_stored_in_fewer_bits(kind, share, lite_in_floats):
    """The function is that of the run, or nothing is written: one of another student is refused."""
    student = lite()
    pixels = smooth_pixels(32, 32)
    function = function_of(student, "logits")
    small = litert_file.to_quantised(function, 32, 1, "lite", kind, None)
    assert len(small) < share * len(lite_in_floats)
    runtime = litert_file.load_function(small)
    examples = Examples("validation", pixels, np.full(32, -1, np.int32))
    found = compare(runtime, f"tflite {kind}", student, "logits", 1, examples)
    assert 0 < found.relative_error < (0.005 if kind == "float16" else 0.35)
    wrong = dataclasses.replace(
        student, network=dataclasses.replace(student.network, input_range="imagenet")
    )
    with pytest.raises(UserError, match="so nothing was written"):
        compare(runtime, f"tflite {kind}", wrong, "logits", 1, examples)


def test_the_relative_error_is_of_the_spread():
    """Of outputs in the ratio of 3 to 4, and their mean square about their mean."""
    student = lite()
    pixels = smooth_pixels(8, 32)
    examples = Examples("test", pixels, np.full(8, -1, np.int32))
    function = jax.jit(function_of(student, "logits"))
    expected = np.asarray(function(jnp.asarray(pixels)), np.float64)
    mean = expected.mean(axis=0)
    runtime = Runtime("x", lambda x: mean + 0.8 * (np.asarray(function(x)) - mean))
    found = compare(runtime, "tflite int8", student, "logits", "dynamic", examples)
    assert found.relative_error == pytest.approx(0.2, rel=1e-3) and found.relative_bound == 0.35


def test_no_file_where_parity_fails(workdir, tmp_path, monkeypatch):
    def changed(student, output):
        return function_of(with_one_weight_changed(student), output)

    monkeypatch.setattr(exporting, "function_of", changed)
    with pytest.raises(UserError, match="so nothing was written"):
        export(workdir, tmp_path / "x.tflite", output="logits")
    assert not [*tmp_path.iterdir()]


def test_what_is_refused(workdir, exported, tmp_path, capsys, monkeypatch):
    data = bytearray(exported.read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "flipped.tflite").write_bytes(data)
    (tmp_path / "cut.tflite").write_bytes(exported.read_bytes()[:-40])
    with zipfile.ZipFile(exported) as archive:
        start = min(x.header_offset for x in archive.infolist())
    (tmp_path / "other.tflite").write_bytes(exported.read_bytes()[:start])
    out = tmp_path / "x.tflite"
    for said, *arguments in (
        ("is damaged or was changed", "evaluate", tmp_path / "flipped.tflite"),
        ("has no card of fm-distill, or was damaged", "evaluate", tmp_path / "cut.tflite"),
        ("has no card of fm-distill", "evaluate", tmp_path / "other.tflite"),
        ("takes a fixed number of images", "export", workdir, out, "--batch", "dynamic"),
        ("--quantise dynamic is for .tflite", "export", workdir, tmp_path / "x.onnx",
         "--quantise", "dynamic"),
    ):  # fmt: skip
        code, _, error = command(capsys, *arguments)
        assert code == 2 and said in error, error
        assert len(error.strip().splitlines()) == 1, error
    find = litert_file.importlib.util.find_spec
    monkeypatch.setattr(
        litert_file.importlib.util,
        "find_spec",
        lambda name: None if name == "tensorflow" else find(name),
    )
    code, _, error = command(capsys, "export", workdir, out)
    assert code == 2 and "pip install -e '.[litert]'" in error and not out.exists()


def test_an_operation_that_litert_has_not_is_named():
    def function(pixels):
        return jax.lax.linalg.cholesky(pixels[:, :3, :3, 0] * 1.0).reshape(1, 9)

    with pytest.raises(UserError, match=r"mine cannot be converted to LiteRT: .+"):
        litert_file.to_litert(function, 16, 1, "mine")


def test_the_other_commands_take_the_file(exported, capsys):
    code, out, _ = command(capsys, "bench", exported, "--seconds", 0.05, "--json")
    (row,) = json.loads(out)["rows"]
    assert code == 0 and row["runtime"].startswith("LiteRT") and row["network"] == "bit"
    code, out, _ = command(capsys, "evaluate", exported, "--split", "validation", "--json")
    assert code == 0 and json.loads(out)["runtime"].startswith("LiteRT")
