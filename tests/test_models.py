"""The networks: published sizes, the reference's logits, and what holds for every one of them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SHARED
from formula import formula_variables
from tiny import LARGER, NETWORK, logits_of, smallest

from fm_distill.config import NetworkConfig, with_options
from fm_distill.models import (
    MODELS,
    Variables,
    build_network,
    check_network,
    parameter_count,
    resolve,
)
from fm_distill.models.bit import standardise
from fm_distill.models.layers import group_norm

FLOAT32 = jnp.dtype("float32")

# Source: the paper's and big_transfer's networks, counted from timm's with these heads.
PUBLISHED = {
    ("bit_r50x1", 102): 23_709_350,
    ("bit_r50x1", 1000): 25_549_352,
    ("bit_r50x3", 102): 211_800_870,
    ("bit_r101x1", 37): 42_568_293,
    ("bit_r101x3", 102): 382_416_678,
    ("bit_r152x2", 102): 232_656_102,
    ("bit_r152x4", 102): 929_175_910,
    # Counted from timm 1.0.31's, and Keras 3.15's `trainable_weights`.
    ("efficientnet_lite0", 1000): 4_652_008,
    ("efficientnet_lite1", 1000): 5_416_680,
    ("efficientnet_lite2", 1000): 6_092_072,
    ("efficientnet_lite3", 1000): 8_197_096,
    ("efficientnet_lite4", 1000): 13_006_568,
    ("mobilenet_v3_large", 1000): 5_483_032,
    ("mobilenet_v3_small", 1000): 2_542_856,
    ("mobilenet_v3_large_gn", 1000): 5_483_032,
    ("mobilenet_v3_small_gn", 1000): 2_542_856,
    ("resnet50v2", 1000): 25_568_360,
}
# By tools/make_timm_expectations.py.
RECORDED = json.loads((ROOT / "tests" / "data" / "timm_logits.json").read_text())["parameters"]
PUBLISHED |= {(name, 1000): count for name, count in RECORDED.items()}


def network_of(name: str) -> NetworkConfig:
    return NETWORK if name == "bit" else NetworkConfig(model=name, resolution=smallest(name))


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        pytest.param(*key, marks=[pytest.mark.slow] if LARGER.match(key[0]) else [])
        for key in PUBLISHED
    ],
)
def test_parameter_counts_are_the_published_ones(name, classes):
    network = build_network(network_of(name), classes, FLOAT32)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert parameter_count(shapes.params) == PUBLISHED[name, classes]


def test_every_named_model_is_counted():
    assert {name for name, _ in PUBLISHED} | {"bit"} == set(MODELS)


@pytest.mark.parametrize("name", [name for name in MODELS if not LARGER.match(name)])
def test_every_model_keeps_the_contract(name):
    network = build_network(network_of(name), 7, FLOAT32)
    variables = jax.eval_shape(network.init, jax.random.key(0))
    images = jnp.zeros((2, smallest(name), smallest(name), 3))
    asked = ("pre_logits", "block1")
    for train in (True, False):
        output = jax.eval_shape(
            functools.partial(network.apply, train=train, features=asked), variables, images
        )
        assert output.logits.shape == (2, 7) and output.logits.dtype == jnp.float32
        assert set(output.features) == set(asked)
        assert jax.tree.structure(output.statistics) == jax.tree.structure(variables.statistics)
    frozen = jax.eval_shape(network.freeze, variables)
    assert jax.eval_shape(network.apply_frozen, frozen, images).logits.shape == (2, 7)


def formula_images(size):
    rng = np.random.default_rng(2106_05237)
    return jnp.asarray(rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32))


# The first six logits of timm's resnetv2_50x1_bit for that file and images of 64 pixels
# (weight standardisation with 1e-10, zero-padded root pool).
TIMM = np.array(
    [
        [0.697024, 0.460016, 0.319558, 0.052382, 0.360235, 0.892448],
        [0.507853, 0.007566, 0.239238, -0.519461, -0.513061, 0.769235],
    ]
)


def test_bit_r50x1_computes_timms_logits():
    config = NetworkConfig(model="bit_r50x1", resolution=64)
    variables = formula_variables(config, 102)
    network = build_network(config, 102, FLOAT32)
    x = formula_images(64)
    logits = jax.jit(lambda v, x: network.apply(v, x, train=False).logits)(variables, x)
    np.testing.assert_allclose(logits[:, :6], TIMM, atol=1e-4)
    frozen = jax.jit(network.freeze)(variables)
    folded = jax.jit(lambda v, x: network.apply_frozen(v, x).logits)(frozen, x)
    np.testing.assert_allclose(folded[:, :6], TIMM, atol=1e-4)
    if (SHARED / "parity").is_dir():
        stored = np.load(SHARED / "parity" / "bit_r50x1_logits.npz")["logits_64"]
        np.testing.assert_allclose(logits, stored, atol=1e-4)


def test_root_pool_padding_is_a_choice():
    logits = {}
    for padding in ("zero", "minus_infinity"):
        config = NetworkConfig(
            model="bit_r50x1", resolution=64, options={"root_pool_padding": padding}
        )
        variables = formula_variables(config, 102)
        network = build_network(config, 102, FLOAT32)
        apply = jax.jit(lambda v, x, n=network: n.apply(v, x, train=False).logits)
        logits[padding] = apply(variables, formula_images(64))
    difference = np.abs(logits["zero"] - logits["minus_infinity"]).max()
    assert 1e-3 < difference < 0.5


def test_group_norm_against_numpy():
    rng = np.random.default_rng(0)
    x = 3 + 2 * rng.standard_normal((2, 5, 6, 12))
    scale, bias = rng.standard_normal((2, 12))
    grouped = x.reshape(2, 5, 6, 3, 4)
    mean = grouped.mean(axis=(1, 2, 4), keepdims=True)
    variance = grouped.var(axis=(1, 2, 4), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * scale + bias
    found = group_norm(jnp.float32(x), jnp.float32(scale), jnp.float32(bias), 3, 1e-5)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_standardise_against_numpy():
    kernel = 2 + np.random.default_rng(0).standard_normal((3, 3, 4, 5))
    flat = kernel.reshape(-1, 5)
    expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-10)
    np.testing.assert_allclose(
        standardise(jnp.float32(kernel)), expected.reshape(kernel.shape), atol=1e-5
    )


def batch_norm_network():
    return build_network(with_options(NETWORK, {"norm": "batch"}), 5, FLOAT32)


def test_batch_norm_moves_its_statistics_in_training_only():
    network = batch_norm_network()
    variables = network.init(jax.random.key(0))
    assert jax.tree.leaves(variables.statistics)
    images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))
    still = network.apply(variables, images, train=False).statistics
    jax.tree.map(np.testing.assert_array_equal, still, variables.statistics)
    moved = network.apply(variables, images, train=True).statistics
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), moved, variables.statistics)
    assert all(jax.tree.leaves(changed))
    frozen = network.apply_frozen(network.freeze(variables), images).statistics
    jax.tree.map(np.testing.assert_array_equal, frozen, variables.statistics)


def test_unknown_feature_is_named():
    network = build_network(NETWORK, 5, FLOAT32)
    variables = network.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"block7.*pre_logits"):
        network.apply(variables, jnp.zeros((1, 16, 16, 3)), train=False, features=("block7",))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depths": ()}, "needs the option depths"),
        ({"groups": 3}, "use groups=1"),
        ({"depths": "many"}, "an option of bit has the wrong type: Expected `int`"),
        ({"norm": "layer"}, "an option of bit has the wrong type: Invalid enum value 'layer'"),
        ({"width": 0}, "options.width is 0.0; expected a number above zero"),
        ({"depht": 1}, "bit has no option depht; it has .*; did you mean depths"),
        ({"depths": (1, 1, 1, 1, 1, 1)}, "below the network's stride"),
    ],
)
def test_wrong_network_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        check_network(with_options(NETWORK, changes))


def test_a_teacher_that_is_a_function_has_nothing_to_resolve():
    function = NetworkConfig(model="function", resolution=8, input_range="zero_one")
    assert resolve(function) == function


def test_a_published_network_has_no_description():
    named = dataclasses.replace(NETWORK, model="bit_r50x1")
    with pytest.raises(ValueError, match="no option depths, width, groups, stem; it has root_pool"):
        check_network(named)


def test_bfloat16_computes_close_to_float32():
    wide, narrow = (build_network(NETWORK, 5, jnp.dtype(d)) for d in ("float32", "bfloat16"))
    variables = wide.init(jax.random.key(0))
    head = {"kernel": jnp.ones((32, 5)), "bias": jnp.zeros(5)}
    variables = Variables(variables.params | {"head": head}, {})
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    a = logits_of(wide, variables, images)
    b = logits_of(narrow, variables, images)
    assert b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=0.05)
