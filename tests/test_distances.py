"""Every distance against float64 NumPy, and the properties that hold for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_distill.config import ObjectiveConfig
from fm_distill.objectives.distances import (
    DISTANCES,
    WITHOUT_TEMPERATURE,
    cross_entropy,
    kl_divergence,
    smooth,
)
from fm_distill.objectives.terms import Outputs, Targets, make_terms, values_of, weighted_sum


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def numpy_kl(s, t, temperature):
    ls, lt = log_softmax(s / temperature), log_softmax(t / temperature)
    return (np.exp(lt) * (lt - ls)).sum(-1)


def pearson(x, y):
    x, y = (z - z.mean(-1, keepdims=True) for z in (x, y))
    return (x * y).sum(-1) / (np.sqrt((x**2).sum(-1)) * np.sqrt((y**2).sum(-1)) + 1e-8)


def standardised(x):
    return (x - x.mean(-1, keepdims=True)) / (1e-7 + x.std(-1, ddof=1, keepdims=True))


def squared_temperature(objective):
    return objective.temperature**2 if objective.temperature_squared else 1


REFERENCES = {
    "kl": lambda s, t, o: numpy_kl(s, t, o.temperature) * squared_temperature(o),
    "l2": lambda s, t, o: ((s - t) ** 2).sum(-1),
    "euclidean": lambda s, t, o: np.sqrt(((s - t) ** 2).sum(-1) + 1e-12),
    "hard": lambda s, t, o: -log_softmax(s)[np.arange(len(s)), t.argmax(-1)],
    "standardised_kl": lambda s, t, o: (
        numpy_kl(standardised(s), standardised(t), o.temperature) * squared_temperature(o)
    ),
    "dist_rows": lambda s, t, o: (
        1 - pearson(*(np.exp(log_softmax(x / o.temperature)) for x in (s, t)))
    ),
}


def loss_of(terms, logits, targets, progress=0.0):
    return weighted_sum(terms, values_of(terms, Outputs(logits), targets, progress), progress)


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return 3 * rng.standard_normal((2, 6, 11))


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("squared", [True, False])
def test_against_numpy(name, temperature, squared, logits):
    objective = ObjectiveConfig(distance=name, temperature=temperature, temperature_squared=squared)
    student, teacher = logits
    targets = Targets((jnp.float32(teacher),))
    found = loss_of(make_terms(objective), jnp.float32(student), targets)
    assert found.shape == (6,) and found.dtype == jnp.float32
    expected = REFERENCES[name](student, teacher, objective)
    np.testing.assert_allclose(found, expected, rtol=5e-5, atol=1e-6)


@pytest.mark.parametrize("name", DISTANCES)
def test_those_without_a_temperature_are_named(name, logits):
    student, teacher = map(jnp.float32, logits)
    one, four = (DISTANCES[name](student, teacher, x) for x in (1.0, 4.0))
    assert np.array_equal(one, four) == (name in WITHOUT_TEMPERATURE)


def test_every_distance_has_a_reference():
    assert set(REFERENCES) == set(DISTANCES)


@pytest.mark.parametrize("name", sorted(set(DISTANCES) - {"hard"}))
def test_zero_value_and_gradient_at_equality(name, logits):
    x = jnp.float32(logits[0])

    def total(student):
        return DISTANCES[name](student, x, 2.0).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(x)
    assert abs(value) < 1e-5
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
def test_bfloat16_logits_are_compared_in_float32(name, logits):
    student, teacher = jnp.bfloat16(logits[0]), jnp.bfloat16(logits[1])
    found = DISTANCES[name](student, teacher, 1.0)
    wide = DISTANCES[name](student.astype(jnp.float32), teacher.astype(jnp.float32), 1.0)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, wide)


def test_kl_keeps_its_gradient_where_probabilities_underflow():
    student, teacher = jnp.array([[0.0, 200.0]]), jnp.array([[200.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda s: kl_divergence(s, teacher).sum())(student)
    np.testing.assert_allclose(value, 200.0, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-1.0, 1.0]], atol=1e-6)


def test_kl_of_a_class_that_the_teacher_rules_out():
    student, teacher = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[0.0, 0.0, -jnp.inf]])
    expected = -np.log(2) - log_softmax([[1.0, 2.0, 3.0]])[0, :2].mean()
    np.testing.assert_allclose(kl_divergence(student, teacher), [expected], rtol=1e-6)


def test_direction_is_teacher_to_student(logits):
    forward = kl_divergence(jnp.float32(logits[0]), jnp.float32(logits[1]))
    backward = kl_divergence(jnp.float32(logits[1]), jnp.float32(logits[0]))
    np.testing.assert_allclose(forward, numpy_kl(logits[0], logits[1], 1.0), rtol=1e-5)
    assert not np.allclose(forward, backward, rtol=1e-2)


def test_cross_entropy_of_mixed_labels(logits):
    targets = np.zeros((6, 11))
    targets[:, 2], targets[:, 7] = 0.7, 0.3
    found = cross_entropy(jnp.float32(logits[0]), jnp.float32(targets))
    expected = -0.7 * log_softmax(logits[0])[:, 2] - 0.3 * log_softmax(logits[0])[:, 7]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_smoothed_labels_against_numpy(logits):
    one_hot = np.eye(11)[[3, 0, 10, 5, 5, 1]]
    expected = 0.9 * one_hot + 0.1 / 11
    np.testing.assert_allclose(smooth(jnp.float32(one_hot), 0.1), expected, atol=1e-7)
    found = cross_entropy(jnp.float32(logits[0]), smooth(jnp.float32(one_hot), 0.1))
    np.testing.assert_allclose(found, -(expected * log_softmax(logits[0])).sum(-1), rtol=1e-5)


def test_a_sum_of_distances_is_over_the_teachers(logits):
    student, teacher = (jnp.float32(x) for x in logits)
    terms = make_terms(ObjectiveConfig(temperature=3.0))
    found = loss_of(terms, student, Targets((teacher, student, teacher / 2)))
    expected = sum(9 * numpy_kl(logits[0], t, 3.0) for t in (*logits[::-1], logits[1] / 2))
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_labels_are_one_term(logits):
    (term,) = make_terms(ObjectiveConfig(target="labels", temperature=5.0))
    labels = np.eye(11)[[3, 0, 10, 5, 5, 1]]
    found = loss_of((term,), jnp.float32(logits[0]), Targets(labels=jnp.float32(labels)))
    np.testing.assert_allclose(found, -(labels * log_softmax(logits[0])).sum(-1), rtol=1e-5)
    assert term.name == "labels"
