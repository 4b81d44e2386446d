"""Networks, distances, crops, sources and optimizers of one's own, named by the config."""

import dataclasses
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import run_command, write_experiment
from test_accelerator_paths import matching
from test_train import same_bits, stop_at
from tiny import NETWORK, tiny_config

from fm_distill import load_student, testing
from fm_distill.config import (
    MeshConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SplitConfig,
    TeacherConfig,
    ViewConfig,
    with_options,
)
from fm_distill.data.sources import open_source
from fm_distill.errors import UserError
from fm_distill.evaluation.inference import evaluate
from fm_distill.exporting.export import export
from fm_distill.models import MODELS, build_network, check_network
from fm_distill.objectives.distances import DISTANCES
from fm_distill.objectives.terms import make_terms
from fm_distill.preparation.check import problems
from fm_distill.preparation.experiment import load_experiment
from fm_distill.runs.open_run import open_run
from fm_distill.train_step.optim import OPTIMIZERS
from fm_distill.training.train import train
from fm_distill.views.crops import CROPS

MINE = """
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fm_distill.data.sources import SOURCES
from fm_distill.models import MODELS


class Small(nn.Module):
    classes: int
    width: int = 4

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(self.width, (3, 3), strides=2, name="stem")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        features = {"stem": x}
        x = nn.Dense(self.classes, name="head")(x.mean((1, 2)))
        return x, features


class Plain(nn.Module):
    classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, dtype=self.dtype)(images))
        return nn.Dense(self.classes, dtype=self.dtype)(x.mean((1, 2)))


def narrow(config, classes, dtype):
    options = {"depths": (1,), "width": 0.125, "stem": "small", "groups": 4}
    described = dataclasses.replace(config, model="bit", options=options)
    return MODELS["bit"].build(described, classes, dtype)


def huber(student, teacher, temperature=1.0):
    return optax.huber_loss(student / temperature, teacher / temperature).sum(-1)


def squares(key, sizes, config, smallest_area):
    side = jnp.min(sizes, axis=1).astype(jnp.float32)
    return jnp.stack([0 * side, 0 * side, side, side], axis=1)


def lion(config):
    return optax.scale_by_lion(b1=config.beta1, b2=config.beta2)


def my_digits(config, name):
    return SOURCES["digits"](config, name)


NUMBER = 3


class Wrong(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, images, train):
        return images.mean((1, 2))


class Failing(nn.Module):
    classes: int

    def __call__(self, images, train):
        raise ValueError("not today")


class Fixed(nn.Module):
    def __call__(self, images, train):
        return images


def nothing(config, classes, dtype):
    return None
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def student_of(model):
    options = {"width": 8} if model.endswith(":Small") else {}
    return dataclasses.replace(tiny_config().student, model=model, options=options)


@pytest.mark.parametrize("name", ["Small", "Plain", "narrow"])
def test_an_own_network_passes_the_projects_tests(mine, name):
    config = student_of(f"{mine}:{name}")
    testing.check_network(build_network_of(config), config)


def test_options_of_an_own_network_are_the_fields_of_its_module(mine):
    def refused(name, options):
        with pytest.raises((ValueError, UserError)) as error:
            check_network(dataclasses.replace(student_of(f"{mine}:{name}"), options=options))
        return str(error.value)

    assert "Small has no option wdith; it has width; did you mean width?" in refused(
        "Small", {"wdith": 1}
    )
    assert "Plain has no option classes; it has none" in refused("Plain", {"classes": 3})
    with mine.open("a") as file:
        file.write("class Needy(nn.Module):\n    classes: int\n    depth: int\n")
        file.write("def reads(config, classes, dtype):\n    return config.options['width']\n")
    needs = "Needy needs the option depth: give --student.options.depth VALUE"
    assert needs in refused("Needy", {})
    assert "reads cannot be built: KeyError: 'width'" in refused("reads", {})


def build_network_of(config):
    return lambda _, classes, dtype: build_network(config, classes, dtype)


def test_an_own_network_is_trained_resumed_evaluated_and_exported(mine, tmp_path, monkeypatch):
    config = matching(tmp_path, MeshConfig(data=1), student=student_of(f"{mine}:Small"))
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    figures = train(config, whole).evaluation
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert not train(config, pieces).complete
    assert train(config, pieces).evaluation == figures
    same_bits(whole, pieces)
    assert evaluate(whole)["student"] == pytest.approx(figures["student"], rel=1e-5)
    card = export(whole, tmp_path / "mine.safetensors")
    assert card.naming == "flax"
    run, exported = open_run(whole).student, load_student(tmp_path / "mine.safetensors")
    assert {*run.variables.params} == {"stem", "norm", "head"}
    assert run.variables.params["stem"]["kernel"].shape == (3, 3, 3, 8)
    jax.tree.map(np.testing.assert_array_equal, run.variables, exported.variables)
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), np.uint8)
    np.testing.assert_array_equal(run.predict(images), exported.predict(images))
    for name in ("mine.stablehlo", "mine.onnx"):
        function = export(whole, tmp_path / name).function
        assert function.parity.agreement == 1 and function.parity.file_top1 > 0


def test_a_network_that_was_changed_is_refused(mine, tmp_path):
    config = tiny_config(student=student_of(f"{mine}:Small"))
    train(config, tmp_path / "run")
    mine.write_text(MINE.replace("nn.relu(nn.BatchNorm", "nn.gelu(nn.BatchNorm"))
    with pytest.raises(UserError, match=r"mine\.py:Small, and that file was changed: its SHA-256"):
        evaluate(tmp_path / "run")
    schedule = dataclasses.replace(config.schedule, total_steps=8)
    longer = dataclasses.replace(config, schedule=schedule)
    with pytest.raises(UserError, match=r"code: \('[0-9a-f]{64}',\) in the workdir"):
        train(longer, tmp_path / "run", extend=True)
    mine.unlink()
    with pytest.raises(UserError, match=r"which cannot be run here: there is no file .*mine\.py"):
        evaluate(tmp_path / "run")


def test_a_network_that_was_moved_is_the_same(mine, tmp_path, monkeypatch):
    config = tiny_config(student=student_of(f"{mine}:Small"))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        train(config, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(mine, tmp_path / "elsewhere" / "mine.py")
    moved = dataclasses.replace(config, student=student_of(f"{tmp_path}/elsewhere/mine.py:Small"))
    assert train(moved, tmp_path / "run").complete
    assert evaluate(tmp_path / "run")["student"]["top1"] is not None


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("{}:Missing", "has no 'Missing'; it has"),
        ("{}:NUMBER", "is a int; expected a function"),
        ("{}:Wrong", r"returned an array of shape \(2, 3\) for 2 images; expected logits"),
        ("{}:Failing", "does not run on images of 16 pixels: ValueError: not today"),
        ("{}:Fixed", "has no field `classes`; give it one"),
        ("{}:nothing", r"returned a NoneType; expected a fm_distill\.models\.Network"),
        ("nowhere.py:Small", r"there is no file nowhere\.py"),
        ("no.such.package:Small", r"no\.such\.package cannot be imported"),
    ],
)
def test_what_is_no_network_is_refused(mine, tmp_path, model, said):
    config = tiny_config(student=student_of(model.format(mine)))
    with pytest.raises(UserError, match=said):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_own_parts_are_used_and_known_by_their_contents(mine, tmp_path):
    """A run with four of them, by command, with paths beside the experiment; then evaluated."""
    write_experiment(
        tmp_path / "teacher.py", "views=ViewConfig(flip_probability=0.5, central_fraction=1.0)"
    )
    plain = write_experiment(tmp_path / "plain.py", 'teacher=TeacherConfig(experiment="teacher.py")'
                             ", objective=ObjectiveConfig(temperature=2.0)")  # fmt: skip
    options = {
        "objective.distance": "huber", "views.crop": "squares",
        "optimizer.name": "lion", "data.source": "my_digits",
    }  # fmt: skip
    given = [x for k, v in options.items() for x in (f"--{k}", f"{mine}:{v}")]
    done = run_command("train", plain, "--workdir", tmp_path / "run", *given)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert len(stored["resolved"]["code"]) == 4
    judged = run_command("evaluate", tmp_path / "run", "--json")
    assert judged.returncode == 0, judged.stderr
    for option in options:
        wrong = run_command("show", plain, f"--{option}", f"{mine}:NUMBER")
        assert wrong.returncode == 2
        assert f"{option}={mine}:NUMBER is a int; expected a function" in wrong.stderr


def test_paths_of_code_are_relative_to_the_experiment(mine, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    shutil.copy(mine, tmp_path / "folder")
    path = write_experiment(
        tmp_path / "folder" / "run.py",
        'student=StudentConfig(model="mine.py:Small", resolution=16), '
        'views=ViewConfig(crop="mine.py:squares"), '
        'objective=ObjectiveConfig(terms=(TermConfig(kind="mine.py:huber"),)), '
        'teacher=TeacherConfig(function="mine.py:huber"), more_teachers=(TeacherConfig('
        'weights="x", network=NetworkConfig(model="mine.py:Small", resolution=16)),)',
    )
    monkeypatch.chdir(tmp_path)
    found = load_experiment(os.path.relpath(path))
    assert found.student.model == "folder/mine.py:Small"
    assert found.views.crop == "folder/mine.py:squares"
    assert found.objective.terms[0].kind == "folder/mine.py:huber"
    (term,) = make_terms(found.objective)
    assert term.name == "huber" and not term.squared
    assert found.teacher.function == "folder/mine.py:huber"
    assert found.more_teachers[0].network.model == "folder/mine.py:Small"
    assert found.data.source == "digits"


def test_a_value_of_a_wrong_type_in_an_experiment_is_refused(tmp_path):
    """In a process without the tests' checks of types."""
    done = run_command("show", write_experiment(tmp_path / "run.py", 'batch_size="many"'))
    assert done.returncode == 2
    assert "Expected `int`, got `str` - at `$.batch_size`" in done.stderr


