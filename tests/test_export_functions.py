"""Exports of whole functions: run by their own runtimes, without this package, as the run."""

import dataclasses
import json
import os
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command_environment
from test_cli import command
from tiny import logits_of

from fm_distill.config import CanvasConfig, NetworkConfig
from fm_distill.errors import UserError
from fm_distill.evaluation.inference import open_student, predict
from fm_distill.exporting import export as exporting
from fm_distill.exporting import stablehlo
from fm_distill.exporting.export import export
from fm_distill.exporting.function import function_of, in_batches
from fm_distill.exporting.parity import IMAGES, compare, examples_of
from fm_distill.models import Variables, build_network, resolve
from fm_distill.runs.open_run import open_run
from fm_distill.runs.student import Student
from fm_distill.views.rendering import CentralCrop

# What somebody else would write, who has JAX alone.
READ_STABLEHLO = """
import json, sys, zipfile
import jax, numpy as np
archive = zipfile.ZipFile(sys.argv[1])
function = jax.export.deserialize(bytearray(archive.read("function.jax_export")))
found = function.call(np.load(sys.argv[2]))
assert not {"fm_distill", "flax"} & {x.split(".")[0] for x in sys.modules}
np.save(sys.argv[3], found)
print(json.loads(archive.read("card.json"))["class_names"][0])
"""


@pytest.fixture(scope="module")
def workdir(trained):
    """A complete run with an average, at 16 pixels, for minus one to one."""
    return trained / "run"


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """The defaults: one image, probabilities."""
    path = tmp_path_factory.mktemp("functions") / "student.stablehlo"
    export(workdir, path)
    return path


def pixels_of(rows: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (rows, side, side, 3), np.uint8)


