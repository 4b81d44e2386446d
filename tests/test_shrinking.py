"""Structured pruning: a smaller network equals the masked one, and trains, exports and resumes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_command, write_experiment
from test_train import check_resume
from tiny import NETWORK, resolved_run, tiny_config

from fm_distill.config import MeshConfig, NetworkConfig, PruningConfig, with_options
from fm_distill.data.splits import open_data
from fm_distill.errors import UserError
from fm_distill.models import Variables, build_network, parameter_count
from fm_distill.networks.channel_scores import read_scores, weight_scores, write_scores
from fm_distill.networks.cost import cost_of
from fm_distill.networks.loading import load_networks
from fm_distill.networks.shrinking import keep_channels, pruned_network
from fm_distill.preparation.check import check
from fm_distill.runs.open_run import open_run
from fm_distill.runs.workdir import Workdir
from fm_distill.system.sharding import make_layout
from fm_distill.training.channels import decided_networks, gradient_scores
from fm_distill.training.train import train
from fm_distill.weights.card import only_network
from fm_distill.weights.load import load_weights

FLOAT32 = jnp.dtype("float32")
HALF = PruningConfig(pattern="channels", sparsity=0.5)
OVER_NETWORK = PruningConfig(pattern="channels", sparsity=0.35, ranking="network")
TAYLOR = PruningConfig(
    pattern="channels", sparsity=0.5, criterion="taylor", ranking="network", taylor_batches=2
)
BIT = only_network(with_options(NETWORK, {"depths": (1, 1), "groups": 2}))
# For each network, what reads inner channels, and an array with one number for each of them.
READERS = {
    BIT: {"b": "b_norm/scale", "c": "c_norm/scale"},
    with_options(BIT, {"norm": "batch"}): {"b": "b_norm/scale", "c": "c_norm/scale"},
    NetworkConfig(model="efficientnet_lite0", resolution=32): {"conv_pwl": "bn2/bias"},
    NetworkConfig(model="mobilenet_v3_small", resolution=32): {
        "conv_pwl": "bn2/bias",
        "se/conv_reduce": "bn2/bias",
    },
    NetworkConfig(model="mobilenet_v3_small_gn", resolution=32): {
        "conv_pwl": "bn2/bias",
        "se/conv_reduce": "bn2/bias",
    },
    NetworkConfig(model="resnet18", resolution=32): {"conv2": "bn1/scale"},
    NetworkConfig(model="resnet50", resolution=32): {"conv2": "bn1/scale", "conv3": "bn2/scale"},
    NetworkConfig(model="vit_tiny_patch16_224", resolution=32): {"mlp/fc2": "mlp/fc1/bias"},
}


def random_variables(config: NetworkConfig) -> Variables:
    """No two channels are equal, and nothing starts at zero or one."""
    network = build_network(config, 10, FLOAT32)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(0)

    def of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("kernel"):
            return rng.normal(size=leaf.shape, scale=np.prod(leaf.shape[:-1]) ** -0.5)
        return 0.5 + rng.permutation(leaf.size).reshape(leaf.shape) / leaf.size

    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), jax.tree_util.tree_map_with_path(of, shapes)
    )


def flat(tree) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.array(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def with_leaves(tree, leaves):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(leaves[jax.tree_util.keystr(path, simple=True, separator="/")]),
        tree,
    )


def standardised(kernel: np.ndarray) -> np.ndarray:
    wide = kernel.astype(np.float64)
    deviation = np.sqrt(wide.var(axis=(0, 1, 2)) + 1e-10)
    return (wide - wide.mean(axis=(0, 1, 2))) / deviation


# The others share their parts.
ALONE = ("mobilenet_v3_small", "resnet18")
CASES = [(x, HALF) for x in READERS]
CASES += [(x, OVER_NETWORK) for x in READERS if x.model == "bit"]


@pytest.mark.parametrize(
    ("config", "pruning"),
    [pytest.param(x, y, marks=[pytest.mark.slow] * (x.model in ALONE)) for x, y in CASES],
    ids=lambda x: f"{x.model}-{x.options.get('norm', 'group')}" if x in READERS else x.ranking,
)
def test_the_shrunk_network_equals_the_masked_one(config, pruning):
    """Zeros wherever a channel that went was read; BiT's kernels over what they have left."""
    network, variables = build_network(config, 10, FLOAT32), random_variables(config)
    scores = weight_scores(variables, config, "magnitude")
    smaller = pruned_network(config, pruning, scores)
    less = keep_channels(variables, config, smaller.block_widths, scores)
    widths = dict(zip([x.block for x in network.inner_channels], smaller.block_widths, strict=True))
    shrunk = build_network(smaller, 10, FLOAT32)
    masked = flat(network.freeze(variables).params)
    before, after = flat(variables.params), flat(less.params)
    for block in network.inner_channels:
        for reader, one_each in READERS[config].items():
            path = f"{block.block}/{reader}/kernel"
            if path not in before:
                continue  # a block without squeeze and excitation
            each = f"{block.block}/{one_each}"
            stays = np.isin(before[each], after[each])
            assert stays.sum() == widths[block.block]
            assert pruning.ranking == "network" or stays.sum() <= 0.51 * len(before[each])
            np.testing.assert_array_equal(before[each][stays], after[each])  # in their order
            if network.zeros_stay:
                masked[path][..., ~stays, :] = 0
            else:
                masked[path][..., ~stays, :] = 0
                masked[path][..., stays, :] = standardised(before[path][..., stays, :])
    x = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (4, *2 * (config.resolution,), 3)))
    frozen = dataclasses.replace(
        network.freeze(variables), params=with_leaves(variables.params, masked)
    )
    expected = jax.jit(network.apply_frozen)(frozen, x).logits
    found = jax.jit(shrunk.apply_frozen)(shrunk.freeze(less), x).logits
    spread = np.ptp(expected)
    np.testing.assert_allclose(found, expected, atol=1e-5 * spread)
    # And differs from the whole one.
    whole = jax.jit(network.apply_frozen)(network.freeze(variables), x).logits
    assert np.abs(whole - found).max() > 1e-2 * spread
    assert parameter_count(less.params) < parameter_count(variables.params)
    shapes = jax.eval_shape(shrunk.init, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), less, shapes)


