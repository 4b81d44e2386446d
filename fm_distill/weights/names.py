"""Where each array of a network's variables stands in a weight file, for every naming in use.

A naming is a function `(network, variables or their shapes) -> {path of ours: Stored}` and a line
in `NAMINGS`. It serves loading and writing, so a file that was written is read back in every bit.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from fm_distill.config import NetworkConfig
from fm_distill.models import Variables, is_own


class Stored(NamedTuple):
    """One array in a file: there it has `shape`; transposed by `axes` and reshaped it is ours."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]


Naming = Callable[[NetworkConfig, Variables], dict[str, Stored]]


def shapes_of(variables: Variables) -> dict[str, tuple[int, ...]]:
    """Each array's shape by its path, `params/block1_unit01/a/kernel` or `statistics/...`."""
    tree = {"params": variables.params, "statistics": variables.statistics}
    return {path: leaf.shape for path, leaf in leaves_by_path(tree)}


def to_ours(array: np.ndarray, stored: Stored, shape: tuple[int, ...]) -> np.ndarray:
    """The array of the file in our layout."""
    return array.transpose(stored.axes).reshape(shape)


def to_stored(array: np.ndarray, stored: Stored) -> np.ndarray:
    """The inverse of `to_ours`."""
    transposed = tuple(stored.shape[i] for i in stored.axes)
    return np.ascontiguousarray(array.reshape(transposed).transpose(np.argsort(stored.axes)))


def _as_is(name: str, shape: tuple[int, ...], ones: int = 0) -> Stored:
    """Stored in our layout, after a number of leading axes of length one."""
    return Stored(name, (1,) * ones + shape, tuple(range(ones + len(shape))))


def _torch(name: str, shape: tuple[int, ...], head_is_convolution: bool = False) -> Stored:
    """PyTorch's layouts: OIHW for a convolution, (out, in) for a dense layer."""
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        return Stored(name, (outputs, inputs, height, width), (2, 3, 1, 0))
    if len(shape) == 2 and head_is_convolution:
        return Stored(name, (shape[1], shape[0], 1, 1), (2, 3, 1, 0))
    return Stored(name, shape[::-1], tuple(reversed(range(len(shape)))))


_TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "gamma": "gamma",
    "mean": "running_mean",
    "var": "running_var",
}


def _bit_parts(path: str) -> tuple[str, str, str, str]:
    """Block, unit, part and leaf of one of BiT's paths; block and unit are empty outside units."""
    _, *modules, leaf = path.split("/")
    if len(modules) == 1:
        return "", "", modules[0], leaf
    block, unit = modules[0].split("_")
    return block, unit, modules[1], leaf


def bit_original(network: NetworkConfig, variables: Variables) -> dict[str, Stored]:
    """`resnet/block1/unit01/a/standardized_conv2d/kernel`. Source: big_transfer's weight files."""
    leaves = {"scale": "group_norm/gamma", "bias": "group_norm/beta"}

    def stored(path: str, shape: tuple[int, ...]) -> Stored:
        block, unit, part, leaf = _bit_parts(path)
        if part == "head":
            return _as_is(f"resnet/head/conv2d/{leaf}", shape, 2 if leaf == "kernel" else 0)
        if part == "root":
            return _as_is("resnet/root_block/standardized_conv2d/kernel", shape)
        if part == "norm":
            return _as_is(f"resnet/{leaves[leaf]}", shape)
        if part.endswith("_norm"):
            return _as_is(f"resnet/{block}/{unit}/{part[0]}/{leaves[leaf]}", shape)
        part = {"projection": "a/proj"}.get(part, part)
        return _as_is(f"resnet/{block}/{unit}/{part}/standardized_conv2d/kernel", shape)

    return {path: stored(path, shape) for path, shape in shapes_of(variables).items()}


def bit_flat(network: NetworkConfig, variables: Variables) -> dict[str, Stored]:
    """`block1/unit01/conv1/kernel`. Source: the released trainer, big_vision's bit_paper.py."""
    parts = {
        **{"a": "conv1", "b": "conv2", "c": "conv3", "projection": "conv_proj"},
        **{"a_norm": "gn1", "b_norm": "gn2", "c_norm": "gn3"},
    }

    def stored(path: str, shape: tuple[int, ...]) -> Stored:
        block, unit, part, leaf = _bit_parts(path)
        if part == "head":
            return _as_is(f"head/{leaf}", shape)
        if part == "root":
            return _as_is("root_block/conv_root/kernel", shape)
        if part == "norm":
            return _as_is(f"norm-pre-head/{leaf}", shape, 3)
        ones = 3 if part.endswith("_norm") else 0
        return _as_is(f"{block}/{unit}/{parts[part]}/{leaf}", shape, ones)

    return {path: stored(path, shape) for path, shape in shapes_of(variables).items()}


