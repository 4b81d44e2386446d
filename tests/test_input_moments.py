"""`student.input_range=adapt`: the moments of the training images, and who uses them."""

import dataclasses
import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_experiment
from PIL import Image
from test_cli import command
from test_train import stop_at
from tiny import NETWORK, logits_of, resolved_run, tiny_config

from fm_distill.config import (
    CanvasConfig,
    Config,
    DataConfig,
    LogConfig,
    MeshConfig,
    NetworkConfig,
    ScheduleConfig,
    SplitConfig,
    TeacherConfig,
)
from fm_distill.data.feeding import Reader
from fm_distill.data.grey_levels import count_levels, moments_of
from fm_distill.data.images import decode, shrink
from fm_distill.data.sources import open_source
from fm_distill.data.splits import open_data
from fm_distill.diagnosis.diagnose import diagnose
from fm_distill.errors import UserError
from fm_distill.evaluation.inference import evaluate
from fm_distill.exporting.export import export
from fm_distill.exporting.load_exported import load_exported
from fm_distill.exporting.load_student import load_student
from fm_distill.models import build_network
from fm_distill.networks.branch import make_branch
from fm_distill.networks.loading import load_networks
from fm_distill.networks.teachers import load_teachers
from fm_distill.preparation import input_moments
from fm_distill.preparation.check import check
from fm_distill.preparation.input_moments import with_input_moments
from fm_distill.preparation.resolve import resolve_here
from fm_distill.runs.open_run import open_run
from fm_distill.runs.workdir import Workdir
from fm_distill.system.preemption import Stop
from fm_distill.training.record import record
from fm_distill.training.train import train
from fm_distill.views.rendering import InputSpec, as_pixels, normalise
from fm_distill.weights.card import only_network
from fm_distill.weights.load import load_weights

ADAPT = dataclasses.replace(NETWORK, input_range="adapt")
CANVAS = CanvasConfig(size=24, fit="long")
# Heights and widths; the last is larger than the canvas.
SIZES = ((12, 20), (20, 12), (24, 24), (30, 40))


