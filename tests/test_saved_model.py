"""SavedModels of BiT: variables matched by names or by order; with TensorFlow, real ones."""

import os
import re
import sys

import jax
import numpy as np
import pytest
from formula import formula_variables

from fm_distill.config import NetworkConfig
from fm_distill.errors import UserError
from fm_distill.weights.load import load_weights
from fm_distill.weights.names import in_naming
from fm_distill.weights.structure import HEAD_BIAS, HEAD_KERNEL, as_original

NETWORK = NetworkConfig(model="bit", resolution=32, options={"depths": (2, 1, 2, 1), "width": 0.5})
CLASSES = 7
VARIABLES = formula_variables(NETWORK, CLASSES)
ORIGINAL = {x: y.copy() for x, y in in_naming("bit_original", NETWORK, VARIABLES).items()}
BODY = {name: x for name, x in ORIGINAL.items() if name not in (HEAD_KERNEL, HEAD_BIAS)}
SHAPES = {name: x.shape for name, x in BODY.items()}
HEAD = [ORIGINAL[HEAD_KERNEL][0, 0], ORIGINAL[HEAD_BIAS]]


def creation(name: str) -> tuple:
    """Where a variable stands in the order in which a graph of BiT creates them."""
    if "root_block" in name:
        return (0,)
    block, unit, part = (re.search(p, name) for p in (r"block(\d)", r"unit(\d+)", r"/([abc])/"))
    if not block:
        return 9, name.endswith("beta")
    rank = 0 if "group_norm" in name else 1 if "proj" in name else 2
    return 1, int(block[1]), int(unit[1]), part[1], rank, name.endswith("beta")


ORDERS = {
    "creation": creation,
    "alphabetical": lambda name: (name,),
    "gammas, then betas": lambda name: (name.endswith("beta"), creation(name)),
}


def in_a_list(order: str) -> list[np.ndarray]:
    """The variables without their names, a dense head last."""
    return [BODY[name] for name in sorted(BODY, key=ORDERS[order])] + HEAD


def keyed(arrays) -> dict[str, np.ndarray]:
    """As a checkpoint gives them: in the order of its keys, where 10 comes before 2."""
    keys = {f"model/variables/{i}/.ATTRIBUTES/VARIABLE_VALUE": x for i, x in enumerate(arrays)}
    return {key: keys[key] for key in sorted(keys)}


def same(found: dict[str, np.ndarray]):
    assert found.keys() == ORIGINAL.keys()
    for name, tensor in ORIGINAL.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_in_use_is_matched(order):
    found, remark = as_original("x", keyed(in_a_list(order)), SHAPES)
    same(found)
    assert "not verified on a file" in remark and "check the teacher's accuracy" in remark


def test_names_are_matched_whatever_encloses_them():
    named = {f"bit/keras_layer/{name}:0": x for name, x in BODY.items()}
    for head in (("dense/kernel", "dense/bias"), (HEAD_KERNEL, HEAD_BIAS)):
        found, remark = as_original("x", named | dict(zip(head, HEAD, strict=True)), SHAPES)
        same(found)
        assert remark == "variables matched by their names"


def refused(tensors, *said: str):
    with pytest.raises(UserError) as caught:
        as_original("x", tensors, SHAPES)
    for text in said:
        assert text in str(caught.value), caught.value


def test_what_does_not_tell_is_refused():
    arrays = in_a_list("creation")
    refused(keyed(arrays[:-2]), "has 0 variables that could be the head's kernel (1024 x classes)")
    refused(keyed([*arrays, HEAD[0]]), "has 2 variables that could be the head's kernel")
    refused(keyed(arrays[:-1]), "has 0 variables that could be the bias of the head of 7 classes")
    refused(
        keyed(arrays[1:]), "differ in number by shape", "(7, 7, 3, 32): 0 variables, expected 1"
    )
    refused(keyed([*arrays, np.zeros(5)]), "(5,): 1 variables, expected 0")
    nested = {f"unit/{i}/a": x for i, x in enumerate(arrays)}
    refused(nested, "nor form one list")
    two = {key.replace("model", "ab"[i % 2]): x for i, (key, x) in enumerate(keyed(arrays).items())}
    refused(two, "nor form one list")
    alike = [np.zeros_like(x) if x.ndim == 1 and x.size > 7 else x for x in arrays]
    refused(keyed(alike), "cannot be told apart by their values")


