"""Masks of weights: schedule and choice against NumPy, and runs whose zeros stay zeros."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_command, write_experiment
from test_train import check_resume
from tiny import NETWORK, resolved_run, tiny_config

from fm_distill.config import (
    MeshConfig,
    NetworkConfig,
    OptimizerConfig,
    PruningConfig,
    with_options,
)
from fm_distill.errors import UserError
from fm_distill.models import build_network
from fm_distill.objectives.terms import Targets
from fm_distill.preparation.check import check
from fm_distill.runs.open_run import open_run
from fm_distill.system.sharding import make_layout
from fm_distill.train_step.pruning import (
    initial_masks,
    largest_of_four,
    masks_of_zeros,
    smallest_removed,
    sparsity_after,
    sparsity_of,
)
from fm_distill.training.build import build

FLOAT32 = jnp.dtype("float32")
STUDENT = with_options(NETWORK, {"norm": "batch"})
GRADUAL = PruningConfig(
    pattern="unstructured", sparsity=0.6, begin_step=1, end_step=4, every_steps=2
)
ONE_DEVICE = MeshConfig(data=1)


def kernels(params) -> dict[str, np.ndarray]:
    """All but those of the layer that reads the picture, depthwise convolutions and the head."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    names = [x for x in leaves if x.endswith("kernel") and not x.startswith("head")]
    return {x: leaves[x] for x in names if leaves[x].shape[-2] not in (1, 3)}


def random_params(seed: int = 0):
    rng = np.random.default_rng(seed)
    return {
        "first": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 3, 8)), jnp.float32)},
        "conv": {
            "kernel": jnp.asarray(rng.normal(size=(3, 3, 8, 6)), jnp.float32),
            "bias": jnp.zeros(6),
        },
        "dw": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 1, 6)), jnp.float32)},
        "dense": {"kernel": jnp.asarray(5 * rng.normal(size=(6, 4)), jnp.float32)},
        "head": {"kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)},
    }


@pytest.mark.parametrize(("begin", "end", "power"), [(0, 100, 3.0), (17, 41, 1.0), (5, 6, 2.0)])
def test_the_schedule_is_zhu_and_guptas(begin, end, power):
    """s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3, with s_i = 0."""
    config = PruningConfig(
        pattern="unstructured", sparsity=0.87, begin_step=begin, end_step=end, power=power
    )
    for step in range(begin, end + 1):
        expected = 0.87 + (0 - 0.87) * (1 - (step - begin) / (end - begin)) ** power
        assert sparsity_after(config, step) == pytest.approx(expected, abs=1e-6)
    assert sparsity_after(dataclasses.replace(config, end_step=None), begin) == np.float32(0.87)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_the_smallest_weights_are_removed(scope, sparsity):
    params = random_params()
    found = smallest_removed(params, initial_masks(params), sparsity, scope)
    parts = {x: np.abs(y).reshape(-1) for x, y in kernels(params).items()}
    assert {*parts} == {"conv/kernel", "dense/kernel"}
    everything = np.sort(np.concatenate([*parts.values()]))
    for path, sizes in parts.items():
        among = everything if scope == "global" else np.sort(sizes)
        count = round(sparsity * len(among))
        bound = among[count] if count < len(among) else np.inf
        mask = np.asarray(found[path.split("/")[0]]["kernel"]).reshape(-1)
        np.testing.assert_array_equal(mask, sizes >= bound)
    for whole in (*(found[x]["kernel"] for x in ("first", "dw", "head")), found["conv"]["bias"]):
        assert whole.shape == () and whole


def test_a_network_with_arrays_of_no_module():
    """A ViT has positions and tokens beside its modules."""
    network = build_network(NetworkConfig(model="vit_tiny_patch16_224", resolution=32), 10, FLOAT32)
    params = jax.eval_shape(network.init, jax.random.key(0)).params
    masks = jax.eval_shape(initial_masks, params)
    assert masks["pos_embed"].shape == () == masks["patch_embed"]["proj"]["kernel"].shape
    assert masks["blocks_0"]["mlp"]["fc1"]["kernel"].shape == (192, 768)


def test_no_layer_is_emptied():
    params = random_params()
    small = params | {"conv": {"kernel": 1e-6 * params["conv"]["kernel"]}}
    found = smallest_removed(small, initial_masks(small), 0.99, "global")["conv"]["kernel"]
    largest = np.abs(np.asarray(small["conv"]["kernel"])).argmax()
    assert np.flatnonzero(found).tolist() == [largest]


