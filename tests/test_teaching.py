"""The paper's regimes, ensembles, fixed targets and transfer sets: who sees which view."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_step import DRAWS, KEY, gradients_of, random_batch, with_random_head
from tiny import NETWORK, logits_of, resolved_run, tiny_config, train_step_of

from fm_distill.config import (
    MeshConfig,
    ObjectiveConfig,
    SplitConfig,
    TransferConfig,
    ViewConfig,
    with_options,
)
from fm_distill.config.regime import Regime, regime_of
from fm_distill.data.feeding import Reader, StreamingFeed
from fm_distill.data.resident import ResidentFeed
from fm_distill.data.sources import open_source
from fm_distill.data.transfer import open_training
from fm_distill.errors import UserError
from fm_distill.models import Network, Output, Variables
from fm_distill.networks.branch import Branch
from fm_distill.objectives.distances import kl_divergence
from fm_distill.objectives.ensemble import as_one, combine
from fm_distill.runs.state import init_state
from fm_distill.system.sharding import make_layout
from fm_distill.training.build import build
from fm_distill.training.targets import fixed_targets
from fm_distill.views.draws import VIEW_LAWS, draw, mix
from fm_distill.views.rendering import CentralCrop, InputSpec, render, render_central

VIEWS = ViewConfig()


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def looking_network(side: int) -> Network:
    """Its logits are the picture itself, so that a loss tells what was seen."""

    def apply(variables, images, *, train=False, features=()):
        seen = images.reshape(images.shape[0], -1) * variables.params["gain"]
        return Output(seen, {}, {})

    return Network(
        side * side * 3,
        lambda key: Variables({"gain": jnp.ones(())}, {}),
        apply,
        lambda variables: variables,
        lambda frozen, images, *, features=(): apply(frozen, images),
    )


def branch(side: int = 4) -> Branch:
    return Branch(looking_network(side), InputSpec(side, "minus_one_one"))


def loss_of(teaching: str, batch) -> float:
    """The L2 between what the student and what its teacher saw, at the first step."""
    one = branch()
    state = init_state(KEY, one.network, jnp_identity(), None)
    objective = ObjectiveConfig(distance="l2")
    step = train_step_of(one, (one,), jnp_identity(), VIEWS, objective, 8, teaching)
    _, metrics = jax.jit(step)(state, (state.student,), batch, DRAWS)
    return float(metrics["loss"])


def jnp_identity():
    import optax

    return optax.sgd(0.0)


def seen_by(drawn, batch) -> np.ndarray:
    pictures = render(drawn, batch.canvases, InputSpec(4, "minus_one_one"))
    return np.asarray(pictures, np.float64).reshape(len(batch.labels), -1)


def test_each_teaching_shows_what_the_paper_says():
    batch = jax.tree.map(jnp.asarray, random_batch())
    key = jax.random.fold_in(KEY, 0)
    # Function matching and consistent teaching show both networks the same: no distance but what
    # XLA may round otherwise where it fuses the same pictures twice.
    assert loss_of("function_matching", batch) < 1e-12
    assert loss_of("consistent", batch) < 1e-12
    matching = VIEW_LAWS["mixed"](key, batch.sizes, VIEWS, 0).student
    consistent = VIEW_LAWS["unmixed"](key, batch.sizes, VIEWS, 0).student
    assert matching.coefficients is not None and consistent.coefficients is None
    np.testing.assert_array_equal(matching.boxes, consistent.boxes)
    # Independent: two draws of the same images.
    own, teachers, shared = VIEW_LAWS["independent"](key, batch.sizes, VIEWS, 0)
    assert not shared
    assert own.coefficients is None and teachers.coefficients is None
    assert (np.asarray(own.boxes) != np.asarray(teachers.boxes)).any(axis=1).mean() > 0.9
    expected = ((seen_by(own, batch) - seen_by(teachers, batch)) ** 2).sum(-1).mean()
    assert loss_of("independent", batch) == pytest.approx(expected, rel=1e-5) and expected > 1
    # Fixed: the batch brings the targets, the student sees a crop of its own.
    targets = np.random.default_rng(0).standard_normal((16, 1, 48)).astype(np.float32)
    assert regime_of(FIXED) == Regime("unmixed", "table")
    own = VIEW_LAWS["unmixed"](key, batch.sizes, VIEWS, 0).student
    expected = ((seen_by(own, batch) - targets[:, 0]) ** 2).sum(-1).mean()
    found = loss_of("fixed", dataclasses.replace(batch, targets=targets))
    assert found == pytest.approx(expected, rel=1e-5)


def test_several_teachers_against_numpy():
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((3, 6, 7))
    teachers = tuple(jnp.float32(x) for x in logits)
    for temperature in (1.0, 2.5):
        (found,) = combine(teachers, "mean_logits", temperature)
        np.testing.assert_allclose(found, logits.mean(0), rtol=1e-5, atol=1e-6)
        (found,) = combine(teachers, "mean_probabilities", temperature)
        expected = np.exp(log_softmax(logits / temperature)).mean(0)
        np.testing.assert_allclose(jax.nn.softmax(found / temperature), expected, rtol=1e-5)
        np.testing.assert_allclose(found, temperature * np.log(expected), atol=1e-4)
        total = "sum_of_distances", temperature
        assert len(combine(teachers, *total)) == 3
        np.testing.assert_array_equal(as_one(teachers, *total), found)
    assert combine(teachers[:1], "mean_logits", 1.0) == teachers[:1]


def test_a_sum_of_distances_pulls_to_the_mean_probability():
    rng = np.random.default_rng(1)
    student, *teachers = (jnp.float32(x) for x in 2 * rng.standard_normal((4, 5, 7)))
    summed = "sum_of_distances", 2.0

    def total(s):
        return sum(kl_divergence(s, t, 2.0) for t in combine(tuple(teachers), *summed)).sum()

    def to_mean(s):
        return 3 * kl_divergence(s, as_one(tuple(teachers), *summed), 2.0).sum()

    np.testing.assert_allclose(jax.grad(total)(student), jax.grad(to_mean)(student), atol=1e-5)


@pytest.mark.parametrize("ensemble", ["mean_logits", "mean_probabilities", "sum_of_distances"])
def test_two_teachers_at_two_resolutions_teach_in_the_step(ensemble):
    """The gradient of the step against one that is written out here."""
    config = tiny_config(
        objective=ObjectiveConfig(temperature=2.0, ensemble=ensemble), views=ViewConfig()
    )
    other = dataclasses.replace(NETWORK, resolution=24, input_range="zero_one")
    built = build(config, resolved_run(config, (NETWORK, other)))
    state = built.init(jax.random.key(0))
    state = dataclasses.replace(state, student=with_random_head(state.student))
    frozen = tuple(
        branch.network.freeze(with_random_head(branch.network.init(jax.random.key(i)), i))
        for i, branch in enumerate(built.teachers, 1)
    )
    batch = jax.tree.map(jnp.asarray, random_batch())
    branches = built.student, built.teachers
    found, metrics = gradients_of(config, state, branches, frozen, batch)
    drawn = draw(jax.random.fold_in(KEY, 0), batch.sizes, config.views)
    said = [
        branch.network.apply_frozen(v, render(drawn, batch.canvases, branch.input_spec)).logits
        for branch, v in zip(built.teachers, frozen, strict=True)
    ]
    assert built.teachers[1].input_spec.resolution == 24

    def loss(params):
        variables = Variables(params, {})
        images = render(drawn, batch.canvases, built.student.input_spec)
        logits = logits_of(built.student.network, variables, images, train=True)
        if ensemble == "sum_of_distances":
            return 4 * sum(kl_divergence(logits, t, 2.0) for t in said).mean()
        if ensemble == "mean_logits":
            return 4 * kl_divergence(logits, (said[0] + said[1]) / 2, 2.0).mean()
        p = (jax.nn.softmax(said[0] / 2) + jax.nn.softmax(said[1] / 2)) / 2
        return 4 * kl_divergence(logits, 2 * jnp.log(p), 2.0).mean()

    value, expected = jax.jit(jax.value_and_grad(loss))(state.student.params)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), found, expected
    )


def teacher_of(config, seed=1):
    built = build(config, resolved_run(config, (NETWORK,), make_layout(MeshConfig())))
    network = built.teachers[0].network
    variables = with_random_head(network.init(jax.random.key(seed)), seed)
    return built.teachers, (network.freeze(variables),)


def some_digits(config, count=20):
    data = dataclasses.replace(config.data, train=SplitConfig(name="train"))
    source = open_source(data, "train")
    return Reader(dataclasses.replace(source, labels=source.labels[:count]), data, 10)


def described(config, **changes):
    """What `some_digits` and `teacher_of` resolve to."""
    run = resolved_run(config, (NETWORK,), examples=20)
    changes = {"data": "digits", "teacher_weights": ("first",)} | changes
    return dataclasses.replace(run, **changes)


def test_fixed_targets_are_the_central_crops_logits_computed_once(tmp_path):
    views = ViewConfig(central_fraction=0.5)
    config = tiny_config(objective=ObjectiveConfig(), teaching="fixed", views=views)
    layout = make_layout(MeshConfig())
    branches, frozen = teacher_of(config)
    reader, kept = some_digits(config), tmp_path / "targets.npz"
    run = described(config)
    found = fixed_targets(config, run, branches, frozen, reader, layout, kept)
    assert found.shape == (20, 1, 10)
    canvases = jnp.stack([reader[i]["canvas"] for i in range(20)])
    sizes = jnp.stack([reader[i]["size"] for i in range(20)])
    images = render_central(canvases, sizes, CentralCrop.of(config.views), branches[0].input_spec)
    expected = branches[0].network.apply_frozen(frozen[0], images).logits
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)
    # Kept: other networks would change nothing, and a broken file is made anew.
    _, others = teacher_of(config, seed=2)
    again = fixed_targets(config, run, branches, others, reader, layout, kept)
    np.testing.assert_array_equal(again, found)
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 0xFF
    kept.write_bytes(data)
    np.testing.assert_array_equal(
        fixed_targets(config, run, branches, frozen, reader, layout, kept), found
    )


FIXED = tiny_config(objective=ObjectiveConfig(), teaching="fixed")


@pytest.mark.parametrize(
    "config, changes, said",
    [
        (
            FIXED,
            {"teacher_weights": ("second",)},
            r"teacher_weights: \['first'\] there, \['second'\] now",
        ),
        (FIXED, {"data": "other digits"}, "data: digits there, other digits now"),
        (FIXED, {"teachers": (dataclasses.replace(NETWORK, resolution=24),)}, "teachers"),
        (
            dataclasses.replace(FIXED, views=ViewConfig(central_fraction=0.5)),
            {},
            "central_fraction",
        ),
        (dataclasses.replace(FIXED, fixed_crops=2), {}, "crops: 0 there, 2 now"),
    ],
)
def test_fixed_targets_of_another_run_are_refused(tmp_path, config, changes, said):
    layout, kept = make_layout(MeshConfig()), tmp_path / "targets.npz"
    branches, frozen = teacher_of(FIXED)
    reader = some_digits(FIXED)
    fixed_targets(FIXED, described(FIXED), branches, frozen, reader, layout, kept)
    written = kept.read_bytes()
    with pytest.raises(UserError, match=f"another run .*{said}.*remove it"):
        run = described(config, **changes)
        fixed_targets(config, run, branches, frozen, reader, layout, kept)
    assert kept.read_bytes() == written


def test_fixed_targets_that_do_not_say_what_made_them_are_refused(tmp_path):
    kept = tmp_path / "targets.npz"
    np.savez(kept, targets=np.zeros((20, 1, 10), np.float32))
    branches, frozen = teacher_of(FIXED)
    with pytest.raises(UserError, match=r"data: \(missing\) there, digits now"):
        fixed_targets(
            FIXED, described(FIXED), branches, frozen, some_digits(FIXED),
            make_layout(MeshConfig()), kept,
        )  # fmt: skip


@pytest.mark.parametrize("ensemble", ["mean_logits", "mean_probabilities"])
def test_fixed_targets_over_many_crops(tmp_path, ensemble):
    objective = ObjectiveConfig(ensemble=ensemble, temperature=2.0)
    config = tiny_config(objective=objective, teaching="fixed", fixed_crops=3, batch_size=24)
    layout = make_layout(MeshConfig())
    branches, frozen = teacher_of(config)
    reader = some_digits(config)
    found = fixed_targets(
        config, described(config), branches, frozen, reader, layout, tmp_path / "t.npz"
    )
    # The one batch is padded with black pictures up to 24.
    canvases, sizes = np.zeros((24, 32, 32, 3), np.uint8), np.ones((24, 2), np.int32)
    for i in range(20):
        canvases[i], sizes[i] = reader[i]["canvas"], reader[i]["size"]
    views = dataclasses.replace(config.views, mixup="none")
    said = []
    for crop in range(3):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 0), crop)
        images = render(
            draw(key, jnp.asarray(sizes), views), jnp.asarray(canvases), branches[0].input_spec
        )
        said.append(np.asarray(branches[0].network.apply_frozen(frozen[0], images).logits)[:20])
    assert np.abs(said[0] - said[1]).max() > 0.1
    if ensemble == "mean_logits":
        np.testing.assert_allclose(found[:, 0], np.mean(said, axis=0), atol=1e-4)
    else:
        expected = np.exp(log_softmax(np.array(said) / 2)).mean(0)
        np.testing.assert_allclose(jax.nn.softmax(found[:, 0] / 2), expected, atol=1e-5)


def test_targets_travel_with_their_examples_in_both_feedings():
    config = tiny_config()
    reader = some_digits(config)
    targets = np.arange(20, dtype=np.float32)[:, None, None] * np.ones((1, 1, 3), np.float32)
    layout = make_layout(MeshConfig())
    resident = ResidentFeed(reader, 0, 8, layout.replicated, layout.ids, targets)
    streaming = StreamingFeed(reader, 0, 8, 4, layout.batch, targets)
    steps = resident.feed(0, iter([1] * 4))
    for batch, fed in zip(streaming.feed(0, iter([1] * 4)), steps, strict=True):
        ids = fed.ids[0]
        np.testing.assert_array_equal(np.asarray(batch.targets)[:, 0, 0], ids)
        jax.tree.map(np.testing.assert_array_equal, resident.data.at(ids), batch)


def test_a_mixture_of_other_images_and_own_ones_has_no_labels(tmp_path):
    (tmp_path / "other").mkdir()
    for i in range(3):
        pixels = np.full((20, 20, 3), 10 * i, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "other" / f"{i}.png")
    other = TransferConfig(source="images", data_dir=str(tmp_path), split="other")
    own = TransferConfig(source="digits")
    data = dataclasses.replace(tiny_config().data, transfer=(other, own))
    joined = open_training(data)
    assert len(joined) == 3 + 1259
    assert joined.classes == 10 and joined.class_names == tuple("0123456789")
    assert {joined[i].label for i in (0, 2, 3, 1261)} == {-1}
    own_source = open_source(data, "train")
    np.testing.assert_array_equal(joined[3].image, own_source[0].image)
    np.testing.assert_array_equal(joined[1261].image, own_source[1258].image)
    assert "files/" in joined.identity and "digits/train" in joined.identity
    with pytest.raises(IndexError):
        joined[1262]
    assert open_training(dataclasses.replace(data, transfer=())).identity == "digits/train"


def test_mixed_labels_are_those_of_the_pictures():
    """Mixup of labels and of pictures is the same mixture."""
    drawn = draw(KEY, jnp.full((6, 2), 24), VIEWS)
    one_hot = np.eye(6, dtype=np.float32)
    a = float(drawn.coefficients[0])
    expected = a * one_hot + (1 - a) * np.roll(one_hot, 1, axis=0)
    np.testing.assert_allclose(mix(drawn, jnp.asarray(one_hot)), expected, atol=1e-6)


def test_kept_statistics_stay_and_are_used():
    """In training BatchNorm reads the running averages, and leaves them as they are."""
    student = with_options(NETWORK, {"norm": "batch"})
    config = tiny_config(student=student)
    built = build(config, resolved_run(config, ()))
    state = built.init(jax.random.key(0))
    variables = with_random_head(state.student)
    moved = jax.tree.map(lambda x: x + 0.3, variables.statistics)
    state = dataclasses.replace(state, student=Variables(variables.params, moved))
    batch = jax.tree.map(jnp.asarray, random_batch())
    losses = {}
    for keep in (True, False):
        step = train_step_of(
            built.student, (), built.optimizer, config.views, config.objective, 8,
            keep_statistics=keep,
        )  # fmt: skip
        new, metrics = jax.jit(step)(state, (), batch, DRAWS)
        losses[keep] = float(metrics["loss"])
        same = jax.tree.map(
            lambda a, b: bool((a == b).all()), new.student.statistics, state.student.statistics
        )
        assert all(jax.tree.leaves(same)) == keep
    drawn = draw(jax.random.fold_in(KEY, 0), batch.sizes, config.views)
    images = render(drawn, batch.canvases, built.student.input_spec)
    logits = logits_of(built.student.network, state.student, images)
    targets = mix(drawn, jax.nn.one_hot(batch.labels, 10))
    expected = -(np.asarray(targets) * log_softmax(logits)).sum(-1).mean()
    assert losses[True] == pytest.approx(expected, rel=1e-5)
    assert abs(losses[False] - losses[True]) > 1e-3
