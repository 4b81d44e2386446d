"""Teachers that are any function from pictures to logits."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import ROOT, run_command, write_experiment
from tiny import tiny_config

from fm_distill.config import NetworkConfig, ObjectiveConfig, TeacherConfig
from fm_distill.errors import UserError
from fm_distill.recordings.manifest import open_recording
from fm_distill.recordings.reading import RecordingReader
from fm_distill.system.preemption import Stop
from fm_distill.training.record import record
from fm_distill.training.train import train

# The mean of each quarter and channel, times a fixed matrix.
FUNCTION = """
import numpy as np

MATRIX = np.linspace(-1, 1, 12 * 10).reshape(12, 10).astype(np.float32)

def teacher(images):
    assert images.dtype == np.float32 and images.shape[1:] == (24, 24, 3)
    quarters = images.reshape(len(images), 2, 12, 2, 12, 3).mean((2, 4))
    return 8 * quarters.reshape(len(images), 12) @ MATRIX
"""
PICTURES = NetworkConfig(model="function", resolution=24, input_range="zero_one")


def taught_by(path, **changes):
    teacher = TeacherConfig(function=f"{path}:teacher", network=PICTURES)
    objective = ObjectiveConfig(temperature=2.0)
    return tiny_config(teacher=teacher, objective=objective, **changes)


def test_a_function_teaches_through_its_recording(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTION)
    config = taught_by(tmp_path / "mine.py")
    with pytest.raises(UserError, match="is called only by `fm-distill record`: record it with"):
        train(config, tmp_path / "run")
    found = record(config, tmp_path / "recording", Stop(), dtype="float32").recording
    assert found.header.classes == 10
    teacher = dataclasses.replace(config.teacher, recording=str(tmp_path / "recording"))
    done = train(dataclasses.replace(config, teacher=teacher), tmp_path / "run")
    assert done.complete
    assert done.evaluation["student"]["top1"] is not None
    assert done.evaluation["teacher"]["top1"] is None


def test_it_sees_the_pictures_that_a_network_would_see(tmp_path, trained):
    """Beside a network with the same input: what it got is what was rendered for the network."""
    (tmp_path / "mine.py").write_text(FUNCTION + "SEEN = []\n" + RECORDING)
    run = str(trained / "run" / "teacher")
    config = taught_by(tmp_path / "mine.py", more_teachers=(TeacherConfig(weights=run),))
    found = record(config, tmp_path / "both", Stop(), dtype="float32", steps=(0, 2)).recording
    alone = dataclasses.replace(config, teacher=config.more_teachers[0], more_teachers=())
    other = record(alone, tmp_path / "one", Stop(), dtype="float32", steps=(0, 2)).recording
    both, one = (RecordingReader(x, 2).at(1) for x in (found, other))
    np.testing.assert_allclose(both.rows.values[:, :, 1], one.rows.values[:, :, 0], rtol=1e-5)
    np.testing.assert_array_equal(both.views, one.views)
    seen = np.load(tmp_path / "seen.npy")
    assert seen.shape == (16, 24, 24, 3)
    quarters = seen.reshape(16, 2, 12, 2, 12, 3).mean((2, 4)).reshape(16, 12)
    matrix = np.linspace(-1, 1, 120).reshape(12, 10)
    logits = both.rows.values[0, :, 0]  # of float32, whose offset is zero
    np.testing.assert_allclose(logits, 8 * quarters @ matrix, rtol=1e-4, atol=1e-4)
    assert seen.min() >= 0 and seen.max() <= 1 and seen.std() > 0.05


RECORDING = """
import pathlib

plain = teacher

