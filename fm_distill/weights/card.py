"""The card of an export: the weight file's own description, as JSON in its metadata."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import numpy as np

from fm_distill.config import NetworkConfig, QuantisationConfig
from fm_distill.config.resolved import CodeFile
from fm_distill.config.serialization import before_options, converted
from fm_distill.errors import UserError
from fm_distill.views.rendering import CentralCrop

# Where the card stands in the metadata of a safetensors file.
CARD_KEY = "fm_distill"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
    """An exported function, run by its own runtime, beside the run on the same uint8 pixels."""

    runtime: str
    split: str
    images: int
    # Of what the file returns, and what was allowed.
    largest_difference: float
    bound: float
    # Fraction of the numbers within the bound: all, but where activations are quantised.
    within_bound: float = 1.0
    # Root mean square of the difference over that of what the run returns about its mean, and
    # what was allowed of a file of `export --quantise`, or of a student quantised in training,
    # which may have nearly all within the bound instead. None in older files.
    relative_error: float | None = None
    relative_bound: float | None = None
    # Fraction of the images with the same most likely class.
    agreement: float
    # Top-1 on the images whose label is known; None where there is none.
    file_top1: float | None
    run_top1: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """What a student in eight bits gains by some layers in floats, on the calibration's images.

    Errors of the logits: root mean square, over that of the float logits about each class's mean.
    """

    float_layers: tuple[str, ...]
    error: float
    error_with_them: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionFacts:
    """What a file with a whole function takes and returns.

    uint8 pixels (batch, resolution, resolution, 3), 0 to 255, to float32 (batch, classes).
    """

    format: Literal["stablehlo", "onnx", "tflite"]
    batch: int | Literal["dynamic"]
    output: Literal["probabilities", "logits"]
    parity: Parity
    # Of the function without this card, and of its weights as float32; None in older files.
    bytes: int | None = None
    float32_bytes: int | None = None
    quantise: Literal["none", "float16", "dynamic", "int8"] = "none"
    # Of a student in eight bits without training, by layer: see `exporting.calibration`.
    layer_errors: dict[str, float] | None = None
    # How far each layer alone changes the logits, relative as in `MixedPrecision`.
    layer_effects: dict[str, float] | None = None
    mixed_precision: MixedPrecision | None = None
    # Of a student in eight bits without training.
    quantisation: QuantisationConfig | None = None
    # How often it has each operation, where its runtime tells.
    operations: dict[str, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """Everything that is needed to use an export, and where it comes from."""

    # A key of `models.MODELS`, and the whole network; nothing in it is `auto`.
    model: str
    network: NetworkConfig
    classes: int
    class_names: tuple[str, ...] | None
    # Of the input, on the scale where a pixel is 0 to 1.
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # Of the central view of evaluation.
    resolution: int
    central_fraction: float
    central_resize: Literal["bilinear", "area"] = "bilinear"
    # Compute type of the run.
    precision: Literal["float32", "bfloat16"] = "float32"
    # The student as it stood after this step, or its moving average.
    step: int
    averaged: bool
    # `evaluation.json` and `config.json` of the run.
    metrics: dict[str, Any] | None
    config: dict[str, Any]
    versions: dict[str, Any]
    commit: str | None
    # A key of `weights.names.NAMINGS`.
    naming: str
    # Of all tensors; see `digest`. Of a file with a function: of the tensors that it was made of.
    sha256: str
    # Of the run's teachers, in their order: `weights.load.fingerprint`.
    teacher_weights: tuple[str, ...] = ()
    # By their references, where the run found the files of code that its config names.
    code_files: Mapping[str, CodeFile] = dataclasses.field(default_factory=dict)
    # Of a file with a whole function, which computes in float32; None of one with weights.
    function: FunctionFacts | None = None

    @property
    def central_crop(self) -> CentralCrop:
        return CentralCrop(self.central_fraction, self.central_resize)


def card_from_json(text: str, path: str) -> Card:
    """The card in the metadata of `path`. Raises `UserError` where it is not one."""
    try:
        tree = msgspec.json.decode(text)
        card = converted(tree, Card)
    except msgspec.DecodeError as error:
        raise UserError(
            f"{path}: its card does not fit this version ({error}); export it again with this one"
        ) from None
    if before_options(tree["network"]):
        raise UserError(
            f"{path}: its card does not fit this version (it has no options of its {card.model}); "
            "export it again with this one"
        )
    return card


def card_to_json(card: Card) -> str:
    """The inverse of `card_from_json`, for people too."""
    return msgspec.json.format(msgspec.json.encode(card), indent=2).decode()


def only_network(network: NetworkConfig) -> NetworkConfig:
    """`network` without what a student adds to it."""
    return network_from_json(msgspec.to_builtins(network))


def network_from_json(tree: Any) -> NetworkConfig:
    """A network as it was stored. Raises `UserError` where `tree` is not one."""
    try:
        return converted(tree, NetworkConfig)
    except msgspec.ValidationError as error:
        raise UserError(f"the stored network does not fit this version: {error}") from None


def digest(tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 of names, types, shapes and bytes of all tensors, in the order of their names."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        hasher.update(f"{name} {array.dtype} {array.shape}\n".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()
