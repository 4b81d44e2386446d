"""Exports: the student in one file, which we and timm load back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_command, write_experiment
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import logits_of, tiny_config

from fm_distill.config import (
    LogConfig,
    ObjectiveConfig,
    ScheduleConfig,
    StudentConfig,
    TeacherConfig,
    with_options,
)
from fm_distill.errors import UserError
from fm_distill.evaluation.inference import predict
from fm_distill.exporting.export import export
from fm_distill.exporting.load_student import load_student
from fm_distill.models import Variables, build_network
from fm_distill.networks.loading import agreed_classes
from fm_distill.networks.teachers import load_pretrained, load_teachers
from fm_distill.runs.open_run import open_run
from fm_distill.runs.workdir import Workdir
from fm_distill.training.train import train
from fm_distill.views.rendering import CentralCrop, InputSpec, render_central
from fm_distill.weights.load import load_weights

# As timm's BiT, but small.
STUDENT = StudentConfig(
    model="bit",
    resolution=32,
    input_range="zero_one",
    options={"depths": (1, 1, 1, 1), "width": 0.5},
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A complete run with an average."""
    path = tmp_path_factory.mktemp("export") / "run"
    config = tiny_config(
        student=STUDENT,
        batch_size=8,
        ema_decay=0.5,
        schedule=ScheduleConfig(total_steps=2),
        log=LogConfig(every_steps=1, evaluate_every_steps=0, tensorboard=False),
    )
    assert train(config, path).complete
    return path


@pytest.fixture(scope="module")
def exported(workdir):
    path = workdir.parent / "student.safetensors"
    export(workdir, path)
    return path


def logits(network, variables: Variables, classes: int = 10):
    images = np.random.default_rng(0).uniform(0, 1, (2, 32, 32, 3)).astype(np.float32)
    built = build_network(network, classes, jnp.dtype("float32"))
    return logits_of(built, variables, jnp.asarray(images))


def test_an_export_is_loaded_back_in_every_bit(workdir, exported):
    run, found = open_run(workdir), load_weights(str(exported), None, "teacher")
    assert run.averaged and run.complete
    assert found.network == run.network and found.network.input_range == "zero_one"
    assert found.classes == 10 and found.class_names == tuple("0123456789")
    jax.tree.map(np.testing.assert_array_equal, found.variables, run.student.variables)
    ours, theirs = (
        logits(run.network, run.student.variables),
        logits(found.network, found.variables),
    )
    np.testing.assert_array_equal(ours, theirs)
    assert np.abs(ours).max() > 1e-3


