"""Weights of examples, long-tailed splits, and accuracies of their thirds, against NumPy."""

import dataclasses
import json
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import write_experiment
from test_accelerator_paths import matching
from test_cli import refused
from test_distances import log_softmax, numpy_kl
from test_evaluate import evaluate as evaluated
from test_step import DRAWS, KEY, pooled_network, random_batch
from test_terms import curve, stop_and_continue
from test_train import lines_of, same_bits
from tiny import resolved_run, tiny_config, train_step_of

from fm_distill.config import (
    ExampleWeightsConfig,
    MemoryConfig,
    MeshConfig,
    ObjectiveConfig,
    TeacherConfig,
    TermConfig,
    TransferConfig,
    ViewConfig,
)
from fm_distill.data.labels import known_labels
from fm_distill.data.long_tail import long_tailed, tail_counts
from fm_distill.data.sources import open_source
from fm_distill.data.splits import open_data, open_named
from fm_distill.errors import UserError
from fm_distill.evaluation.class_groups import groups_of
from fm_distill.evaluation.evaluate import table
from fm_distill.evaluation.inference import evaluate
from fm_distill.networks.branch import Branch
from fm_distill.objectives.example_weights import (
    class_weights,
    effective_share,
    make_example_weights,
    mean_one,
)
from fm_distill.objectives.terms import Outputs, Targets
from fm_distill.preparation.check import problems
from fm_distill.reports.report import report
from fm_distill.runs.state import TrainState
from fm_distill.system.sharding import make_layout
from fm_distill.testing import check_source
from fm_distill.training.build import build
from fm_distill.training.train import train
from fm_distill.views.draws import draw
from fm_distill.views.rendering import InputSpec, render

COUNTS = (40, 17, 9, 5, 1)
BY_DIFFICULTY = ("teacher_entropy", "teacher_distance")


def weighted(kind, beta=0.999, **changes):
    weights = ExampleWeightsConfig(kind=kind, beta=beta)
    return ObjectiveConfig(example_weights=weights, **changes)


def numpy_class_weights(kind, counts, beta):
    """As the papers write them, then scaled over the examples, in float64."""
    counts = np.float64(counts)
    raw = 1 / counts if kind == "inverse_frequency" else (1 - beta) / (1 - beta**counts)
    return raw / np.average(raw, weights=counts)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999])
@pytest.mark.parametrize("kind", ["inverse_frequency", "effective_number"])
def test_class_weights_against_numpy(kind, beta):
    found = class_weights(ExampleWeightsConfig(kind=kind, beta=beta), COUNTS)
    np.testing.assert_allclose(found, numpy_class_weights(kind, COUNTS, beta), rtol=1e-9)
    assert np.average(found, weights=COUNTS) == pytest.approx(1, abs=1e-12)
    if kind == "effective_number" and beta == 0:
        np.testing.assert_array_equal(found, 1)


def test_effective_numbers_near_one_keep_their_digits():
    """Where 1 - beta^n in float64 has lost half of its digits: against fractions."""
    beta = 1 - 1e-10
    exact = [1 / (1 - Fraction(beta) ** n) for n in COUNTS]
    mean = sum(x * n for x, n in zip(exact, COUNTS, strict=True)) / sum(COUNTS)
    found = class_weights(ExampleWeightsConfig(kind="effective_number", beta=beta), COUNTS)
    np.testing.assert_allclose(found, [float(x / mean) for x in exact], rtol=1e-12)


@pytest.mark.parametrize("kind", BY_DIFFICULTY)
def test_difficulties_against_numpy(kind):
    """Of two teachers, at a temperature that is half of the objective's in the middle."""
    logits = 3 * np.random.default_rng(0).standard_normal((3, 6, 7))
    objective = weighted(kind, temperature=4.0, temperature_schedule=curve((0, 0), (1, 1)))
    student, *teachers = map(jnp.float32, logits)
    weigh = make_example_weights(objective)
    found = weigh(Outputs(student), Targets(tuple(teachers)), 0.5)
    logs = [log_softmax(x / 2) for x in logits[1:]]
    expected = {
        "teacher_entropy": -sum((np.exp(x) * x).sum(-1) for x in logs),
        "teacher_distance": sum(numpy_kl(logits[0], x, 2.0) for x in logits[1:]),
    }[kind]
    np.testing.assert_allclose(found, expected / expected.mean(), rtol=2e-5)
    share = expected.sum() ** 2 / (expected**2).sum() / 6
    assert float(effective_share(found)) == pytest.approx(share, rel=2e-5)


def test_where_nothing_is_difficult_all_weights_are_one():
    np.testing.assert_array_equal(mean_one(jnp.float32([0, -1e-7, 1e-8])), 1)
    assert float(effective_share(jnp.ones(5))) == 1
    assert float(effective_share(jnp.float32([3, 0, 0]))) == pytest.approx(1 / 3)


