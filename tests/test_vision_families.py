"""ResNet, ConvNeXt, ViT, DeiT and DINOv2, against timm's logits and names.

`tools/make_timm_expectations.py` recorded what timm answers; nothing of timm is needed here.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save_file
from timm_formula import CASES, CLASSES, Case, pictures, tensor_of
from tiny import smallest

from fm_distill.config import NetworkConfig
from fm_distill.errors import UserError
from fm_distill.models import Variables, build_network, convnext, resnet, resolve, vit
from fm_distill.models.vit_designs import AUGREG, FACEBOOK
from fm_distill.weights.load import load_weights, start_from
from fm_distill.weights.names import in_naming, timm, to_ours

FLOAT32 = jnp.dtype("float32")
RECORDED = json.loads((ROOT / "tests" / "data" / "timm_logits.json").read_text())
# Of each form one, small.
KEYS = (
    "resnet50d_at_91",
    "deit_tiny_distilled_patch16_224_at_96",
    "vit_small_patch14_reg4_dinov2_at_56",
    "vit_little_patch16_reg4_gap_256_at_64",
    "convnext_atto_at_64",
    "convnextv2_tiny_at_64",
)
FORMS = [case for case in CASES if case.key in KEYS]
FAST = [case for case in CASES if case.key in ("resnet18_at_64", "vit_tiny_patch16_224_at_96")]


def config_of(case: Case) -> NetworkConfig:
    return NetworkConfig(model=case.model, resolution=case.resolution)


def formula_variables(case: Case) -> Variables:
    """The formula's tensors by timm's names, in our places."""
    config = config_of(case)
    network = build_network(config, CLASSES, FLOAT32)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    stored = timm(config, shapes)

    def place(path, leaf):
        s = stored[jax.tree_util.keystr(path, simple=True, separator="/")]
        return jnp.asarray(to_ours(tensor_of(s.name, s.shape), s, leaf.shape))

    tree = {"params": shapes.params, "statistics": shapes.statistics}
    tree = jax.tree_util.tree_map_with_path(place, tree)
    return Variables(tree["params"], tree["statistics"])


def relative_difference(found, expected) -> float:
    return float(np.abs(found - np.asarray(expected)).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_logits_are_timms(case):
    expected = RECORDED["logits"][case.key]
    # The pictures differ enough to tell.
    assert relative_difference(expected[0], expected[1]) > 0.03
    network = build_network(config_of(case), CLASSES, FLOAT32)
    variables, images = formula_variables(case), jnp.asarray(pictures(case.resolution))

    def frozen(variables, images):
        return network.apply_frozen(network.freeze(variables), images).logits

    logits = jax.jit(frozen)(variables, images)
    assert relative_difference(logits, expected) < 1e-4
    if case in FAST:
        live = jax.jit(lambda v, x: network.apply(v, x, train=False).logits)(variables, images)
        assert relative_difference(live, expected) < 1e-4


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.key)
def test_bfloat16_is_close(case):
    network = build_network(config_of(case), CLASSES, jnp.dtype("bfloat16"))
    variables, images = formula_variables(case), jnp.asarray(pictures(case.resolution))
    output = jax.jit(lambda v, x: network.apply(v, x, train=False, features=("block1",)))(
        variables, images
    )
    assert output.logits.dtype == jnp.float32
    assert output.features["block1"].dtype == jnp.bfloat16
    difference = relative_difference(output.logits, RECORDED["logits"][case.key])
    assert 1e-4 < difference < 0.1


# As of the networks of these names, but with few blocks and channels.
SHRUNK = {
    "resnet18": resnet.member(resnet.Design((1, 1), bottleneck=False)),
    "resnet50d": resnet.member(resnet.Design((1, 1), bottleneck=True, deep=True)),
    "convnext_atto": convnext.member(convnext.Design((0, 0, 0, 1), 8, convolutions=True)),
    "convnextv2_tiny": convnext.member(convnext.Design((0, 0, 0, 1), 8, second_version=True)),
    **{
        name: vit.member(dataclasses.replace(design, channels=32, depth=2, heads=2))
        for name, design in (AUGREG | FACEBOOK).items()
        if f"{name}_at_" in " ".join(KEYS)
    },
}


@pytest.mark.parametrize("name", SHRUNK)
def test_a_gradient_reaches_every_parameter(name):
    resolution = smallest(name) * 2
    config = resolve(NetworkConfig(model=name, resolution=resolution))
    network = SHRUNK[name](config, CLASSES, FLOAT32)
    variables = network.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(x + 0.3 * rng.standard_normal(x.shape), jnp.float32),
        variables.params,
    )

    def loss(params):
        images = jnp.asarray(pictures(resolution))
        output = network.apply(Variables(params, variables.statistics), images, train=True)
        return jnp.square(output.logits).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        # Behind a ReLU some channels are dead, and of a 7x7 kernel around 2x2 pixels only the
        # middle 3x3 meet any.
        share = float((leaf != 0).mean())
        assert share > 0.1, (jax.tree_util.keystr(path), share)


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.key)
def test_timms_names_come_back_in_every_bit(tmp_path, case):
    config, variables = config_of(case), formula_variables(case)
    tensors = in_naming("timm", config, variables)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, tensor_of(name, tensor.shape))
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    found = load_weights(str(path), dataclasses.replace(config, input_range="auto"), "teacher")
    assert found.classes == CLASSES
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)


def test_weights_without_a_head_start_a_student(tmp_path):
    """As timm's DINOv2 comes; and a distilled network has a head of two parts."""
    case = next(case for case in CASES if case.key == KEYS[1])
    config, variables = config_of(case), formula_variables(case)
    tensors = in_naming("timm", config, variables)
    assert {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"} < set(tensors)
    body = {name: x for name, x in tensors.items() if not name.startswith("head")}
    path = tmp_path / "x.safetensors"
    save_file(body, path)
    found = load_weights(str(path), config, "student")
    assert found.classes == 0 and "no classes" in found.notes[0]
    init = jax.tree.map(lambda x: x + 1, variables)
    started, sentence = start_from(init, found, CLASSES, None)
    assert sentence == "the weights have no head: there is a new one of 6 classes"
    expected = Variables(variables.params | {"head": init.params["head"]}, {})
    jax.tree.map(np.testing.assert_array_equal, started, expected)
    save_file(body | {"extra": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match="unexpected extra"):
        load_weights(str(path), config, "student")


def test_pictures_of_no_whole_patches_are_refused():
    config = NetworkConfig(model="vit_tiny_patch16_224", resolution=100)
    with pytest.raises(
        ValueError, match=r"100 is not a multiple of the patch size.*16 pixels; use 96 or 112"
    ):
        build_network(config, CLASSES, FLOAT32)
