"""`teacher.classes`: a student of some of its teacher's classes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_accelerator_paths import matching
from tiny import NETWORK, smallest

from fm_distill.config import (
    CanvasConfig,
    DataConfig,
    MeshConfig,
    NetworkConfig,
    SplitConfig,
    TeacherConfig,
)
from fm_distill.errors import UserError
from fm_distill.evaluation.inference import evaluate
from fm_distill.models import build_network
from fm_distill.networks import class_choice
from fm_distill.networks.teachers import load_teachers
from fm_distill.runs.open_run import open_run
from fm_distill.system.preemption import Stop
from fm_distill.training.record import record
from fm_distill.training.train import train
from fm_distill.weights.card import only_network

FLOAT32 = jnp.dtype("float32")
NAMES = tuple("abcdefghij")


# One head, and the mean of two.
@pytest.mark.parametrize("model", ["bit", "deit_tiny_distilled_patch16_224"])
def test_the_logits_of_the_chosen_classes_are_those_of_the_teacher(model):
    config = NetworkConfig(model=model, resolution=smallest(model))
    config = only_network(NETWORK) if model == "bit" else config
    full, places = build_network(config, 7, FLOAT32), (5, 0, 3)
    variables = jax.jit(full.init)(jax.random.key(0))
    # Heads start at zero.
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [x + 0.1 * jax.random.uniform(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    variables = jax.tree.unflatten(tree, noise)
    images = jax.random.normal(jax.random.key(2), (2, config.resolution, config.resolution, 3))
    some = class_choice.variables_of(config, variables, 7, places)
    every, logits = (
        np.asarray(jax.jit(lambda v, x, n=n: n.apply(v, x, train=False).logits)(v, images))
        for n, v in ((full, variables), (build_network(config, 3, FLOAT32), some))
    )
    every = every.astype(np.float64)
    np.testing.assert_allclose(logits, every[:, places], rtol=1e-5, atol=1e-5)
    probabilities = np.exp(every) / np.exp(every).sum(1, keepdims=True)
    chosen = probabilities[:, places] / probabilities[:, places].sum(1, keepdims=True)
    np.testing.assert_allclose(jax.nn.softmax(logits), chosen, rtol=1e-4)
    assert (every[0].argsort() != np.arange(7)).any()


@pytest.fixture
def unlabelled(tmp_path):
    """A run on 20 images without labels, with a teacher of the ten classes a to j."""
    (tmp_path / "images").mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    data = DataConfig(
        source="images",
        data_dir=str(tmp_path),
        train=SplitConfig(name="images"),
        canvas=CanvasConfig(size=24),
        class_names=str(tmp_path / "names.txt"),
    )
    return matching(tmp_path, MeshConfig(data=1), data=data)


def of_classes(config, *classes):
    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, classes=classes))


def test_a_student_of_some_classes_live_and_recorded(unlabelled, tmp_path):
    (tmp_path / "wanted.txt").write_text("h\nc\n\nd\n")
    config = of_classes(unlabelled, str(tmp_path / "wanted.txt"))
    figures = train(config, tmp_path / "run").evaluation
    run = open_run(tmp_path / "run")
    assert run.class_names == ("h", "c", "d") and run.classes == 3
    assert figures["examples"] == 20 and figures["kl"]["one"] is not None
    # By whatever names: they are the same teacher.
    for classes in (("h", "2", "d"), ("7", "2", "3")):
        again = evaluate(tmp_path / "run", "train", of_classes(config, *classes))
        assert again["kl"] == pytest.approx(figures["kl"], rel=1e-5)
    with pytest.raises(UserError, match="this is not the teacher of the run"):
        evaluate(tmp_path / "run", "train", of_classes(config, "c", "h", "d"))
    assert record(config, tmp_path / "recording", Stop()).complete
    recorded = TeacherConfig(recording=str(tmp_path / "recording"))
    config = dataclasses.replace(config, teacher=recorded)
    assert train(config, tmp_path / "recorded").complete
    assert open_run(tmp_path / "recorded").class_names == ("h", "c", "d")
    with pytest.raises(UserError, match=r"recorded 3 classes \(h, c, d\), .* for 2 classes \(h,"):
        train(of_classes(config, "h", "c"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_function_of_some_classes(tmp_path):
    (tmp_path / "sums.py").write_text(
        "import numpy as np\n"
        "def logits(images):\n"
        "    return images.mean((1, 2, 3))[:, None] * np.arange(1, 6, dtype=np.float32)\n"
    )
    network = NetworkConfig(model="function", resolution=8, input_range="zero_one")
    teacher = TeacherConfig(function=f"{tmp_path / 'sums.py'}:logits", network=network)
    experiment = dataclasses.replace(matching(tmp_path, MeshConfig(data=1)), teacher=teacher)
    (every,) = load_teachers(experiment, tmp_path)
    (some,) = load_teachers(of_classes(experiment, "4", "1"), tmp_path)
    images = np.random.default_rng(0).random((3, 8, 8, 3), np.float32)
    np.testing.assert_array_equal(some.function(images), every.function(images)[:, [4, 1]])
    assert some.classes == 2 and some.fingerprint != every.fingerprint


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("a", "hh"), "the teacher has no class 'hh'; did you mean h"),
        (("a", "10"), "no class '10'; give names, or numbers from 0 to 9"),
        (("a", "b", "a"), "names 'a' more than once"),
        (("b", "1"), "'1' is given twice"),
        (("a",), "only 'a'; expected two classes or more"),
        (("empty.txt",), "names none; expected two classes or more"),
        (("nowhere.txt",), "nowhere.txt cannot be read"),
    ],
)
def test_classes_that_cannot_be_chosen(unlabelled, tmp_path, monkeypatch, classes, message):
    (tmp_path / "empty.txt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        train(of_classes(unlabelled, *classes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_classes_of_imagenet_have_names():
    choice = class_choice.chosen(("pizza", "tabby"), None, 1000, "teacher")
    assert choice == ((963, 281), ("pizza", "tabby"))
    # Numbers are no names: those of the data may be others.
    assert class_choice.chosen(("963", "281"), None, 1000, "teacher") == ((963, 281), None)
    assert class_choice.chosen(("1", "0"), None, 5, "teacher") == ((1, 0), None)