def test_what_was_removed_stays_removed_and_of_equals_the_first_goes():
    params = {"a": {"kernel": jnp.ones((4, 2)).at[3, 0].set(2)}}
    masks = {"a": {"kernel": jnp.asarray([[1, 1], [1, 1], [1, 1], [1, 0]], bool)}}
    found = smallest_removed(params, masks, 0.5, "global")["a"]["kernel"]
    np.testing.assert_array_equal(found, [[0, 0], [0, 1], [1, 1], [1, 0]])
    assert sparsity_of({"a": {"kernel": found}, "b": jnp.ones((), bool)}) == 0.5


@pytest.mark.parametrize("left", [1, 2])
def test_of_four_inputs_the_largest_stay(left):
    weights = np.random.default_rng(0).normal(size=(3, 1, 12, 5)).astype(np.float32)
    weights[0, 0, :4, 0] = 1  # equals
    found = np.asarray(largest_of_four(jnp.asarray(weights), jnp.ones(weights.shape, bool), left))
    for row, output, first in np.ndindex(3, 5, 3):
        four = np.abs(weights[row, 0, 4 * first : 4 * first + 4, output])
        mask = found[row, 0, 4 * first : 4 * first + 4, output]
        order = sorted(range(4), key=lambda i: (-four[i], i))
        assert mask.sum() == left and {*np.flatnonzero(mask)} == {*order[:left]}


def test_zeros_of_the_weights_stay_but_a_new_layer_is_learned():
    params = {"a": {"kernel": jnp.asarray([[1.0], [0.0], [2.0], [0.0]])}}
    params["last"] = {"kernel": jnp.zeros((4, 3))}
    found = masks_of_zeros(initial_masks(params), params)
    np.testing.assert_array_equal(found["a"]["kernel"][:, 0], [1, 0, 1, 0])
    assert found["last"]["kernel"].all()


def states_of(pruning: PruningConfig, mesh: MeshConfig = ONE_DEVICE, steps: int = 6):
    """The states of updates towards random teachers, with momentum, decay and an average."""
    config = tiny_config(
        student=dataclasses.replace(STUDENT, pruning=pruning),
        ema_decay=0.5,
        mesh=mesh,
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=1e-2),
    )
    layout = make_layout(mesh)
    built = build(config, resolved_run(config, layout=layout))
    shardings = layout.variables(built.abstract_state)
    state = jax.jit(built.init, out_shardings=shardings)(jax.random.key(0))
    update = jax.jit(built.update)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(steps):
        view = jnp.asarray(rng.normal(size=(16, 16, 16, 3)), jnp.float32)
        labels = jax.nn.one_hot(rng.integers(0, 10, 16), 10)
        targets = Targets(labels=labels, teacher_logits=())
        state, metrics = update(
            state, jax.device_put(view, layout.batch), jax.device_put(targets, layout.batch)
        )
        found.append((jax.device_get(state), float(metrics["sparsity"])))
    return found


def test_removed_weights_are_zero_from_then_on_and_the_others_learn():
    found = states_of(GRADUAL)
    parts = [kernels(state.student.params) for state, _ in found]
    total = sum(x.size for x in parts[0].values())
    # After the steps 1, 3 and 4: the way to the end is 0, 2/3 and 1.
    expected = [0, 0, 0, 0.6 * (1 - (1 / 3) ** 3), 0.6, 0.6]
    gone: dict[str, np.ndarray] = {x: np.zeros(y.shape, bool) for x, y in parts[0].items()}
    for (state, share), part, wanted in zip(found, parts, expected, strict=True):
        zeros = sum((x == 0).sum() for x in part.values())
        assert zeros == round(wanted * total) and share == pytest.approx(wanted, abs=1 / total)
        averaged = kernels(state.ema.params)
        for path, kernel in part.items():
            assert (kernel[gone[path]] == 0).all()
            gone[path] = kernel == 0
            assert ((averaged[path] == 0) == gone[path]).all()
    last = [state.student.params for state, _ in found[-3:-1]]  # the last rate is zero
    moved = [x != y for x, y in zip(*map(jax.tree.leaves, last), strict=True)]
    assert np.concatenate([x.reshape(-1) for x in moved]).mean() > 0.3
    assert (last[1]["root"]["kernel"] != 0).all()
    # They are no part of the gradient: Adam's first moment only fades.
    before, after = (kernels(state.opt_state[1].mu) for state, _ in found[-2:])
    for path, mask in gone.items():
        np.testing.assert_allclose(after[path][mask], 0.9 * before[path][mask], rtol=1e-5)
        assert np.abs(before[path][mask]).max() > 0


