"""Weight files of every kind: what is read from them, and what is refused in a sentence."""

import dataclasses
import hashlib
import json
import pickle
import sys
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import SHARED
from formula import formula_variables
from safetensors.numpy import save_file

from fm_distill.config import NetworkConfig, with_options
from fm_distill.errors import UserError
from fm_distill.models import MODELS, Variables, build_network, resolve
from fm_distill.weights.load import Pretrained, fingerprint, load_weights, start_from
from fm_distill.weights.names import in_naming, naming_of

# The shape of BiT's files, small: an imagenet stem, four blocks, 32 groups.
SMALL = NetworkConfig(model="bit", resolution=32, options={"depths": (1, 1, 1, 1), "width": 0.5})
CLASSES = 7
VARIABLES = formula_variables(SMALL, CLASSES)


def tensors_in(naming: str) -> dict[str, np.ndarray]:
    return {name: x.copy() for name, x in in_naming(naming, SMALL, VARIABLES).items()}


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
    assert found.network.options["root_pool_padding"] == "zero"
    assert found.network.input_range == "minus_one_one"
    assert any("zero: as bit_original" in remark for remark in found.notes)
    assert any("does not state" in remark for remark in found.notes)


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
    assert found.network.options["root_pool_padding"] == "minus_infinity"
    assert any("minus_infinity" in remark for remark in found.notes)


def test_timms_naming(tmp_path):
    path = written(tmp_path / "x.safetensors", tensors_in("timm"))
    found = load_weights(path, SMALL, "teacher")
    same_arrays(found.variables)
    assert found.network.options["root_pool_padding"] == "zero"


def test_the_chosen_root_pool_padding_wins(tmp_path):
    asked = with_options(SMALL, {"root_pool_padding": "minus_infinity"})
    found = load_weights(original(tmp_path / "x.npz"), asked, "teacher")
    assert found.network.options["root_pool_padding"] == "minus_infinity"


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
    expected = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), VARIABLES)
    same_arrays(found.variables, expected)


# What a file says of itself.

TIMM_SAYS = {"mean": "0.5", "std": "0.5", "num_classes": "7", "format": "pt"}


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [
        ("0.5", "[0.5, 0.5, 0.5]", "minus_one_one"),
        ("0.0", "1.0", "zero_one"),
        ("(0.485, 0.456, 0.406)", "0.229 0.224 0.225", "imagenet"),
    ],
)
def test_the_input_range_is_the_files(tmp_path, mean, std, expected):
    path = written(tmp_path / "x.safetensors", tensors_in("timm"), {"mean": mean, "std": std})
    found = load_weights(path, SMALL, "teacher")
    assert found.network.input_range == expected
    assert f"input range {expected}: as the file says" in found.notes


def test_an_unknown_input_range_is_refused(tmp_path):
    clip = "[0.48145466, 0.4578275, 0.40821073]", "[0.26862954, 0.26130258, 0.27577711]"
    for mean, std, said in (
        ("0.43", "0.5", "none of the input ranges of this"),
        ("0.5", "0.229", "deviation (0.229, 0.229, 0.229), which is none"),
        (*clip, "which is none of the input ranges of this"),
        ("often", "0.5", "its mean is 'often'; expected one number or three"),
        ("0.5", "[0.5, 0.5]", "its std is '[0.5, 0.5]'; expected one number or three"),
    ):
        says = {"mean": mean, "std": std}
        refused(written(tmp_path / "x.safetensors", tensors_in("timm"), says), said)


def test_an_input_range_that_contradicts_the_file_is_refused(tmp_path):
    path = written(tmp_path / "x.safetensors", tensors_in("timm"), TIMM_SAYS)
    asked = dataclasses.replace(SMALL, input_range="imagenet")
    refused(
        path,
        "teacher.network.input_range is imagenet",
        "minus_one_one; a wrong normalisation silently lowers the accuracy",
        network=asked,
    )
    refused(path, "student.input_range is imagenet", network=asked, option="student")
    assert load_weights(original(tmp_path / "x.npz"), asked, "teacher").network == resolve(
        with_options(asked, {"groups": 32, "root_pool_padding": "zero"})
    )


