"""Terms of features through adapters: values, the adapters' own state, export, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_accelerator_paths import matching
from test_features import halved
from test_terms import stop_and_continue, trained_by
from test_train import arrays_of, lines_of, same_bits
from tiny import NETWORK, tiny_config

from fm_distill import load_student
from fm_distill.config import (
    MemoryConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TeacherConfig,
    TermConfig,
)
from fm_distill.diagnosis.diagnose import diagnose
from fm_distill.errors import UserError
from fm_distill.exporting.export import export
from fm_distill.objectives.adapters import AdapterShape, adapt, init_adapter
from fm_distill.objectives.features import ADAPTED_DISTANCES, OF_MAPS
from fm_distill.objectives.terms import Outputs, Targets, make_terms
from fm_distill.preparation.check import problems
from fm_distill.runs.open_run import open_run
from fm_distill.system.sharding import make_layout
from fm_distill.train_step.optim import adapter_optimizer, make_optimizer
from fm_distill.training.train import train


def in_hint(student, teacher):
    return ((student - teacher) ** 2).mean((1, 2, 3))


def in_hint_normalised(student, teacher):
    rows = [x.reshape(len(x), -1) for x in (student, teacher)]
    one, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows)
    return 2 - 2 * (one * other).sum(1)


def in_cosine(student, teacher):
    norms = (np.linalg.norm(x, axis=-1) for x in (student, teacher))
    product = (student * teacher).sum(-1)
    for norm in norms:
        product = product / norm
    return (1 - product).mean((1, 2))


REFERENCES = {"hint": in_hint, "hint_normalised": in_hint_normalised, "cosine": in_cosine}


@pytest.fixture
def maps():
    """Student's and teacher's: other sizes, other channels."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((5, 8, 8, 3)) + 0.3, rng.standard_normal((5, 4, 4, 6))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_an_adapter_against_numpy(maps, batch_norm):
    x = maps[0]
    params = init_adapter(jax.random.key(1), AdapterShape(3, 6, batch_norm))
    scale = np.linspace(0.5, 2, 6)
    changed = {name: y if name == "kernel" else y + scale for name, y in params.items()}
    expected = x @ np.float64(params["kernel"])
    if batch_norm:
        rows = expected.reshape(-1, 6)
        deviation = np.sqrt(rows.var(0) + 1e-5)
        expected = (expected - rows.mean(0)) / deviation * (1 + scale) + scale
    else:
        expected = expected + scale
    np.testing.assert_allclose(adapt(changed, jnp.float32(x)), expected, rtol=1e-5, atol=1e-5)
    assert adapt(changed, jnp.bfloat16(x)).dtype == jnp.float32
    assert np.std(params["kernel"]) == pytest.approx(3**-0.5, rel=0.3)


@pytest.mark.parametrize("kind", ADAPTED_DISTANCES)
def test_a_term_through_an_adapter_against_numpy(kind, maps):
    """The student's map is larger: it is shrunk with antialiasing, then adapted."""
    student, teacher = maps
    objective = one(kind=kind, student_tap="a", teacher_tap="b", weight=3.0)
    (term,) = make_terms(objective)
    params = init_adapter(jax.random.key(1), AdapterShape(3, 6, False))
    outputs = Outputs(jnp.zeros((5, 2)), {"a": jnp.float32(student)}, {kind: params})
    targets = Targets(teacher_features={"b": jnp.float32(teacher)})
    found = term.value(outputs, targets, jnp.float32(1.0))
    expected = REFERENCES[kind](halved(student) @ np.float64(params["kernel"]), teacher)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    # A larger teacher's is shrunk as well.
    outputs = Outputs(jnp.zeros((5, 2)), {"a": jnp.float32(teacher)}, {})
    targets = Targets(teacher_features={"b": jnp.float32(student.repeat(2, axis=-1))})
    found = term.value(outputs, targets, jnp.float32(1.0))
    np.testing.assert_allclose(
        found, REFERENCES[kind](teacher, halved(student.repeat(2, axis=-1))), rtol=2e-5
    )