def expected_logits(workdir, pixels: np.ndarray) -> np.ndarray:
    """By the run's network in training's form, normalised here."""
    student = open_run(workdir).student
    network = build_network(student.network, 10, jnp.dtype("float32"))
    images = (pixels.astype(np.float32) - 127.5) / 127.5
    return np.asarray(logits_of(network, student.variables, jnp.asarray(images)))


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def run_elsewhere(script: str, path, pixels: np.ndarray, folder) -> tuple[np.ndarray, str]:
    """What a process without this package gets of a file."""
    np.save(folder / "pixels.npy", pixels)
    environment = {x: y for x, y in command_environment().items() if x != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script, path, folder / "pixels.npy", folder / "found.npy"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return np.load(folder / "found.npy"), done.stdout.strip()


def test_a_function_runs_without_this_package(workdir, exported, tmp_path):
    pixels = pixels_of(1)
    found, name = run_elsewhere(READ_STABLEHLO, exported, pixels, tmp_path)
    logits = expected_logits(workdir, pixels)
    assert found.dtype == np.float32 and found.shape == (1, 10) and name == "0"
    np.testing.assert_allclose(found, softmax(logits), atol=1e-5)
    assert np.ptp(found) > 1e-3


def test_any_batch_and_logits(workdir, tmp_path):
    path = tmp_path / "x.stablehlo"
    card = export(workdir, path, batch="dynamic", output="logits")
    assert card.function.batch == "dynamic" and card.function.output == "logits"
    pixels = pixels_of(5)
    found, _ = run_elsewhere(READ_STABLEHLO, path, pixels, tmp_path)
    np.testing.assert_allclose(found, expected_logits(workdir, pixels), atol=1e-4)
    one = open_student(path).runtime.call(pixels[:1])
    np.testing.assert_allclose(one, found[:1], atol=1e-5)
    assert np.abs(found.sum(axis=1) - 1).min() > 1e-2  # no probabilities


def test_the_card_in_the_file_has_the_figures(workdir, exported):
    with zipfile.ZipFile(exported) as archive:
        card = json.loads(archive.read("card.json"))
    assert [x.name for x in exported.parent.iterdir()] == [exported.name]
    function = card["function"]
    assert function["format"] == "stablehlo" and function["batch"] == 1
    assert function["output"] == "probabilities"
    parity = function["parity"]
    assert parity["split"] == "validation" and parity["images"] == IMAGES
    assert 0 < parity["largest_difference"] <= parity["bound"] == 1e-4
    assert parity["agreement"] == 1.0 and parity["file_top1"] == parity["run_top1"]
    # The accuracy is that of the run, on the same images.
    run = open_run(workdir)
    examples = examples_of(run.config, run.student)
    right = expected_logits(workdir, examples.pixels).argmax(axis=1) == examples.labels
    assert parity["run_top1"] == pytest.approx(right.mean()) and (examples.labels >= 0).all()
    assert card["metrics"] == json.loads((workdir / "evaluation.json").read_text())
    assert card["class_names"] == [*"0123456789"] and card["averaged"]


def with_one_weight_changed(student: Student) -> Student:
    """The first class's bias, by what moves its probability by a thousandth."""
    params = jax.tree.map(np.array, student.variables.params)
    params["head"]["bias"][0] += 0.01
    changed = Variables(params, student.variables.statistics)
    return dataclasses.replace(student, variables=changed)


def test_a_changed_weight_is_refused(workdir, tmp_path, monkeypatch):
    run = open_run(workdir)
    examples = examples_of(run.config, run.student)
    wrong = with_one_weight_changed(run.student)
    for output in ("probabilities", "logits"):
        data = stablehlo.to_stablehlo(function_of(wrong, output), 16, "dynamic", "bit")
        runtime = stablehlo.load_function(data)
        compare(runtime, "stablehlo", wrong, output, "dynamic", examples)
        with pytest.raises(UserError, match=rf"differs from the run by up to .* in its {output}"):
            compare(runtime, "stablehlo", run.student, output, "dynamic", examples)
    monkeypatch.setattr(exporting, "function_of", lambda x, y: function_of(wrong, y))
    with pytest.raises(UserError, match="so nothing was written"):
        export(workdir, tmp_path / "x.stablehlo")
    assert not [*tmp_path.iterdir()]


def test_outputs_of_other_classes_than_the_card_s_are_refused():
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    with pytest.raises(UserError, match=r"shape \(2, 5\) for 2 images.*describes 7 classes"):
        in_batches(lambda x: np.zeros((len(x), 5), np.float32), pixels, 2, 7)


def test_numbers_that_are_none_do_not_agree(workdir):
    run = open_run(workdir)
    examples = examples_of(run.config, run.student)
    runtime = stablehlo.Runtime("x", lambda pixels: np.full((len(pixels), 10), np.nan))
    with pytest.raises(UserError, match="returns numbers that are not finite"):
        compare(runtime, "stablehlo", run.student, "logits", "dynamic", examples)
    failing = stablehlo.Runtime("x", lambda pixels: np.zeros(2).reshape(3))
    with pytest.raises(UserError, match=r"x cannot run the converted student \(ValueError"):
        compare(failing, "stablehlo", run.student, "logits", "dynamic", examples)


def test_predict_takes_the_file(workdir, exported, tmp_path, capsys):
    """As the run but for the rounding of what comes in; five images through batches of three."""
    np.save(tmp_path / "images.npy", pixels_of(5, 40))
    three = tmp_path / "three.stablehlo"
    code, out, _ = command(capsys, "export", workdir, three, "--batch", 3, "--output", "logits")
    assert code == 0 and "uint8 (3, 16, 16, 3) to logits" in out
    assert "XLA of jax" in out and "100.00 %" in out and "top-1 of the file" in out
    ours = predict(workdir, [tmp_path / "images.npy"], top=10)
    for path in (exported, three):
        code, out, _ = command(
            capsys, "predict", path, tmp_path / "images.npy", "--top", 10, "--json"
        )
        assert code == 0
        for x, y in zip(json.loads(out), ours, strict=True):
            theirs = dict(zip(x["classes"], x["probabilities"], strict=True))
            expected = dict(zip(y.classes, y.probabilities, strict=True))
            assert x["image"] == y.image and sum(theirs.values()) == pytest.approx(1, abs=1e-5)
            for name, probability in expected.items():
                assert theirs[name] == pytest.approx(probability, abs=5e-3)


def test_a_run_that_is_not_complete_is_exported_and_said(workdir, tmp_path, capsys):
    status = json.loads((workdir / "status.json").read_text())
    try:
        (workdir / "status.json").write_text(json.dumps(status | {"state": "paused"}))
        code, _, said = command(capsys, "export", workdir, tmp_path / "x.stablehlo")
    finally:
        (workdir / "status.json").write_text(json.dumps(status))
    assert code == 0 and "is not complete: its student is exported as it stood after 6 of 6" in said
    assert open_student(tmp_path / "x.stablehlo").card.metrics is None


def test_what_is_refused(workdir, exported, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    os.symlink("/dev/full", full / "x.stablehlo.tmp")
    for said, *arguments in (
        ("No space left on device", "export", workdir, full / "x.stablehlo"),
        ("already exists", "export", workdir, exported),
        ("is not a name for an export", "export", workdir, tmp_path / "x.h5"),
        ("--batch is 0; expected 1 or more", "export", workdir, tmp_path / "x.stablehlo",
         "--batch", 0),
        ("for whole functions", "export", workdir, tmp_path / "x.safetensors", "--batch", 2),
    ):  # fmt: skip
        code, _, error = command(capsys, *arguments)
        assert code == 2 and said in error, error
        assert len(error.strip().splitlines()) == 1, error
    assert not [*full.iterdir()] and not [*tmp_path.glob("x.*")]


def test_files_of_other_tools_are_refused(exported, tmp_path):
    path = tmp_path / "x.stablehlo"
    path.write_bytes(b"module @jit_f {}")
    with pytest.raises(
        UserError, match=r"x.stablehlo is not a \.stablehlo file of `fm-distill expo"
    ):
        open_student(path)
    with pytest.raises(UserError, match="cannot be read"):
        open_student(tmp_path / "none.stablehlo")
    data = bytearray(exported.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="was damaged"):
        open_student(path)
    card = exported_card(exported)
    for members, said in (
        ({"model.bin": b"x"}, "has no function.jax_export"),
        ({stablehlo.FUNCTION: b"x" * 64, stablehlo.CARD: b"{}"}, "does not fit this version"),
        ({stablehlo.FUNCTION: b"x" * 64, stablehlo.CARD: card}, "cannot be run here"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        with pytest.raises(UserError, match=said):
            open_student(path)


def exported_card(path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(stablehlo.CARD)


def test_a_network_that_cannot_be_converted_is_named_with_its_operation():
    def function(pixels):
        shape = jax.ShapeDtypeStruct((1, 10), np.float32)
        return jax.pure_callback(lambda x: np.zeros((1, 10), np.float32), shape, pixels + 1)

    said = r"mine cannot be converted to StableHLO: the operation pure_callback: "
    with pytest.raises(UserError, match=said):
        stablehlo.to_stablehlo(function, 16, 1, "mine")


def initial_student(model: str) -> Student:
    """With made-up weights, at 32 pixels: nothing is compiled for them."""
    network = resolve(NetworkConfig(model=model, resolution=32))
    init = build_network(network, 10, jnp.dtype("float32")).init
    shapes = jax.eval_shape(init, jax.random.key(0))
    variables = jax.tree.map(lambda x: np.full(x.shape, 0.01, np.float32), shapes)
    names = tuple("0123456789")
    return Student(
        network, 10, names, CanvasConfig(size=32), CentralCrop(1.0), "float32", variables
    )


def test_each_depthwise_convolution_leaves_as_one():
    """MobileNetV3-small has 11; traced on a CPU, where training writes them as shifted sums."""
    function = function_of(initial_student("mobilenet_v3_small"), "logits")
    data = stablehlo.to_stablehlo(function, 32, 1, "mobilenet_v3_small")
    text = jax.export.deserialize(bytearray(data)).mlir_module()
    lines = [x for x in text.splitlines() if "stablehlo.convolution" in x]
    grouped = [x for x in lines if "feature_group_count = 1 " not in x]
    assert len(grouped) == 11 and len(lines) == 53
    assert text.count("stablehlo.dot_general") == 1  # the head
    assert "stablehlo.case" not in text  # nothing depends on the platform


OF_FUNCTIONS = """
import jax.numpy as jnp
from fm_distill.models import Network, Output, Variables

def network(config, classes, dtype):
    def init(key):
        return Variables({"kernel": jnp.ones((3, classes))}, {})

    def apply(variables, images, *, train=False, features=()):
        return Output(images.mean((1, 2)) @ variables.params["kernel"], {}, {})

    return Network(classes, init, apply, lambda x: x, apply)
"""


def test_a_network_of_functions_alone_has_one_form(tmp_path):
    (tmp_path / "mine.py").write_text(OF_FUNCTIONS)
    kernel = np.linspace(-1, 1, 30, dtype=np.float32).reshape(3, 10)
    network = resolve(NetworkConfig(model=f"{tmp_path / 'mine.py'}:network", resolution=8))
    names, variables = tuple("0123456789"), Variables({"kernel": kernel}, {})
    student = Student(
        network, 10, names, CanvasConfig(size=8), CentralCrop(1.0), "float32", variables
    )
    pixels = pixels_of(2, 8)
    found = function_of(student, "logits")(jnp.asarray(pixels))
    means = (pixels.astype(np.float64) / 127.5 - 1).mean(axis=(1, 2))
    np.testing.assert_allclose(found, means @ kernel, atol=1e-5)
