"""A teacher without a head, as DINOv2 comes: its features teach, and nothing asks its logits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_experiment
from PIL import Image
from safetensors.numpy import save_file
from test_features import one
from test_terms import stop_and_continue
from test_train import lines_of, same_bits
from tiny import resolved_run, tiny_config

from fm_distill.cli.main import main
from fm_distill.config import (
    BankConfig,
    CheckpointConfig,
    ExampleWeightsConfig,
    LogConfig,
    MeshConfig,
    NetworkConfig,
    ObjectiveConfig,
    QuantisationConfig,
    SplitConfig,
    TeacherConfig,
    TermConfig,
)
from fm_distill.diagnosis.diagnose import as_json, diagnose
from fm_distill.diagnosis.page import page
from fm_distill.errors import UserError
from fm_distill.evaluation.bench_process import Subject, _open
from fm_distill.evaluation.demo import judges
from fm_distill.evaluation.teacher_check import feature_warnings
from fm_distill.models import MODELS, Model, build_network, vit
from fm_distill.models.vit_designs import FACEBOOK
from fm_distill.networks.cost import cost_of
from fm_distill.preparation.warnings import warnings_on
from fm_distill.training.train import train
from fm_distill.weights.load import load_weights
from fm_distill.weights.names import in_naming

FLOAT32 = jnp.dtype("float32")
NAME = "vit_small_patch14_dinov2"
DINO = NetworkConfig(model=NAME, resolution=28)
TAPS = {"student_tap": "pre_logits", "teacher_tap": "pre_logits"}
SEED = one(kind="bank_similarity", bank=BankConfig(rows=32), **TAPS)
LABELLED = ObjectiveConfig(terms=(*SEED.terms, TermConfig(kind="labels", weight=0.1)))


@pytest.fixture(scope="module", autouse=True)
def little_dino():
    """The published network, but with few blocks and channels."""
    little = dataclasses.replace(FACEBOOK[NAME], channels=32, depth=2, heads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, NAME, Model(vit.member(little), "imagenet", NAME))
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with a head, and one without it, by timm's names."""
    folder = tmp_path_factory.mktemp("weights")
    shapes = jax.eval_shape(build_network(DINO, 10, FLOAT32).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    tensors = in_naming("timm", DINO, drawn)
    body = {x: y for x, y in tensors.items() if not x.startswith("head.")}
    assert len(body) == len(tensors) - 2 and "norm.weight" in body
    save_file(tensors, folder / "headed.safetensors")
    save_file(body, folder / "headless.safetensors")
    return folder


def taught(weights, name="headless", objective=SEED, **changes):
    teacher = TeacherConfig(weights=str(weights / f"{name}.safetensors"), network=DINO)
    log = LogConfig(every_steps=1, evaluate_every_steps=0, tensorboard=False)
    config = tiny_config(objective=objective, teacher=teacher, mesh=MeshConfig(data=1), log=log)
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    config, folder = taught(weights, objective=LABELLED), tmp_path_factory.mktemp("run") / "run"
    assert train(config, folder).complete
    return config, folder


def test_a_run_goes_on_after_a_stop(run, tmp_path, monkeypatch):
    config, folder = run
    losses = [x["loss"] for x in lines_of(folder) if x["split"] == "train"]
    assert losses[-1] < losses[0] and min(losses) > 0
    assert not any("agreement" in name for line in lines_of(folder) for name in line)
    stop_and_continue(config, tmp_path / "run", monkeypatch)
    same_bits(folder, tmp_path / "run")


def test_the_student_does_not_see_whether_there_is_a_head(run, weights, tmp_path):
    _, folder = run
    config = taught(weights, "headed", LABELLED)
    assert train(config, tmp_path / "run").complete
    same_bits(folder, tmp_path / "run")
    headless, headed = (json.loads((x / "evaluation.json").read_text())
                        for x in (folder, tmp_path / "run"))  # fmt: skip
    assert headless["student"] == headed["student"]
    assert headed["agreement"]["top1"] is not None
    params = [x["cost"]["teacher"]["parameters"] for x in (headless, headed)]
    assert params[1] - params[0] == 32 * 10 + 10


def test_features_are_those_of_the_whole_network(weights):
    found = {}
    for name, classes in (("headless", 0), ("headed", 10)):
        loaded = load_weights(str(weights / f"{name}.safetensors"), DINO, "teacher")
        assert loaded.classes == classes and ("head" in loaded.variables.params) == bool(classes)
        network = build_network(loaded.network, classes, FLOAT32)
        images = jax.random.normal(jax.random.key(0), (2, 28, 28, 3))
        asked = ("block2", "pre_logits")
        output = network.apply_frozen(network.freeze(loaded.variables), images, features=asked)
        assert output.logits.shape == (2, classes)
        found[name] = output.features
        assert ("head" in network.feature_shapes(modules=True)) == bool(classes)
    jax.tree.map(np.testing.assert_array_equal, found["headless"], found["headed"])
    floats = [cost_of((DINO,), classes, "float32", None).flops for classes in (0, 10)]
    # A product and a sum for each class: the body is counted.
    assert floats[1] - floats[0] == 2 * 32 * 10 + 10 and floats[0] > 1e5


def command(capsys, *arguments):
    """Exit code and what is printed."""
    with pytest.raises(SystemExit) as ended:
        main([str(x) for x in arguments])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


def test_what_needs_logits_is_left_out_of_evaluation(run, capsys):
    _, folder = run
    code, out, err = command(capsys, "evaluate", folder, "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert set(figures["teacher"].values()) == {None} and figures["student"]["top1"] > 0
    assert figures["agreement"] == {"top1": None, "top5": None} and figures["retention"] is None
    assert figures["kl"]["one"] is None and figures["training_view"]["kl"]["one"] is None
    code, out, _ = command(capsys, "evaluate", folder)
    assert code == 0 and "student accuracy" in out and "agreement" not in out and "nan" not in out


def test_commands_that_read_the_run(run, tmp_path, capsys):
    _, folder = run
    diagnosis = diagnose(folder, examples=16)
    found = as_json(diagnosis)
    assert found["training_view"] is None and found["central_view"] is None
    assert set(found["gradients"]["terms"]) == {"bank_similarity", "labels"}
    assert found["cka"]["teacher"] == ["stem", "block1", "block2", "pre_logits"]
    left, curve = found["not_examined"]
    assert curve["what"] == "the curve of the loss"
    assert "the teacher has no head" in left["why"] and "CKA" in page(diagnosis)
    code, _, err = command(capsys, "report", folder, "--out", tmp_path / "report.html")
    shown = (tmp_path / "report.html").read_text()
    assert code == 0 and "confusions" in shown and "Missing" not in shown, err
    code, out, err = command(capsys, "status", folder)
    assert code == 0 and "complete" in out, err
    assert [x.name for x in judges(folder)] == ["student"]
    with pytest.raises(UserError, match="it has no head, and so no probabilities to compute"):
        _open(Subject(str(folder), "teacher", 0, 1, 1, False))


def experiment(weights, path):
    return write_experiment(
        path,
        f'teacher=TeacherConfig(weights="{weights}/headless.safetensors", network=NetworkConfig('
        f'model="{NAME}", resolution=28)), objective=ObjectiveConfig(terms=(TermConfig(kind='
        '"cosine", student_tap="pre_logits", teacher_tap="pre_logits"),))',
    )


def test_commands_that_read_an_experiment(weights, tmp_path, capsys):
    path = experiment(weights, tmp_path / "run.py")
    code, out, err = command(capsys, "show", path)
    assert code == 0 and "headless = True" in out and "classes = 10" in out, err
    code, out, err = command(capsys, "show", path, "--taps")
    assert code == 0 and "pre_logits   32" in out, err
    code, _, err = command(capsys, "record", path, "--to", tmp_path / "recorded")
    assert code == 2 and "a recording holds the teacher's logits, and the teacher has no h" in err
    distance = ("--objective.terms.0.kind", "kl", "--objective.terms.0.student-tap", "None",
                "--objective.terms.0.teacher-tap", "None")  # fmt: skip
    code, _, err = command(capsys, "train", path, "--workdir", tmp_path / "run", *distance)
    assert code == 2 and "the term kl reads the teacher's logits, and teacher has no head" in err
    assert "Traceback" not in err and not (tmp_path / "run" / "config.json").exists()


def test_a_batch_larger_than_the_data_is_warned_of():
    for size, warned in ((320, True), (160, False)):
        config = tiny_config(batch_size=size)
        said = "\n".join(warnings_on(config, resolved_run(config, examples=160)))
        assert ("is larger than the 160 training examples" in said) == warned


def test_a_run_of_features_alone_is_warned_of_its_head():
    for objective, warned in ((SEED, True), (LABELLED, False), (ObjectiveConfig(), False)):
        config = tiny_config(objective=objective, teacher=TeacherConfig(weights="w"))
        said = "\n".join(warnings_on(config, resolved_run(config)))
        assert ("no term reads the student's logits, so its head learns nothing" in said) == warned


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"objective": ObjectiveConfig()},
            "the term kl reads the teacher's logits, and teacher has no head: use terms of its f",
        ),
        (
            {"objective": ObjectiveConfig(terms=(*SEED.terms, TermConfig(kind="dkd_others")))},
            "the term dkd_others reads the teacher's logits, and teacher has no head",
        ),
        (
            {"objective": ObjectiveConfig(target="labels")},
            "teacher has no head, and no term reads its features: leave it out",
        ),
        (
            {
                "objective": dataclasses.replace(
                    SEED, example_weights=ExampleWeightsConfig(kind="teacher_entropy")
                )
            },
            "example_weights.kind=teacher_entropy needs the teacher's logits",
        ),
        (
            {
                "checkpoint": CheckpointConfig(every_steps=2, keep_best="kl_one"),
                "log": tiny_config().log,
            },
            "checkpoint.keep_best=kl_one compares with the teacher's logits",
        ),
        (
            {"objective": one(kind="cosine", student_tap="pre_logits", teacher_tap="head")},
            "teacher_tap is 'head', which the teacher does not have",
        ),
    ],
)
def test_what_reads_logits_is_refused(weights, tmp_path, changes, said):
    config = dataclasses.replace(taught(weights), **changes)
    with pytest.raises(UserError, match=said):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"quantisation": QuantisationConfig(weights="int8", activations="int8")},
            "teacher.quantisation is checked by the teacher's classes, and it has no head",
        ),
        ({"classes": ("0", "1")}, "teacher.classes chooses among a teacher's classes, and this"),
    ],
)
def test_a_teacher_of_no_classes_is_not_asked_for_them(weights, tmp_path, changes, said):
    config = taught(weights)
    teacher = dataclasses.replace(config.teacher, **changes)
    with pytest.raises(UserError, match=said):
        train(dataclasses.replace(config, teacher=teacher), tmp_path / "run")


