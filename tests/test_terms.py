"""The loss of several terms: each kind against float64 NumPy, schedules, labels, and a run."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_accelerator_paths import matching
from test_distances import log_softmax, loss_of, numpy_kl, pearson
from test_step import DRAWS, KEY, matching_config, random_batch, with_random_head
from test_train import lines_of, same_bits, stop_at
from tiny import NETWORK, logits_of, resolved_run, tiny_config

from fm_distill.config import (
    CurveConfig,
    MemoryConfig,
    MeshConfig,
    ObjectiveConfig,
    TeacherConfig,
    TermConfig,
)
from fm_distill.diagnosis.diagnose import over_the_run
from fm_distill.diagnosis.logged import log_of
from fm_distill.evaluation.inference import evaluate
from fm_distill.objectives.curves import progress_of, value_at
from fm_distill.objectives.distances import (
    BATCH_DISTANCES,
    DISTANCES,
    LABELLED_DISTANCES,
    dist_columns,
    dkd_others,
    dkd_target,
    standardised_kl,
)
from fm_distill.objectives.terms import Outputs, Targets, make_terms, values_of
from fm_distill.preparation.check import problems
from fm_distill.reports.report import report, weight_of
from fm_distill.runs.history import read_history
from fm_distill.system.sharding import make_layout
from fm_distill.training.build import build
from fm_distill.training.train import train
from fm_distill.views.draws import draw
from fm_distill.views.rendering import render

CLASSES = 7
LABELS = np.array([3, 0, 6, 5, 5, 1])
ONE_HOT = np.eye(CLASSES)[LABELS]
# Mixed with the example before, as `mix` does; the fourth and the fifth have the same class.
MIXED = 0.7 * ONE_HOT + 0.3 * np.roll(ONE_HOT, 1, axis=0)


def curve(*points, interpolation="linear"):
    return CurveConfig(
        points=tuple((float(x), float(y)) for x, y in points), interpolation=interpolation
    )


@pytest.fixture
def logits():
    return 3 * np.random.default_rng(0).standard_normal((2, 6, CLASSES))


def softmax(x):
    return np.exp(log_softmax(x))


def authors_dkd(student, teacher, temperature, alpha, beta):
    """mdistiller's `dkd_loss` for each example, without T^2, in float64."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    named = ONE_HOT.astype(bool)
    two = [np.stack([x[named], (x * ~named).sum(-1)], axis=-1) for x in (p, q)]
    target = (two[0] * np.log(two[0] / two[1])).sum(-1)
    p, q = (log_softmax(x / temperature - 1000 * ONE_HOT) for x in (teacher, student))
    others = (np.exp(p) * (p - q)).sum(-1)
    return alpha * target + beta * others


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_is_the_authors(logits, temperature):
    """Two terms with the authors' weights, through the objective."""
    objective = ObjectiveConfig(
        temperature=temperature,
        terms=(TermConfig(kind="dkd_target"), TermConfig(kind="dkd_others", weight=8.0)),
    )
    student, teacher = map(jnp.float32, logits)
    found = loss_of(make_terms(objective), student, Targets((teacher,), jnp.float32(ONE_HOT)))
    expected = temperature**2 * authors_dkd(*logits, temperature, 1.0, 8.0)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("labels", [ONE_HOT, MIXED])
def test_dkd_is_a_part_of_the_kl(logits, labels):
    """KL = target + (the teacher's probability of the others) * others (the paper's equation 5)."""
    student, teacher = map(jnp.float32, logits)
    parts = [f(student, teacher, jnp.float32(labels), 2.0) for f in (dkd_target, dkd_others)]
    rest = (softmax(logits[1] / 2) * (labels == 0)).sum(-1)
    np.testing.assert_allclose(parts[0] + rest * parts[1], numpy_kl(*logits, 2.0), rtol=3e-5)


def test_dkd_where_every_class_is_named(logits):
    """Of two classes, mixed: nothing is left to compare among the others."""
    student, teacher = (jnp.float32(x[:, :2]) for x in logits)
    labels = jnp.full((6, 2), 0.5)

    def total(student):
        return (dkd_target(student, teacher, labels) + dkd_others(student, teacher, labels)).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(student)
    np.testing.assert_allclose(value, numpy_kl(*logits[:, :, :2], 1.0).sum(), rtol=1e-5)
    assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_dist_of_columns_against_numpy(logits, temperature):
    p, q = (softmax(x / temperature) for x in logits)
    expected = (1 - pearson(p.T, q.T)).mean()
    found = dist_columns(*map(jnp.float32, logits), temperature)
    np.testing.assert_allclose(found, [expected] * 6, rtol=2e-5)