LABELS_BESIDE = (TermConfig(kind="kl", weight=0.5), TermConfig(kind="labels", weight=2.0))


@pytest.mark.parametrize(
    ("kind", "devices", "accumulate"),
    [
        ("effective_number", 1, 1),
        ("effective_number", 8, 1),
        ("effective_number", 1, 4),
        ("teacher_entropy", 8, 1),
        ("teacher_distance", 1, 1),
        ("teacher_distance", 8, 1),
    ],
)
def test_loss_and_gradient_of_a_step_against_numpy(kind, devices, accumulate):
    """A network linear in 48 means of its view, each example mixed by itself with any other."""
    views = ViewConfig(mixup="example", mixup_partner="permutation")
    objective = weighted(kind, beta=0.9, temperature=2.0, terms=LABELS_BESIDE)
    network = pooled_network(classes=5)
    branch = Branch(network, InputSpec(16, "minus_one_one"))
    student, teacher = (network.init(jax.random.key(i)) for i in (0, 1))
    keep = optax.GradientTransformation(
        lambda params: (), lambda g, s, params: (jax.tree.map(jnp.subtract, g, params), s)
    )
    step = train_step_of(
        branch, (branch,), keep, views, objective, 8, class_counts=COUNTS,
        memory=MemoryConfig(accumulate=accumulate),
    )  # fmt: skip
    layout = make_layout(MeshConfig(data=devices))
    host = random_batch(classes=5)
    state = TrainState(jnp.int32(0), student, (), None)
    put = jax.device_put((state, (teacher,)), layout.replicated)
    with_gradient, metrics = jax.jit(step)(*put, jax.device_put(host, layout.batch), DRAWS)

    drawn = draw(jax.random.fold_in(KEY, 0), jnp.asarray(host.sizes), views)
    images = np.float64(render(drawn, jnp.asarray(host.canvases), branch.input_spec))
    seen = images.reshape(16, 4, 4, 4, 4, 3).mean(axis=(2, 4)).reshape(16, -1)
    logits = [seen @ np.float64(x.params["kernel"]) for x in (student, teacher)]
    share, others = np.float64(drawn.coefficients), np.asarray(drawn.partners)
    assert len({*others}) == 16 and np.ptp(share) > 0.1

    def mixed(x):
        a = share.reshape(16, *[1] * (x.ndim - 1))
        return a * x + (1 - a) * x[others]

    teacher_logs = log_softmax(logits[1] / 2)
    if kind == "effective_number":
        weights = mixed(numpy_class_weights(kind, COUNTS, 0.9)[host.labels])
    elif kind == "teacher_entropy":
        weights = -(np.exp(teacher_logs) * teacher_logs).sum(-1)
        weights /= weights.mean()
    else:
        weights = numpy_kl(*logits, 2.0)
        weights /= weights.mean()
    labels = mixed(np.eye(5)[host.labels])
    values = numpy_kl(*logits, 2.0), -(labels * log_softmax(logits[0])).sum(-1)
    loss = (weights * (0.5 * 4 * values[0] + 2 * values[1])).mean()
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    for name, value in zip(("kl", "labels"), values, strict=True):
        assert float(metrics[f"term_{name}"]) == pytest.approx((weights * value).mean(), rel=1e-4)
    kish = weights.sum() ** 2 / (weights**2).sum() / 16
    assert float(metrics["effective_sample_share"]) == pytest.approx(kish, rel=1e-5)
    # The weights have no gradient of their own.
    of_kl = 0.5 * 4 * (np.exp(log_softmax(logits[0] / 2)) - np.exp(teacher_logs)) / 2
    of_labels = 2 * (np.exp(log_softmax(logits[0])) - labels)
    gradient = seen.T @ (weights[:, None] * (of_kl + of_labels)) / 16
    found = with_gradient.student.params["kernel"]
    np.testing.assert_allclose(found, gradient, rtol=1e-3, atol=1e-5 * np.abs(gradient).max())