def timm_folder(path, tensors, config) -> str:
    """A repository of the hub, as its files lie in a folder."""
    path.mkdir()
    written(path / "model.safetensors", tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


TIMM_CONFIG = {
    "architecture": "resnetv2_50x1_bit",
    "num_classes": CLASSES,
    "pretrained_cfg": {
        "tag": "goog_distilled_in1k",
        "input_size": [3, 224, 224],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
}


@pytest.mark.slow
def test_a_folder_of_the_hub_says_everything(tmp_path):
    network = NetworkConfig(model="bit_r50x1", resolution=224)
    variables = formula_variables(network, CLASSES)
    tensors = in_naming("timm", network, variables)
    found = load_weights(timm_folder(tmp_path / "x", tensors, TIMM_CONFIG), None, "teacher")
    same_arrays(found.variables, variables)
    assert (found.network.model, found.network.resolution) == ("bit_r50x1", 224)
    assert found.network.input_range == "minus_one_one"


def test_a_file_that_says_too_little_is_refused_without_a_network(tmp_path):
    tensors = tensors_in("timm")
    refused(
        original(tmp_path / "x.npz"), "does not say what it is; give teacher.network", network=None
    )
    path = written(tmp_path / "a.safetensors", tensors, {"architecture": "resnetv2_50x1_bit.goog"})
    refused(path, "but not at what resolution", "model='bit_r50x1'", network=None)
    path = written(tmp_path / "b.safetensors", tensors, {"architecture": "vit_base"})
    refused(path, "says that it is a vit_base, which is not one of", network=None)


def test_another_architecture_is_refused(tmp_path):
    folder = timm_folder(tmp_path / "x", tensors_in("timm"), TIMM_CONFIG)
    refused(
        folder, "says that it is a resnetv2_50x1_bit (bit_r50x1), but teacher.network.model is bit"
    )
    other = NetworkConfig(model="bit_r101x1", resolution=32)
    refused(folder, "teacher.network.model is bit_r101x1", network=other)


def test_a_bit_file_for_another_family_is_refused(tmp_path):
    batch = with_options(SMALL, {"norm": "batch"})
    refused(original(tmp_path / "x.npz"), "holds a BiT with GroupNorm", "norm=batch", network=batch)


# Tensors that do not fit, each named.


def test_other_width_is_refused_with_a_short_list(tmp_path):
    message = refused(
        original(tmp_path / "x.npz"),
        "44 tensors differ; check teacher.network.model",
        "is (1, 1, 32, 32), expected (1, 1, 64, 64)",
        network=with_options(SMALL, {"width": 1.0}),
    )
    assert message.endswith("\n  ...") and len(message.splitlines()) == 22


def test_other_depth_is_refused(tmp_path):
    deeper = with_options(SMALL, {"depths": (1, 1, 2, 1)})
    refused(original(tmp_path / "x.npz"), "missing resnet/block3/unit02/a", network=deeper)
    flatter = with_options(SMALL, {"depths": (1, 1, 1)})
    refused(original(tmp_path / "x.npz"), "unexpected resnet/block4/unit01/a", network=flatter)


def test_an_extra_tensor_is_refused(tmp_path):
    path = original(tmp_path / "x.npz", lambda tensors: tensors | {"extra": np.zeros(3)})
    refused(path, "1 tensors differ", "unexpected extra")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    def change(tensors):
        tensors["resnet/group_norm/gamma"][5] = value
        return tensors

    refused(
        original(tmp_path / "x.npz", change), "resnet/group_norm/gamma has values", "not finite"
    )


def test_integers_are_refused(tmp_path):
    def change(tensors):
        return tensors | {"resnet/group_norm/beta": np.zeros(1024, np.int64)}

    refused(original(tmp_path / "x.npz", change), "resnet/group_norm/beta is of type int64")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    def change(tensors):
        name = "resnet/root_block/standardized_conv2d/kernel"
        return tensors | {name.replace("2d/", "2d_4/"): tensors[name]}

    refused(original(tmp_path / "x.npz", change), "several tensors whose names differ only")


def test_unknown_names_are_refused(tmp_path):
    path = written(tmp_path / "x.npz", {"a": np.zeros(3), "b": np.zeros(3)})
    refused(
        path, "none of bit_original, bit_flat, timm, keras", "resnet/head/conv2d/bias", "got a, b"
    )


# Files that are damaged, or may not be loaded.


def test_missing_file(tmp_path):
    refused(tmp_path / "none.npz", "there is no weight file", "expected a BiT .npz")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "is a folder without weights")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("kept", [0.2, 0.999])
def test_truncated_file(tmp_path, suffix, kept):
    naming = "bit_original" if suffix == ".npz" else "timm"
    path = tmp_path / f"x{suffix}"
    written(path, tensors_in(naming))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refused(path, f"is not a complete {suffix} file", "copy or download it again")


def flipped(path, at: int):
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def test_flipped_byte_of_an_npz(tmp_path):
    path = tmp_path / "x.npz"
    original(path)
    flipped(path, path.stat().st_size // 2)
    refused(path, "is not a complete .npz file")


@pytest.mark.parametrize("at", [0, 3, 40])
def test_flipped_byte_of_a_safetensors_header(tmp_path, at):
    path = tmp_path / "x.safetensors"
    written(path, tensors_in("timm"))
    flipped(path, at)
    refused(path, "is not a complete .safetensors file")


def test_empty_and_unknown_files(tmp_path):
    for content, said in (
        (b"", "has an unknown format"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "is an HDF5 file. Convert it once, with Keras"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
    ):
        (tmp_path / "x.npz").write_bytes(content)
        refused(tmp_path / "x.npz", said, "expected a BiT .npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    refused(tmp_path / "one.npy", "is one array")
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        archive.writestr("metadata.json", "{}")
    refused(tmp_path / "x.keras", "a zip archive, but not of arrays")


class Bomb:
    """What a hostile pickle does when it is loaded."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_are_never_loaded(tmp_path, protocol):
    path = tmp_path / "x.pth"
    path.write_bytes(pickle.dumps(Bomb(), protocol))
    refused(path, "is a pickle, and a pickle can run any code", "torch.load(", "weights_only=True")
    with zipfile.ZipFile(path, "w") as archive:  # what torch.save writes
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
        archive.writestr("archive/version", "3")
    refused(path, "is a pickle, and a pickle can run any code")
    np.savez(tmp_path / "x.npz", **tensors_in("bit_original"), objects=np.array([Bomb()], object))
    refused(tmp_path / "x.npz", "holds pickled objects", "never loaded")


# The hub, without a network: only its cache.


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the hub, offline."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached_repository(cache, revision="main") -> None:
    """As huggingface_hub lays out what it downloaded."""
    repository = cache / "models--someone--small"
    snapshot = repository / "snapshots" / ("a" * 40)
    blobs = repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / revision).write_text("a" * 40)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "of something else"}))
    written(blobs / "x.safetensors", tensors_in("timm"), TIMM_SAYS)
    name = hashlib.sha256((blobs / "x.safetensors").read_bytes()).hexdigest()
    (blobs / "x.safetensors").rename(blobs / name)
    (snapshot / "model.safetensors").symlink_to(blobs / name)


def test_a_repository_of_the_hub(hub_cache):
    cached_repository(hub_cache)
    found = load_weights("hf://someone/small", SMALL, "teacher")
    same_arrays(found.variables)
    assert "hf://someone/small: 7 classes" in found.notes[0]
    refused("hf://someone/small@v2", "hf://someone/small@v2 cannot be downloaded")


def test_a_revision_of_the_hub(hub_cache):
    cached_repository(hub_cache, "v2")
    same_arrays(load_weights("hf://someone/small@v2", SMALL, "teacher").variables)


def test_a_damaged_download_is_refused(hub_cache):
    cached_repository(hub_cache)
    blob = next((hub_cache / "models--someone--small" / "blobs").iterdir())
    flipped(blob, blob.stat().st_size - 10)
    refused("hf://someone/small", "is damaged: its SHA-256 is", "the hub says " + blob.name)


def test_the_hub_out_of_reach(hub_cache, monkeypatch):
    refused(
        "hf://someone/small", "cannot be downloaded (LocalEntryNotFoundError", "give the folder"
    )
    refused("hf://someone", "is not an address of the hub; expected hf://OWNER/REPO")
    refused("hf://some..one/x", "cannot be downloaded (HFValidationError")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("hf://someone/small", "needs the package huggingface_hub: pip install -e '.[hub]'")


# A student starts from weights.


def pretrained(names=None) -> Pretrained:
    return Pretrained(SMALL, CLASSES, names, VARIABLES, ())


def test_the_head_is_kept_where_the_classes_are_the_same():
    init = jax.tree.map(lambda x: x + 1, VARIABLES)
    names = tuple("abcdefg")
    for theirs, ours in ((None, None), (names, None), (None, names), (names, names)):
        found, sentence = start_from(init, pretrained(theirs), CLASSES, ours)
        same_arrays(found)
        assert sentence == "the head of 7 classes is kept"


def test_the_head_of_other_classes_is_replaced():
    init = jax.tree.map(lambda x: x + 1, formula_variables(SMALL, 3))
    found, sentence = start_from(init, pretrained(), 3, None)
    assert sentence == "the head of 7 classes is replaced by a new one of 3 classes"
    expected = Variables({**VARIABLES.params, "head": init.params["head"]}, {})
    same_arrays(found, expected)
    same = jax.tree.map(lambda x: x + 1, VARIABLES)
    found, sentence = start_from(same, pretrained(tuple("abcdefg")), 7, tuple("abcdegf"))
    assert sentence == "the head of 7 classes is replaced by a new one of 7 other classes"
    np.testing.assert_array_equal(found.params["head"]["bias"], same.params["head"]["bias"])


def test_fingerprint_is_of_contents():
    head = VARIABLES.params["head"]
    other = {**VARIABLES.params, "head": head | {"bias": head["bias"].at[0].add(1e-5)}}
    copied = Variables(jax.tree.map(lambda x: x + 0, VARIABLES.params), {})
    assert fingerprint(copied) == fingerprint(VARIABLES) != fingerprint(Variables(other, {}))


# The real file of EfficientNet-Lite0.

LITE = SHARED / "weights" / "tf_efficientnet_lite0.in1k.safetensors"


@pytest.mark.skipif(not LITE.is_file(), reason="needs the weights of EfficientNet-Lite0")
def test_timms_file_of_efficientnet_lite0():
    asked = NetworkConfig(model="efficientnet_lite0", resolution=224)
    found = load_weights(str(LITE), asked, "teacher")
    assert found.classes == 1000 and found.network.input_range == "minus_one_one"
    assert "input range minus_one_one: as the file says" in found.notes
    refused(LITE, "but not at what resolution", "model='efficientnet_lite0'", network=None)
    other = NetworkConfig(model="efficientnet_lite1", resolution=224)
    refused(LITE, "is a tf_efficientnet_lite0 (efficientnet_lite0)", network=other)


@pytest.mark.parametrize(
    "model", ["efficientnet_lite0", "mobilenet_v3_small", "mobilenet_v3_small_gn", "resnet50v2"]
)
def test_other_families_come_back_from_their_naming(tmp_path, model):
    network = NetworkConfig(model=model, resolution=64)
    built = build_network(network, CLASSES, jnp.dtype("float32"))
    leaves, tree = jax.tree.flatten(jax.eval_shape(built.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    values = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    variables = jax.tree.unflatten(tree, values)
    tensors = in_naming(naming_of(network), network, variables)
    path = written(tmp_path / "x.safetensors", tensors)
    found = load_weights(path, network, "teacher")
    same_arrays(found.variables, variables)
    assert found.network.input_range == MODELS[model].input_range
    refused(path, "does not hold a bit")
    refused(original(tmp_path / "x.npz"), "holds a BiT with GroupNorm", network=network)
