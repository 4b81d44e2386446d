"""The families beside BiT: the layers they are made of, and the logits of the originals."""

import dataclasses
import functools
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED

from fm_distill.config import NetworkConfig
from fm_distill.models import MODELS, Variables, build_network, check_network
from fm_distill.models.layers import convolve, convolve_depthwise
from fm_distill.weights import names

FLOAT32 = jnp.dtype("float32")
FAMILIES = [name for name in MODELS if not name.startswith("bit")]


# Depthwise convolution, against NumPy in float64 and against the grouped convolution.


def depthwise_in_numpy(x, kernel, gradient, stride, padding):
    """Output, and gradients of `sum(output * gradient)` by picture and kernel."""
    size, total = kernel.shape[0], []
    for n in x.shape[1:3]:
        if padding == "same":
            need = max((int(np.ceil(n / stride)) - 1) * stride + size - n, 0)
            total.append((need // 2, need - need // 2))
        else:
            total.append((size // 2, size // 2))
    padded = np.pad(x, ((0, 0), *total, (0, 0)))
    height, width = ((padded.shape[i] - size) // stride + 1 for i in (1, 2))
    out = np.zeros((x.shape[0], height, width, x.shape[-1]))
    of_padded, of_kernel = np.zeros_like(padded), np.zeros_like(kernel)
    for r in range(height):
        for c in range(width):
            here = np.s_[:, r * stride : r * stride + size, c * stride : c * stride + size]
            window = padded[here]
            out[:, r, c] = (window * kernel[:, :, 0]).sum(axis=(1, 2))
            if gradient is not None:
                of_padded[here] += kernel[:, :, 0] * gradient[:, r, c, None, None]
                of_kernel[:, :, 0] += (window * gradient[:, r, c, None, None]).sum(axis=0)
    (top, _), (left, _) = total
    return out, of_padded[:, top : top + x.shape[1], left : left + x.shape[2]], of_kernel


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("shape", [(8, 7), (1, 2)])
def test_depthwise_values_and_gradients(shape, size, stride, padding):
    rng = np.random.default_rng(size)
    x, kernel = rng.standard_normal((2, *shape, 6)), rng.standard_normal((size, size, 1, 6))
    wide = depthwise_in_numpy(x, kernel, None, stride, padding)[0]
    g = rng.standard_normal(wide.shape)
    expected = depthwise_in_numpy(x, kernel, g, stride, padding)

    def grouped(x, kernel):
        around = "SAME" if padding == "same" else [(size // 2, size // 2)] * 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            around,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=6,
        )

    def ours(x, kernel):
        return convolve_depthwise(x, kernel, stride, padding)

    for form in (ours, grouped):
        out, pull = jax.vjp(jax.jit(form), jnp.float32(x), jnp.float32(kernel))
        for found, wanted in zip((out, *pull(jnp.float32(g))), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_each_backend_gets_its_form_of_the_depthwise_convolution():
    x, kernel = jnp.zeros((2, 8, 8, 24)), jnp.zeros((3, 3, 1, 24))
    traced = jax.jit(functools.partial(convolve_depthwise, stride=2)).trace(x, kernel)
    tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert tpu.count("stablehlo.convolution") == 1 and "feature_group_count = 24" in tpu
    assert "stablehlo.slice" not in tpu and "stablehlo.multiply" not in tpu
    cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.convolution" not in cpu and cpu.count("stablehlo.multiply") == 9


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize(("size", "stride"), [(1, 2), (3, 1), (3, 2), (5, 2)])
def test_same_padding_is_tensorflows(side, size, stride):
    x = jax.random.normal(jax.random.key(0), (2, side, side + 1, 3))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 4))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(convolve(x, kernel, stride, "same"), expected, atol=1e-5)


# What holds for every family.


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 2.0}, "fixes width"),
        ({"norm": "batch"}, "fixes norm"),
        ({"root_pool_padding": "minus_infinity"}, "no choice of root_pool_padding"),
        ({"resolution": 31}, "below the network's stride 32"),
    ],
)
def test_a_named_network_takes_no_other_description(name, changes, said):
    config = NetworkConfig(model=name, resolution=32)
    check_network(config)
    with pytest.raises(ValueError, match=said):
        check_network(dataclasses.replace(config, **changes))


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_kernels_are_in_the_compute_type(name):
    network = build_network(NetworkConfig(model=name, resolution=32), 3, jnp.dtype("bfloat16"))
    frozen = jax.eval_shape(lambda key: network.freeze(network.init(key)), jax.random.key(0))
    tree = {"params": frozen.params, "statistics": frozen.statistics}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        narrow = path.endswith("/kernel") and path != "params/head/kernel"
        assert leaf.dtype == (jnp.bfloat16 if narrow else jnp.float32), path


# The originals' logits.


def variables_from(tensors, config, naming, classes) -> Variables:
    """`tensors` of a file of that naming; every one is used."""
    network = build_network(config, classes, FLOAT32)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    stored = naming(config, shapes)
    assert {s.name for s in stored.values()} == set(tensors)

    def place(path, leaf):
        s = stored[jax.tree_util.keystr(path, simple=True, separator="/")]
        assert tensors[s.name].shape == s.shape, s.name
        return jnp.asarray(names.to_ours(tensors[s.name], s, leaf.shape))

    tree = {"params": shapes.params, "statistics": shapes.statistics}
    tree = jax.tree_util.tree_map_with_path(place, tree)
    return Variables(tree["params"], tree["statistics"])


def logits_of(variables, images, config, classes, frozen=False):
    network = build_network(config, classes, FLOAT32)
    if frozen:
        variables = network.freeze(variables)
        return jax.jit(lambda v, x: network.apply_frozen(v, x).logits)(variables, images)
    return jax.jit(lambda v, x: network.apply(v, x, train=False).logits)(variables, images)


def read_safetensors(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, data = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], np.float32).reshape(entry["shape"])
        for name, entry in header.items()
    }


@pytest.mark.skipif(
    not (SHARED / "parity").is_dir(), reason="published weights and their logits are not here"
)
def test_published_efficientnet_lite0_computes_timms_logits():
    tensors = read_safetensors(SHARED / "weights" / "tf_efficientnet_lite0.in1k.safetensors")
    tensors = {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}
    parity = np.load(SHARED / "parity" / "efficientnet_lite0_logits.npz")
    images = jnp.asarray((parity["images_uint8"].astype(np.float32) - 127.5) / 127.5)
    config = NetworkConfig(model="efficientnet_lite0", resolution=128)
    variables = variables_from(tensors, config, names.timm, 1000)
    for frozen in (False, True):
        logits = logits_of(variables, images, config, 1000, frozen)
        np.testing.assert_allclose(logits, parity["logits"], atol=1e-4)
