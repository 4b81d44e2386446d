"""Channels chosen by the run's own gradient, and over the whole network, against NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_shrinking import random_variables
from tiny import NETWORK, tiny_config

from fm_distill.config import (
    Config,
    MemoryConfig,
    MeshConfig,
    ObjectiveConfig,
    PruningConfig,
    TeacherConfig,
    with_options,
)
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import Reader, stack
from fm_distill.data.order import example_ids
from fm_distill.data.splits import open_data
from fm_distill.errors import UserError
from fm_distill.models import InnerChannels, build_network, resolve
from fm_distill.networks.branch import make_branch, step_views
from fm_distill.networks.channel_scores import read_scores, write_scores
from fm_distill.networks.loading import Networks, load_networks
from fm_distill.networks.shrinking import check_ranking, ranked_widths
from fm_distill.networks.teachers import Teacher
from fm_distill.preparation.resolve import resolve as resolve_run
from fm_distill.system.preemption import Stop
from fm_distill.system.sharding import make_layout
from fm_distill.training import channels
from fm_distill.training.channels import decided_networks, gradient_scores
from fm_distill.training.record import record
from fm_distill.views.draws import run_keys
from fm_distill.weights.card import only_network
from fm_distill.weights.load import Pretrained, fingerprint

FLOAT32 = jnp.dtype("float32")
TAYLOR = PruningConfig(pattern="channels", criterion="taylor", taylor_batches=2)
STUDENT = dataclasses.replace(NETWORK, weights="none", pruning=TAYLOR)
MATCHER = tiny_config(
    student=STUDENT,
    teacher=TeacherConfig(weights="none"),
    objective=ObjectiveConfig(temperature=2.0),
)


def networks_of(config: Config) -> Networks:
    """A student and a teacher with random weights, as if they came from files."""
    network = resolve(only_network(config.student))
    student, teacher = random_variables(network), random_variables(network)
    teacher = jax.tree.map(lambda x: x[..., ::-1], teacher)
    return Networks(
        student=network,
        pretrained=Pretrained(network, 10, None, student, ()),
        teachers=(Teacher(network, 10, None, teacher, "other", ()),),
        classes=10,
        class_names=None,
        undecided=True,
    )


def scores_of(config: Config, networks: Networks, folder, mesh: int = 1):
    data, _ = open_data(config)
    layout = make_layout(MeshConfig(data=mesh))
    resolved = resolve_run(config, data.facts, networks.facts, layout)
    return gradient_scores(config, resolved, data, networks, layout, folder)


def batch_of(config: Config, step: int) -> Batch:
    data, _ = open_data(config)
    reader = Reader(data.train, config.data, 10)
    positions = step * config.batch_size + np.arange(config.batch_size)
    ids = example_ids(config.seed, positions, len(reader))
    return jax.tree.map(jnp.asarray, stack([reader[int(i)] for i in ids]))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def loss_of(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """T^2 KL(teacher || student), the mean over the batch, in float64."""
    a, b = (log_softmax(x.astype(np.float64) / temperature) for x in (teacher, student))
    return temperature**2 * (np.exp(a) * (a - b)).sum(axis=-1).mean()


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_scores_are_finite_differences_of_the_matchers_loss(norm, tmp_path):
    """All weights of a channel grow and shrink by a hundredth, in the run's first two batches."""
    config = dataclasses.replace(MATCHER, student=with_options(STUDENT, {"norm": norm}))
    networks = networks_of(config)
    (block,), (scores,) = scores_of(config, networks, tmp_path)
    branch = make_branch(networks.student, 10, FLOAT32)
    start, key = networks.pretrained.variables, run_keys(MATCHER.seed).draws
    apply = jax.jit(branch.network.apply, static_argnames="train")
    expected = np.zeros((2, 8))
    for step in range(2):
        batch = batch_of(MATCHER, step)
        views = step_views("mixed", MATCHER.views, branch, (branch,), batch, key, step)
        teacher = apply(networks.teachers[0].variables, views.student, train=False).logits

        def loss(place, channel, share, views=views, teacher=teacher):
            params = jax.tree.map(np.array, start.params)
            for path, axis in block.places[place]:
                kind, *parents, leaf = path.split("/")
                if kind == "statistics":
                    continue
                part = params
                for name in parents:
                    part = part[name]
                np.moveaxis(part[leaf], axis, 0)[channel] *= 1 + share
            variables = dataclasses.replace(start, params=params)
            logits = apply(variables, views.student, train=True).logits
            return loss_of(np.asarray(logits), np.asarray(teacher), 2.0)

        for place in range(2):
            for channel in range(8):
                change = loss(place, channel, 0.01) - loss(place, channel, -0.01)
                expected[place, channel] += (change / 0.02) ** 2 / 2
    assert np.sort(expected.ravel())[4] > 1e-7  # what is compared is more than rounding
    np.testing.assert_allclose(np.stack(scores), expected, rtol=0.06, atol=1e-4 * expected.max())