def teacher(images):
    np.save(pathlib.Path(__file__).with_name("seen.npy"), images)
    return plain(images)
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return np.zeros((len(x), 10), np.int64)", "returned int64; expected logits in floating"),
        ("return np.zeros((10, len(x) + 1), np.float32)", r"shape \(10, 3\) for 2 images; exp"),
        ("return np.full((len(x), 10), np.nan)", "returned numbers that are not finite"),
        (
            "return np.random.default_rng().random((len(x), 10))",
            "returns different logits when it is called again",
        ),
        (
            "raise ValueError('no model here')",
            "failed for images of shape .*ValueError: no model",
        ),
        ("return None", r"shape \(\) for 2 images"),
    ],
)
def test_what_cannot_teach_is_refused(tmp_path, body, said):
    (tmp_path / "mine.py").write_text(f"import numpy as np\ndef teacher(x):\n    {body}\n")
    with pytest.raises(UserError, match=said):
        record(taught_by(tmp_path / "mine.py"), tmp_path / "recording", Stop())


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("{}/none.py:teacher", "there is no file .*none.py"),
        ("{}/mine.py:other", "has no 'other'; it has teacher"),
        ("{}/mine.py:NUMBER", "is a int; expected a function from images to logits"),
        ("{}/broken.py:teacher", "broken.py cannot be run: ZeroDivisionError"),
        ("no.such.module:teacher", "no.such.module cannot be imported: No module named 'no'"),
        ("teacher", r"is 'teacher'; expected FILE.py:NAME or package.module:name"),
    ],
)
def test_a_reference_that_is_none_is_refused(tmp_path, reference, said):
    (tmp_path / "mine.py").write_text("NUMBER = 3\ndef teacher(x):\n    return x\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    config = taught_by("x")
    teacher = dataclasses.replace(config.teacher, function=reference.format(tmp_path))
    with pytest.raises(UserError, match=said):
        record(dataclasses.replace(config, teacher=teacher), tmp_path / "recording", Stop())


def test_its_pictures_have_to_be_described(tmp_path):
    config = taught_by("x")
    teacher = dataclasses.replace(config.teacher, network=None)
    with pytest.raises(UserError, match=r"needs to know its images: give teacher\.network"):
        record(dataclasses.replace(config, teacher=teacher), tmp_path / "recording", Stop())


def test_other_weights_behind_the_same_code_are_noticed(tmp_path):
    scaled = FUNCTION.replace("return 8", "return np.load(str(FACTOR))") + (
        "import pathlib\nFACTOR = pathlib.Path(__file__).with_name('factor.npy')\n"
    )
    (tmp_path / "mine.py").write_text(scaled)
    config = taught_by(tmp_path / "mine.py")
    np.save(tmp_path / "factor.npy", np.float32(8))
    record(config, tmp_path / "recording", Stop(), steps=(0, 3))
    np.save(tmp_path / "factor.npy", np.float32(7))
    with pytest.raises(UserError, match=r"are not those that .* recorded: in step 2"):
        record(config, tmp_path / "recording", Stop())
    np.save(tmp_path / "factor.npy", np.float32(8))
    assert record(config, tmp_path / "recording", Stop()).recording.steps == 6


def test_an_onnx_file_teaches_a_student_by_command(tmp_path, monkeypatch):
    """`experiments/onnx_teacher.py` with a small model that is made here: record, then train."""
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.Generator(np.random.Philox(5))
    weight = rng.normal(size=(10, 3)).astype(np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["means"]),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"], transB=1),
    ]
    shape = ["batch", 3, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "teacher",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "teacher.onnx")
    monkeypatch.setenv("TEACHER_ONNX", str(tmp_path / "teacher.onnx"))
    reference = f"{ROOT}/experiments/onnx_teacher.py:teacher"
    teacher = f'TeacherConfig(function="{reference}", network=NetworkConfig(model="function", '
    teacher += 'resolution=16, input_range="imagenet"))'
    objective = "objective=ObjectiveConfig(temperature=2.0)"
    experiment = write_experiment(tmp_path / "run.py", f"teacher={teacher}, {objective}")
    recorded = run_command("record", experiment, "--to", tmp_path / "recording")
    assert recorded.returncode == 0, recorded.stderr
    assert "steps 0 to 6" in recorded.stdout
    header = open_recording(tmp_path / "recording").header
    assert header.teachers[0].resolution == 16
    refused = run_command("train", experiment, "--workdir", tmp_path / "run")
    assert refused.returncode == 2
    assert "record it with `fm-distill record" in refused.stderr
    learnt = run_command(
        "train", experiment, "--workdir", tmp_path / "run",
        "--teacher.recording", tmp_path / "recording",
    )  # fmt: skip
    assert learnt.returncode == 0, learnt.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "complete"
