"""`fm-distill diagnose`: each planted cause is the first one named, and a healthy run has none."""

import dataclasses
import json
import re
import shutil
import types
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, run_command
from diagnosed import NEAR, NOTHING_LEARNED, PLANTED, healthy, within
from gratings import CLASSES
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_cli import command, refused
from tiny import NETWORK, resolved_run, tiny_config

from fm_distill.config import (
    CanvasConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    QuantisationConfig,
    ScheduleConfig,
    SplitConfig,
    StudentConfig,
    TeacherConfig,
    TermConfig,
    ViewConfig,
    with_options,
)
from fm_distill.config.serialization import changed
from fm_distill.diagnosis import causes
from fm_distill.diagnosis.causes import CAUSES, causes_of
from fm_distill.diagnosis.data_rules import renamed_accuracy
from fm_distill.diagnosis.diagnose import Diagnosis, as_json, diagnose
from fm_distill.diagnosis.evidence import Cka
from fm_distill.diagnosis.measure import aim_of, kl
from fm_distill.diagnosis.page import cka_picture, text
from fm_distill.diagnosis.probes import _teacher_of, gradient_products
from fm_distill.errors import UserError
from fm_distill.exporting.export import export
from fm_distill.models import Network, Output, Variables
from fm_distill.networks.batch_statistics import batch_moments
from fm_distill.networks.branch import Branch
from fm_distill.objectives.terms import Targets
from fm_distill.runs.open_run import open_run
from fm_distill.runs.stored_run import describe_run
from fm_distill.system.preemption import Stop
from fm_distill.training.record import record
from fm_distill.training.reporter import Reporter
from fm_distill.training.train import train
from fm_distill.views.rendering import INPUT_RANGES, InputSpec
from fm_distill.weights.card import CARD_KEY, only_network
from fm_distill.weights.names import in_naming

VIEWS = ViewConfig(crop_area=(0.5, 1.0), flip_probability=0.0, central_fraction=1.0)
LABELS = tiny_config(
    batch_size=32,
    data=DataConfig(
        source=f"{ROOT / 'tests' / 'gratings.py'}:gratings",
        train=SplitConfig(name="train"),
        test=SplitConfig(name="test"),
        canvas=CanvasConfig(size=20, fit="long"),
    ),
    views=dataclasses.replace(VIEWS, mixup="none"),
    student=with_options(NETWORK, {"width": 0.25}),
    optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=1e-4),
    schedule=ScheduleConfig(total_steps=60, warmup_steps=6),
    checkpoint=CheckpointConfig(every_steps=1000),
    log=LogConfig(every_steps=1, evaluate_every_steps=0, tensorboard=False, final_evaluation=False),
    mesh=MeshConfig(data=1),
)


def names(found) -> list[str]:
    return [x.name for x in found]


def test_every_cause_is_planted():
    assert PLANTED.keys() == CAUSES.keys()
    assert {name for name, _ in NEAR.values()} == CAUSES.keys()
    assert causes_of(healthy()) == ()


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_cause_is_the_first_one_named(name):
    found = causes_of(PLANTED[name])
    assert names(found)[0] == name
    assert re.search(r"\d", found[0].evidence) and len(found[0].advice) > 20


@pytest.mark.parametrize("case", NEAR)
def test_what_is_only_near_has_no_cause(case):
    assert causes_of(NEAR[case][1]) == ()


def test_a_run_that_diverged_or_went_far_for_nothing_has_too_high_a_rate():
    failed = within(
        healthy(), "setting", failure="the loss is not finite at step 7", complete=False
    )
    back = within(healthy(), "setting", rollbacks=2)
    for found in (failed, back, NOTHING_LEARNED):
        assert names(causes_of(found)) == ["learning-rate-too-high"]
    other = within(healthy(), "setting", failure="the disk is full", complete=False)
    assert causes_of(other) == ()