@pytest.mark.parametrize("name", [x for x in DISTANCES if x != "hard"])
def test_the_distances_here_pass(name):
    testing.check_distance(DISTANCES[name])


@pytest.mark.parametrize(
    "distance",
    [
        lambda student, teacher, temperature: 0 * student.sum(-1),
        lambda student, teacher, temperature: (
            (student.argmax(-1) != teacher.argmax(-1)) + 0 * student.sum(-1)
        ),
    ],
)
def test_a_distance_that_moves_nothing_does_not_pass(distance):
    with pytest.raises(AssertionError, match="the gradient is zero where the two disagree"):
        testing.check_distance(distance)


@pytest.mark.parametrize("name", CROPS)
def test_the_crops_here_pass(name):
    testing.check_crop(CROPS[name])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizers_here_pass(name):
    testing.check_optimizer(OPTIMIZERS[name])


def test_a_network_and_a_source_here_pass():
    testing.check_network(MODELS["bit"].build, with_options(as_network(), {"groups": 4}))
    testing.check_source(open_source(tiny_config().data, "test"))


def as_network() -> NetworkConfig:
    fields = {x.name: vars(NETWORK)[x.name] for x in dataclasses.fields(NetworkConfig)}
    return NetworkConfig(**fields | {"input_range": "minus_one_one"})