@pytest.mark.parametrize("criterion", ["magnitude", "norm_scale"])
def test_the_best_channels_stay(criterion):
    """By loops in float64; of a GroupNorm whole groups."""
    variables = random_variables(BIT)
    scored = weight_scores(variables, BIT, criterion)
    found = keep_channels(variables, BIT, pruned_network(BIT, HALF).block_widths, scored)
    before, after = flat(variables.params), flat(found.params)
    for unit, width in (("block1_unit01", 8), ("block2_unit01", 16)):
        for made, read in (("a", "b"), ("b", "c")):
            scores = np.zeros(width)
            for channel in range(width):
                if criterion == "norm_scale":
                    scores[channel] = abs(before[f"{unit}/{read}_norm/scale"][channel])
                    continue
                for name, axis in ((made, 3), (read, 2)):
                    kernel = standardised(before[f"{unit}/{name}/kernel"]) ** 2
                    of_channel = kernel.take(channel, axis=axis).mean()
                    scores[channel] += of_channel / kernel.mean()
            groups = scores.reshape(2, -1).sum(axis=1)
            best = np.argmax(groups) * width // 2 + np.arange(width // 2)
            scale = before[f"{unit}/{read}_norm/scale"][best]
            np.testing.assert_array_equal(after[f"{unit}/{read}_norm/scale"], scale)
            kernel = before[f"{unit}/c/kernel"][..., best, :]
            if read == "c":
                np.testing.assert_array_equal(after[f"{unit}/c/kernel"], kernel)


@pytest.mark.parametrize(
    ("sparsity", "multiple_of", "widths"),
    [
        (0.5, 1, (32, 64, 128)),  # of 64, 128, 256
        (0.5, 24, (24, 72, 120)),
        (0.3, 1, (45, 90, 179)),
        (0.001, 40, (40, 120, 240)),
    ],
)
def test_widths_are_the_nearest_that_divide(sparsity, multiple_of, widths):
    wide = with_options(BIT, {"norm": "batch", "width": 1.0, "depths": (1, 1, 1)})
    pruning = PruningConfig(pattern="channels", sparsity=sparsity, multiple_of=multiple_of)
    assert pruned_network(wide, pruning).block_widths == widths


def test_published_widths_change_nothing():
    config = NetworkConfig(model="mobilenet_v3_small_gn", resolution=32)
    network = build_network(config, 10, FLOAT32)
    widths = tuple(x.width for x in network.inner_channels)
    again = build_network(dataclasses.replace(config, block_widths=widths), 10, FLOAT32)
    shapes, same = (jax.eval_shape(x.init, jax.random.key(0)) for x in (network, again))
    assert shapes == same and again.inner_channels == network.inner_channels


def test_half_of_the_channels_of_lite0_are_over_forty_percent_of_its_flops():
    config = NetworkConfig(model="efficientnet_lite0", resolution=96, input_range="zero_one")
    before = cost_of((config,), 102, "float32", None).flops
    after = cost_of((pruned_network(config, HALF),), 102, "float32", None).flops
    assert after < 0.6 * before


def test_a_shrunk_run_resumes_bit_for_bit_and_is_shrunk_again(tmp_path, monkeypatch):
    train(tiny_config(), tmp_path / "start")
    student = dataclasses.replace(NETWORK, weights=str(tmp_path / "start"), pruning=TAYLOR)
    config = tiny_config(ema_decay=0.9, student=student)
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return gradient_scores(*arguments)

    monkeypatch.setattr("fm_distill.training.channels.gradient_scores", counted)
    check_resume(config, tmp_path, monkeypatch, (2,))
    assert len(calls) == 2  # once for the whole run, and once for the one in pieces
    assert open_run(tmp_path / "whole").network.block_widths == (4,)
    _other_channels_are_refused(config, tmp_path / "pieces")
    # Without widths of its own, another student takes those of its weights; a plan knows them too.
    again = dataclasses.replace(student, weights=str(tmp_path / "whole"), pruning=HALF)
    kept = dataclasses.replace(again, pruning=PruningConfig())
    planned = [resolved_run(tiny_config(student=x)).student.block_widths for x in (kept, again)]
    assert planned == [(4,), (2,)]
    train(tiny_config(student=again), tmp_path / "again")
    assert open_run(tmp_path / "again").network.block_widths == (2,)