def test_equal_classes_change_no_bit_and_without_weights_nothing_is_logged():
    config = tiny_config(views=ViewConfig(mixup="none"))
    states = []
    for kind in ("none", "inverse_frequency"):
        objective = dataclasses.replace(
            config.objective, example_weights=ExampleWeightsConfig(kind=kind)
        )
        changed = dataclasses.replace(config, objective=objective)
        built = build(changed, resolved_run(changed))
        batch = jax.tree.map(jnp.asarray, random_batch())
        state, metrics = jax.jit(built.train_step)(built.init(jax.random.key(0)), (), batch, DRAWS)
        assert metrics.get("effective_sample_share") == (None if kind == "none" else 1)
        states.append(state)
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_the_long_tail_of_the_papers():
    """The classes of CIFAR-10-LT with a factor of 100, as they are published."""
    found = tail_counts(np.full(10, 5000), 100.0)
    np.testing.assert_array_equal(found, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
    counts = np.array([30, 50, 10, 40, 2])
    wanted = [max(1, math.floor(50 * 300.0 ** (-c / 4))) for c in range(5)]
    np.testing.assert_array_equal(tail_counts(counts, 300.0), np.minimum(counts, wanted))
    np.testing.assert_array_equal(tail_counts(counts, 1.0), counts)


class Unread:
    """A source of which nothing is known but by reading it."""

    def __init__(self, source):
        self.source, self.identity = source, source.identity
        self.classes, self.class_names = source.classes, source.class_names

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]


def tailed_data(factor=50.0, **changes):
    return dataclasses.replace(tiny_config().data, long_tail=factor, **changes)


@pytest.mark.parametrize("form", [lambda x: x, Unread])
def test_a_long_tailed_split_keeps_the_first_of_each_class_in_their_order(form):
    whole = open_source(tiny_config().data, "train")
    assert (known_labels(form(whole)) is None) == (form is Unread)
    thinned = long_tailed(form(whole), 50.0)
    check_source(thinned)
    labels = np.array([whole[i].label for i in range(len(whole))])
    expected = []
    for i, label in enumerate(labels):
        n = math.floor(np.bincount(labels).max() / 50 ** (label / 9))
        if (labels[:i] == label).sum() < max(n, 1):
            expected.append(i)
    assert len(thinned) == len(expected) < 500
    for i, of_whole in enumerate(expected):
        np.testing.assert_array_equal(thinned[i].image, whole[of_whole].image)
        assert thinned[i][1:] == whole[of_whole][1:]
    np.testing.assert_array_equal(known_labels(thinned), labels[expected])


def test_the_training_split_alone_is_thinned_and_has_an_identity_of_its_own():
    config = tiny_config(data=tailed_data())
    data, said = open_data(config)
    assert len(data.train) == len(open_named(config, "train")) == sum(data.class_counts)
    assert len(data.test) == len(open_named(config, "test")) == 359
    assert f"leaves {len(data.train)} examples" in said[-1] and "2 of the smallest" in said[-1]
    identities = {
        open_data(tiny_config(data=tailed_data(x)))[0].facts.identity for x in (None, 50.0, 50.5)
    }
    assert identities == {
        "digits/train",
        "digits/train with a long tail of 50.0",
        "digits/train with a long tail of 50.5",
    }


def test_thirds_of_the_classes():
    counts = (5, 90, 1, 40, 40, 7, 40, 2)
    assert [*groups_of(counts)] == [1, 0, 2, 0, 0, 1, 1, 2]
    assert groups_of((5, 9, 8)) is None and groups_of(None) is None
    assert [*groups_of((5, 10))] == [1, 0] and [*groups_of((0, 1, 0))] == [1, 0, 2]


@pytest.mark.parametrize(("devices", "size"), [(1, 16), (8, 16)])
def test_accuracies_of_the_thirds_against_numpy(devices, size):
    rng = np.random.default_rng(0)
    logits, labels = 2 * rng.standard_normal((2, 50, 9)), rng.integers(-1, 8, 50)
    counts = (3, 80, 20, 20, 7, 9, 1, 60, 2)
    # The last class of the tail, 8, is not in the split.
    thirds = {"head": [1, 7, 2], "middle": [3, 5, 4], "tail": [0, 8, 6]}
    found = evaluated(*logits, labels, devices, size, class_counts=counts)
    text = table(found)
    for name, of_network in zip(("student", "teacher"), logits, strict=True):
        for third, classes in thirds.items():
            inside = np.isin(labels, classes)
            expected = (of_network.argmax(-1) == labels)[inside].mean()
            assert found[name][f"{third}_top1"] == pytest.approx(expected)
            assert f"{100 * expected:.2f} %" in text.split(f"{name} accuracy, {third}")[1]
    without = evaluated(*logits, labels, devices, size)
    assert "tail_top1" not in without["student"] and "tail" not in table(without)
    assert {x: without[x] for x in without if x not in ("student", "teacher")} == {
        x: found[x] for x in found if x not in ("student", "teacher")
    }
    alone = evaluated(logits[0], None, np.full(50, 1), devices, size, class_counts=counts)
    assert alone["student"]["head_top1"] is not None and alone["student"]["tail_top1"] is None
    assert "head_top1" not in alone["teacher"]