def write_images(folder, seed: int = 0) -> None:
    """Two classes; each channel has its own mean and deviation. Uncompressed: all equally long."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 8), ("test", 4)):
        for i in range(count):
            place = folder / split / "ab"[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            noise = rng.normal((60, 120, 200), (50, 30, 10), (*SIZES[i % 4], 3))
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(place / f"{i}.bmp")


def config_on(folder, **changes) -> Config:
    data = DataConfig(
        source="class_folders",
        data_dir=str(folder),
        train=SplitConfig(name="train"),
        test=SplitConfig(name="test"),
        canvas=CANVAS,
    )
    few = {
        "batch_size": 4,
        "data": data,
        "student": ADAPT,
        "schedule": ScheduleConfig(total_steps=4),
        "log": LogConfig(
            every_steps=1, evaluate_every_steps=0, final_evaluation=False, tensorboard=False
        ),
        "mesh": MeshConfig(data=1),
    }
    return tiny_config(**few | changes)


def pixels_of(folder) -> np.ndarray:
    """All pixels of the training images as they lie on their canvases."""
    paths = sorted((folder / "train").rglob("*.bmp"))
    return np.concatenate([shrink(decode(x.read_bytes()), CANVAS).reshape(-1, 3) for x in paths])


def assert_moments_of(network: NetworkConfig, pixels: np.ndarray) -> None:
    floats = pixels.astype(np.float64)
    np.testing.assert_allclose(network.input_mean, floats.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(network.input_deviation, floats.std(axis=0), rtol=1e-13)


def student_of(config: Config, folder) -> NetworkConfig:
    """The student as a new run in `folder` resolves it."""
    data, _ = open_data(config)
    networks = load_networks(config, folder, data.train.classes, data.train.class_names)
    return with_input_moments(networks, config, data.train, None).student


def no_pass(monkeypatch) -> None:
    def counted(*arguments):
        raise AssertionError("the moments were computed again")

    monkeypatch.setattr(input_moments, "count_levels", counted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapt")
    write_images(path)
    return path


@pytest.fixture(scope="module")
def run(folder):
    assert train(config_on(folder), folder / "run").complete
    return folder / "run"


def test_moments_are_those_of_the_pixels(tmp_path):
    write_images(tmp_path)
    expected = pixels_of(tmp_path)
    (tmp_path / "train/a/broken.bmp").write_bytes(b"no image")
    config = dataclasses.replace(config_on(tmp_path).data, corrupt="skip")
    reader = Reader(open_source(config, "train"), config, 2)
    counts = count_levels(reader)
    assert counts.sum() == 3 * len(expected)  # neither padding nor what is broken
    mean, deviation = moments_of(counts, "x")
    assert_moments_of(
        dataclasses.replace(ADAPT, input_mean=mean, input_deviation=deviation), expected
    )
    shares = [count_levels(reader, first, 3) for first in (2, 0, 1)]
    np.testing.assert_array_equal(sum(shares), counts)
    assert count_levels(reader, 9, 10).sum() == 0  # a process with nothing to do


def test_moments_are_exact_however_many_pixels_there_are():
    """Nearly all are alike: in float64, the mean square less the squared mean would be noise."""
    counts = np.zeros((3, 256), np.int64)
    most, few = 10**15 + 7, 3
    counts[:, 254], counts[:, 255] = most, few
    mean, deviation = moments_of(counts, "x")
    assert mean == (float(254 + Fraction(few, most + few)),) * 3
    assert deviation == (math.sqrt(Fraction(most * few, (most + few) ** 2)),) * 3


def test_a_constant_channel_is_refused(tmp_path):
    grey = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    grey[..., 2] = 7
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(grey).save(tmp_path / split / "a" / "1.png")
    with pytest.raises(UserError, match=r"^every pixel of files/\w+ has the same blue, and"):
        train(config_on(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_run_stores_them_and_its_input_is_normalised_by_them(folder, run):
    stored = Workdir(run).stored()
    network = stored.resolved.student
    assert stored.config.student.input_mean == ()  # the config is as it was given
    assert_moments_of(network, pixels_of(folder))
    mean, deviation = np.array(network.input_mean), np.array(network.input_deviation)
    image = np.random.default_rng(1).integers(0, 255, (1, 16, 16, 3)).astype(np.float32)
    seen = normalise(jnp.asarray(image), InputSpec.of(network))
    np.testing.assert_allclose(seen, (image - mean) / deviation, atol=1e-5)
    np.testing.assert_array_equal(as_pixels(seen, InputSpec.of(network)), image)
    # What it is trained on is then about zero and one.
    everything = (pixels_of(folder) - mean) / deviation
    np.testing.assert_allclose(
        [everything.mean(0), everything.std(0)], [[0] * 3, [1] * 3], atol=1e-9
    )


def test_whoever_uses_the_student_uses_them(folder, run, tmp_path, monkeypatch):
    """A picture of the network's own size passes through the view as it is."""
    no_pass(monkeypatch)
    opened = open_run(run)
    picture = np.random.default_rng(2).integers(0, 255, (1, 16, 16, 3), np.uint8)
    # By hand: the network on what NumPy normalised.
    network = opened.network
    images = (picture - np.array(network.input_mean)) / np.array(network.input_deviation)
    built = build_network(network, 2, jnp.dtype("float32"))
    logits = logits_of(built, opened.student.variables, jnp.float32(images))
    expected = np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(opened.student.predict(picture), expected, atol=1e-5)

    card = export(run, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(card.mean, np.array(network.input_mean) / 255)
    np.testing.assert_array_equal(card.std, np.array(network.input_deviation) / 255)
    assert load_weights(str(tmp_path / "x.safetensors"), None, "teacher").network == network
    exported = load_student(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(exported.predict(picture), opened.student.predict(picture))
    export(run, tmp_path / "x.stablehlo")
    function = load_exported(tmp_path / "x.stablehlo")
    np.testing.assert_allclose(function.predict_pixels([picture[0]]), expected, atol=1e-5)

    source = open_source(config_on(folder).data, "test")
    examples = [source[i] for i in range(len(source))]
    found = opened.student.predict_pixels([opened.student.prepare(x.image) for x in examples])
    surprise = -np.log([row[x.label] for row, x in zip(found, examples, strict=True)])
    assert evaluate(run)["student"]["cross_entropy"] == pytest.approx(surprise.mean(), rel=1e-4)


def test_a_run_goes_on_with_its_own(tmp_path, monkeypatch):
    """Also where the pixels have changed behind the names and lengths of their files."""
    write_images(tmp_path)
    config = config_on(tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, feeding="streaming"))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert not train(config, tmp_path / "run").complete
    before = Workdir(tmp_path / "run").stored().resolved.student
    write_images(tmp_path, seed=1)
    no_pass(monkeypatch)
    assert train(config, tmp_path / "run").complete
    assert Workdir(tmp_path / "run").stored().resolved.student == before


@pytest.fixture(scope="module")
def taught(folder, run):
    """A student that adapts to other images, of a teacher that adapted to `folder`'s."""
    write_images(folder / "other", seed=3)
    objective = dataclasses.replace(tiny_config().objective, target="teacher")
    teacher = TeacherConfig(workdir=str(run))
    config = config_on(folder / "other", teacher=teacher, objective=objective)
    assert train(config, folder / "taught").complete
    return folder / "taught"


def test_a_teacher_keeps_those_that_it_was_trained_with(folder, run, taught, tmp_path):
    """Of its workdir or its export."""
    resolved = Workdir(taught).stored().resolved
    own = open_run(run).network
    assert resolved.teachers == (own,)
    assert_moments_of(resolved.student, pixels_of(folder / "other"))
    assert resolved.student.input_mean != own.input_mean
    export(run, tmp_path / "x.safetensors")
    network = dataclasses.replace(only_network(NETWORK), input_range="auto")
    for stated in (None, network):
        teacher = TeacherConfig(weights=str(tmp_path / "x.safetensors"), network=stated)
        (found,) = load_teachers(tiny_config(teacher=teacher), tmp_path)
        assert found.network == own


def test_diagnose_tries_the_own_range_of_each_network(taught):
    central = diagnose(taught, examples=4).evidence.central
    assert central is not None
    assert [(x.network, x.configured) for x in central.ranges] == [
        ("student", "adapt"), ("teacher", "adapt"),
    ]  # fmt: skip
    for network in central.ranges:
        assert set(network.right) == {"minus_one_one", "zero_one", "imagenet", "adapt"}


def test_a_recording_teaches_a_student_that_adapts(folder, taught, tmp_path, monkeypatch):
    """To another data set than its teacher did, and as the teacher itself would."""
    config = Workdir(taught).stored().config
    with monkeypatch.context() as patch:
        no_pass(patch)  # the student sees nothing yet
        assert record(config, tmp_path / "recorded", Stop()).complete
    recorded = dataclasses.replace(config.teacher, recording=str(tmp_path / "recorded"))
    config = dataclasses.replace(config, teacher=recorded)
    assert train(config, tmp_path / "run").complete
    resolved = Workdir(tmp_path / "run").stored().resolved
    assert resolved.recording and resolved.student == open_run(taught).network
    assert resolved.teachers == Workdir(taught).stored().resolved.teachers
    for a, b in zip(*(jax.tree.leaves(open_run(x).student.variables)
                      for x in (taught, tmp_path / "run")), strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, atol=0.01)  # rounded to float16


@pytest.mark.parametrize("given", ["adapt", "auto"])
def test_a_student_starts_with_those_of_its_weights(folder, run, tmp_path, monkeypatch, given):
    """However its config says it; of the run or of its export."""
    no_pass(monkeypatch)
    export(run, tmp_path / "x.safetensors")
    for weights in (run, tmp_path / "x.safetensors"):
        student = dataclasses.replace(ADAPT, weights=str(weights), input_range=given)
        assert student_of(config_on(folder, student=student), tmp_path) == open_run(run).network


def test_given_moments_are_used_as_they_are(folder, tmp_path, monkeypatch):
    no_pass(monkeypatch)
    given = {"input_mean": (100.0, 110.0, 120.0), "input_deviation": (50.0, 60.0, 70.0)}
    config = config_on(folder, student=dataclasses.replace(ADAPT, **given))
    check(config)
    assert InputSpec.of(student_of(config, tmp_path)).moments == tuple(given.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_mean": (1.0, 2.0, 3.0)}, "expected three numbers each"),
        ({"input_mean": (1.0,) * 3, "input_deviation": (1.0, 0.0, 1.0)}, "deviations above zero"),
        ({"input_mean": (1.0,), "input_deviation": (1.0,)}, "expected three numbers each"),
        (
            {"input_mean": (1.0,) * 3, "input_deviation": (1.0,) * 3, "input_range": "auto"},
            "are for input_range=adapt, and input_range is auto",
        ),
    ],
)
def test_moments_that_cannot_be_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        check(tiny_config(student=dataclasses.replace(ADAPT, **change)))