def test_the_strongest_is_named_first_and_the_first_of_the_table_of_equal_ones(monkeypatch):
    both = within(PLANTED["too-little-patience"], "setting", warmup_steps=900)
    both = dataclasses.replace(both, central=PLANTED["wrong-class-order"].central)
    expected = ["wrong-class-order", "warm-up-too-long", "too-little-patience"]
    assert names(causes_of(both)) == expected
    monkeypatch.setattr(causes, "CAUSES", dict(reversed(CAUSES.items())))
    assert names(causes_of(both)) == expected


def test_new_names_of_classes_are_checked_on_other_examples():
    """Else chance would look like another order where a class has few examples."""
    found, label = np.random.default_rng(0).integers(0, 100, (2, 800))
    assert renamed_accuracy(found, label, 100) < 0.05
    assert renamed_accuracy((label + 7) % 100, label, 100) > 0.95


@pytest.mark.parametrize("kept", [0.9, 0.99])
def test_the_moments_of_a_batch_are_read_out_of_any_average(kept):
    def apply(variables, images, *, train, features=()):
        new = jax.tree.map(lambda x, y: kept * x + (1 - kept) * y, variables.statistics, moments)
        return Output(jnp.zeros((2, 3)), {}, new)

    moments = {"norm": {"mean": jnp.float32([1.5, -2.0]), "var": jnp.float32([0.25, 9.0])}}
    stored = Variables({}, jax.tree.map(jnp.ones_like, moments))
    network = Network(3, lambda key: stored, apply, lambda x: x, apply)
    branch = Branch(network, InputSpec(4, "zero_one"))
    found = batch_moments(branch, stored, jnp.zeros((2, 4, 4, 3)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(moments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)


def test_schedules_of_the_loss_silence_the_curves():
    for name in ("learning-rate-too-low", "capacity-reached", "too-little-patience"):
        assert causes_of(within(PLANTED[name], "setting", comparable=False)) == ()


def test_products_of_gradients_are_those_of_each_alone():
    params = {"a": jnp.float32([1.0, 2.0]), "b": jnp.float32(3.0)}

    def losses(p):
        return jnp.stack([p["a"] @ p["a"], p["a"][0] * p["b"], -p["b"]])

    gradients = np.array([[2.0, 4.0, 0.0], [3.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    np.testing.assert_allclose(gradient_products(losses, params), gradients @ gradients.T)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_most_likely_classes_of_a_recording_are_put_in_their_places(temperature):
    """Else averages over examples would be of ranks, and say that the teacher sees nothing."""
    logits = 6 * np.eye(5) + np.random.default_rng(0).normal(size=(5, 5))
    indices = np.argsort(-logits, axis=-1)[:, :2]
    kept = np.take_along_axis(logits, indices, axis=-1)
    others = np.exp(logits / temperature).sum(-1) - np.exp(kept / temperature).sum(-1)
    recorded = np.concatenate([kept, temperature * np.log(others)[:, None]], axis=-1)
    targets = Targets((jnp.float32(recorded),), indices=(jnp.int32(indices),))
    measured = _teacher_of(targets, jnp.float32(temperature), 5)
    expected = np.repeat(temperature * np.log(others / 3)[:, None], 5, axis=-1)
    np.put_along_axis(expected, indices, kept, axis=-1)
    for name, t in (("teacher_entropy", temperature), ("teacher_entropy_one", 1.0)):
        p = np.exp(expected / t) / np.exp(expected / t).sum(-1, keepdims=True)
        entropy = -(p * np.log(p)).sum(-1) / np.log(5)
        np.testing.assert_allclose(measured[name], entropy, rtol=1e-4)
    np.testing.assert_allclose(measured["teacher_probabilities"], p.mean(0), rtol=1e-4)


@pytest.mark.parametrize("ensemble", ["mean_logits", "mean_probabilities", "sum_of_distances"])
def test_several_teachers_are_one_target_on_the_central_crop(ensemble):
    """A student that is what they make together is at no distance, whatever the first one is."""
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 8, 5)) * 3
    student = (one + two) / 2
    if ensemble != "mean_logits":
        student = np.log(sum(np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (one, two)) / 2)
    objective = ObjectiveConfig(temperature=1.0, ensemble=ensemble)
    target, classes = aim_of([one, two], objective)
    np.testing.assert_allclose(kl(target, student, 1.0), 0, atol=1e-5)
    first = one if ensemble == "sum_of_distances" else student
    np.testing.assert_array_equal(classes, first.argmax(-1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the complete run of a teacher that knows its classes."""
    place = tmp_path_factory.mktemp("diagnose")
    assert train(LABELS, place / "teacher").complete
    return place


def matching(folder, steps=100, **changes):
    """The run of a student of that teacher."""
    config = dataclasses.replace(
        LABELS,
        views=VIEWS,
        student=NETWORK,
        teacher=TeacherConfig(workdir=str(folder / "teacher")),
        objective=ObjectiveConfig(temperature=2.0),
        schedule=ScheduleConfig(total_steps=steps, warmup_steps=steps // 10),
    )
    return dataclasses.replace(config, **changes)


def diagnosed(folder, name, config):
    train(config, folder / name)
    return diagnose(folder / name)


def teacher_file(folder, change) -> TeacherConfig:
    """The teacher's weights with a changed head, in a file that says nothing of itself."""
    opened = open_run(folder / "teacher")
    variables = opened.student.variables
    head = jax.tree.map(change, variables.params["head"])
    changed_variables = Variables(variables.params | {"head": head}, variables.statistics)
    path = folder / "teacher.npz"
    np.savez(path, **in_naming("bit_original", opened.network, changed_variables))
    return TeacherConfig(weights=str(path), network=only_network(opened.network))


@pytest.fixture(scope="module")
def healthy_run(folder):
    train(matching(folder), folder / "healthy")
    return folder / "healthy"


def test_a_healthy_run_has_no_cause_and_a_page(healthy_run, folder):
    """By the real command, in a process of its own."""
    page = folder / "page.html"
    done = run_command("diagnose", healthy_run, "--json", "--out", page)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["causes"] == [] and found["not_examined"] == []
    assert found["complete"] and found["step"] == found["total_steps"] == 100
    cka = np.array(found["cka"]["values"])
    assert cka.shape == (len(found["cka"]["student"]), len(found["cka"]["teacher"])) == (3, 3)
    # Both order the examples by their class in the end, and not yet at the input.
    assert cka[-1, -1] > 0.8 and cka[-1, -1] > cka[0, -1] + 0.2
    assert list(found["gradients"]["terms"]) == ["kl"]
    assert found["gradients"]["terms"]["kl"]["share"] == 1
    assert found["training_view"]["agreement"] > 0.9
    assert found["training_view"]["kl_between_views_nats"] < 1e-6
    assert found["central_view"]["teacher_top1"][0] > 0.95
    assert len(found["over_the_run"]) == 6
    assert all(0 <= x["data_wait"] <= 1 for x in found["over_the_run"])
    written = page.read_text()
    assert "No cause was found" in written and "<img alt='CKA'" in written
    for outside in ("http:", "https:", "<script", "<link", "url("):
        assert outside not in re.sub(r"base64,[^']*", "", written)


def test_a_teacher_with_its_classes_in_another_order(folder):
    order = np.roll(np.arange(CLASSES), 2)
    teacher = teacher_file(folder, lambda x: x[..., order])
    found = diagnosed(folder, "order", matching(folder, 20, teacher=teacher))
    assert names(found.causes)[0] == "wrong-class-order"
    assert "100.0%" in found.causes[0].evidence or "99." in found.causes[0].evidence


def test_a_teacher_with_a_wrong_input_range(folder):
    """BatchNorm's moments are those of one normalisation, and its file names another one."""
    student = dataclasses.replace(own("Normed"), input_range="zero_one")
    train(dataclasses.replace(LABELS, student=student), folder / "normed")
    path = folder / "normed.safetensors"
    export(folder / "normed", path)
    with safe_open(path, "numpy") as file:
        card = json.loads(file.metadata()[CARD_KEY])
    mean, deviation = (tuple(x / 255 for x in y) for y in INPUT_RANGES["imagenet"])
    card |= {"mean": mean, "std": deviation}
    card["network"]["input_range"] = "imagenet"
    save_file(load_file(path), path, {CARD_KEY: json.dumps(card)})
    teacher = TeacherConfig(weights=str(path))
    found = diagnosed(folder, "range", matching(folder, 20, teacher=teacher))
    assert names(found.causes)[0] == "wrong-input-range"
    assert "--teacher.network.input-range zero_one" in found.causes[0].advice
    assert "wrong-input-range" in text(found)


def test_what_is_not_there_is_left_out_and_said(healthy_run):
    """The log alone still names causes."""
    config = changed(open_run(healthy_run).config, {"data.source": "/gone/gratings.py:gratings"})
    found = diagnose(healthy_run, config)
    assert found.evidence.training is None and found.evidence.cka is None
    assert "/gone/gratings.py" in found.evidence.not_examined[0].why
    assert as_json(found)["gradients"] is None
    assert "not examined" in text(found)


@pytest.fixture
def no_checkpoint(tmp_path):
    """The workdir of a run that has only its config."""
    run = tmp_path / "run"
    run.mkdir()
    tree = describe_run(tiny_config(), resolved_run(tiny_config()), ())
    (run / "config.json").write_text(json.dumps(tree))
    return run


def test_a_run_without_a_checkpoint_is_judged_by_what_it_logged(healthy_run, tmp_path):
    no_checkpoint = tmp_path / "run"
    no_checkpoint.mkdir()
    shutil.copy(healthy_run / "config.json", no_checkpoint)
    with pytest.raises(UserError, match="has no checkpoint yet; train it first"):
        diagnose(no_checkpoint)
    status = {"state": "failed", "step": 0, "total_steps": 9, "reason": "loss not finite at step 1"}
    (no_checkpoint / "status.json").write_text(json.dumps(status))
    found = diagnose(no_checkpoint)
    assert names(found.causes) == ["learning-rate-too-high"]
    assert "not finite at step 1" in found.causes[0].evidence
    left_out = {x.what: x.why for x in found.evidence.not_examined}
    assert left_out["networks and views"] == "the run has no checkpoint yet"
    assert left_out["the curve of the loss"].endswith("and it has 0")


def test_a_curve_that_is_not_judged_is_left_out(healthy_run, tmp_path):
    run = shutil.copytree(healthy_run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:5]))
    (left_out,) = diagnose(run).evidence.not_examined
    assert left_out.what == "the curve of the loss" and "20 lines" in left_out.why


def test_a_place_that_was_given_has_to_be_right(healthy_run):
    config = open_run(healthy_run).config
    with pytest.raises(UserError, match="/gone"):
        diagnose(healthy_run, changed(config, {"teacher.workdir": "/gone"}))
    with pytest.raises(UserError, match="examples is 0; expected 1 or more"):
        diagnose(healthy_run, examples=0)


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("page.html", "already exists; choose another --out, or give --overwrite"),
        ("run", "already exists"),
        ("gone/page.html", "there is no folder"),
    ],
)
def test_the_place_of_the_page_is_checked_before_anything_is_measured(
    capsys, no_checkpoint, tmp_path, out, said
):
    page = tmp_path / "page.html"
    page.write_text("mine")
    error = refused(capsys, "diagnose", no_checkpoint, "--out", tmp_path / out)
    assert said in error and len(error.strip().splitlines()) == 1
    assert page.read_text() == "mine"


def test_a_page_that_cannot_be_written_costs_no_diagnosis(
    capsys, no_checkpoint, tmp_path, monkeypatch
):
    found = Diagnosis("the run", (), healthy())
    monkeypatch.setattr("fm_distill.diagnosis.diagnose.diagnose", lambda *_: found)
    (tmp_path / "page.html.tmp").symlink_to("/dev/full")
    code, out, error = command(capsys, "diagnose", no_checkpoint, "--out", tmp_path / "page.html")
    assert code == 2 and "page.html cannot be written" in error
    assert out == text(found) + "\n"


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere", "is not the workdir of a run"),
        ("teacher", "learns from labels, without a teacher"),
    ],
)
def test_wrong_input_is_refused(capsys, folder, healthy_run, place, said):
    error = refused(capsys, "diagnose", folder / place, "--json")
    assert said in error and len(error.strip().splitlines()) == 1