def test_the_card_says_everything(workdir, exported):
    with safe_open(exported, "numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["num_classes"] == "10"
    assert json.loads(metadata["mean"]) == [0, 0, 0] and json.loads(metadata["std"]) == [1, 1, 1]
    assert "architecture" not in metadata  # timm has no such network
    card = json.loads(metadata["fm_distill"])
    assert json.loads(exported.with_suffix(".json").read_text()) == card
    stored = json.loads((workdir / "config.json").read_text())
    assert card["metrics"] == json.loads((workdir / "evaluation.json").read_text())
    for key in ("config", "versions", "commit"):
        assert card[key] == stored[key]
    assert card["step"] == 2 and card["averaged"] and card["naming"] == "timm"
    assert card["resolution"] == 32 and card["central_fraction"] == 1.0
    assert "auto" not in card["network"].values() and len(card["sha256"]) == 64


def test_the_file_is_open_to_whom_its_card_is(exported):
    assert exported.stat().st_mode == exported.with_suffix(".json").stat().st_mode


def test_nothing_is_overwritten_unasked(workdir, exported, tmp_path):
    before = exported.read_bytes()
    with pytest.raises(UserError, match=r"student.safetensors and .*json already exists"):
        export(workdir, exported)
    (tmp_path / "x.json").write_text("mine")
    with pytest.raises(UserError, match=r"x.json already exists; .*--overwrite"):
        export(workdir, tmp_path / "x.safetensors")
    assert exported.read_bytes() == before and not (tmp_path / "x.safetensors").exists()
    export(workdir, tmp_path / "x.safetensors", overwrite=True)
    a, b = load_file(tmp_path / "x.safetensors"), load_file(exported)
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["x.json", "x.safetensors"]
    with pytest.raises(UserError, match="is not a name for an export"):
        export(workdir, tmp_path / "x.npz")
    with pytest.raises(UserError, match="there is no folder"):
        export(workdir, tmp_path / "none" / "x.safetensors")
    with pytest.raises(UserError, match="is not the workdir of a run"):
        export(tmp_path, tmp_path / "y.safetensors")


def test_a_changed_export_is_refused(exported, tmp_path):
    data = bytearray(exported.read_bytes())
    data[-100] ^= 1
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged or was changed.*its card says"):
        load_weights(str(tmp_path / "x.safetensors"), None, "teacher")
    with safe_open(exported, "numpy") as file:
        metadata = file.metadata() | {"fm_distill": "{}"}
    save_file(load_file(exported), tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match="its card does not fit this version"):
        load_weights(str(tmp_path / "x.safetensors"), None, "teacher")
    with safe_open(exported, "numpy") as file:
        card = json.loads(file.metadata()["fm_distill"])
    del card["network"]["options"]
    metadata["fm_distill"] = json.dumps(card)
    save_file(load_file(exported), tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match="no options of its bit"):
        load_weights(str(tmp_path / "x.safetensors"), None, "teacher")


def test_a_network_that_contradicts_the_card_is_refused(exported):
    for changes, said in (
        (
            {"options": {"depths": (1, 1, 1, 1)}},
            r"holds a different network.*options.width is 0.5, requested 1.0",
        ),
        ({"options": {"depths": (1, 1, 1), "width": 0.5}}, "options.depths is"),
        ({"input_range": "imagenet"}, "trained with zero_one; a wrong normalisation"),
    ):
        with pytest.raises(UserError, match=said):
            load_weights(str(exported), dataclasses.replace(STUDENT, **changes), "student")
    asked = dataclasses.replace(STUDENT, resolution=64, input_range="auto")
    found = load_weights(str(exported), asked, "student")
    assert found.network.resolution == 64 and found.network.input_range == "zero_one"


def test_timm_loads_an_export(exported):
    torch = pytest.importorskip("torch", reason="needs timm")
    resnetv2 = pytest.importorskip("timm.models.resnetv2", reason="needs timm")
    module = resnetv2.ResNetV2(
        layers=[1, 1, 1, 1],
        width_factor=0.5,
        stem_type="fixed",
        num_classes=10,
        conv_layer=lambda *a, **k: resnetv2.StdConv2d(*a, eps=1e-10, **k),
    )
    tensors = {name: torch.from_numpy(x) for name, x in load_file(exported).items()}
    module.load_state_dict(tensors, strict=True)
    images = np.random.default_rng(0).uniform(0, 1, (2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = module.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    found = load_weights(str(exported), None, "teacher")
    np.testing.assert_allclose(logits(found.network, found.variables), theirs, atol=1e-5)


# A run, an export and a file as teachers, and a run as a start.


def taught_by(*teachers: TeacherConfig):
    config = tiny_config(objective=ObjectiveConfig())
    return dataclasses.replace(config, teacher=teachers[0], more_teachers=teachers[1:])


def test_a_run_and_its_export_are_the_same_teacher(workdir, exported, tmp_path):
    config = taught_by(
        TeacherConfig(workdir=str(workdir)),
        TeacherConfig(weights=str(exported)),
        TeacherConfig(weights=str(workdir)),
    )
    teachers = load_teachers(config, tmp_path)
    assert len({x.fingerprint for x in teachers}) == 1
    assert len({x.network for x in teachers}) == 1
    assert {x.class_names for x in teachers} == {tuple("0123456789")}
    assert all(x.notes for x in teachers)
    assert load_teachers(tiny_config(), tmp_path) == ()


def test_the_places_of_several_teachers(tmp_path):
    config = taught_by(TeacherConfig(experiment="a.py"), TeacherConfig(experiment="b.py"))
    with pytest.raises(UserError, match=r"/teacher is not the workdir of a run"):
        load_teachers(config, tmp_path)
    config = taught_by(TeacherConfig(workdir="x"), TeacherConfig())
    with pytest.raises(UserError, match=r"x is not the workdir"):
        load_teachers(config, tmp_path)
    (tmp_path / "teacher_2").mkdir()
    with Workdir(tmp_path).locked():
        pass
    (tmp_path / "teachers").mkdir()
    with pytest.raises(UserError, match=r"is not empty .*teachers"), Workdir(tmp_path).locked():
        pass


def test_a_run_as_weights(workdir, tmp_path):
    run = open_run(workdir)
    found = load_pretrained(
        str(workdir), dataclasses.replace(STUDENT, input_range="auto"), "student"
    )
    assert found.network == run.network and "after 2 steps" in found.notes[0]
    with pytest.raises(
        UserError, match=r"a different network from the student's: options\.width is"
    ):
        load_pretrained(str(workdir), with_options(STUDENT, {"width": 1.0}), "student")
    with pytest.raises(UserError, match="trained with input_range=zero_one"):
        load_pretrained(
            str(workdir), dataclasses.replace(STUDENT, input_range="imagenet"), "student"
        )
    status = json.loads((workdir / "status.json").read_text())
    try:
        (workdir / "status.json").write_text(json.dumps(status | {"state": "paused"}))
        with pytest.raises(UserError, match=r"the teacher's run in .* is not complete"):
            load_pretrained(str(workdir), None, "teacher")
        assert load_pretrained(str(workdir), None, "student").classes == 10
        assert export(workdir, tmp_path / "x.safetensors").metrics is None
    finally:
        (workdir / "status.json").write_text(json.dumps(status))


def test_the_network_of_a_run_is_the_stored_one(workdir):
    before = (workdir / "config.json").read_text()
    stored = json.loads(before)
    network = dataclasses.asdict(open_run(workdir).network) | {
        "options": {**STUDENT.options, "root_pool_padding": "minus_infinity"}
    }
    stored["resolved"]["student"] = network
    try:
        (workdir / "config.json").write_text(json.dumps(stored))
        assert open_run(workdir).network.options["root_pool_padding"] == "minus_infinity"
    finally:
        (workdir / "config.json").write_text(before)


def test_classes_have_to_agree(workdir, tmp_path):
    teachers = load_teachers(taught_by(TeacherConfig(workdir=str(workdir))), tmp_path)
    names = tuple("0123456789")
    assert agreed_classes(None, 10, names, teachers) == 10
    assert agreed_classes(None, None, None, teachers) == 10
    assert agreed_classes(10, None, None, ()) == 10
    with pytest.raises(UserError, match="class 3 is '4' in the data and '3' in the teacher"):
        agreed_classes(None, 10, tuple("0124356789"), teachers)
    with pytest.raises(UserError, match=r"differs .*the data's labels: 9, the teacher's head: 10"):
        agreed_classes(None, 9, None, teachers)
    other = dataclasses.replace(teachers[0], class_names=tuple("0123456798"))
    with pytest.raises(UserError, match="class 8 is '8' in the teacher and '9' in teacher 2"):
        agreed_classes(None, 10, None, (*teachers, other))
    unnamed = dataclasses.replace(teachers[0], class_names=None)
    assert agreed_classes(None, 10, names, (unnamed,)) == 10


def test_the_commands(workdir, tmp_path):
    out = tmp_path / "student.safetensors"
    done = run_command("export", workdir, out)
    assert done.returncode == 0, done.stderr
    assert "the moving average (EMA) of the student after 2 steps" in done.stdout
    again = run_command("export", workdir, out)
    assert again.returncode == 2 and "already exists" in again.stderr
    experiment = write_experiment(
        tmp_path / "student.py", "objective=ObjectiveConfig(), teacher=TeacherConfig()"
    )
    taught = run_command(
        "train", experiment, "--workdir", tmp_path / "run", "--teacher.weights", out
    )
    assert taught.returncode == 0, taught.stderr
    assert "top-1 agreement" in taught.stdout


# A student to call.


def image_batch(height=45, width=70):
    return np.random.default_rng(1).integers(0, 256, (5, height, width, 3), np.uint8)


def test_a_student_predicts_as_its_files_are_predicted(workdir, exported, tmp_path):
    """One image at a time through the parts, against batches of a run, an export and files."""
    run, images = open_run(workdir), image_batch()
    side, network = run.config.data.canvas.side, run.network
    built = build_network(network, 10, jnp.dtype("float32"))
    expected = []
    for image in images:
        small = Image.fromarray(image).resize((32, round(45 * 32 / 70)), Image.Resampling.BILINEAR)
        pixels = np.asarray(small)
        canvas = np.zeros((1, side, side, 3), np.uint8)
        canvas[0, : pixels.shape[0], : pixels.shape[1]] = pixels
        size = jnp.array([pixels.shape[:2]])
        view = render_central(jnp.asarray(canvas), size, CentralCrop(1.0), InputSpec.of(network))
        expected.append(logits_of(built, run.student.variables, view)[0])
    np.testing.assert_allclose(run.student.logits(images), expected, atol=1e-5)
    probabilities = run.student.predict(images)
    assert probabilities.shape == (5, 10) and np.ptp(probabilities, axis=0).max() > 1e-4
    np.testing.assert_allclose(probabilities, jax.nn.softmax(jnp.stack(expected)), atol=1e-6)
    np.testing.assert_array_equal(load_student(exported).predict(images), probabilities)
    np.save(tmp_path / "batch.npy", images)
    for row, image in enumerate(images[:2]):
        Image.fromarray(image).save(tmp_path / f"{row}.png")
    (tmp_path / "notes.txt").write_text("no image")
    found = predict(exported, [tmp_path], top=10)
    names = [str(tmp_path / x) for x in ("0.png", "1.png")]
    names += [f"{tmp_path / 'batch.npy'}[{row}]" for row in range(5)]
    assert [x.image for x in found] == names
    for prediction, row in zip(found, (0, 1, 0, 1, 2, 3, 4), strict=True):
        by_name = dict(zip(prediction.classes, prediction.probabilities, strict=True))
        np.testing.assert_allclose([by_name[str(i)] for i in range(10)], probabilities[row], 1e-4)
        assert list(prediction.probabilities) == sorted(prediction.probabilities, reverse=True)


def test_batches_of_any_size_and_grey_ones(workdir):
    student = open_run(workdir).student
    assert student.predict(image_batch()[:0]).shape == (0, 10)
    many = np.repeat(image_batch(8, 8), 8, axis=0)
    whole = student.logits(many)
    assert whole.shape == (40, 10)
    np.testing.assert_allclose(whole[[0, 39]], student.logits(many[[0, 39]]), atol=1e-5)
    grey = image_batch(20, 9)[..., :1]
    np.testing.assert_array_equal(student.logits(grey), student.logits(np.repeat(grey, 3, -1)))


def test_what_a_student_refuses(workdir, exported, tmp_path):
    student = open_run(workdir).student
    for wrong in (image_batch()[0], image_batch() / 255, image_batch()[..., :2], image_batch(0)):
        with pytest.raises(UserError, match=r"images: .* of shape \("):
            student.predict(wrong)
    tensors = load_file(exported)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other.safetensors has no card of fm-distill"):
        load_student(tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "floats.npy", np.zeros((1, 4, 4, 3)))
    np.save(tmp_path / "none.npy", np.zeros((0, 4, 4, 3), np.uint8))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "floats.npy").read_bytes()[:60])
    for place, said in (
        ("none", "there is no image, folder or array"),
        ("empty", "holds no images"),
        ("floats.npy", "floats.npy: got float64"),
        ("cut.npy", "is not a complete array"),
        ("none.npy", r"none.npy holds no images: its shape is \(0, 4, 4, 3\)"),
    ):
        with pytest.raises(UserError, match=said):
            predict(workdir, [tmp_path / place])
        with pytest.raises(UserError, match=said):  # one place, which is no list of letters
            predict(workdir, str(tmp_path / place))
    with pytest.raises(UserError, match="top is 0; expected 1 or more"):
        predict(workdir, [tmp_path], top=0)


def test_the_group_may_read_an_export(exported):
    assert exported.stat().st_mode == exported.with_suffix(".json").stat().st_mode