@pytest.mark.parametrize(
    ("check", "part", "said"),
    [
        ("distance", lambda s, t, T: jnp.square(s - t).sum(), "one number per example"),
        (
            "distance",
            lambda s, t, T: jnp.square(s - t.mean(0)).sum(-1),
            "depends on other examples",
        ),
        ("distance", lambda s, t, T: jnp.sqrt(jnp.square(s - t).sum(-1)), "not finite where the"),
        ("distance", lambda s, t, T: -jnp.square(s - t).sum(-1), "larger than that of another"),
        ("crop", lambda k, s, c, area: jnp.ones((len(s), 2)), r"boxes of shape \(200, 4\)"),
        ("crop", lambda k, s, c, area: jnp.full((len(s), 4), 25.0), "ends outside of its image"),
        ("optimizer", lambda c: optax.scale(-1.0), "after 200 steps it stands at"),
    ],
)
def test_a_part_that_is_wrong_is_told_so(check, part, said):
    with pytest.raises(AssertionError, match=said):
        getattr(testing, f"check_{check}")(part)


WRONG = """
import optax


def mean(student, teacher, temperature):
    return ((student - teacher) ** 2).mean()


def fails(student, teacher, temperature):
    return student @ teacher


def sizes(key, sizes, config, area):
    return sizes


def nothing(config):
    return None
"""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": "mean"}, r"returns \(\) for logits of shape \(3, 5\); .* of shape \(3,\)"),
        ({"objective": "fails"}, "fails with TypeError: dot_general requires"),
        ({"views": "sizes"}, r"returns \(3, 2\) for 3 sizes; expected an array of shape \(3, 4\)"),
        ({"optimizer": "nothing"}, "returns a NoneType; expected an optax.GradientTransformation"),
    ],
)
def test_a_wrong_own_part_is_refused_with_the_config(tmp_path, changes, said):
    """Before data are opened, or a teacher is trained."""
    (tmp_path / "wrong.py").write_text(WRONG)
    ((section, name),) = changes.items()
    reference = f"{tmp_path / 'wrong.py'}:{name}"
    part = {
        "objective": ObjectiveConfig(distance=reference),
        "views": ViewConfig(crop=reference),
        "optimizer": OptimizerConfig(name=reference, learning_rate=1.0),
    }[section]
    config = tiny_config(teacher=TeacherConfig(weights="w"), objective=ObjectiveConfig())
    (found,) = problems(dataclasses.replace(config, **{section: part}))
    assert reference in found and re.search(said, found)


def test_the_defaults_of_an_own_part_are_those_of_the_config():
    assert ObjectiveConfig().distance in DISTANCES
    assert OptimizerConfig(learning_rate=1.0).name in OPTIMIZERS


@pytest.mark.parametrize(
    ("classes", "said"), [(None, "has no labels"), (10, "has none for example 0")]
)
def test_labels_that_an_own_source_does_not_have_are_refused(tmp_path, classes, said):
    (tmp_path / "own.py").write_text(
        "import numpy as np\nfrom fm_distill.data.sources import Raw\n"
        "class Unlabelled:\n"
        f"    identity, classes, class_names = 'own', {classes}, None\n"
        "    def __len__(self): return 64\n"
        "    def __getitem__(self, i): return Raw(np.zeros((8, 8, 3), np.uint8), -1, f'own[{i}]')\n"
        "def source(config, name): return Unlabelled()\n"
    )
    config = tiny_config()
    data = dataclasses.replace(
        config.data,
        source=f"{tmp_path}/own.py:source",
        train=SplitConfig(name="train"),
        validation=None,
        test=None,
    )
    with pytest.raises(UserError, match=f"needs the label of each training image, .* {said}"):
        train(dataclasses.replace(config, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()