def test_eight_devices_in_two_parts_find_the_same_scores(tmp_path):
    networks = networks_of(MATCHER)
    _, one = scores_of(MATCHER, networks, tmp_path)
    parts = dataclasses.replace(MATCHER, memory=MemoryConfig(accumulate=2), ema_decay=0.9)
    _, eight = scores_of(parts, networks, tmp_path, mesh=8)
    largest = max(x.max() for x in one[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6 * largest), one, eight
    )
    assert all(x.dtype == np.float64 for x in one[0])


def test_a_recorded_teacher_gives_the_scores_of_the_live_one(trained, tmp_path):
    whole = dataclasses.replace(
        MATCHER, student=NETWORK, teacher=TeacherConfig(workdir=f"{trained}/run/teacher")
    )
    assert record(whole, tmp_path / "recorded", Stop(), dtype="float32").complete
    there = dataclasses.replace(whole, teacher=TeacherConfig(recording=f"{tmp_path}/recorded"))
    scores = []
    for config in (whole, there):
        loaded = load_networks(config, tmp_path, 10, None)
        start = networks_of(MATCHER)
        networks = dataclasses.replace(
            loaded, student=start.student, pretrained=start.pretrained, undecided=True
        )
        pruned = dataclasses.replace(config, student=STUDENT)
        scores.append(np.stack(scores_of(pruned, networks, tmp_path)[1][0]))
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-6 * scores[0].max())
    labels = dataclasses.replace(MATCHER, objective=ObjectiveConfig(target="labels"), teacher=None)
    alone = dataclasses.replace(networks_of(MATCHER), teachers=())
    of_labels = np.stack(scores_of(labels, alone, tmp_path)[1][0])
    assert not np.allclose(of_labels, scores[0], rtol=0.1)