@pytest.mark.parametrize("kind", ADAPTED_DISTANCES)
def test_equal_features_have_no_loss_and_no_gradient(kind, maps):
    same = jnp.float32(maps[0])
    form = jax.jit(jax.value_and_grad(lambda x: ADAPTED_DISTANCES[kind](x, same).sum()))
    value, gradient = form(same)
    assert abs(value) < 1e-6 and jnp.abs(gradient).max() < 1e-5
    assert jnp.abs(form(same + maps[0][::-1])[1]).max() > 1e-4
    assert jnp.isfinite(form(jnp.zeros_like(same))[1]).all()
    assert kind not in OF_MAPS  # vectors too
    assert ADAPTED_DISTANCES[kind](same[:, 0, 0], same[:, 0, 0]).shape == (5,)


def test_one_device_and_eight_agree_on_batch_norm(maps):
    x = (
        jnp.float32(np.tile(maps[0], (5, 1, 1, 1))[:24])
        * jnp.linspace(0.5, 2, 24)[:, None, None, None]
    )
    params = init_adapter(jax.random.key(1), AdapterShape(3, 6, True))
    form = jax.jit(jax.grad(lambda p, x: (adapt(p, x)[..., 0] ** 3).sum()))
    rows = make_layout(MeshConfig(data=8)).batch
    found, expected = form(params, jax.device_put(x, rows)), form(params, x)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-3)


def test_adapters_have_a_learning_rate_of_their_own():
    config = OptimizerConfig(
        name="sgd", learning_rate=0.1, head_learning_rate=9.0, adapter_learning_rate=0.5
    )
    for other, rate in (
        (config, 0.5),
        (dataclasses.replace(config, adapter_learning_rate=None), 0.1),
    ):
        transform = make_optimizer(adapter_optimizer(other), lambda step: 1.0)
        params = {"head": {"kernel": jnp.full(4, 0.25)}}
        updates, _ = transform.update(params, transform.init(params), params)
        np.testing.assert_allclose(updates["head"]["kernel"], -rate * 0.25, rtol=1e-6)


ADAPTED = ObjectiveConfig(
    temperature=2.0,
    terms=(
        TermConfig(kind="kl"),
        TermConfig(kind="hint", weight=0.5, student_tap="block1", teacher_tap="block1_unit01/b"),
        TermConfig(
            kind="cosine", student_tap="pre_logits", teacher_tap="pre_logits", adapter="batch_norm"
        ),
    ),
)
ALONE = ObjectiveConfig(temperature=2.0, terms=ADAPTED.terms[:1])


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return trained_by(ADAPTED, tmp_path_factory.mktemp("adapted"))


def test_adapters_are_learned_and_go_on_after_a_stop(adapted, tmp_path, monkeypatch):
    config, folder = adapted
    arrays = {x: y for x, y in arrays_of(folder / "run").items() if "terms" in x}
    assert any("opt_state" in x for x in arrays)
    (bias,) = (y for x, y in arrays.items() if "params" in x and "bias" in x)
    assert np.abs(bias).min() > 0  # they begin at zero
    lines = [x for x in lines_of(folder / "run") if x["split"] == "train"]
    for line in lines:
        parts = [line[f"term_{x.kind}"] * line[f"weight_{x.kind}"] for x in ADAPTED.terms]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert line["adapter_gradient_hint"] > 0 and line["adapter_gradient_cosine"] > 0
    assert lines[-1]["term_hint"] < lines[0]["term_hint"]
    stop_and_continue(config, tmp_path / "run", monkeypatch)
    same_bits(folder / "run", tmp_path / "run")


@pytest.fixture(scope="module")
def alone(adapted, tmp_path_factory):
    config, _ = adapted
    folder = tmp_path_factory.mktemp("alone")
    train(dataclasses.replace(config, objective=ALONE), folder / "run")
    return folder


