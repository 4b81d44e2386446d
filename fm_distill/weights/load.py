"""Pretrained weights in any form that is read here, into the variables of one of our networks."""

import dataclasses
import hashlib
import re
from typing import Literal, cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import PyTree

from fm_distill.config import InputRange, NetworkConfig
from fm_distill.errors import UserError
from fm_distill.models import MODELS, Variables, build_network, resolve
from fm_distill.views import INPUT_RANGES
from fm_distill.weights.card import only_network
from fm_distill.weights.files import Facts, WeightFile, read
from fm_distill.weights.names import NAMINGS, Stored, to_ours

# The bias of the head, by which a naming is recognised and the classes are counted; timm has one
# name in BiT and one in its mobile families.
HEADS = {
    "resnet/head/conv2d/bias": "bit_original",
    "head/bias": "bit_flat",
    "head.fc.bias": "timm",
    "classifier.bias": "timm",
    "predictions/bias": "keras",
}
# Fields of a network that its weights do not fix.
FREE = ("resolution", "input_range", "root_pool_padding")
# Largest difference between a file's mean or deviation and the ones of an input range.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network with its weights, and what is known of it."""

    network: NetworkConfig  # nothing in it is `auto`
    classes: int  # of its head
    class_names: tuple[str, ...] | None
    variables: Variables
    remarks: tuple[str, ...]  # what was recognised and what was chosen, a sentence each


def load_weights(path: str, network: NetworkConfig | None, option: str) -> Pretrained:
    """The weights at `path`: a file, a folder or `hf://OWNER/REPO`.

    `network` says what they are and how they are used; where it is None the file has to say it.
    `option` is where both were given, `teacher` or `student`, and stands in messages. Raises
    `UserError` where the file cannot be read, says otherwise than `network`, or does not hold it:
    then every missing, unexpected, mis-shaped and not finite tensor is listed.
    """
    fields = option if option == "student" else f"{option}.network"
    file = read(path)
    described, remarks = _described(file, only_network(network) if network else None, fields)
    naming, tensors, head = _recognised(file)
    if naming.startswith("bit") and not (
        described.model.startswith("bit") and described.norm == "group"
    ):
        raise UserError(
            f"{path} holds a BiT with GroupNorm, by its tensors' names ({naming}), but the network "
            f"is {described.model} with norm={described.norm}; check {fields}.model"
        )
    classes = int(tensors[head].size)
    remarks = [f"{path}: {classes} classes, names of the kind {naming}", *remarks]
    chosen, more = _without_auto(described, file, naming, fields)
    variables = _placed(file, chosen, classes, naming, tensors, fields)
    names = file.facts.card.class_names if file.facts.card else None
    return Pretrained(chosen, classes, names, variables, (*remarks, *more))


def _described(
    file: WeightFile, asked: NetworkConfig | None, fields: str
) -> tuple[NetworkConfig, list[str]]:
    """The network that was asked for, checked against what the file says of itself."""
    said = _said(file.facts)
    if asked is None:
        if said is not None:
            return said, [f"network: {said.model} at {said.resolution}, as the file says"]
        architecture = file.facts.architecture
        known = _model_of(architecture)
        what = f"says that it is a {architecture}" if architecture else "does not say what it is"
        if architecture and not known:
            raise UserError(
                f"{file.path} {what}, which is none of the networks here: "
                + ", ".join(f"{x.timm} ({name})" for name, x in MODELS.items() if x.timm)
            )
        raise UserError(
            f"{file.path} {what}{', but not at what resolution' if known else ''}; give {fields} = "
            f"NetworkConfig(model={known or '...'!r}, resolution=...) in the experiment file"
        )
    card, architecture = file.facts.card, file.facts.architecture
    if card and (differ := differing(card.network, asked)):
        raise UserError(f"{file.path} holds another network than {fields} says: {differ}")
    timm = MODELS[asked.model].timm
    if architecture and architecture != timm and (timm or _model_of(architecture)):
        raise UserError(
            f"{file.path} says that it is a {architecture}"
            + (f" ({_model_of(architecture)})" if _model_of(architecture) else "")
            + f", but {fields}.model is {asked.model}"
        )
    if card:
        padding = asked.root_pool_padding
        padding = card.network.root_pool_padding if padding == "auto" else padding
        asked = dataclasses.replace(asked, root_pool_padding=padding)
    return asked, []


def differing(stored: NetworkConfig, asked: NetworkConfig) -> str:
    """The fields in which `asked` cannot be what is stored, as text; empty where it can be."""
    a, b = msgspec.to_builtins(stored), msgspec.to_builtins(only_network(asked))
    fields = [name for name in a if name not in FREE and a[name] != b[name]]
    return "; ".join(f"{name} is {a[name]}, asked for {b[name]}" for name in fields)


def _said(facts: Facts) -> NetworkConfig | None:
    """The network, where the file describes it completely."""
    if facts.card:
        return facts.card.network
    model = _model_of(facts.architecture)
    if model and facts.resolution:
        return NetworkConfig(model=model, resolution=facts.resolution)
    return None


def _model_of(architecture: str | None) -> str | None:
    """Our name for what timm calls `architecture`."""
    return next(
        (name for name, x in MODELS.items() if architecture and x.timm == architecture), None
    )


