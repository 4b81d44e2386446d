"""A function as an `.onnx` file, its card in the metadata. The extra `onnx` brings what runs it."""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from fm_distill.errors import UserError
from fm_distill.exporting.function import BatchSize, Function, Runtime
from fm_distill.weights.card import CARD_KEY

SUFFIX = ".onnx"
# In the metadata, beside the card: see `_digest`.
DIGEST_KEY = "model_sha256"
# Bytes of weights. Protobuf's limit is 2 GiB, with nodes and card.
LARGEST = 2_000_000_000


def to_onnx(function: Function, resolution: int, batch: BatchSize, model: str) -> bytes:
    """`function`, serialised. Raises `UserError` where the network `model` cannot be converted."""
    checker, _ = _onnx().checker, _onnxruntime()  # before anything is compiled
    from fm_distill.exporting.onnx_folding import fold
    from fm_distill.exporting.onnx_graph import Unsupported, convert
    from fm_distill.exporting.onnx_operations import CALLS, RULES

    try:
        converted = convert(function, resolution, batch, RULES, CALLS)
        fold(converted)
    except Unsupported as error:
        raise UserError(
            f"{model} cannot be converted to ONNX: {error}; export to .stablehlo"
        ) from None
    if sum(len(x.raw_data) for x in converted.graph.initializer) > LARGEST:
        raise UserError(f"{model} is larger than an ONNX file can be, 2 GB; export to .safetensors")
    checker.check_model(converted)
    return bytes(converted.SerializeToString())


def load_function(data: bytes, threads: int | None = None) -> Runtime:
    """The function of a model, on the CPU. Raises `UserError` without ONNX Runtime."""
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised too
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def call(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {name: pixels})[0])

    return Runtime(f"ONNX Runtime {onnxruntime.__version__}", call)


def write_model(path: pathlib.Path, function: bytes, card: str) -> None:
    """The file. Raises `OSError`."""
    model = _onnx().ModelProto.FromString(function)
    metadata = {CARD_KEY: card}
    # For tools that do not know the card.
    if names := json.loads(card)["class_names"]:
        metadata["class_names"] = json.dumps(names)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    model.metadata_props.add(key=DIGEST_KEY, value=_digest(model))
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
        raise UserError(f"{path} is not an ONNX model, or was damaged ({error})") from None
    metadata = {x.key: x.value for x in model.metadata_props}
    if CARD_KEY not in metadata:
        raise UserError(
            f"{path} has no card of fm-distill, so how its images are prepared is not known; "
            "expected a file that `fm-distill export` wrote"
        )
    if metadata.get(DIGEST_KEY) != _digest(model):
        raise UserError(
            f"{path} is damaged or was changed: its contents are not those that were exported; "
            "export it again"
        )
    if scale_name := _broken_scale(onnx, model):
        raise UserError(
            f"{path} has a quantisation scale that is not positive, {scale_name}; export it again"
        )
    return data, metadata[CARD_KEY]


def _broken_scale(onnx: Any, model: Any) -> str | None:
    """The first scale of quantised numbers, by its name, that is not finite and positive."""
    operators = ("QuantizeLinear", "DequantizeLinear")
    scales = {x.input[1] for x in model.graph.node if x.op_type in operators}
    for weight in model.graph.initializer:
        if weight.name in scales:
            values = onnx.numpy_helper.to_array(weight)
            if not ((values > 0) & np.isfinite(values)).all():
                return str(weight.name)
    return None


def _digest(model: Any) -> str:
    """SHA-256 of a model without this digest: nothing in its format checks its contents."""
    without_digest = type(model)()
    without_digest.CopyFrom(model)
    for i, entry in enumerate(without_digest.metadata_props):
        if entry.key == DIGEST_KEY:
            del without_digest.metadata_props[i]
            break
    return hashlib.sha256(without_digest.SerializeToString(deterministic=True)).hexdigest()


def _onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.numpy_helper
    except ImportError:
        raise UserError(_missing("the package onnx")) from None
    return onnx


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(_missing("ONNX Runtime")) from None
    return onnxruntime


def _missing(what: str) -> str:
    return f"an {SUFFIX} file needs {what}, which is not installed: pip install -e '.[onnx]'"
