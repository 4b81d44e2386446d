"""Weight files of every kind: what is read from them, and what is refused in a sentence."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from formula import formula_variables
from safetensors.numpy import save_file

from fm_distill.config import NetworkConfig
from fm_distill.errors import UserError
from fm_distill.models import Variables
from fm_distill.weights.load import load_weights
from fm_distill.weights.names import in_naming

# The shape of BiT's files, small: an imagenet stem, four blocks, 32 groups.
SMALL = NetworkConfig(model="bit", resolution=32, depths=(1, 1, 1, 1), width=0.5)
CLASSES = 7
VARIABLES = formula_variables(SMALL, CLASSES)


def tensors_in(naming: str) -> dict[str, np.ndarray]:
    return in_naming(naming, SMALL, VARIABLES)


def written(path, tensors, metadata=None) -> str:
    """A file of the kind that the suffix says."""
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    else:
        save_file(tensors, path, metadata)
    return str(path)


def original(path, change=lambda tensors: tensors) -> str:
    return written(path, change(tensors_in("bit_original")))


def same_arrays(found: Variables, expected: Variables = VARIABLES):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def refused(path, *said: str, network: NetworkConfig | None = SMALL, option="teacher") -> str:
    with pytest.raises(UserError) as caught:
        load_weights(str(path), network, option)
    message = str(caught.value)
    for text in said:
        assert text in message, message
    return message


# The three namings of BiT hold the same arrays.


def test_the_original_naming(tmp_path):
    found = load_weights(original(tmp_path / "x.npz"), SMALL, "teacher")
    same_arrays(found.variables)
    assert found.classes == CLASSES and found.class_names is None
    assert found.network.root_pool_padding == "zero"
    assert found.network.input_range == "minus_one_one"
    assert any("zero: as bit_original" in remark for remark in found.remarks)
    assert any("does not say" in remark for remark in found.remarks)


def test_numbered_convolutions(tmp_path):
    numbered = {
        name.replace("standardized_conv2d", f"standardized_conv2d_{i}"): tensor
        for i, (name, tensor) in enumerate(tensors_in("bit_original").items())
    }
    same_arrays(load_weights(written(tmp_path / "x.npz", numbered), SMALL, "teacher").variables)


@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
def test_the_trainers_naming_with_its_prefixes(tmp_path, prefix):
    tensors = {prefix + name: tensor for name, tensor in tensors_in("bit_flat").items()}
    assert tensors[prefix + "norm-pre-head/scale"].shape == (1, 1, 1, 1024)
    if prefix:
        tensors["opt/state/0/mu/head/kernel"] = np.ones(3)
    found = load_weights(written(tmp_path / "x.npz", tensors), SMALL, "teacher")
    same_arrays(found.variables)
    assert found.network.root_pool_padding == "minus_infinity"
    assert any("minus_infinity" in remark for remark in found.remarks)


def test_timms_naming(tmp_path):
    path = written(tmp_path / "x.safetensors", tensors_in("timm"))
    found = load_weights(path, SMALL, "teacher")
    same_arrays(found.variables)
    assert found.network.root_pool_padding == "zero"


def test_the_chosen_root_pool_padding_wins(tmp_path):
    asked = dataclasses.replace(SMALL, root_pool_padding="minus_infinity")
    found = load_weights(original(tmp_path / "x.npz"), asked, "teacher")
    assert found.network.root_pool_padding == "minus_infinity"


def test_the_content_counts_not_the_suffix(tmp_path):
    original(tmp_path / "a.npz")
    (tmp_path / "a.npz").rename(tmp_path / "weights.safetensors")
    found = load_weights(str(tmp_path / "weights.safetensors"), SMALL, "teacher")
    same_arrays(found.variables)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(tmp_path, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors_in("timm").items()}
    tensors["norm.num_batches_tracked"] = np.array(5)
    found = load_weights(written(tmp_path / "x.safetensors", tensors), SMALL, "teacher")
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), VARIABLES)
    same_arrays(found.variables, expected)