def test_standardised_logits_have_neither_shift_nor_scale(logits):
    one, other = (standardised_kl(jnp.float32(x), jnp.float32(logits[1]), 2.0)
                  for x in (logits[0], 5 * logits[0] + 3))  # fmt: skip
    np.testing.assert_allclose(one, other, rtol=1e-4)


def every_kind():
    labels = jnp.float32(MIXED)
    plain = {**DISTANCES, **BATCH_DISTANCES}
    yield from plain.items()
    for name, distance in LABELLED_DISTANCES.items():
        yield name, lambda s, t, temperature, f=distance: f(s, t, labels, temperature)


@pytest.mark.parametrize(("name", "distance"), every_kind())
def test_equal_outputs_have_no_loss_and_equal_logits_a_gradient(name, distance, logits):
    """The head starts at zero, where a root of nothing has no finite gradient."""
    teacher = jnp.float32(logits[1])
    value, gradient = jax.value_and_grad(lambda x: distance(x, teacher, 2.0).sum())(teacher)
    if name != "hard":
        assert abs(value) < 1e-5
        np.testing.assert_allclose(gradient, 0, atol=2e-5)
    start = jax.grad(lambda x: distance(x, teacher, 2.0).sum())(jnp.zeros((6, CLASSES)))
    assert jnp.isfinite(start).all() and jnp.abs(start).max() > 1e-3


def test_one_device_and_eight_agree_on_what_compares_a_batch(logits):
    student, teacher = (jnp.float32(np.tile(x, (4, 1)) * np.arange(1, 25)[:, None]) for x in logits)
    rows = make_layout(MeshConfig(data=8)).batch
    form = jax.jit(jax.value_and_grad(lambda x, y: dist_columns(x, y, 2.0).sum()))
    one, eight = form(student, teacher), form(*jax.device_put((student, teacher), rows))
    np.testing.assert_allclose(one[0], eight[0], rtol=1e-6)
    np.testing.assert_allclose(one[1], eight[1], rtol=1e-5, atol=1e-7)


POINTS = ((0.1, 0.0), (0.5, 2.0), (0.9, 1.0))


@pytest.mark.parametrize(
    ("interpolation", "expected"),
    {
        "linear": [0.0, 0.0, 1.0, 2.0, 1.5, 1.0, 1.0],
        "cosine": [0.0, 0.0, 1.0, 2.0, 1.5, 1.0, 1.0],
        "step": [0.0, 0.0, 0.0, 2.0, 2.0, 1.0, 1.0],
    }.items(),
)
def test_a_curve_through_points(interpolation, expected):
    drawn = curve(*POINTS, interpolation=interpolation)
    values = [value_at(drawn, x) for x in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]
    np.testing.assert_allclose(values, expected, atol=1e-6)
    quarter = {"linear": 0.5, "cosine": 2 * 0.5 * (1 - np.cos(np.pi / 4)), "step": 0.0}
    assert float(value_at(drawn, 0.2)) == pytest.approx(quarter[interpolation], abs=1e-6)