# What timm calls the classifier, by the beginning of the model's name; `classifier` elsewhere.
_TIMM_HEADS = {"resnet": "fc", "vit": "head", "deit": "head", "convnext": "head.fc"}


def timm(network: NetworkConfig, variables: Variables) -> dict[str, Stored]:
    """`stages.0.blocks.0.conv1.weight` (BiT), `blocks.0.0.conv_dw.weight`. Source: timm 1.0.

    BiT has a naming of its own; in the other families our modules have timm's names, where
    `blocks_0_0` stands for `blocks.0.0` and `head` for the classifier.
    """
    if network.model.startswith("bit"):
        return {path: _timm_bit(path, shape) for path, shape in shapes_of(variables).items()}
    heads = [head for family, head in _TIMM_HEADS.items() if network.model.startswith(family)]
    head = heads[0] if heads else "classifier"
    return {path: _timm_mirrored(path, shape, head) for path, shape in shapes_of(variables).items()}


def _timm_bit(path: str, shape: tuple[int, ...]) -> Stored:
    block, unit, part, leaf = _bit_parts(path)
    leaf = _TORCH_LEAVES[leaf]
    if part == "head":
        return _torch(f"head.fc.{leaf}", shape, head_is_convolution=True)
    if part == "root":
        return _torch("stem.conv.weight", shape)
    if part == "norm":
        return _torch(f"norm.{leaf}", shape)
    parts = {
        **{"a": "conv1", "b": "conv2", "c": "conv3", "projection": "downsample.conv"},
        **{"a_norm": "norm1", "b_norm": "norm2", "c_norm": "norm3"},
    }
    stage, index = int(block.removeprefix("block")) - 1, int(unit.removeprefix("unit")) - 1
    return _torch(f"stages.{stage}.blocks.{index}.{parts[part]}.{leaf}", shape)


def _timm_mirrored(path: str, shape: tuple[int, ...], head: str) -> Stored:
    _, *modules, leaf = path.split("/")
    if not modules:
        # Tokens and positions, which are of no module.
        return _as_is(leaf, shape)
    name = ".".join(re.sub(r"_(?=\d)", ".", module) for module in modules)
    name = {"head": head, "head.dist": "head_dist", "head_norm": "head.norm"}.get(name, name)
    return _torch(f"{name}.{_TORCH_LEAVES[leaf]}", shape)


def keras(network: NetworkConfig, variables: Variables) -> dict[str, Stored]:
    """`conv2_block1_1_conv/kernel`: our modules of ResNet50V2 have Keras's names and layouts."""
    leaves = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}

    def stored(path: str, shape: tuple[int, ...]) -> Stored:
        _, *modules, leaf = path.split("/")
        name = "predictions" if modules == ["head"] else "/".join(modules)
        is_norm = name.endswith("_bn")
        return _as_is(f"{name}/{leaves[leaf] if is_norm else leaf}", shape)

    return {path: stored(path, shape) for path, shape in shapes_of(variables).items()}


def flax(network: NetworkConfig, variables: Variables) -> dict[str, Stored]:
    """`params/encoder/kernel`: the names of a custom network."""
    return {path: _as_is(path, shape) for path, shape in shapes_of(variables).items()}


NAMINGS: dict[str, Naming] = {
    "bit_original": bit_original,
    "bit_flat": bit_flat,
    "timm": timm,
    "keras": keras,
    "flax": flax,
}


def naming_of(network: NetworkConfig) -> str:
    """The naming that a network is exported in: timm's, where timm has it."""
    if is_own(network.model):
        return "flax"
    return "keras" if network.model == "resnet50v2" else "timm"


def in_naming(naming: str, network: NetworkConfig, variables: Variables) -> dict[str, np.ndarray]:
    """All arrays of `variables` as a file with this naming holds them."""
    names = NAMINGS[naming](network, variables)
    tree = {"params": variables.params, "statistics": variables.statistics}
    return {
        names[path].name: to_stored(np.asarray(leaf), names[path])
        for path, leaf in leaves_by_path(tree)
    }


def leaves_by_path(tree: PyTree) -> list[tuple[str, Any]]:
    """Each array with its path, `params/block1_unit01/a/kernel`, in the order of the tree."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
