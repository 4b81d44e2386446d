"""Fake quantisation against NumPy in float64, and quantised students in training."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_command, write_experiment
from test_train import check_resume
from tiny import NETWORK, logits_of, resolved_run, tiny_config

from fm_distill.config import (
    MemoryConfig,
    MeshConfig,
    NetworkConfig,
    QuantisationConfig,
    TeacherConfig,
    with_options,
)
from fm_distill.errors import UserError
from fm_distill.models import Variables, build_network, ranges_of
from fm_distill.models.bit import standardise
from fm_distill.models.layers import Convolution
from fm_distill.models.quantisation import (
    OF_ACTIVATIONS,
    OF_WEIGHTS,
    RANGE_MOMENTUM,
    RANGES,
    Precision,
    Quantised,
    Range,
    fake_quantise,
    quantised_activations,
    quantised_weights,
)
from fm_distill.preparation.check import check
from fm_distill.runs.open_run import open_run
from fm_distill.system.sharding import make_layout
from fm_distill.training.build import build

FLOAT32 = jnp.dtype("float32")
INT8 = QuantisationConfig(weights="int8", activations="int8")
STUDENT = dataclasses.replace(NETWORK, quantisation=INT8)
WITH_BATCH_NORM = with_options(STUDENT, {"norm": "batch"})


def rounded_weights(kernel: np.ndarray, bits: int) -> np.ndarray:
    """Each output channel by a loop, on the grid that its largest weight gives."""
    steps = 2 ** (bits - 1) - 1
    flat = kernel.astype(np.float64).reshape(-1, kernel.shape[-1])
    columns = []
    for column in flat.T:
        step = np.abs(column).max() / steps
        columns.append(np.rint(column / step) * step if step else column)
    return np.stack(columns, axis=1).reshape(kernel.shape)


def rounded_activations(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """The nearest of the 256 numbers of a uniform grid that has zero, and covers the range."""
    step = (max(high, 0.0) - min(low, 0.0)) / (254 if low < 0 < high else 255)
    below = np.rint(-min(low, 0.0) / step)  # numbers of the grid below zero
    grid = step * (np.arange(256) - below)
    return grid[np.abs(x.astype(np.float64)[..., None] - grid).argmin(axis=-1)]


def random_array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_head(variables: Variables, ranges=None) -> Variables:
    """The head starts at zero; here it says something."""
    head = variables.params["head"]
    kernel = jax.random.normal(jax.random.key(5), head["kernel"].shape)
    params = variables.params | {"head": head | {"kernel": kernel}}
    return dataclasses.replace(variables, params=params, ranges=ranges or variables.ranges)


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (3, 3, 1, 8), (6, 4)], ids=str)
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_weights_against_numpy(name, shape):
    kernel = random_array(*shape) * np.geomspace(1e-3, 1e2, shape[-1], dtype=np.float32)
    kernel[..., 0] = 0
    found = np.asarray(quantised_weights(jnp.asarray(kernel), OF_WEIGHTS[name]))
    expected = rounded_weights(kernel, {"int8": 8, "int4": 4}[name])
    largest = np.abs(kernel).reshape(-1, shape[-1]).max(axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-6 * largest.max(), rtol=1e-5)
    assert {len(np.unique(x)) for x in found.reshape(-1, shape[-1]).T} != {1}


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 2.0), (0.0, 3.0), (0.5, 3.0), (-4.0, -1.0), (-0.01, 6.0)]
)
def test_activations_against_numpy(low, high):
    x = random_array(4000) * 3
    found = np.asarray(
        quantised_activations(
            jnp.asarray(x), Range(jnp.float32(low), jnp.float32(high)), OF_ACTIVATIONS["int8"]
        )
    )
    expected = rounded_activations(x, low, high)
    step = (max(high, 0) - min(low, 0)) / 254
    # Halves may go either way in float32.
    far = np.abs(found - expected) > 1e-3 * step
    assert far.mean() < 1e-3 and np.abs(found - expected).max() < 1.01 * step
    inside = (min(low, 0) <= x) & (x <= max(high, 0))
    assert np.abs(found - x)[inside].max() < 0.501 * step  # the ends are not clipped
    zero = quantised_activations(
        jnp.zeros(3), Range(jnp.float32(low), jnp.float32(high)), OF_ACTIVATIONS["int8"]
    )
    np.testing.assert_array_equal(zero, 0)


def test_halves_go_to_the_even_number():
    """As in ONNX's QuantizeLinear."""
    x = jnp.asarray([0.5, 1.5, 2.5, -0.5, -1.5])
    found = fake_quantise(x, jnp.ones(()), jnp.zeros(()), -128.0, 127.0)
    np.testing.assert_array_equal(found, [0, 2, 2, 0, -2])