def _recognised(file: WeightFile) -> tuple[str, dict[str, np.ndarray], str]:
    """The naming, the tensors by their names in it, and the name of the head's bias."""
    tensors = dict(file.tensors)
    for prefix in ("params/", "opt/target/"):
        # A whole checkpoint of the trainer has the optimizer's state beside it.
        if any(name.startswith(prefix) for name in tensors):
            tensors = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
    # Some files number the convolutions as TensorFlow's scopes did; Keras 2 numbers outputs.
    pattern = re.compile(r"(?<=standardized_conv2d)_\d+|:0$")
    renamed = {pattern.sub("", name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise UserError(f"{file.path} has several tensors of one name, but for a number in it")
    for head, naming in HEADS.items():
        if head in renamed:
            return naming, renamed, head
    raise UserError(
        f"{file.path}: the names of its tensors are none of {', '.join(NAMINGS)}: there is no "
        f"{' or '.join(HEADS)}; got {', '.join(sorted(renamed)[:3]) or 'no tensor at all'}"
    )


def _without_auto(
    network: NetworkConfig, file: WeightFile, naming: str, fields: str
) -> tuple[NetworkConfig, list[str]]:
    """`network` with the file's own input range and root pool where it says `auto`."""
    said = _input_range(file, fields)
    remarks = []
    if network.input_range == "auto":
        chosen = said or MODELS[network.model].input_range
        why = "as the file says" if said else "the model's usual one, since the file does not say"
        network = dataclasses.replace(network, input_range=chosen)
        remarks.append(f"input range {chosen}: {why}")
    elif said and said != network.input_range:
        raise UserError(
            f"{fields}.input_range is {network.input_range}, but {file.path} says that it was "
            f"trained with {said}; a wrong normalisation costs points silently: use auto"
        )
    if network.root_pool_padding == "auto":
        padding: Literal["zero", "minus_infinity"]
        padding = "minus_infinity" if naming == "bit_flat" else "zero"
        network = dataclasses.replace(network, root_pool_padding=padding)
        if network.model.startswith("bit") and network.stem == "imagenet":
            remarks.append(f"root pool padding {padding}: as {naming} files were trained")
    return resolve(network), remarks


def _input_range(file: WeightFile, fields: str) -> InputRange | None:
    """The name of the file's mean and deviation; None where it does not say them."""
    mean, std = file.facts.mean, file.facts.std
    if mean is None or std is None:
        return None
    for name, (means, deviations) in INPUT_RANGES.items():
        ours = np.array([*means, *deviations]) / 255
        if np.abs(ours - np.array([*mean, *std])).max() <= TOLERANCE:
            return cast(InputRange, name)
    raise UserError(
        f"{file.path} was trained with mean {mean} and deviation {std}, which is none of the input "
        f"ranges here ({', '.join(INPUT_RANGES)}); a wrong normalisation costs points silently, so "
        f"no {fields}.input_range can stand for it"
    )


def _placed(
    file: WeightFile,
    network: NetworkConfig,
    classes: int,
    naming: str,
    tensors: dict[str, np.ndarray],
    fields: str,
) -> Variables:
    """The tensors as the network's variables. Raises `UserError` that lists what does not fit."""
    init = build_network(network, classes, jnp.dtype("float32")).init
    expected = jax.eval_shape(init, jax.random.key(0))
    names = NAMINGS[naming](network, expected)
    problems: list[str] = []

    def place(stored: Stored, leaf: jax.ShapeDtypeStruct) -> jax.Array | None:
        if stored.name not in tensors:
            problems.append(f"missing {stored.name}")
            return None
        tensor = tensors[stored.name]
        if tensor.shape != stored.shape:
            problems.append(f"{stored.name} is {tensor.shape}, expected {stored.shape}")
            return None
        if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            problems.append(f"{stored.name} has values that are not finite numbers")
            return None
        return jnp.asarray(to_ours(tensor, stored, leaf.shape))

    def tree_of(part: str, shapes: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: place(
                names[f"{part}/" + jax.tree_util.keystr(path, simple=True, separator="/")], leaf
            ),
            shapes,
        )

    variables = Variables(
        tree_of("params", expected.params), tree_of("statistics", expected.statistics)
    )
    expected_names = {stored.name for stored in names.values()}
    problems += [f"unexpected {name}" for name in sorted(set(tensors) - expected_names)]
    if problems:
        shown = "\n  ".join(problems[:20] + ["..."] * (len(problems) > 20))
        raise UserError(
            f"{file.path} does not hold a {network.model} ({naming}): {len(problems)} tensors "
            f"differ; check {fields}.model\n  {shown}"
        )
    return variables


def start_from(
    init: Variables,
    pretrained: Pretrained,
    classes: int,
    class_names: tuple[str, ...] | None,
) -> tuple[Variables, str]:
    """Where a student of `classes` starts: at `pretrained`, with the head of `init` if it has to.

    The head is kept where it has as many classes and its names, if known, are the same. The
    sentence says which.
    """
    theirs = pretrained.class_names
    if pretrained.classes == classes and (None in (theirs, class_names) or theirs == class_names):
        return pretrained.variables, f"the head of {classes} classes is kept"
    params = {**pretrained.variables.params, "head": init.params["head"]}
    other = " others" if pretrained.classes == classes else f" {classes}"
    return (
        Variables(params, pretrained.variables.statistics),
        f"the head of {pretrained.classes} classes is replaced by a new one of{other}",
    )


def fingerprint(variables: PyTree) -> str:
    """SHA-256 of the names, shapes and bytes of all arrays: the identity of a teacher."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
