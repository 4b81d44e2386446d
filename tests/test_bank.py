"""Matching of similarities to a bank of the teacher's features: values, the bank, a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_distances import log_softmax
from test_terms import stop_and_continue, trained_by
from test_train import arrays_of, lines_of, same_bits
from tiny import tiny_config

from fm_distill.config import BankConfig, MeshConfig, ObjectiveConfig, TeacherConfig, TermConfig
from fm_distill.errors import UserError
from fm_distill.objectives.bank import bank_similarity, init_bank, replaced
from fm_distill.preparation.check import problems
from fm_distill.system.sharding import make_layout
from fm_distill.training.train import train


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def authors(student, teacher, bank, config):
    """The cross-entropy of SEED's builder.py, one example after another; and the entropy."""
    losses, entropies = [], []
    for s, t in zip(unit(student), unit(teacher), strict=True):
        of_teacher = np.array([t @ t, *(row @ t for row in bank)]) / config.teacher_temperature
        of_student = np.array([t @ s, *(row @ s for row in bank)]) / config.student_temperature
        expected = np.exp(log_softmax(of_teacher))
        losses.append(-(expected * log_softmax(of_student)).sum())
        entropies.append(-(expected * log_softmax(of_teacher)).sum())
    return np.array(losses), np.array(entropies)


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((8, 6)) + 1
    return teacher + rng.standard_normal((8, 6)), teacher, unit(rng.standard_normal((12, 6)))


@pytest.mark.parametrize("config", [BankConfig(), BankConfig(teacher_temperature=0.1)])
def test_against_the_authors(features, config):
    student, teacher, bank = features
    found = bank_similarity(*map(jnp.float32, features), config)
    losses, entropies = authors(student, teacher, bank, config)
    np.testing.assert_allclose(found, losses - entropies, rtol=2e-5, atol=1e-5)
    # Neither length nor compute type matters.
    half = bank_similarity(
        jnp.bfloat16(student), jnp.float32(3 * teacher), jnp.float32(bank), config
    )
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, found, rtol=0.1, atol=0.05)


def test_equal_features_have_no_loss_and_no_gradient(features):
    _, teacher, bank = (jnp.float32(x) for x in features)
    same = BankConfig(student_temperature=0.1, teacher_temperature=0.1)
    form = jax.jit(jax.value_and_grad(lambda x: bank_similarity(x, teacher, bank, same).sum()))
    value, gradient = form(teacher)
    assert abs(value) < 1e-5 and jnp.abs(gradient).max() < 1e-5
    assert jnp.abs(form(-teacher)[1]).max() > 1e-3
    assert jnp.isfinite(form(jnp.zeros_like(teacher))[1]).all()


def test_the_bank_is_the_teachers_last_batches():
    rng = np.random.default_rng(0)
    batches = rng.standard_normal((5, 4, 3)).astype(np.float32)
    bank = init_bank(jax.random.key(0), 12, 3)
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, rtol=1e-6)
    for step, batch in enumerate(batches):
        bank = jax.jit(replaced)(bank, batch, jnp.int32(step))
    # Steps 3 and 4 lie where 0 and 1 did.
    np.testing.assert_allclose(bank, unit(batches[[3, 4, 2]]).reshape(12, 3), rtol=1e-6)
    spread = jax.device_put(batches.repeat(2, axis=1), make_layout(MeshConfig(data=8)).replicated)
    spread = jax.device_put(spread[4], make_layout(MeshConfig(data=8)).batch)
    eight = jax.jit(replaced)(jnp.zeros((16, 3)), spread, jnp.int32(1))
    np.testing.assert_allclose(eight[8:], unit(batches[4].repeat(2, axis=0)), rtol=1e-6)


def banked(rows=32, **changes):
    term = {"student_tap": "pre_logits", "teacher_tap": "pre_logits"} | changes
    bank = BankConfig(rows=rows)
    return ObjectiveConfig(terms=(TermConfig(kind="bank_similarity", bank=bank, **term),))


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return trained_by(banked(), tmp_path_factory.mktemp("banked"))


def test_the_row_does_not_overflow():
    """Beyond 2^31 examples."""
    step, batch, rows = 858_994, 2500, 50_000
    bank, teacher = jnp.zeros((rows, 1)), jnp.ones((batch, 1))
    found = np.flatnonzero(np.asarray(replaced(bank, teacher, jnp.int32(step)))[:, 0])
    assert (found[0], len(found)) == (step * batch % rows, batch)


def test_a_run_with_a_bank_goes_on_after_a_stop(complete, tmp_path, monkeypatch):
    config, folder = complete
    (bank,) = (y for x, y in arrays_of(folder / "run").items() if "banks" in x)
    assert bank.shape == (32, 32)
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, rtol=1e-5)
    # Features are behind a ReLU: none of the random rows is left.
    assert bank.min() >= 0
    losses = [x["loss"] for x in lines_of(folder / "run") if x["split"] == "train"]
    assert min(losses) > 0 and losses[-1] < losses[0]
    stop_and_continue(config, tmp_path / "run", monkeypatch)
    same_bits(folder / "run", tmp_path / "run")


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (banked(1264), r"bank.rows=1264 are more than the 1,259 examples .* use 1248 or less"),
        (banked(40), r"bank.rows=40 is not divisible by batch_size=16; use 32"),
        (
            banked(student_tap="root"),
            "student_tap: bank_similarity compares vectors, and root has shape .* use one of pre",
        ),
    ],
)
def test_a_bank_that_does_not_fit_is_refused(complete, tmp_path, objective, said):
    config, _ = complete
    with pytest.raises(UserError, match=said):
        train(dataclasses.replace(config, objective=objective), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (banked(student_tap=None), "bank_similarity compares features: give objective.terms.0"),
        (
            ObjectiveConfig(terms=(TermConfig(kind="kl", bank=BankConfig(rows=32)),)),
            "objective.terms.0.kind=kl has no bank: leave out objective.terms.0.bank",
        ),
        (banked(temperature=2.0), "leave out objective.terms.0.temperature"),
    ],
)
def test_what_has_no_bank_is_refused(objective, said):
    config = tiny_config(objective=objective, teacher=TeacherConfig(weights="w"))
    assert said in "\n".join(problems(config))