def test_the_picture_shows_each_pair_once():
    values = np.array([[1.0, 0.25, np.nan], [-0.01, 0.5, 0.75]])
    cka = Cka(("a", "b"), ("x", "y<", "z"), values, 64)
    root = ElementTree.fromstring(cka_picture(cka))
    said = [x.text for x in root.iter("{http://www.w3.org/2000/svg}text")]
    assert said[1:] == ["x", "y<", "z", "a", "1.00", "0.25", "-", "b", "-0.01", "0.50", "0.75"]


def rate(learning_rate: float) -> OptimizerConfig:
    return dataclasses.replace(LABELS.optimizer, learning_rate=learning_rate)


def terms(*others: TermConfig) -> ObjectiveConfig:
    return ObjectiveConfig(temperature=2.0, terms=(TermConfig(kind="kl"), *others))


def on(split: str) -> DataConfig:
    return dataclasses.replace(LABELS.data, train=SplitConfig(name=split))


def own(name: str) -> StudentConfig:
    return StudentConfig(model=f"{ROOT / 'tests' / 'gratings.py'}:{name}", resolution=16)


BATCH_NORM = with_options(NETWORK, {"norm": "batch"})
# What is changed of the healthy run, each with the cause that is named first.
TRAINED = {
    "views-differ": {
        "teaching": "independent",
        "views": dataclasses.replace(VIEWS, crop_area=(0.02, 1.0)),
    },
    "weak-teacher-on-training-view": {
        "views": dataclasses.replace(VIEWS, crop_area=(0.005, 0.01)),
    },
    "saturated-gradient": {"objective": ObjectiveConfig(temperature=200.0)},
    "learning-rate-too-high": {"optimizer": rate(10.0)},
    "learning-rate-too-low": {"optimizer": rate(1e-5)},
    "warm-up-too-long": {"schedule": ScheduleConfig(total_steps=60, warmup_steps=40)},
    "dominant-term": {"objective": terms(TermConfig(kind="labels", weight=1e-3))},
    "input-bound": {"data": dataclasses.replace(on("slow"), feeding="streaming"), "steps": 20},
    "too-little-patience": {"teaching": "consistent", "optimizer": rate(4e-3)},
    "statistics-of-training-views": {"student": BATCH_NORM, "steps": 120},
    "capacity-reached": {"student": own("TwoNumbers"), "steps": 300},
    "dead-adapter": {
        "student": own("Silent"),
        "objective": terms(
            TermConfig(kind="hint", weight=0.1, student_tap="silent", teacher_tap="pre_logits")
        ),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_cause_that_was_trained_in_is_the_first_one_named(folder, name):
    found = diagnosed(folder, name, matching(folder, **({"steps": 60} | TRAINED[name])))
    assert names(found.causes)[0] == name


@pytest.mark.slow
def test_pictures_that_the_student_cannot_tell_from_others(folder):
    """The teacher knows them by their middle, which the student does not see."""
    of_marked = {
        "data": on("marked"),
        "views": dataclasses.replace(VIEWS, crop_area=(1.0, 1.0), mixup="none"),
        "schedule": ScheduleConfig(total_steps=400, warmup_steps=20),
    }
    train(dataclasses.replace(LABELS, student=own("Normed"), **of_marked), folder / "marking")
    config = matching(folder, student=own("Unseeing"), **of_marked)
    taught_by = TeacherConfig(workdir=str(folder / "marking"))
    found = diagnosed(folder, "unseen", dataclasses.replace(config, teacher=taught_by))
    assert names(found.causes)[0] == "unmatchable-examples"
    marked = {*np.flatnonzero(np.arange(384) % 24 == 9).tolist()}
    assert "of 384 training images" in found.causes[0].evidence
    furthest = re.search(r"the furthest are the examples (.+)", found.causes[0].evidence)[1]
    furthest = [int(x) for x in furthest.split(", ")]
    assert {*furthest} <= marked and len({*furthest}) == len(furthest) == 5


@pytest.mark.slow
def test_moments_that_are_kept_of_other_images_have_drifted(folder):
    """A student that starts from another run's BatchNorm and sees a quarter of its light."""
    train(dataclasses.replace(LABELS, student=BATCH_NORM), folder / "batch")
    student = dataclasses.replace(BATCH_NORM, weights=str(folder / "batch"), keep_statistics=True)
    found = diagnosed(folder, "drift", matching(folder, data=on("dark"), student=student))
    assert names(found.causes)[0] == "batch-norm-drift"


HEALTHY = {
    "consistent": {"teaching": "consistent"},
    "fixed": {"teaching": "fixed"},
    "labels": {"objective": terms(TermConfig(kind="labels", weight=1.0))},
    "features": {
        "objective": terms(
            TermConfig(kind="similarity", weight=30.0, student_tap="block1", teacher_tap="block1")
        )
    },
    "adapter": {
        "objective": terms(
            TermConfig(kind="hint", weight=0.1, student_tap="block1", teacher_tap="block1")
        )
    },
    "average": {"ema_decay": 0.9},
    "batch norm": {
        "student": dataclasses.replace(BATCH_NORM, final_statistics="central"),
        "steps": 120,
    },
    "streaming": {"data": dataclasses.replace(LABELS.data, feeding="streaming")},
    "quantised": {
        "student": dataclasses.replace(
            NETWORK, quantisation=QuantisationConfig(weights="int8", activations="int8")
        )
    },
    "standardised": {"objective": ObjectiveConfig(distance="standardised_kl", temperature=2.0)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_of_many_kinds_have_no_cause(folder, name):
    found = diagnosed(folder, name, matching(folder, **HEALTHY[name]))
    assert found.causes == () and found.evidence.not_examined == ()


@pytest.mark.slow
def test_a_recorded_teacher_that_is_gone_leaves_out_what_needs_it(folder):
    config = matching(folder)
    assert record(config, folder / "recording", Stop()).complete
    teacher = TeacherConfig(recording=str(folder / "recording"))
    found = diagnosed(folder, "recorded", dataclasses.replace(config, teacher=teacher))
    assert found.causes == () and found.evidence.cka is None
    assert "recorded outputs" in found.evidence.not_examined[0].why
    assert found.evidence.training.same_class.mean() > 0.9
    assert found.evidence.gradients.norms.min() > 0


def test_a_run_that_waits_for_its_batches_says_so_once(capsys):
    reporter = types.SimpleNamespace(waiting=0)
    for wait in (0.9, 0.9, 0.1, 0.9, 0.9):  # never three in a row
        Reporter._warn_of_waiting(reporter, wait)
    assert not capsys.readouterr().err
    for wait in (0.5, 0.9, 0.9):
        Reporter._warn_of_waiting(reporter, wait)
    text = capsys.readouterr().err
    assert text.count("WARNING") == 1 and "50% of the time" in text
