"""Distances of features against float64 NumPy, their properties, and a run that reads them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_command, write_experiment
from test_terms import stop_and_continue, trained_by
from test_train import lines_of, same_bits
from tiny import NETWORK

from fm_distill.config import MemoryConfig, MeshConfig, ObjectiveConfig, TeacherConfig, TermConfig
from fm_distill.errors import UserError
from fm_distill.models import MODELS, build_network
from fm_distill.objectives.features import FEATURE_DISTANCES, OF_MAPS
from fm_distill.preparation.check import problems
from fm_distill.system.sharding import make_layout
from fm_distill.training.train import train


@pytest.fixture
def maps():
    """Student's and teacher's: other sizes, other channels."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((5, 4, 4, 3)), rng.standard_normal((5, 8, 8, 6))


def rows_of_norm_one(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def halved(x):
    """A linear resize to half with antialiasing: 1 3 3 1 eighths, renormalised at the border."""
    size = x.shape[1]
    weights = np.zeros((size // 2, size))
    for i in range(size // 2):
        for j, w in zip(range(2 * i - 1, 2 * i + 3), (1, 3, 3, 1), strict=True):
            if 0 <= j < size:
                weights[i, j] = w
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("ij,kl,bjlc->bikc", weights, weights, x)


def attention_rows(student, teacher):
    maps = (x**2 for x in (student, teacher))
    one, other = (x.mean(-1, keepdims=True) for x in maps)
    pair = one, halved(other)
    return [rows_of_norm_one(x.reshape(len(x), -1)) for x in pair]


def in_attention(student, teacher):
    one, other = attention_rows(student, teacher)
    return ((one - other) ** 2).mean(-1)


def in_attention_norm(student, teacher):
    one, other = attention_rows(student, teacher)
    return np.linalg.norm(one - other, axis=-1) / 2


def in_similarity(student, teacher):
    grams = []
    for x in (student, teacher):
        flat = x.reshape(len(x), -1)
        grams.append(rows_of_norm_one(flat @ flat.T))
    return ((grams[0] - grams[1]) ** 2).sum(-1) / len(student)


def smooth_l1(x):
    return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)


def in_rkd_distance(student, teacher):
    relative = []
    for x in (student, teacher):
        flat = x.reshape(len(x), -1)
        apart = np.array([[np.linalg.norm(a - b) for b in flat] for a in flat])
        relative.append(apart / apart[apart > 0].mean())
    return smooth_l1(relative[0] - relative[1]).mean(-1)


def in_rkd_angle(student, teacher):
    cosines = np.zeros((2, 5, 5, 5))
    for side, x in enumerate((student, teacher)):
        flat = x.reshape(len(x), -1)
        for i, j, k in itertools.product(range(5), repeat=3):
            a, b = flat[j] - flat[i], flat[k] - flat[i]
            if i not in (j, k):
                cosines[side, i, j, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return smooth_l1(cosines[0] - cosines[1]).mean((-1, -2))


REFERENCES = {
    "attention": in_attention,
    "attention_norm": in_attention_norm,
    "similarity": in_similarity,
    "rkd_distance": in_rkd_distance,
    "rkd_angle": in_rkd_angle,
}


@pytest.mark.parametrize("name", FEATURE_DISTANCES)
def test_against_numpy(name, maps):
    found = FEATURE_DISTANCES[name](*map(jnp.float32, maps))
    assert found.shape == (5,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, REFERENCES[name](*maps), rtol=2e-5, atol=1e-7)
    half = FEATURE_DISTANCES[name](*map(jnp.bfloat16, maps))
    assert half.dtype == jnp.float32


@pytest.mark.parametrize("name", FEATURE_DISTANCES)
def test_equal_features_have_no_loss_and_no_gradient(name, maps):
    same = jnp.float32(maps[0])
    form = jax.value_and_grad(lambda x: FEATURE_DISTANCES[name](x, same).sum())
    value, gradient = form(same)
    assert abs(value) < 1e-6
    np.testing.assert_allclose(gradient, 0, atol=1e-5)
    assert jnp.abs(form(same + maps[0][::-1])[1]).max() > 1e-5
    # A dead feature, and an example that is there twice.
    for x in (jnp.zeros_like(same), same.at[1].set(same[0])):
        assert jnp.isfinite(form(x)[1]).all()


@pytest.mark.parametrize("name", sorted(OF_MAPS))
def test_attention_does_not_see_the_scale(name, maps):
    student, teacher = map(jnp.float32, maps)
    one, other = (FEATURE_DISTANCES[name](student, x) for x in (teacher, 10 * teacher))
    np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("name", FEATURE_DISTANCES)
def test_one_device_and_eight_agree(name, maps):
    student, teacher = (jnp.float32(np.tile(x, (5, 1, 1, 1))[:24]) for x in maps)
    # No two alike, whose distance would be rounding.
    scale = jnp.linspace(0.5, 2, 24)[:, None, None, None]
    student, teacher = student * scale, teacher * jnp.flip(scale)
    rows = make_layout(MeshConfig(data=8)).batch
    form = jax.jit(jax.value_and_grad(lambda x, y: FEATURE_DISTANCES[name](x, y).sum()))
    one, eight = form(student, teacher), form(*jax.device_put((student, teacher), rows))
    np.testing.assert_allclose(one[0], eight[0], rtol=1e-5)
    np.testing.assert_allclose(one[1], eight[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "last"), [("bit_r50x1", "block4"), ("vit_tiny_patch16_224", "block12")]
)
def test_shapes_are_those_of_what_is_computed(model, last):
    config = dataclasses.replace(NETWORK, model=model, options={}, resolution=32)
    network = build_network(config, 3, jnp.dtype("float32"))
    shapes = network.feature_shapes()
    assert [*shapes][-2:] == [last, "pre_logits"]
    variables = jax.eval_shape(network.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    asked = tuple(shapes)
    found = jax.eval_shape(
        lambda v, x: network.apply(v, x, train=True, features=asked).features, variables, images
    )
    assert {name: x.shape for name, x in found.items()} == shapes
    assert model in MODELS and len(shapes[last]) == 4


def test_a_modules_output_is_read_by_its_path():
    """Of the last norm follow the activation, the mean over the places, and the head."""
    network = build_network(NETWORK, 3, jnp.dtype("float32"))
    variables = network.init(jax.random.key(0))
    head = variables.params["head"]
    head = {
        "kernel": jax.random.normal(jax.random.key(1), head["kernel"].shape),
        "bias": head["bias"],
    }
    variables = dataclasses.replace(variables, params=variables.params | {"head": head})
    images = jax.random.normal(jax.random.key(2), (2, 16, 16, 3))
    asked = ("norm", "head", "pre_logits", "block1_unit01/c")
    output = network.apply(variables, images, train=True, features=asked)
    frozen = network.apply_frozen(network.freeze(variables), images, features=asked)
    shapes = network.feature_shapes(modules=True)
    for found in (output, frozen):
        assert {name: x.shape for name, x in found.features.items()} == {
            x: shapes[x] for x in asked
        }
        np.testing.assert_array_equal(found.features["head"], found.logits)
        mean = jax.nn.relu(found.features["norm"]).mean((1, 2))
        np.testing.assert_allclose(found.features["pre_logits"], mean, rtol=1e-5, atol=1e-6)
    for name in asked:
        np.testing.assert_allclose(
            output.features[name], frozen.features[name], rtol=1e-3, atol=1e-4
        )
    assert set(network.feature_shapes()) < set(shapes)
    with pytest.raises(ValueError, match="no features"):
        network.apply(variables, images, train=False, features=("norm/deeper",))


READING = ObjectiveConfig(
    temperature=2.0,
    terms=(
        TermConfig(kind="kl"),
        TermConfig(kind="similarity", student_tap="pre_logits", teacher_tap="pre_logits"),
        TermConfig(kind="attention", weight=100.0, student_tap="root", teacher_tap="block1"),
    ),
)


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    return trained_by(READING, tmp_path_factory.mktemp("reading"))


def test_a_run_that_reads_features_goes_on_after_a_stop(reading, tmp_path, monkeypatch):
    config, folder = reading
    lines = [x for x in lines_of(folder / "run") if x["split"] == "train"]
    for line in lines:
        parts = [line[f"term_{x.kind}"] * line[f"weight_{x.kind}"] for x in READING.terms]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-5) and min(parts) > 0
    stop_and_continue(config, tmp_path / "run", monkeypatch)
    same_bits(folder / "run", tmp_path / "run")


def test_the_teachers_parts_do_not_change_it(reading, tmp_path):
    config, folder = reading
    memory = MemoryConfig(teacher_parts=2, rematerialise="norms")
    train(dataclasses.replace(config, memory=memory), tmp_path / "run")
    one, other = ([x["loss"] for x in lines_of(y / "run") if x["split"] == "train"]
                  for y in (folder, tmp_path))  # fmt: skip
    np.testing.assert_allclose(one, other, rtol=1e-4)


def one(**term):
    return ObjectiveConfig(terms=(TermConfig(**term),))


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (
            one(kind="similarity", student_tap="pre_logit", teacher_tap="block1"),
            r"objective.terms.0.student_tap is 'pre_logit', which the student does not have; did "
            r"you mean 'pre_logits'\? It has root, block1, pre_logits, and its modules",
        ),
        (
            one(kind="attention", student_tap="root", teacher_tap="pre_logits"),
            r"teacher_tap: attention compares maps, and pre_logits has shape \(\d+,\) per "
            r"image; use one of root, block1",
        ),
        (one(kind="similarity"), "give objective.terms.0.student_tap and"),
        (one(kind="kl", student_tap="root"), "kl compares outputs, and reads no features"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(reading, tmp_path, objective, said):
    config, _ = reading
    with pytest.raises(UserError, match=said):
        train(dataclasses.replace(config, objective=objective), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"teacher": TeacherConfig(recording="r")},
            "attention compares maps, and teacher.recording",
        ),
        ({"teacher": TeacherConfig(function="f.py:g")}, "teacher.function returns only logits"),
        ({"teaching": "fixed"}, "teaching=fixed keeps only its logits"),
        ({"more_teachers": (TeacherConfig(weights="w"),)}, "reads the features of one teacher"),
        ({"memory": MemoryConfig(accumulate=2)}, "similarity compares the examples of a batch"),
    ],
)
def test_what_has_no_features_is_refused(reading, changes, said):
    config, _ = reading
    assert said in "\n".join(problems(dataclasses.replace(config, **changes)))


def test_taps_are_listed_for_both_sides(tmp_path):
    write_experiment(tmp_path / "teacher.py")
    path = write_experiment(
        tmp_path / "run.py",
        'teacher=TeacherConfig(network=NetworkConfig(model="vit_tiny_patch16_224", resolution=64), '
        'weights="none"), objective=ObjectiveConfig()',
    )
    found = run_command("show", path, "--taps", "--modules")
    assert found.returncode == 0, found.stderr
    lines = [x.split() for x in found.stdout.splitlines()]
    assert ["#", "student:", "bit", "at", "16", "pixels"] in lines
    assert ["block1", "16", "x", "16", "x", "32", "stride", "1"] in lines
    assert ["block12", "4", "x", "4", "x", "192", "stride", "16"] in lines
    assert ["pre_logits", "192"] in lines
    assert ["block1_unit01/b", "16", "x", "16", "x", "8", "stride", "1"] in lines