def test_the_gradient_passes_straight_through_but_where_it_was_clipped():
    x = jnp.asarray([-300.0, -128.4, -3.3, 0.2, 99.9, 127.4, 200.0])
    scale, zero = jnp.ones(()), jnp.zeros(())
    weights = jnp.arange(1.0, 8.0)
    gradient = jax.grad(lambda x: (weights * fake_quantise(x, scale, zero, -128.0, 127.0)).sum())(x)
    np.testing.assert_array_equal(gradient, weights * np.array([0, 1, 1, 1, 1, 1, 0]))
    kernel = jnp.asarray(random_array(3, 3, 2, 4))
    direction = jnp.asarray(random_array(3, 3, 2, 4, seed=1))
    gradient = jax.grad(lambda k: (direction * quantised_weights(k, (-7, 7))).sum())(kernel)
    np.testing.assert_array_equal(gradient, direction)


def test_ranges_begin_at_the_first_batch_and_follow():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            return Convolution(4, 1, 1, FLOAT32, name="conv")(images)

    net = Quantised(Net(), (("conv", Precision("int8", "int8")),))
    tree = net.init(jax.random.key(0), jnp.ones((1, 2, 2, 3)), train=False)
    np.testing.assert_array_equal([*tree[RANGES]["conv"]["input"].values()], 0)
    low = high = 0.0
    observe = jax.jit(functools.partial(net.apply, train=True, mutable=[RANGES]))
    for step in range(150):
        x = random_array(5, 2, 2, 3, seed=step) + step / 100
        kept = min(step / (step + 1), RANGE_MOMENTUM)
        low, high = kept * low + (1 - kept) * x.min(), kept * high + (1 - kept) * x.max()
        _, new = observe(tree, jnp.asarray(x))
        tree = tree | new
        found = tree[RANGES]["conv"]["input"]
        np.testing.assert_allclose([found["low"], found["high"]], [low, high], rtol=1e-4)
    assert found["batches"] == 150
    still = net.apply(tree, jnp.full((1, 2, 2, 3), 1e3), train=False)
    assert np.abs(still).max() < 100  # clipped to what was seen