def test_eight_devices_remove_the_weights_that_one_does():
    one, eight = (states_of(GRADUAL, MeshConfig(data=x), 5)[-1][0] for x in (1, 8))
    pairs = zip(jax.tree.leaves(one.masks), jax.tree.leaves(eight.masks), strict=True)
    assert sum((a != b).sum() for a, b in pairs) <= 2  # two weights as large, to a rounding


@pytest.mark.parametrize("pattern", ["unstructured", pytest.param("2:4", marks=pytest.mark.slow)])
def test_a_pruned_run_resumes_bit_for_bit(tmp_path, monkeypatch, pattern):
    pruning = GRADUAL if pattern == "unstructured" else PruningConfig(pattern="2:4", begin_step=2)
    config = tiny_config(ema_decay=0.9, student=dataclasses.replace(STUDENT, pruning=pruning))
    check_resume(config, tmp_path, monkeypatch, (0, 2))  # stops after 1 and 4 of 6 steps
    params = kernels(open_run(tmp_path / "whole").student.variables.params)
    zeros = sum((x == 0).sum() for x in params.values()) / sum(x.size for x in params.values())
    assert zeros == pytest.approx(0.6 if pattern == "unstructured" else 0.5, abs=1e-3)


def test_the_command_prunes_a_run_and_the_next_one_keeps_its_zeros(tmp_path):
    experiment = write_experiment(tmp_path / "x.py")
    start = ("train", experiment, "--student.options.norm", "batch", "--workdir")
    assert run_command(*start, tmp_path / "float").returncode == 0
    options = ("--student.pruning.pattern", "unstructured", "--student.pruning.sparsity", "0.75")
    done = run_command(*start, tmp_path / "a", "--student.weights", tmp_path / "float", *options)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["sparsity"] == pytest.approx(0.75, abs=1e-3)
    kept = ("--student.pruning.pattern", "kept", "--student.quantisation.weights", "int8")
    done = run_command(*start, tmp_path / "b", "--student.weights", tmp_path / "a", *kept)
    assert done.returncode == 0, done.stderr
    before, after = (kernels(open_run(tmp_path / x).student.variables.params) for x in "ab")
    for path, kernel in before.items():
        np.testing.assert_array_equal(kernel == 0, after[path] == 0, err_msg=path)
        assert (kernel != after[path]).any()


def test_bad_input_is_one_sentence():
    def refused(student, **changes) -> str:
        with pytest.raises(UserError) as error:
            config = tiny_config(student=student, **changes)
            check(config)
            build(config, resolved_run(config))
        assert "\n" not in str(error.value)
        return str(error.value)

    def pruned(network=STUDENT, **fields):
        return dataclasses.replace(network, pruning=PruningConfig(**fields))

    assert "standardises its kernels" in refused(pruned(NETWORK, pattern="unstructured"))
    assert "the last of the run is 5" in refused(pruned(pattern="unstructured", begin_step=6))
    early = {"begin_step": 4, "end_step": 3}
    assert "end_step=3 is before" in refused(pruned(pattern="unstructured", **early))
    assert "expected more than 0" in refused(pruned(pattern="unstructured", sparsity=1.0))
    layer = {"scope": "layer", "sparsity": 0.999}
    assert "leaves none of the 64" in refused(pruned(pattern="unstructured", **layer))
    assert "does not use sparsity" in refused(pruned(pattern="2:4", sparsity=0.7))
    assert "does not use power" in refused(pruned(power=2.0))
    assert "needs weights to start from" in refused(pruned(pattern="kept"))
    odd = dataclasses.replace(STUDENT, block_widths=(6,))
    message = refused(pruned(odd, pattern="1:4"))
    assert "block1_unit01/b/kernel (6)" in message and "unstructured" in message


def test_a_network_whose_kernels_are_standardised_says_so():
    for norm, stay in (("group", False), ("batch", True)):
        network = NetworkConfig(
            model="bit", resolution=16, options={"depths": (1,), "norm": norm, "stem": "small"}
        )
        assert build_network(network, 10, FLOAT32).zeros_stay == stay