def test_the_student_begins_as_without_adapters(adapted, alone):
    """The first step, whose learning rate is zero, has the KL of the run without them."""
    first, other = (next(x for x in lines_of(y / "run") if x["split"] == "train")
                    for y in (adapted[1], alone))  # fmt: skip
    assert first["term_kl"] * first["weight_kl"] == pytest.approx(other["loss"], rel=1e-6)


def test_adapters_are_no_part_of_the_student(adapted, alone, tmp_path):
    _, folder = adapted
    run = open_run(folder / "run")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    export(folder / "run", tmp_path / "student.safetensors")
    student = load_student(tmp_path / "student.safetensors")
    np.testing.assert_array_equal(student.predict(images), run.student.predict(images))
    others = {x for x in arrays_of(folder / "run") if "terms" not in x}
    assert others == set(arrays_of(alone / "run"))


def one(**term):
    return ObjectiveConfig(terms=(TermConfig(**term),))


def taps(student, teacher, **term):
    return one(student_tap=student, teacher_tap=teacher, **{"kind": "hint"} | term)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (
            taps("block1", "pre_logits"),
            r"objective.terms.0: no adapter joins block1 of shape \(16, 16, 32\) and pre_logits of "
            r"shape \(32,\); use two maps, two vectors, or",
        ),
        (
            taps("root", "block1", adapter="none"),
            "adapter=none needs the same number of channels on both sides, and root has 8",
        ),
        (taps("blok1", "root"), "did you mean 'block1'"),
    ],
)
def test_features_that_no_adapter_joins_are_refused(adapted, tmp_path, objective, said):
    config, _ = adapted
    with pytest.raises(UserError, match=said):
        train(dataclasses.replace(config, objective=objective), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": one(kind="hint")}, "hint compares features: give objective.terms.0.student"),
        (
            {"objective": taps("a", "b", kind="similarity", adapter="batch_norm")},
            "similarity takes no adapter: leave out objective.terms.0.adapter=batch_norm",
        ),
        (
            {
                "objective": taps("a", "b", adapter="batch_norm"),
                "memory": MemoryConfig(accumulate=2),
            },
            "hint with adapter=batch_norm compares the examples of a batch with each other",
        ),
        (
            {"optimizer": OptimizerConfig(learning_rate=0.1, adapter_learning_rate=0.2)},
            "optimizer.adapter_learning_rate=0.2 is for adapters, and no term of",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused(changes, said):
    config = tiny_config(**{"objective": ObjectiveConfig(), "teacher": TeacherConfig(weights="w")}
                         | changes)  # fmt: skip
    assert said in "\n".join(problems(config))


DEAD = """
import flax.linen as nn
import jax.numpy as jnp


class Dead(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(images))
        features = {"dead": nn.relu(-1 - x), "alive": x}
        return nn.Dense(self.classes, name="head")(x.mean((1, 2))), features

"""


def test_an_adapter_that_learns_nothing_is_noticed(tmp_path, capsys):
    (tmp_path / "own.py").write_text(DEAD)
    student = dataclasses.replace(
        NETWORK, model=f"{tmp_path / 'own.py'}:Dead", options={},
    )  # fmt: skip
    terms = (
        TermConfig(kind="hint", student_tap="dead", teacher_tap="block1"),
        TermConfig(kind="cosine", student_tap="alive", teacher_tap="block1"),
    )
    config = dataclasses.replace(
        matching(tmp_path, MeshConfig(data=1)),
        student=student,
        objective=ObjectiveConfig(terms=terms),
    )
    train(config, tmp_path / "run")
    lines = [x for x in capsys.readouterr().err.splitlines() if "the adapter" in x]
    assert len(lines) == 1 and "the adapter of the term hint learns nothing" in lines[0]
    # The teacher's weights are random, which is named too.
    found = {x.name: x.evidence for x in diagnose(tmp_path / "run").causes}
    assert "term hint" in found["dead-adapter"]