def test_weights_are_quantised_after_they_are_standardised():
    """A 1x1 convolution against products in float64: standardised, quantised, multiplied."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            return Convolution(6, 1, 1, FLOAT32, prepare=standardise, name="conv")(images)

    net = Quantised(Net(), (("conv", Precision("int4", "none")),))
    x = random_array(2, 3, 3, 9)
    tree = net.init(jax.random.key(0), jnp.asarray(x), train=False)
    kernel = np.float64(tree["params"]["conv"]["kernel"])
    standard = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-10)
    expected = np.float64(x) @ rounded_weights(standard, 4)[0, 0]
    np.testing.assert_allclose(net.apply(tree, jnp.asarray(x), train=False), expected, atol=1e-4)
    before = rounded_weights(kernel, 4)
    before = (before - before.mean((0, 1, 2))) / np.sqrt(before.var((0, 1, 2)) + 1e-10)
    assert np.abs(np.float64(x) @ before[0, 0] - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("config", "ends"),
    [
        (STUDENT, ("root", "head")),
        (NetworkConfig(model="efficientnet_lite0", resolution=32), ("conv_stem", "head")),
        (
            NetworkConfig(model="deit_tiny_distilled_patch16_224", resolution=32),
            ("patch_embed/proj", "head/dist"),
        ),
        (NetworkConfig(model="convnext_atto", resolution=32), ("stem_0", "head")),
    ],
    ids=lambda x: x.model if isinstance(x, NetworkConfig) else "",
)
def test_every_layer_is_quantised_but_those_that_keep_their_precision(config, ends):
    def layers(quantisation):
        changed = dataclasses.replace(config, quantisation=quantisation)
        network = build_network(changed, 10, FLOAT32)
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(shapes.params)
        ]
        kernels = {x.removesuffix("/kernel") for x in paths if x.endswith("/kernel")}
        return network.quantised_layers, kernels, shapes

    found, kernels, shapes = layers(INT8)
    assert set(found) == kernels and (found[0], found[-1]) == ends
    places = {x.removesuffix("/input") for x in ranges_of(jax.tree.map(jnp.zeros_like, shapes))}
    assert {x for x in places if not x.endswith("/branch")} == set(found)
    kept = dataclasses.replace(INT8, first_layer="none", head="none")
    heads = {x for x in kernels if x.split("/")[0] == "head"}
    assert set(layers(kept)[0]) == kernels - {ends[0]} - heads
    assert layers(QuantisationConfig(weights="int8"))[2].ranges == {}


def test_the_three_forms_of_a_quantised_network_agree():
    """Training's, the teacher's (weights standardised before) and the exported one."""
    network = build_network(STUDENT, 10, FLOAT32)
    plain = build_network(NETWORK, 10, FLOAT32)
    x = jnp.asarray(random_array(8, 16, 16, 3))
    start = with_head(network.init(jax.random.key(0)))
    seen = network.apply_observing(start, x, train=False)
    variables = dataclasses.replace(start, ranges=seen.ranges)
    live = logits_of(network, variables, x)
    frozen = network.freeze(variables)
    step = float(np.ptp(live)) / 255
    for logits in (network.apply_frozen(frozen, x).logits, network.apply_portable(frozen, x)):
        assert np.abs(logits - live).max() < step
    floats = logits_of(plain, dataclasses.replace(variables, ranges={}), x)
    difference = np.abs(floats - live).max()
    assert 1e-3 * step < difference < 0.1 * np.ptp(floats)


def test_each_number_is_rounded_once_and_none_of_a_float_network():
    def roundings(config) -> int:
        network = build_network(config, 10, FLOAT32)
        variables = jax.eval_shape(network.init, jax.random.key(0))
        images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
        traced = jax.make_jaxpr(functools.partial(network.apply, train=True))(variables, images)
        return sum(x.params.get("name") == "fake_quantise" for x in traced.eqns)

    layers = build_network(STUDENT, 10, FLOAT32).quantised_layers
    assert len(layers) == 6 and roundings(STUDENT) == 2 * len(layers) + 1  # and the branch
    assert roundings(NETWORK) == 0


def test_ranges_follow_where_batch_norm_does_not():
    config = tiny_config(student=WITH_BATCH_NORM)
    built = build(config, resolved_run(config))
    network = built.student.network
    variables, x = network.init(jax.random.key(0)), jnp.asarray(random_array(4, 16, 16, 3))
    output = network.apply_observing(variables, x, train=False)
    jax.tree.map(np.testing.assert_array_equal, output.statistics, variables.statistics)
    assert output.ranges["root"]["input"]["high"] == x.max()
    still = network.apply(variables, x, train=True)
    jax.tree.map(np.testing.assert_array_equal, still.ranges, variables.ranges)
    assert not np.array_equal(
        still.statistics["norm"]["mean"], variables.statistics["norm"]["mean"]
    )


def test_a_quantised_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    config = tiny_config(ema_decay=0.9, student=WITH_BATCH_NORM)
    check_resume(config, tmp_path, monkeypatch, (0, 2))  # stops after 1 and 4 of 6 steps
    averaged = open_run(tmp_path / "whole").student.variables
    low, high, _ = ranges_of(averaged)["root/input"]
    assert -1 <= low < -0.8 and 0.8 < high <= 1  # from the first step on, not from zero


def test_the_real_command_starts_from_a_float_run_and_evaluates(trained, tmp_path):
    """A finished float run goes on as int8 beside the float teacher, and is judged."""
    experiment = write_experiment(
        tmp_path / "int8.py",
        f'teacher=TeacherConfig(workdir="{trained}/run/teacher"), ema_decay=0.5',
    )
    start = ("train", experiment, "--workdir", tmp_path / "int8", "--student.weights")
    options = ("--student.quantisation.weights", "int8")
    more = ("--student.quantisation.activations", "int8", "--student.keep-statistics", "True")
    done = run_command(*start, trained / "run", *options, *more)
    assert done.returncode == 0, done.stderr
    run = open_run(tmp_path / "int8")
    assert run.network.quantisation == INT8
    seen = run.student.variables.ranges["head"]["input"]
    assert seen["high"] > seen["low"] and seen["batches"] > 1
    done = run_command("evaluate", tmp_path / "int8")
    assert done.returncode == 0, done.stderr


def one_step(mesh: MeshConfig, student=STUDENT):
    config = tiny_config(student=student, mesh=mesh, batch_size=16)
    layout = make_layout(mesh)
    built = build(config, resolved_run(config, layout=layout))
    shapes = built.abstract_state
    shardings = layout.variables(shapes)
    state = jax.jit(built.init, out_shardings=shardings)(jax.random.key(0))
    x = jnp.asarray(random_array(16, 16, 16, 3))
    output = jax.jit(functools.partial(built.student.network.apply_observing, train=True))(
        with_head(state.student), jax.device_put(x, layout.batch)
    )
    return jax.device_get((output.logits, output.ranges))


def test_eight_devices_are_near_one():
    """To the error of a rounding that falls the other way; their ranges are of all images."""
    (one, ranges), (eight, of_eight) = one_step(MeshConfig(data=1)), one_step(MeshConfig(data=8))
    np.testing.assert_allclose(one, eight, atol=2e-2 * np.ptp(one))
    assert ranges["root"]["input"] == of_eight["root"]["input"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2), ranges, of_eight
    )


OWN = """
import flax.linen as nn
class Net(nn.Module):
    classes: int
    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(4, (3, 3), name="stem")(images)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))