def _other_channels_are_refused(config, run) -> None:
    """Damaged scores are computed again, and have to be the same; other scores are seen."""
    networks = load_networks(config, run, 10, None)
    assert not networks.undecided and networks.student.block_widths == (4,)
    resolved = Workdir(run).stored().resolved
    assert networks.facts.student_weights == resolved.student_weights
    data, layout = open_data(config)[0], make_layout(MeshConfig(data=1))
    path = Workdir(run).channel_scores
    kept = path.read_bytes()
    path.write_bytes(kept[:100])
    undecided = load_networks(config, run, 10, None)
    assert undecided.undecided
    again = decided_networks(config, undecided, data, layout, run)
    assert again.facts.student_weights == resolved.student_weights
    blocks = build_network(only_network(NETWORK), 10, FLOAT32).inner_channels
    scores = read_scores(path, blocks)
    assert scores is not None
    write_scores(path, tuple(tuple(-x for x in places) for places in scores), blocks)
    others = load_networks(config, run, 10, None).facts
    with pytest.raises(UserError, match="student_weights"):
        Workdir(run).refuse_other_contents(
            dataclasses.replace(resolved, student_weights=others.student_weights)
        )


def test_the_command_shrinks_exports_and_goes_on_from_the_file(trained, tmp_path):
    experiment = write_experiment(
        tmp_path / "small.py", f'teacher=TeacherConfig(workdir="{trained}/run/teacher")'
    )
    options = ("--student.pruning.pattern", "channels", "--student.pruning.sparsity", "0.5")
    taylor = ("--student.pruning.criterion", "taylor", "--student.pruning.ranking", "network")
    start = ("train", experiment, "--workdir", tmp_path / "run", "--student.weights")
    done = run_command(*start, trained / "run", *options, *taylor)
    assert done.returncode == 0, done.stderr
    assert "chosen by the gradient over the first 6 batches" in done.stderr  # all that it has
    assert "4 of 8 stay in 1 blocks, by taylor, ranked over the network" in done.stderr
    before = json.loads((trained / "run" / "evaluation.json").read_text())["cost"]["student"]
    after = json.loads((tmp_path / "run" / "evaluation.json").read_text())["cost"]["student"]
    assert after["parameters"] < before["parameters"] and after["flops"] < before["flops"]
    done = run_command("export", tmp_path / "run", tmp_path / "small.safetensors")
    assert done.returncode == 0, done.stderr
    loaded = load_weights(str(tmp_path / "small.safetensors"), NETWORK, "student")
    assert loaded.network.block_widths == (4,)
    trained_here = open_run(tmp_path / "run").student.variables
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, trained_here)


def test_bad_input_is_one_sentence():
    def refused(student, **changes) -> str:
        with pytest.raises(UserError) as error:
            config = tiny_config(student=student, **changes)
            check(config)
            resolved_run(config)
        assert "\n" not in str(error.value)
        return str(error.value)

    def pruned(network=NETWORK, **fields):
        fields = {"pattern": "channels"} | fields
        return dataclasses.replace(network, weights="w", pruning=PruningConfig(**fields))

    assert "leaves none of the 8 inner channels" in refused(pruned(sparsity=0.9))
    assert "expected more than 0" in refused(pruned(sparsity=0.0))
    assert "needs weights to start from" in refused(dataclasses.replace(pruned(), weights=None))
    assert "does not use scope" in refused(pruned(scope="layer"))
    assert "magnitude does not use taylor_batches" in refused(pruned(taylor_batches=3))
    over = {"ranking": "network"}
    assert "use 0.75 or less" in refused(pruned(sparsity=0.8, **over))
    assert "leaves none of the 8 inner" in refused(pruned(multiple_of=16, **over))
    unlike = PruningConfig(criterion="taylor")
    idle = refused(dataclasses.replace(NETWORK, pruning=unlike))
    assert "pattern=none does not use criterion" in idle
    other = dataclasses.replace(NETWORK, options={})
    convnext = dataclasses.replace(other, model="convnext_atto", resolution=32)
    assert "convnext_atto has no blocks" in refused(pruned(convnext))
    widths = dataclasses.replace(NETWORK, block_widths=(3, 4))
    assert "block_widths has 2 numbers" in refused(widths)
    widths = dataclasses.replace(NETWORK, block_widths=(3,))
    assert "groups of 2" in refused(widths)
    widths = dataclasses.replace(convnext, block_widths=(3,))
    assert "leave out block_widths" in refused(widths)
    vit = dataclasses.replace(other, model="vit_tiny_patch16_224", resolution=32)
    variables = random_variables(only_network(vit))
    with pytest.raises(ValueError, match="needs norms"):
        weight_scores(variables, only_network(vit), "norm_scale")