def test_a_run_goes_from_zero_to_one():
    assert [float(progress_of(x, 5)) for x in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert float(progress_of(0, 1)) == 0
    assert float(value_at(CurveConfig(), 0.3)) == 1


def test_weights_and_temperatures_follow_their_curves(logits):
    """alpha rises by half of the run while the labels fall, and the temperature halves."""
    objective = ObjectiveConfig(
        temperature=4.0,
        temperature_schedule=curve((0, 1), (1, 0.5)),
        terms=(
            TermConfig(kind="kl", weight=2.0, schedule=curve((0, 0), (0.5, 1))),
            TermConfig(kind="labels", schedule=curve((0, 1), (0.5, 0))),
            TermConfig(kind="kl", weight=0.5, temperature=1.0),
        ),
    )
    terms = make_terms(objective)
    assert [x.name for x in terms] == ["kl", "labels", "kl_2"]
    student, teacher = map(jnp.float32, logits)
    targets = Targets((teacher,), jnp.float32(MIXED))
    entropy = -(MIXED * log_softmax(logits[0])).sum(-1)
    for progress, alpha in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        factor = 1 - progress / 2
        hot, own = 4 * factor, factor
        expected = (
            2 * alpha * hot**2 * numpy_kl(*logits, hot)
            + (1 - alpha) * entropy
            + 0.5 * own**2 * numpy_kl(*logits, own)
        )
        np.testing.assert_allclose(loss_of(terms, student, targets, progress), expected, rtol=3e-5)
    values = values_of(terms, Outputs(student), targets, 0.0)
    np.testing.assert_allclose(values[0], numpy_kl(*logits, 4.0), rtol=2e-5)


RISING = curve((0.0, 0.25), (0.5, 1.0))
FALLING = curve((0.0, 1.0), (0.5, 0.0), interpolation="cosine")
SEVERAL = ObjectiveConfig(
    temperature=2.0,
    terms=(
        TermConfig(kind="kl", weight=0.5, schedule=RISING),
        TermConfig(kind="labels", schedule=FALLING),
        TermConfig(kind="dist_columns", weight=0.1),
        TermConfig(kind="dkd_others", weight=0.2),
    ),
)


def trained_by(objective, folder):
    """The config of a complete run in `folder / "run"`, and the folder."""
    config = dataclasses.replace(matching(folder, MeshConfig(data=1)), objective=objective)
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, term_gradients=True))
    assert train(config, folder / "run").complete
    return config, folder