def test_without_labels_the_number_of_classes_is_asked_for(weights, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in range(32):
            grey = np.full((20, 20, 3), 8 * i, np.uint8)
            Image.fromarray(grey).save(tmp_path / "data" / split / f"{i}.png")
    data = dataclasses.replace(
        tiny_config().data,
        source="images",
        data_dir=str(tmp_path / "data"),
        train=SplitConfig(name="train"),
        validation=None,
        test=SplitConfig(name="test"),
        classes=None,
    )
    with pytest.raises(UserError, match="have no labels and the teacher no head; set"):
        train(taught(weights, data=data), tmp_path / "run")


def test_features_that_do_not_differ_are_warned_of():
    rng = np.random.default_rng(0)
    features = rng.normal(0, 1, (64, 8)) + 1
    assert feature_warnings("x", features) == []
    (said,) = feature_warnings("x", 1 + 1e-3 * features)
    assert "the teacher's x hardly differs between images" in said
    features[3, 2] = np.nan
    assert "values that are not finite" in feature_warnings("x", features)[0]


def test_features_are_looked_at_before_a_teacher_is_trained(tmp_path):
    teacher = write_experiment(tmp_path / "teacher.py")
    for term, said in (
        ({"kind": "hint", "student_tap": "root", "teacher_tap": "pre_logits"},
         "objective.terms.0: no adapter joins root of shape .* and pre_logits of shape"),
        ({"kind": "similarity", "student_tap": "root", "teacher_tap": "blok1"},
         "teacher_tap is 'blok1', which the teacher does not have; did you mean 'block1'"),
    ):  # fmt: skip
        config = tiny_config(objective=one(**term), teacher=TeacherConfig(experiment=str(teacher)))
        with pytest.raises(UserError, match=said):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run" / "teacher").exists()
    # What is wrong with the teacher's own config is said first.
    write_experiment(teacher, "batch_size=0")
    with pytest.raises(UserError, match="batch_size is 0"):
        train(config, tmp_path / "run")
