"""A function as an `.onnx` file, its card in the metadata. The extra `onnx` brings what runs it."""

import json
import pathlib
from typing import Any

import numpy as np

from fm_distill.errors import UserError
from fm_distill.exporting.function import BatchSize, Function, Runtime
from fm_distill.weights.card import CARD_KEY

SUFFIX = ".onnx"


def to_onnx(function: Function, resolution: int, batch: BatchSize, model: str) -> bytes:
    """`function`, serialised. Raises `UserError` where the network `model` cannot be converted."""
    checker = _onnx().checker
    from fm_distill.exporting.onnx_graph import Unsupported, convert
    from fm_distill.exporting.onnx_operations import RULES

    try:
        converted = convert(function, resolution, batch, RULES)
    except Unsupported as error:
        raise UserError(
            f"{model} cannot be converted to ONNX: it has the operation {error}, which has no "
            "form there; export to .stablehlo"
        ) from None
    checker.check_model(converted)
    return bytes(converted.SerializeToString())


def load_function(data: bytes) -> Runtime:
    """The function of a model, on the CPU. Raises `UserError` without ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(_missing("ONNX Runtime")) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised too
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {name: pixels})[0])

    return Runtime(f"ONNX Runtime {onnxruntime.__version__}", call)


def write_model(path: pathlib.Path, function: bytes, card: str) -> None:
    """The file. Raises `OSError`."""
    model = _onnx().ModelProto.FromString(function)
    stated = {CARD_KEY: card}
    # For tools that do not know the card.
    if names := json.loads(card)["class_names"]:
        stated["class_names"] = json.dumps(names)
    for key, value in stated.items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString(deterministic=True))


def read_model(path: pathlib.Path) -> tuple[bytes, str]:
    """The whole file and its card. Raises `UserError` where it is another tool's, or damaged."""
    onnx = _onnx()
    try:
        data = path.read_bytes()
        model = onnx.ModelProto.FromString(data)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # protobuf's own, which has no public name in all its forms
        raise UserError(f"{path} is no ONNX model, or was damaged ({error})") from None
    stated = {x.key: x.value for x in model.metadata_props}
    if CARD_KEY not in stated:
        raise UserError(
            f"{path} has no card of fm-distill, so how its images are prepared is not known; "
            "expected a file that `fm-distill export` wrote"
        )
    return data, stated[CARD_KEY]


def _onnx() -> Any:
    try:
        import onnx
        import onnx.checker
    except ImportError:
        raise UserError(_missing("the package onnx")) from None
    return onnx


def _missing(what: str) -> str:
    return f"an {SUFFIX} file needs {what}, which is not installed: pip install -e '.[onnx]'"