def test_a_long_tailed_run_with_weights_goes_on_bit_for_bit(tmp_path, monkeypatch):
    objective = weighted("effective_number", temperature=2.0, terms=LABELS_BESIDE)
    config = dataclasses.replace(
        matching(tmp_path, MeshConfig(data=1)), objective=objective, data=tailed_data()
    )
    whole = train(config, tmp_path / "whole")
    assert whole.complete
    stop_and_continue(config, tmp_path / "pieces", monkeypatch)
    same_bits(tmp_path / "whole", tmp_path / "pieces")
    lines = lines_of(tmp_path / "whole")
    assert lines == lines_of(tmp_path / "pieces")
    shares = [x["effective_sample_share"] for x in lines if x["split"] == "train"]
    assert len(shares) == 6 and all(0 < x < 1 for x in shares)
    assert {"student_tail_top1", "teacher_head_top1"} <= lines[-1].keys()
    figures = evaluate(tmp_path / "whole")  # on all devices, so that a KL rounds otherwise
    for network in ("student", "teacher"):
        for third in ("head", "middle", "tail"):
            accuracy = figures[network][f"{third}_top1"]
            assert accuracy == whole.evaluation[network][f"{third}_top1"] is not None
    page = report([tmp_path / "whole"], tmp_path / "page.html").read_text()
    assert "effective_number, beta 0.999" in page and "student accuracy, tail" in page
    stored = json.loads((tmp_path / "whole" / "config.json").read_text())["resolved"]
    assert sum(stored["class_counts"]) == stored["examples"]
    other = dataclasses.replace(config, data=tailed_data(20.0))
    with pytest.raises(UserError, match=r"data\.long_tail: 50\.0 in the workdir, 20\.0 now"):
        train(other, tmp_path / "whole")


IMAGES = dataclasses.replace(tiny_config().data, source="images", data_dir="x")
OTHERS = dataclasses.replace(tiny_config().data, transfer=(TransferConfig(source="digits"),))


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("inverse_frequency", {"data": IMAGES}, "inverse_frequency needs labels, and data.source="),
        ("effective_number", {"data": OTHERS}, "data.transfer has images without labels, and "),
        ("none", {"data": dataclasses.replace(IMAGES, long_tail=9.0)}, "data.long_tail=9 needs la"),
        ("none", {"data": dataclasses.replace(OTHERS, long_tail=9.0)}, "data.long_tail=9 thins da"),
        ("none", {"data": tailed_data(0.5)}, "data.long_tail is 0.5; expected 1 or more"),
        ("teacher_distance", {"memory": MemoryConfig(accumulate=2)}, "teacher_distance divides by"),
    ],
)
def test_what_cannot_be_weighted_is_refused(kind, changes, said):
    teacher = {"teacher": TeacherConfig(weights="w")}
    (found,) = problems(tiny_config(objective=weighted(kind), **teacher | changes))
    assert said in found
    assert not [*problems(tiny_config(objective=weighted(kind), **teacher))]


def test_weights_without_their_teacher_and_a_beta_without_its_kind_are_refused():
    (found,) = problems(tiny_config(objective=weighted("teacher_entropy", target="labels")))
    assert "teacher_entropy needs the teacher, and objective.target=labels has none" in found
    wrong = weighted("inverse_frequency", beta=0.9, target="labels")
    (found,) = problems(tiny_config(objective=wrong))
    assert "objective.example_weights.beta=0.9 belongs to kind=effective_number" in found


@pytest.mark.parametrize(
    ("option", "value"),
    [("objective.example-weights.kind", "inverse_frequency"), ("data.long-tail", "10")],
)
def test_a_class_without_examples_is_refused_before_anything_is_compiled(
    tmp_path, capsys, monkeypatch, option, value
):
    for name in ("cat", "dog", "eel"):
        (tmp_path / "train" / name).mkdir(parents=True)
    for name in ("cat", "eel"):
        (tmp_path / "train" / name / "1.png").write_bytes(b"is not opened")
    path = write_experiment(
        tmp_path / "run.py",
        f"data=DataConfig(source='class_folders', data_dir={str(tmp_path)!r}, "
        "train=SplitConfig(name='train'), canvas=CanvasConfig(size=32, fit='long'))",
    )
    monkeypatch.setattr(jax, "jit", lambda *x, **y: pytest.fail("compiled"))
    said = refused(capsys, "train", path, "--workdir", tmp_path / "run", f"--{option}", value)
    assert "needs examples of each class" in said
    assert "none of 1 of 3 classes, the first of them 1 (dog)" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("labels", "said"), [(-1, "has -1; expected 0 to 9"), (None, "has none")])
def test_images_without_labels_are_refused_where_they_are_read(labels, said):
    source = Unread(open_source(tiny_config().data, "validation"))
    if labels is None:
        source.classes = None
    else:
        source.source = [x._replace(label=labels) for x in source.source]
    with pytest.raises(UserError, match=f"data.long_tail=10 needs the label.*{said}"):
        long_tailed(source, 10.0)