def test_a_teacher_does_not_adapt():
    network = NetworkConfig(model="bit_r50x1", resolution=32, input_range="adapt")
    with pytest.raises(UserError, match=r"^teacher\.network\.input_range=adapt: a teacher keeps"):
        check(tiny_config(teacher=TeacherConfig(weights="x.npz", network=network)))
    function = TeacherConfig(function="x:y", network=dataclasses.replace(network, model="function"))
    with pytest.raises(UserError, match="needs to know its images"):
        check(tiny_config(teacher=function))


def test_weights_of_another_range_are_refused(folder, run, tmp_path):
    named = dataclasses.replace(NETWORK, weights=str(run), input_range="imagenet")
    with pytest.raises(UserError, match="trained with input_range=adapt, but the student's is"):
        train(config_on(folder, student=named), tmp_path / "run")
    others = {"input_mean": (1.0,) * 3, "input_deviation": (1.0,) * 3}
    with pytest.raises(UserError, match=r"input_mean is .*, requested "):
        student = dataclasses.replace(ADAPT, weights=str(run), **others)
        train(config_on(folder, student=student), tmp_path / "run")
    export(run, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="states that it was trained with adapt"):
        load_weights(str(tmp_path / "x.safetensors"), named, "student")


def test_without_a_run_there_are_no_moments():
    with pytest.raises(UserError, match="has no moments yet"):
        make_branch(ADAPT, 10, jnp.dtype("float32"))
    described = resolved_run(tiny_config(student=ADAPT), [only_network(ADAPT)])
    for network in (described.student, *described.teachers):  # a plan looks at shapes alone
        make_branch(network, 10, jnp.dtype("float32"))


def test_show_prints_them(tmp_path, capsys):
    experiment = write_experiment(tmp_path / "tiny.py")
    code, said, _ = command(capsys, "show", experiment, "--student.input-range", "adapt")
    source = open_source(tiny_config().data, "train")
    pixels = np.stack([source[i].image for i in range(len(source))])
    mean = float(re.search(r"'input_mean': [\[(]([0-9.]+),", said)[1])
    assert code == 0 and mean == pytest.approx(pixels.astype(np.float64).mean(), rel=1e-13)


def test_show_takes_those_of_the_run_that_is_there(folder, run, monkeypatch):
    no_pass(monkeypatch)
    config = config_on(folder)
    assert resolve_here(config, run).student == open_run(run).network
    smaller = dataclasses.replace(config.data, canvas=CanvasConfig(size=20, fit="long"))
    with pytest.raises(AssertionError, match="computed again"):
        resolve_here(dataclasses.replace(config, data=smaller), run)
