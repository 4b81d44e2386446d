"""Pretrained weights in any form that is read here, into the variables of one of our networks."""

import dataclasses
import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from fm_distill.config import NetworkConfig
from fm_distill.errors import UserError
from fm_distill.models import HEAD, Variables, all_options, build_network, is_own
from fm_distill.system.foreign_code import refuse_foreign_code
from fm_distill.weights.card import only_network
from fm_distill.weights.description import describe, without_auto
from fm_distill.weights.files import WeightFile, read
from fm_distill.weights.names import NAMINGS, Stored, bit_original, to_ours
from fm_distill.weights.structure import HEAD_BIAS, HEAD_KERNEL, as_original

# The bias of the head, by which a naming is recognised and the classes are counted; timm's name
# depends on the family.
HEADS = {
    HEAD_BIAS: "bit_original",
    "head/bias": "bit_flat",
    "head.fc.bias": "timm",
    "classifier.bias": "timm",
    "fc.bias": "timm",
    "head.bias": "timm",
    "predictions/bias": "keras",
}
# Of timm's files without a head (num_classes=0), a tensor that tells them.
BODIES = ("pos_embed", "stem.0.weight", "conv1.weight", "conv1.0.weight")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A network with its weights, and what is known of it."""

    network: NetworkConfig  # nothing in it is `auto`
    classes: int  # of its head; 0 where there is none, and then `variables` have none either
    class_names: tuple[str, ...] | None
    variables: Variables
    notes: tuple[str, ...]  # what was recognised and what was chosen, a sentence each


def load_weights(path: str, network: NetworkConfig | None, option: str) -> Pretrained:
    """The weights at `path`: a file, a folder or `hf://OWNER/REPO`.

    `network` describes them and how they are used; where it is None the file has to.
    `option` is where both were given, `teacher` or `student`, and stands in messages. Raises
    `UserError` where the file cannot be read, describes another network, or does not hold it: then
    every missing, unexpected, mis-shaped and not finite tensor is listed.
    """
    fields = option if option == "student" else f"{option}.network"
    file = read(path)
    if network is None and (card := file.facts.card) and is_own(card.model):
        refuse_foreign_code((card.model,), card.code_files, path)
    described_network, notes = describe(file, only_network(network) if network else None, fields)
    if file.kind == "saved_model":
        _check_bit(file, described_network, "bit_original", fields)
        names = bit_original(described_network, _shapes(described_network, 2))
        body_shapes = {
            x.name: x.shape for x in names.values() if x.name not in (HEAD_KERNEL, HEAD_BIAS)
        }
        tensors, note = as_original(path, file.tensors, body_shapes)
        file, notes = dataclasses.replace(file, tensors=tensors), [*notes, note]
    naming, tensors, classes = _recognised(file)
    _check_bit(file, described_network, naming, fields)
    notes = [f"{path}: {classes or 'no'} classes, {naming} names", *notes]
    resolved_network, more_notes = without_auto(described_network, file, naming, fields)
    variables = _placed(file, resolved_network, classes, naming, tensors, fields)
    class_names = file.facts.card.class_names if file.facts.card else None
    return Pretrained(resolved_network, classes, class_names, variables, (*notes, *more_notes))


def _check_bit(file: WeightFile, network: NetworkConfig, naming: str, fields: str) -> None:
    """Raises `UserError` where a naming of BiT meets another family."""
    norm = all_options(network).get("norm", "group")
    if naming.startswith("bit") and (not network.model.startswith("bit") or norm != "group"):
        raise UserError(
            f"{file.path} holds a BiT with GroupNorm, by its tensors' names ({naming}), but the "
            f"network is {network.model} with norm={norm}; check {fields}.model"
        )


def _shapes(network: NetworkConfig, classes: int) -> Variables:
    init = build_network(network, classes, jnp.dtype("float32")).init
    return jax.eval_shape(init, jax.random.key(0))


def _recognised(file: WeightFile) -> tuple[str, dict[str, np.ndarray], int]:
    """The naming, the tensors by their names in it, and the number of classes, 0 without a head."""
    tensors = dict(file.tensors)
    card = file.facts.card
    if card is not None and is_own(card.model):
        return card.naming, tensors, card.classes
    for prefix in ("params/", "opt/target/"):
        # An intact checkpoint of the trainer has the optimizer's state beside it.
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
        raise UserError(f"{file.path} has several tensors whose names differ only in a number")
    for head, naming in HEADS.items():
        if head in renamed:
            return naming, renamed, int(renamed[head].size)
    if any(name in renamed for name in BODIES):
        return "timm", renamed, 0
    raise UserError(
        f"{file.path}: the names of its tensors are none of {', '.join(NAMINGS)}: there is no "
        f"{' or '.join(HEADS)}; got {', '.join(sorted(renamed)[:3]) or 'no tensor at all'}"
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
    expected = _shapes(network, classes)
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
        if tensor.dtype != np.float32:
            problems.append(f"{stored.name} is of type {tensor.dtype}, expected floats")
            return None
        if not np.isfinite(tensor).all():
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
        listing = "\n  ".join(problems[:20] + ["..."] * (len(problems) > 20))
        raise UserError(
            f"{file.path} does not hold a {network.model} ({naming}): {len(problems)} tensors "
            f"differ; check {fields}.model\n  {listing}"
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
    pretrained_names, start = pretrained.class_names, pretrained.variables
    start = dataclasses.replace(start, ranges=_ranges(init.ranges, start.ranges))
    if pretrained.classes == classes and (
        None in (pretrained_names, class_names) or pretrained_names == class_names
    ):
        return start, f"the head of {classes} classes is kept"
    if HEAD not in init.params:
        raise UserError(
            f"the network's last layer must be named `{HEAD}`, so that it can be replaced: the "
            f"weights have {pretrained.classes} classes, and the run {classes}; it has "
            f"{', '.join(init.params)}"
        )
    start = dataclasses.replace(start, params={**start.params, HEAD: init.params[HEAD]})
    if not pretrained.classes:
        return (
            start,
            f"the weights have no head: there is a new one of {classes} classes",
        )
    other = " other" if pretrained.classes == classes else ""
    return (
        start,
        f"the head of {pretrained.classes} classes is replaced by a new one of {classes}{other} "
        "classes",
    )


def _ranges(init: PyTree, known: PyTree) -> PyTree:
    """Ranges of quantised activations: those that are known, and new ones of further layers."""
    if not isinstance(init, dict):
        return init if known is None else known
    known_ranges = known or {}
    return {name: _ranges(value, known_ranges.get(name)) for name, value in init.items()}


def fingerprint(variables: PyTree) -> str:
    """SHA-256 of the names, shapes and bytes of all arrays: the identity of a teacher."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
