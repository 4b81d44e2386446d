"""The families beside BiT: the layers they are made of, and the logits of the originals."""

import dataclasses
import functools
import json
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED
from tiny import LARGER, smallest

from fm_distill.config import NetworkConfig
from fm_distill.models import MODELS, Variables, build_network, check_network
from fm_distill.models.convolutions import convolve, convolve_depthwise
from fm_distill.models.layers import Norm
from fm_distill.weights import names

FLOAT32 = jnp.dtype("float32")
FAMILIES = [name for name in MODELS if not name.startswith("bit")]
FORMS = [name for name in FAMILIES if not LARGER.match(name)]


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


def convolution_in_numpy(x, kernel, gradient, stride):
    """With `kernel // 2` zeros around: output, and gradients by picture and kernel."""
    size = kernel.shape[0]
    half = size // 2
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    out = np.zeros(gradient.shape)
    of_padded, of_kernel = np.zeros_like(padded), np.zeros_like(kernel)
    for r, c in np.ndindex(out.shape[1:3]):
        here = np.s_[:, r * stride : r * stride + size, c * stride : c * stride + size]
        out[:, r, c] = np.einsum("nijc,ijco->no", padded[here], kernel)
        of_padded[here] += np.einsum("no,ijco->nijc", gradient[:, r, c], kernel)
        of_kernel += np.einsum("nijc,no->ijco", padded[here], gradient[:, r, c])
    return out, of_padded[:, half : half + x.shape[1], half : half + x.shape[2]], of_kernel


# Outputs of 8x8 pixels and less are matrix products on a CPU, larger ones are XLA's.
@pytest.mark.parametrize("shape", [(1, 2), (5, 4), (8, 8), (9, 8), (17, 16)])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2), (9, 1)])
def test_a_convolution_and_its_gradients(shape, size, stride):
    rng = np.random.default_rng(size)
    x, kernel = rng.standard_normal((2, *shape, 3)), rng.standard_normal((size, size, 3, 5))
    g = rng.standard_normal((2, *((n - 1) // stride + 1 for n in shape), 5))
    expected = convolution_in_numpy(x, kernel, g, stride)
    form = jax.jit(lambda x, k: convolve(x, k, stride))
    out, pull = jax.vjp(form, jnp.float32(x), jnp.float32(kernel))
    for found, wanted in zip((out, *pull(jnp.float32(g))), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_each_backend_gets_its_form_of_a_convolution():
    kernel = jnp.zeros((3, 3, 4, 4))
    for side, on_cpu in ((8, 0), (9, 1)):
        traced = jax.jit(convolve).trace(jnp.zeros((2, side, side, 4)), kernel)
        for platform, count in (("cpu", on_cpu), ("tpu", 1), ("cuda", 1)):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert text.count("stablehlo.convolution") == count, (platform, side)


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize(("size", "stride"), [(1, 2), (3, 1), (3, 2), (5, 2)])
def test_same_padding_is_tensorflows(side, size, stride):
    x = jax.random.normal(jax.random.key(0), (2, side, side + 1, 3))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 4))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(convolve(x, kernel, stride, "same"), expected, atol=1e-5)


def test_batch_norm_against_numpy():
    rng = np.random.default_rng(0)
    x = 3 + 2 * rng.standard_normal((4, 5, 6, 3))
    mean, var, scale, bias = np.abs(rng.standard_normal((4, 3)))
    tree = {
        "params": {"scale": jnp.float32(scale), "bias": jnp.float32(bias)},
        "batch_stats": {"mean": jnp.float32(mean), "var": jnp.float32(var)},
    }
    still = Norm(None, 1e-3, train=False).apply(tree, jnp.float32(x))
    np.testing.assert_allclose(
        still, (x - mean) / np.sqrt(var + 1e-3) * scale + bias, rtol=1e-4, atol=1e-4
    )
    y, new = Norm(None, 1e-3, train=True).apply(tree, jnp.float32(x), mutable=["batch_stats"])
    m, v = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    np.testing.assert_allclose(y, (x - m) / np.sqrt(v + 1e-3) * scale + bias, atol=1e-4)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.9 * mean + 0.1 * m, rtol=1e-4)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 * var + 0.1 * v, rtol=1e-4)


# What holds for every family.


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"width": 2.0}}, "has no option width; it has none"),
        ({"options": {"root_pool_padding": "minus_infinity"}}, "has no option root_pool_padding"),
        ({"resolution": 13}, "below the network's stride (32|16|14)"),
    ],
)
def test_a_named_network_takes_no_options_of_another(name, changes, said):
    config = NetworkConfig(model=name, resolution=smallest(name))
    check_network(config)
    with pytest.raises(ValueError, match=said):
        check_network(dataclasses.replace(config, **changes))


