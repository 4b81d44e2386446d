"""ResNet, against timm's logits and names.

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

from fm_distill.config import NetworkConfig
from fm_distill.models import Variables, build_network
from fm_distill.weights.load import load_weights
from fm_distill.weights.names import in_naming, timm, to_ours

FLOAT32 = jnp.dtype("float32")
RECORDED = json.loads((ROOT / "tests" / "data" / "timm_logits.json").read_text())
# One of each form, small.
FORMS = [case for case in CASES if case.model in ("resnet18", "resnet50d")]


def config_of(case: Case) -> NetworkConfig:
    return NetworkConfig(model=case.ours or case.model, resolution=case.resolution)


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
    if case in FORMS:
        live = jax.jit(lambda v, x: network.apply(v, x, train=False).logits)(variables, images)
        assert relative_difference(live, expected) < 1e-4


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.key)
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


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.key)
def test_a_gradient_reaches_every_parameter(case):
    network = build_network(config_of(case), CLASSES, FLOAT32)
    variables, images = formula_variables(case), jnp.asarray(pictures(case.resolution))

    def loss(params):
        output = network.apply(Variables(params, variables.statistics), images, train=True)
        return jnp.square(output.logits).mean()

    gradient = jax.jit(jax.grad(loss))(variables.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        # Behind a ReLU some channels are dead, and zeros around a small picture meet no pixel.
        share = float((leaf != 0).mean())
        assert share > 0.5, (jax.tree_util.keystr(path), share)


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
