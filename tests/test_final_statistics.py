"""`student.final_statistics`: BatchNorm's moments of central crops, from the last step on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import NETWORK, logits_of, tiny_config

from fm_distill.config import MeshConfig, with_options
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import Reader, sampled_batches
from fm_distill.data.order import example_ids
from fm_distill.data.transfer import open_training
from fm_distill.errors import UserError
from fm_distill.networks.batch_statistics import with_central_statistics
from fm_distill.networks.branch import make_branch
from fm_distill.runs.open_run import open_run
from fm_distill.system.preemption import Stop
from fm_distill.system.sharding import make_layout
from fm_distill.training.train import train, train_until
from fm_distill.views.rendering import CentralCrop

BATCH_NORM = with_options(NETWORK, {"norm": "batch"})
CENTRAL = dataclasses.replace(BATCH_NORM, final_statistics="central")
SEED = 3
CONFIG = tiny_config(student=CENTRAL, seed=SEED, mesh=MeshConfig(data=1))


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def equal(a, b) -> bool:
    return all((x == y).all() for x, y in zip(leaves(a), leaves(b), strict=True))


def random_batch(seed: int, count: int = 16) -> Batch:
    rng = np.random.default_rng(seed)
    canvases = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return Batch(canvases, np.full((count, 2), 32, np.int32), np.zeros(count, np.int32))


def central_by_hand(canvases: np.ndarray) -> np.ndarray:
    """The 32 pixels of the canvas at 16, bilinear without antialiasing: means of two by two."""
    pixels = canvases.astype(np.float64).reshape(len(canvases), 16, 2, 16, 2, 3)
    return pixels.mean(axis=(2, 4))


def test_the_first_layer_has_the_moments_of_its_input():
    """Convolution, mean and variance in NumPy, in float64; the mean over two batches."""
    branch = make_branch(BATCH_NORM, 10, jnp.dtype("float32"))
    variables = branch.network.init(jax.random.key(0))
    batches = [random_batch(1), random_batch(2)]
    layout = make_layout(MeshConfig(data=8))
    found = with_central_statistics(branch, variables, batches, CentralCrop(1.0), layout)
    kernel = np.asarray(variables.params["root"]["kernel"], np.float64)
    moments = []
    for batch in batches:
        images = central_by_hand(batch.canvases) / 127.5 - 1
        padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
        root = sum(
            padded[:, i : i + 16, j : j + 16] @ kernel[i, j] for i in range(3) for j in range(3)
        )
        moments.append((root.mean(axis=(0, 1, 2)), root.var(axis=(0, 1, 2))))
    mean, variance = np.mean([x[0] for x in moments], 0), np.mean([x[1] for x in moments], 0)
    first = found.statistics["block1_unit01"]["a_norm"]
    np.testing.assert_allclose(first["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(first["var"], variance, rtol=1e-4)
    assert found.params is variables.params


def test_with_the_moments_of_one_batch_evaluation_is_training_mode():
    """Of every layer, not of the first alone."""
    branch = make_branch(BATCH_NORM, 10, jnp.dtype("float32"))
    variables = branch.network.init(jax.random.key(0))
    head = jax.random.normal(jax.random.key(1), variables.params["head"]["kernel"].shape)
    params = {**variables.params, "head": {**variables.params["head"], "kernel": head}}
    variables = dataclasses.replace(variables, params=params)
    batch = random_batch(1)
    found = with_central_statistics(
        branch, variables, [batch], CentralCrop(1.0), make_layout(MeshConfig(data=1))
    )
    images = jnp.asarray(central_by_hand(batch.canvases) / 127.5 - 1, jnp.float32)
    trained = logits_of(branch.network, variables, images, train=True)
    evaluated = logits_of(branch.network, found, images)
    kept = logits_of(branch.network, variables, images)
    assert np.abs(trained - evaluated).max() < 1e-3
    assert np.abs(trained - kept).max() > 0.1


def test_they_are_of_the_first_batches_of_the_stream():
    """In the order of the seed: sorted by class, each batch would have moments of its own."""
    reader = Reader(open_training(CONFIG.data), CONFIG.data, 10)
    batches = list(sampled_batches(reader, SEED, 16, 100))
    expected = example_ids(SEED, np.arange(96), len(reader)).reshape(6, 16)
    assert len(batches) == 6
    for batch, ids in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch.labels, [reader[int(i)]["label"] for i in ids])
        np.testing.assert_array_equal(batch.canvases[0], reader[int(ids[0])]["canvas"])
    assert len(list(sampled_batches(reader, SEED, 16, 10_000))) == len(reader) // 16
    assert len(list(sampled_batches(reader, SEED, 16, 9))) == 1


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_run_ends_with_them(tmp_path, ema):
    """Its parameters are those without; its evaluation and its last checkpoint have them."""
    config = dataclasses.replace(
        CONFIG, ema_decay=ema, optimizer=dataclasses.replace(CONFIG.optimizer, learning_rate=0.05)
    )
    kept = dataclasses.replace(config, student=BATCH_NORM)
    before, after = tmp_path / "kept", tmp_path / "central"
    figures = {x: train(y, x).evaluation for x, y in ((before, kept), (after, config))}
    old, new = (open_run(x).student.variables for x in (before, after))
    assert equal(old.params, new.params)
    assert not equal(old.statistics, new.statistics)
    reader = Reader(open_training(config.data), config.data, 10)
    branch, layout = make_branch(BATCH_NORM, 10, jnp.dtype("float32")), make_layout(config.mesh)
    batches = sampled_batches(reader, SEED, 16, 10_000)
    expected = with_central_statistics(branch, old, batches, CentralCrop(1.0), layout)
    for a, b in zip(leaves(expected.statistics), leaves(new.statistics), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert figures[before] != figures[after]
    earlier = [open_run(x, step=4).student.variables for x in (before, after)]
    assert equal(*earlier)


def test_stopped_and_resumed_it_ends_with_the_same(tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert train(CONFIG, once).complete
    assert not train_until(CONFIG, twice, Stop(max_hours=1e-9)).complete
    assert 0 < open_run(twice).step < 6
    assert train(CONFIG, twice).complete
    assert equal(open_run(once).student.variables, open_run(twice).student.variables)


def test_who_has_no_statistics_or_keeps_them_is_refused(tmp_path):
    none = with_options(CENTRAL, {"norm": "group"})
    with pytest.raises(UserError, match="with BatchNorm, and bit as configured has none"):
        train(dataclasses.replace(CONFIG, student=none), tmp_path / "none")
    both = dataclasses.replace(CENTRAL, keep_statistics=True, weights="x.npz")
    with pytest.raises(UserError, match=r"replaces the statistics that student\.keep"):
        train(dataclasses.replace(CONFIG, student=both), tmp_path / "both")
    assert not list(tmp_path.glob("*/*"))