@pytest.mark.parametrize("name", FORMS)
def test_frozen_kernels_are_in_the_compute_type(name):
    config = NetworkConfig(model=name, resolution=smallest(name))
    network = build_network(config, 3, jnp.dtype("bfloat16"))
    frozen = jax.eval_shape(lambda key: network.freeze(network.init(key)), jax.random.key(0))
    tree = {"params": frozen.params, "statistics": frozen.statistics}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        narrow = path.endswith("/kernel") and not path.startswith("params/head/")
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


# Weights by formula, the same for both sides: each tensor is a function of its name in the file.


CLASSES = 6
# Variance of a kernel times its inputs, so that the logits are of order 1 and differ by picture.
GAINS = {
    "efficientnet_lite": 1.5,
    "mobilenet_v3_large": 1.8,
    "mobilenet_v3_small": 2.2,
    "resnet50v2": 1.1,
}


def formula_tensors(config, naming, classes):
    network = build_network(config, classes, FLOAT32)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    gain = next(gain for name, gain in GAINS.items() if config.model.startswith(name))
    sizes, tensors = names.shapes_of(shapes), {}
    for path, stored in naming(config, shapes).items():
        z = np.random.default_rng(zlib.crc32(stored.name.encode())).standard_normal(stored.shape)
        leaf = path.split("/")[-1]
        if leaf == "kernel":
            z = z * np.sqrt(gain / np.prod(sizes[path][:-1]))
        elif leaf == "scale":
            z = 1 + 0.1 * z
        elif leaf == "var":
            z = np.exp(0.3 * z)
        else:
            z = 0.1 * z
        tensors[stored.name] = z.astype(np.float32)
    return tensors


def formula_images():
    rng = np.random.default_rng(2106_05237)
    return rng.uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)


def our_formula_logits(name):
    config = NetworkConfig(model=name, resolution=64)
    naming = names.keras if name == "resnet50v2" else names.timm
    tensors = formula_tensors(config, naming, CLASSES)
    variables = variables_from(tensors, config, naming, CLASSES)
    return tensors, logits_of(variables, jnp.asarray(formula_images()), config, CLASSES)


# For these weights and pictures, by timm 1.0.31 and Keras 3.15; the tests after this one compute
# them anew where those are installed.
ORIGINALS = {
    "efficientnet_lite1": [
        [0.545642, 0.645089, 0.437609, 0.961662, 1.113895, -0.553198],
        [0.404009, 0.835976, 0.560536, 0.946898, 0.914583, -0.377200],
    ],
    "mobilenet_v3_large": [
        [0.641986, -0.997291, -0.134072, 2.450040, 3.471010, -2.744480],
        [3.072654, -1.051920, -0.951746, 1.031261, 2.927405, -0.827125],
    ],
    "mobilenet_v3_small": [
        [-0.115287, -0.911162, 0.842224, 1.221210, 1.747438, 0.822809],
        [0.336294, -0.614287, 0.406921, 0.957210, 1.054598, 1.026781],
    ],
    "mobilenet_v3_small_gn": [
        [0.930747, 0.163387, -0.471239, 0.536030, 0.350717, -0.307145],
        [0.460390, -0.373862, -0.125650, 0.220523, 0.382260, -0.132927],
    ],
    "resnet50v2": [
        [-0.885450, 0.855889, 0.669504, -0.192529, 0.618971, -1.243233],
        [-1.252569, 0.757737, 0.784507, -0.123272, 0.761458, -1.439026],
    ],
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_logits_are_the_originals(name):
    _, logits = our_formula_logits(name)
    np.testing.assert_allclose(logits, ORIGINALS[name], atol=1e-4)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n.startswith(("eff", "mobile"))])
def test_logits_are_timms(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    tensors, logits = our_formula_logits(name)
    model = timm.create_model(MODELS[name.removesuffix("_gn")].timm, num_classes=CLASSES).eval()
    if name.endswith("_gn"):
        with_group_norm(model, timm.layers)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all(n.endswith("num_batches_tracked") for n in missing)
    with torch.no_grad():
        expected = model(torch.from_numpy(formula_images()).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def with_group_norm(module, layers) -> None:
    """Replaces each BatchNorm by a GroupNorm of 8 groups with the same activation."""
    for name, child in module.named_children():
        if isinstance(child, layers.BatchNormAct2d):
            norm = layers.GroupNormAct(child.num_features, num_groups=8, apply_act=False)
            norm.act = child.act
            setattr(module, name, norm)
        else:
            with_group_norm(child, layers)


def test_logits_are_keras():
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    tensors, logits = our_formula_logits("resnet50v2")
    model = keras.applications.ResNet50V2(
        weights=None, input_shape=(64, 64, 3), classes=CLASSES, classifier_activation=None
    )
    assert {weight.path for weight in model.weights} == set(tensors)
    for weight in model.weights:
        weight.assign(tensors[weight.path])
    expected = np.asarray(model(formula_images(), training=False))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