# With TensorFlow.


@pytest.fixture(scope="module")
def tf():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow  # takes seconds, so not for each worker that collects the tests

    return tensorflow


def same_arrays(found):
    jax.tree.map(np.testing.assert_array_equal, found.variables, VARIABLES)


def test_a_module_with_the_original_names(tf, tmp_path):
    class Part(tf.Module):
        pass

    module = tf.Module()
    module.bit, module.optimizer, module.dense = Part(), Part(), Part()
    module.bit.held = {
        str(i): tf.Variable(x, name=f"keras_layer/{name}")
        for i, (name, x) in enumerate(BODY.items())
    }
    module.dense.kernel = tf.Variable(HEAD[0], name="dense/kernel")
    module.dense.bias = tf.Variable(HEAD[1], name="dense/bias")
    module.optimizer.momentum = tf.Variable(np.ones((1024, CLASSES), np.float32), name="momentum")
    module.save_counter = tf.Variable(3, name="save_counter")
    tf.saved_model.save(module, str(tmp_path / "model"))
    found = load_weights(str(tmp_path / "model"), NETWORK, "teacher")
    same_arrays(found)
    assert found.classes == CLASSES and found.network.options["root_pool_padding"] == "zero"
    assert "variables matched by their names" in found.notes


@pytest.mark.parametrize("order", ORDERS)
def test_a_list_of_variables_without_names(tf, tmp_path, order):
    module = tf.Module()
    module.held = [tf.Variable(x, name="Variable") for x in in_a_list(order)]
    tf.saved_model.save(module, str(tmp_path / "model"))
    found = load_weights(str(tmp_path / "model"), NETWORK, "teacher")
    same_arrays(found)
    assert any("check the teacher's accuracy" in remark for remark in found.notes)


def test_a_keras_model_around_a_layer(tf, tmp_path):
    arrays = in_a_list("creation")

    class Bit(tf.keras.layers.Layer):
        def build(self, shape):
            self.held = [self.add_weight(shape=x.shape, name="w") for x in arrays[:-2]]

        def call(self, images):
            shift = tf.add_n([tf.reduce_mean(x) for x in self.held])
            return shift + tf.reduce_mean(images) + tf.zeros((1, 1024))

        def compute_output_shape(self, shape):
            return (1, 1024)

    inputs = tf.keras.Input((32, 32, 3), batch_size=1)
    model = tf.keras.Model(inputs, tf.keras.layers.Dense(CLASSES)(Bit()(inputs)))
    model.set_weights(arrays)
    model.export(str(tmp_path / "model"), verbose=False)
    same_arrays(load_weights(str(tmp_path / "model"), NETWORK, "teacher"))


def test_saved_models_that_are_refused(tf, tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path / "empty"))
    said = "is a SavedModel without variables"
    with pytest.raises(UserError, match=said):
        load_weights(str(tmp_path / "empty"), NETWORK, "teacher")
    module = tf.Module()
    module.held = [tf.Variable(x) for x in in_a_list("creation")]
    tf.saved_model.save(module, str(tmp_path / "model"))
    with pytest.raises(UserError, match="does not say what it is; give teacher"):
        load_weights(str(tmp_path / "model"), None, "teacher")
    batch = NetworkConfig(model="bit", resolution=32, options={"depths": (1,), "norm": "batch"})
    with pytest.raises(UserError, match="holds a BiT with GroupNorm"):
        load_weights(str(tmp_path / "model"), batch, "teacher")
    data = next((tmp_path / "model" / "variables").glob("*.data-*"))
    whole = data.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for damaged in (whole[:1000], bytes(flipped)):
        data.write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot be read .*copy or download it again"):
            load_weights(str(tmp_path / "model"), NETWORK, "teacher")


def test_without_variables_or_without_tensorflow(tmp_path, monkeypatch):
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(UserError, match="is a SavedModel without variables"):
        load_weights(str(tmp_path), NETWORK, "teacher")
    (tmp_path / "variables").mkdir()
    (tmp_path / "variables" / "variables.index").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[prepare\]'"):
        load_weights(str(tmp_path), NETWORK, "teacher")