def stop_and_continue(config, workdir, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train(config, workdir).step == 3
    assert train(config, workdir).complete


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return trained_by(SEVERAL, tmp_path_factory.mktemp("several"))


def test_what_a_run_logs_is_its_loss(several):
    config, folder = several
    lines = [x for x in lines_of(folder / "run") if x["split"] == "train"]
    terms = make_terms(config.objective)
    assert len(lines) == config.schedule.total_steps
    for line in lines:
        pairs = [(line[f"term_{x.name}"], line[f"weight_{x.name}"]) for x in terms]
        assert line["loss"] == pytest.approx(sum(v * w for v, w in pairs), rel=1e-5)
    weights = [x["weight_kl"] for x in lines]
    assert weights[0] == pytest.approx(0.5 * 0.25 * 4) and weights[-1] == 0.5 * 4
    assert lines[-1]["weight_labels"] == 0 and lines[0]["weight_labels"] == 1
    # The line of the plan in the report goes through what was logged.
    rates = weight_of(terms[0], config.schedule.total_steps, read_history(folder / "run"))
    assert rates.planned[0] == rates.logged[0]
    np.testing.assert_allclose(rates.planned[1], rates.logged[1], rtol=1e-6)


def test_the_gradients_of_the_terms_add_up_to_that_of_the_loss(several):
    config, folder = several
    names = [x.name for x in make_terms(config.objective)]
    lines = [x for x in lines_of(folder / "run") if x["split"] == "train"]
    for line in lines:
        norms = {x: line[f"gradient_norm_of_{x}"] for x in names}
        squared = sum(x**2 for x in norms.values())
        for a, b in itertools.combinations(names, 2):
            cosine = line[f"gradient_cosine_of_{a}_and_{b}"]
            assert -1 <= cosine <= 1
            squared += 2 * cosine * norms[a] * norms[b]
        assert squared == pytest.approx(line["gradient_norm"] ** 2, rel=1e-3)
    # Labels have no weight at the end.
    assert lines[0]["gradient_norm_of_labels"] > 0 == lines[-1]["gradient_norm_of_labels"]
    log = log_of(read_history(folder / "run"), config.batch_size)
    parts = over_the_run(log)
    assert set(parts[0]["term_gradients"]) == set(names) and len(parts[0]["term_cosines"]) == 6
    assert parts[0]["term_gradients"]["kl"] == pytest.approx(lines[0]["gradient_norm_of_kl"])


def test_the_report_draws_the_weights(several, tmp_path):
    _, folder = several
    page = report([folder / "run"], tmp_path / "page.html").read_text()
    assert "What each term of the loss is multiplied by" in page
    assert "0.5 kl, 1 labels, 0.1 dist_columns, 0.2 dkd_others" in page


def test_schedules_go_on_exactly_after_a_stop(several, tmp_path, monkeypatch):
    config, folder = several
    stop_and_continue(config, tmp_path / "run", monkeypatch)
    same_bits(folder / "run", tmp_path / "run")
    assert lines_of(tmp_path / "run") == lines_of(folder / "run")
    assert evaluate(tmp_path / "run")["student"] == evaluate(folder / "run")["student"]


def wrong(objective, **changes):
    changes = {"teacher": TeacherConfig(weights="w")} | changes
    return "\n".join(problems(tiny_config(objective=objective, **changes)))


def one(**term):
    return ObjectiveConfig(terms=(TermConfig(**{"kind": "kl"} | term),))


@pytest.mark.parametrize(
    ("objective", "changes", "said"),
    [
        (one(kind="cka"), {}, "objective.terms.0.kind is 'cka'; expected one of attention, "),
        (one(weight=-1.0), {}, "objective.terms.0.weight is -1.0; expected 0 or more"),
        (one(weight=0.0), {}, "the weights of objective.terms sum to zero from 0 to 1 of the run"),
        (
            one(schedule=curve((0.4, 0), (0.6, 1))),
            {},
            "the weights of objective.terms sum to zero from 0 to 0.4 of the run",
        ),
        (
            one(schedule=curve((0, 0), (0.3, 1), interpolation="step")),
            {},
            "the weights of objective.terms sum to zero from 0 to 0.3 of the run",
        ),
        (
            one(schedule=curve((0, 0), (1.5, 1))),
            {},
            "objective.terms.0.schedule.points are at 0, 1.5 of the run; expected 0 to 1",
        ),
        (
            one(schedule=curve((0.5, 0), (0.5, 1))),
            {},
            "objective.terms.0.schedule.points: the shares of the run must increase",
        ),
        (one(schedule=curve((0, -1))), {}, "points: expected factors of 0 or more"),
        (
            dataclasses.replace(one(), temperature_schedule=curve((0, 1), (1, 0))),
            {},
            "objective.temperature_schedule: got a factor of 0 or less",
        ),
        (
            dataclasses.replace(one(), distance="l2"),
            {},
            "objective.terms are the whole loss, and objective.target=teacher, "
            "objective.distance=l2 would define another one",
        ),
        (
            one(kind="dkd_target"),
            {"data": dataclasses.replace(tiny_config().data, source="images", data_dir="x")},
            "the term dkd_target needs labels, and data.source=images has none",
        ),
        (
            one(kind="dist_columns"),
            {"memory": MemoryConfig(accumulate=2)},
            "dist_columns compares the examples of a batch with each other",
        ),
        (
            dataclasses.replace(one(temperature=3.0), ensemble="mean_probabilities"),
            {"more_teachers": (TeacherConfig(weights="v"),)},
            "ensemble=mean_probabilities takes the mean at objective.temperature",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused(objective, changes, said):
    assert said in wrong(objective, **changes)
    assert not wrong(ObjectiveConfig(terms=(TermConfig(kind="kl"), TermConfig(kind="labels"))))
    assert not wrong(one(schedule=curve((0, 0), (0.3, 1))))  # it rises from the first step on


def test_labels_are_mixed_as_the_students_view_is():
    objective = ObjectiveConfig(terms=(TermConfig(kind="kl"), TermConfig(kind="labels")))
    config = dataclasses.replace(matching_config(), objective=objective)
    built = build(config, resolved_run(config, (NETWORK,)))
    state = built.init(jax.random.key(0))
    state = dataclasses.replace(state, student=with_random_head(state.student))
    frozen = (built.teachers[0].network.freeze(with_random_head(state.student, 1)),)
    batch = jax.tree.map(jnp.asarray, random_batch())
    _, metrics = jax.jit(built.train_step)(state, frozen, batch, DRAWS)
    drawn = draw(jax.random.fold_in(KEY, 0), batch.sizes, config.views)
    images = render(drawn, batch.canvases, built.student.input_spec)
    logits = logits_of(built.student.network, state.student, images, train=True)
    coefficient = np.asarray(drawn.coefficients)[:, None]
    one_hot = np.eye(10)[np.asarray(batch.labels)]
    # The partner is the example before, as no other is drawn.
    assert drawn.partners is None
    mixed = coefficient * one_hot + (1 - coefficient) * np.roll(one_hot, 1, axis=0)
    expected = -(mixed * log_softmax(logits)).sum(-1).mean()
    assert float(metrics["term_labels"]) == pytest.approx(expected, rel=1e-5)
    assert abs(-(one_hot * log_softmax(logits)).sum(-1).mean() - expected) > 1e-3