def loss_says_nothing(networks: Networks, tmp_path, config=MATCHER) -> str:
    """What is said where `networks` come from the weights of `config`."""
    data, _ = open_data(config)
    with pytest.raises(UserError) as error:
        decided_networks(config, networks, data, make_layout(MeshConfig(data=1)), tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    return str(error.value)


def test_where_the_gradient_says_nothing_it_is_said(tmp_path, monkeypatch):
    networks = networks_of(MATCHER)
    start, (teacher,) = networks.pretrained, networks.teachers

    def said(**changes) -> str:
        return loss_says_nothing(dataclasses.replace(networks, **changes), tmp_path)

    own = dataclasses.replace(teacher, fingerprint=fingerprint(start.variables))
    assert "its teacher's own" in said(teachers=(own,))
    assert "needs a trained head" in said(pretrained=dataclasses.replace(start, classes=7))
    # A block of zeros, whose channels change nothing.
    params = {**start.variables.params}
    params["block1_unit01"] = jax.tree.map(jnp.zeros_like, params["block1_unit01"])
    dead = dataclasses.replace(start.variables, params=params)
    assert "is zero, so it has nothing to learn" in said(
        pretrained=dataclasses.replace(start, variables=dead)
    )
    broken = jax.tree.map(lambda x: x * jnp.nan, teacher.variables)
    assert "is not finite" in said(teachers=(dataclasses.replace(teacher, variables=broken),))

    def full(*_):
        raise OSError(28, "No space left on device")

    blocks = build_network(networks.student, 10, FLOAT32).inner_channels
    scores = (tuple(np.arange(1.0, 9.0) for _ in range(2)),)
    monkeypatch.setattr(channels, "gradient_scores", lambda *_: (blocks, scores))
    monkeypatch.setattr(channels, "write_scores", full)
    assert "channel_scores.npz cannot be written" in said()


def in_numpy(widths, together, scores, sparsity, multiple_of) -> list[int]:
    """One step after another goes, the worst of those that are left."""
    steps = [math.lcm(x, multiple_of) for x in together]
    order = []
    for places, group in zip(scores, together, strict=True):
        ranked = []
        for one in places:
            normal = one / np.sqrt((one**2).sum())
            groups = sorted(sum(normal[i : i + group]) / group for i in range(0, len(one), group))
            ranked.append([x for x in groups for _ in range(group)])
        order.append(np.mean(ranked, axis=0))
    total = sum(widths)
    kept = [width - width % step for width, step in zip(widths, steps, strict=True)]
    while True:
        # What each block would lose next, if it may.
        worth = [
            np.mean(order[i][widths[i] - kept[i] :][: steps[i]]) if kept[i] > steps[i] else np.inf
            for i in range(len(widths))
        ]
        next_one = int(np.argmin(worth))
        if np.isinf(worth[next_one]):
            return kept
        before = total - sum(kept) - sparsity * total
        if abs(before + steps[next_one]) >= abs(before):
            return kept
        kept[next_one] -= steps[next_one]


@pytest.mark.parametrize(
    ("widths", "together", "places", "sparsity", "multiple_of"),
    [
        ((8, 16, 12), (1, 1, 1), 1, 0.5, 1),
        ((8, 16, 32), (2, 4, 8), 2, 0.6, 1),  # groups of GroupNorms, two places in a block
        ((18, 20, 50), (1, 2, 1), 1, 0.4, 8),
        ((8, 8, 8), (2, 1, 4), 3, 0.05, 1),
        ((4, 60, 7), (1, 1, 1), 2, 0.95, 1),  # all but a few
    ],
)
def test_the_worst_of_the_network_go(widths, together, places, sparsity, multiple_of):
    pruning = PruningConfig(
        pattern="channels", ranking="network", sparsity=sparsity, multiple_of=multiple_of
    )
    blocks = tuple(
        InnerChannels(f"b{i}", width, group, ((),) * places)
        for i, (width, group) in enumerate(zip(widths, together, strict=True))
    )
    seen = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores = tuple(
            tuple(rng.gamma(0.5, scale=10.0**i, size=x.width) for _ in range(places))
            for i, x in enumerate(blocks)
        )
        check_ranking(blocks, pruning)
        found = ranked_widths(blocks, scores, pruning)
        assert list(found) == in_numpy(widths, together, scores, sparsity, multiple_of)
        assert all(
            x > 0 and x % math.lcm(y, multiple_of) == 0
            for x, y in zip(found, together, strict=True)
        )
        gone = sum(widths) - sum(found)
        assert abs(gone - sparsity * sum(widths)) <= max(8, *together)
        seen.add(found)
    assert len(seen) > 1 or sparsity > 0.9


def test_of_equal_channels_the_first_block_goes_and_a_dead_block_keeps_one():
    pruning = PruningConfig(pattern="channels", ranking="network", sparsity=0.5)
    blocks = tuple(InnerChannels(x, 4, 1, ((),)) for x in "ab")
    alike = ((np.ones(4),), (np.ones(4),))
    assert ranked_widths(blocks, alike, pruning) == (1, 3)
    dead = ((np.ones(4),), (np.zeros(4),))
    assert ranked_widths(blocks, dead, pruning) == (3, 1)


def test_scores_are_read_as_they_were_written_or_not_at_all(tmp_path):
    blocks = (InnerChannels("a", 4, 1, ((), ())), InnerChannels("b", 6, 2, ((),)))
    rng = np.random.default_rng(0)
    scores = ((rng.random(4), rng.random(4)), (rng.random(6),))
    path = tmp_path / "scores.npz"
    write_scores(path, scores, blocks)
    jax.tree.map(np.testing.assert_array_equal, read_scores(path, blocks), scores)
    others = (blocks[0], InnerChannels("c", 6, 2, ((),))), blocks[:1], blocks[::-1]
    assert [read_scores(path, x) for x in others] == [None] * 3
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"text"):
        path.write_bytes(damaged)
        assert read_scores(path, blocks) is None
    assert read_scores(tmp_path / "none.npz", blocks) is None
    write_scores(path, ((scores[0][0] * np.nan, scores[0][1]), scores[1]), blocks)
    assert read_scores(path, blocks) is None