"""
OWN_FUNCTION = """
import jax.numpy as jnp
from fm_distill.models import Network, Output, Variables
def net(config, classes, dtype):
    def apply(v, x, *, train, features=()):
        return Output(x.mean((1, 2)) @ v.params["k"], {}, {})
    def init(key):
        return Variables({"k": jnp.ones((3, classes))}, {})
    def frozen(v, x, *, features=()):
        return apply(v, x, train=False)
    return Network(classes, init, apply, lambda v: v, frozen)
"""


def test_bad_input_is_one_sentence(tmp_path):
    def refused(student, **changes) -> str:
        with pytest.raises(UserError) as error:
            config = tiny_config(student=student, **changes)
            check(config)
            build(config, resolved_run(config))
        return str(error.value)

    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "function.py").write_text(OWN_FUNCTION)
    own = dataclasses.replace(STUDENT, model=f"{tmp_path}/own.py:Net", options={})
    assert "cannot be quantised, head, stem" in refused(own)
    function = dataclasses.replace(own, model=f"{tmp_path}/function.py:net")
    assert "has no layer that can be quantised" in refused(function)
    alone = dataclasses.replace(STUDENT, quantisation=QuantisationConfig(activations="int8"))
    assert "needs quantised weights" in refused(alone)
    assert "accumulate" in refused(STUDENT, memory=MemoryConfig(accumulate=2))
    teacher = TeacherConfig(weights="x.npz", network=NetworkConfig(
        model="bit_r50x1", resolution=32, quantisation=INT8,
    ))  # fmt: skip
    assert "teacher.network.quantisation" in refused(NETWORK, teacher=teacher)


def test_activations_of_four_bits_are_refused_by_the_command(tmp_path):
    experiment = write_experiment(tmp_path / "x.py")
    options = ("--student.quantisation.activations", "int4")
    done = run_command("train", experiment, "--workdir", tmp_path / "run", *options)
    assert done.returncode == 2 and "int4" in done.stderr
    assert "Traceback" not in done.stderr
