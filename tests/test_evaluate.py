"""The figures against NumPy, each example once on any number of devices, nulls where due."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from fm_distill.config import MeshConfig, ObjectiveConfig, ViewConfig
from fm_distill.data.batch import Batch
from fm_distill.evaluation.bootstrap import Right, gap_interval, retention_interval
from fm_distill.evaluation.evaluate import Evaluator, table
from fm_distill.models import Network, Output, Variables
from fm_distill.networks.branch import Branch
from fm_distill.runs import metric_table
from fm_distill.system.sharding import make_layout
from fm_distill.views.draws import draw
from fm_distill.views.rendering import InputSpec, render


def lookup_network(logits: np.ndarray) -> Network:
    """Says `logits[i]` of an image whose red channel is i: figures from known logits."""

    def apply(variables, images, *, train, features=()):
        index = jnp.round(images[:, 0, 0, 0] * 255).astype(jnp.int32)
        return Output(variables.params["logits"][index], {}, {})

    return Network(
        logits.shape[1],
        lambda key: Variables({"logits": jnp.float32(logits)}, {}),
        apply,
        lambda variables: variables,
        lambda frozen, images, *, features=(): apply(frozen, images, train=False),
    )


def batches(labels, size):
    """Images of their own index, in padded batches with masks."""
    count = -(-len(labels) // size) * size
    index = np.minimum(np.arange(count), 255).astype(np.uint8)
    canvases = np.tile(index[:, None, None, None], (1, 4, 4, 3))
    padded = np.concatenate([labels, np.zeros(count - len(labels))]).astype(np.int32)
    mask = np.arange(count) < len(labels)
    for i in range(0, count, size):
        rows = slice(i, i + size)
        yield Batch(canvases[rows], np.full((size, 2), 4, np.int32), padded[rows]), mask[rows]


def evaluate(student, teacher, labels, devices=1, size=16, temperature=2.0, class_counts=None):
    config = tiny_config()
    config = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, temperature=temperature)
    )
    layout = make_layout(MeshConfig(data=devices))
    input_spec = InputSpec(4, "zero_one")
    networks = [lookup_network(x) for x in (student, teacher) if x is not None]
    branches = [Branch(n, input_spec) for n in networks]
    variables = [n.init(jax.random.key(0)) for n in networks]
    variables = jax.device_put(variables, layout.replicated)
    evaluator = Evaluator.make(config, branches[0], tuple(branches[1:]), layout, class_counts)
    return evaluator(variables[0], tuple(variables[1:]), batches(labels, size), "test", 7)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def numpy_figures(logits, labels):
    log_p = log_softmax(logits)
    order = np.argsort(-logits, axis=-1)
    right = order[:, 0] == labels
    confidence = np.exp(log_p.max(-1))
    ece = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return {
        "top1": right.mean(),
        "top5": (order[:, :5] == labels[:, None]).any(-1).mean(),
        "cross_entropy": -log_p[np.arange(len(labels)), labels].mean(),
        "ece": ece,
    }


@pytest.fixture
def known():
    rng = np.random.default_rng(0)
    return 2 * rng.standard_normal((2, 50, 9)), rng.integers(0, 9, 50)


@pytest.mark.parametrize(("devices", "size"), [(1, 16), (1, 50), (8, 16), (8, 64), (5, 15)])
def test_figures_against_numpy_on_any_number_of_devices(known, devices, size):
    (student, teacher), labels = known
    found = evaluate(student, teacher, labels, devices, size)
    assert (found["split"], found["examples"], found["step"]) == ("test", 50, 7)
    for name, logits in (("student", student), ("teacher", teacher)):
        for key, value in numpy_figures(logits, labels).items():
            assert found[name][key] == pytest.approx(value, abs=2e-6), (name, key)
    first = teacher.argmax(-1)
    top5 = np.argsort(-student, axis=-1)[:, :5]
    assert found["agreement"]["top1"] == pytest.approx((student.argmax(-1) == first).mean())
    assert found["agreement"]["top5"] == pytest.approx((top5 == first[:, None]).any(-1).mean())
    for key, temperature in (("train_temperature", 2.0), ("one", 1.0)):
        ls, lt = log_softmax(student / temperature), log_softmax(teacher / temperature)
        expected = (np.exp(lt) * (lt - ls)).sum(-1).mean()
        assert found["kl"][key] == pytest.approx(expected, rel=1e-5)
    top1 = {name: numpy_figures(x, labels)["top1"] for name, x in zip("st", known[0], strict=True)}
    assert found["retention"] == pytest.approx(top1["s"] / top1["t"])
    assert found["gap"] == pytest.approx(top1["t"] - top1["s"])


def test_intervals_are_those_of_the_paired_answers(known):
    """Padded examples and those without a label are not counted."""
    (noise, teacher), _ = known
    student, labels = teacher + noise, teacher.argmax(-1)
    labels[:20] = (labels[:20] + 1) % 9
    student[-1] = teacher[-1] = -np.arange(9)  # which padding sees, with label 0
    labels[45:] = -1
    found = evaluate(student, teacher, labels, devices=8, size=16)
    s, t = (x.argmax(-1)[:45] == labels[:45] for x in (student, teacher))
    right = Right(*(int(x.sum()) for x in (s & t, s & ~t, ~s & t, ~s & ~t)))
    assert all(right.counts[[0, 2, 3]]) and right.counts.sum() == 45
    assert found["retention_interval"] == retention_interval(right)
    assert found["gap_interval"] == gap_interval(right)
    assert found["retention_interval"][0] < found["retention"] < found["retention_interval"][1]


def test_without_labels(known):
    (student, teacher), labels = known
    found = evaluate(student, teacher, np.full_like(labels, -1))
    assert set(found["student"].values()) == {None} and found["retention"] is None
    assert found["retention_interval"] is None and found["gap_interval"] is None
    assert found["agreement"]["top1"] is not None and found["kl"]["one"] is not None
    assert "accuracy" not in table(found)


def test_without_teacher(known):
    (student, _), labels = known
    found = evaluate(student, None, labels)
    assert set(found["teacher"].values()) == {None} and found["gap"] is None
    assert found["retention_interval"] is None and found["gap_interval"] is None
    assert found["agreement"] == {"top1": None, "top5": None}
    assert found["kl"] == {"train_temperature": None, "one": None}
    assert found["student"]["top1"] is not None


def test_fewer_than_five_classes(known):
    (student, teacher), labels = known
    found = evaluate(student[:, :3], teacher[:, :3], labels % 3)
    assert found["student"]["top5"] is None and found["agreement"]["top5"] is None
    assert found["student"]["top1"] is not None and found["agreement"]["top1"] is not None


def test_perfect_confidence_is_in_the_last_bin():
    logits = np.eye(6) * 1000
    found = evaluate(logits, logits, np.arange(6))
    assert found["student"]["ece"] == 0.0 and found["kl"]["one"] == 0.0


def test_the_training_view_is_measured_on_whole_mixtures_only():
    """Against the draws made here: networks that see one pixel, with padding in the last batch."""
    config = tiny_config(objective=ObjectiveConfig(temperature=2.0), views=ViewConfig())
    layout = make_layout(MeshConfig(data=1))
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((2, 48, 6)).astype(np.float32)

    def branch(kernel):
        def apply(variables, images, *, train=False, features=()):
            return Output(images.reshape(images.shape[0], -1) @ kernel, {}, {})

        network = Network(
            6,
            lambda key: Variables({}, {}),
            apply,
            lambda variables: variables,
            lambda frozen, images, *, features=(): apply(frozen, images),
        )
        return Branch(network, InputSpec(4, "minus_one_one"))

    canvases = rng.integers(0, 256, (20, 12, 12, 3), np.uint8)
    padded = np.concatenate([canvases, np.zeros((4, 12, 12, 3), np.uint8)])
    sizes, labels = np.full((24, 2), 12, np.int32), np.zeros(24, np.int32)
    mask = np.arange(24) < 20
    host = [
        (Batch(padded[i : i + 8], sizes[i : i + 8], labels[i : i + 8]), mask[i : i + 8])
        for i in (0, 8, 16)
    ]
    student, teacher = branch(weights[0]), branch(weights[1])
    evaluator = Evaluator.make(config, student, (teacher,), layout)
    nothing = Variables({}, {})
    found = evaluator(nothing, (nothing,), host, "test", 1)["training_view"]
    kl, agreement = [], []
    for index, (batch, keep) in enumerate(host):
        drawn = draw(
            jax.random.fold_in(jax.random.key(0), index), jnp.asarray(batch.sizes), config.views
        )
        images = render(drawn, jnp.asarray(batch.canvases), student.input_spec)
        s, t = (np.asarray(images).reshape(8, -1) @ w for w in weights)
        ls, lt = log_softmax(s / 2), log_softmax(t / 2)
        both = keep & np.roll(keep, 1)
        kl += list((np.exp(lt) * (lt - ls)).sum(-1)[both])
        agreement += list((s.argmax(-1) == t.argmax(-1))[both])
    assert len(kl) == 8 + 8 + 3
    assert found["kl"]["train_temperature"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert found["agreement"]["top1"] == pytest.approx(np.mean(agreement))


def test_every_reported_number_has_one_row(known):
    """Names are unique, every place of an evaluation is read from its figures, with its unit."""
    (student, teacher), labels = known
    found = evaluate(student, teacher, labels)
    assert len(metric_table.BY_NAME) == len(metric_table.METRICS)
    values = metric_table.logged(found)
    assert values["training_view_kl"] == found["training_view"]["kl"]["train_temperature"]
    assert set(metric_table.RANKED) == set(values) - {"teacher_top1"}
    assert [name for name, higher in metric_table.RANKED.items() if not higher] == [
        "kl_train_temperature", "kl_one", "training_view_kl", "student_cross_entropy",
    ]  # fmt: skip
    text = dict(x.rsplit("  ", 1) for x in table(found).splitlines()[1:])
    text = {name.strip(): value.strip() for name, value in text.items()}
    assert text["student accuracy"] == f"{100 * found['student']['top1']:.2f} %"
    assert text["KL at temperature 1"] == f"{found['kl']['one']:.4f} nats"
    assert metric_table.line(values) == (
        f"student accuracy {text['student accuracy']}, top-1 agreement {text['top-1 agreement']}, "
        f"KL at temperature 1 {text['KL at temperature 1']}"
    )
    drawn = [x.name for metrics in metric_table.panels().values() for x in metrics]
    assert sorted(drawn) == sorted(x.name for x in metric_table.METRICS if x.curve)
