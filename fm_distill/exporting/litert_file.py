"""A function as a `.tflite` file for LiteRT. The extra `litert` brings what writes and runs it.

Behind the flatbuffer, which readers take from the front, lies a zip archive, as TensorFlow Lite's
metadata have their associated files: `card.json`, `labels.txt` and the SHA-256 of the flatbuffer.
"""

import collections
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

import jax
import numpy as np

from fm_distill.errors import UserError
from fm_distill.exporting import litert_conversion
from fm_distill.exporting.function import BatchSize, Function, Pixels, Quantise, Runtime
from fm_distill.exporting.litert_quantisation import in_one_step, traced
from fm_distill.exporting.litert_ranges import Batches, with_ranges
from fm_distill.exporting.litert_steps import Step, joined
from fm_distill.exporting.litert_weights import with_integers
from fm_distill.system.files import DAMAGED_ARCHIVE

SUFFIX = ".tflite"
# Of a ViT and a ConvNeXt: LiteRT aborts in what the converter's own calibration makes of them.
GELU = {"erf", "erfc"}
CARD, LABELS, DIGEST = "card.json", "labels.txt", "flatbuffer.sha256"


def to_litert(function: Function, resolution: int, batch: BatchSize, model: str) -> bytes:
    """`function`, serialised. Raises `UserError` where the network `model` cannot be converted."""
    return to_quantised(function, resolution, batch, model, "none", None)


def to_quantised(
    function: Function,
    resolution: int,
    batch: BatchSize,
    model: str,
    quantise: Quantise,
    shown: Pixels | None,
) -> bytes:
    """As `to_litert`, with weights in fewer bits; for int8, ranges are those on the images `shown`.

    float16: weights stored so, products in float32. dynamic: int8 weights, activations quantised
    while it runs. int8: weights and activations, with uint8 pixels in and float32 out.
    """
    for package, name in (("tensorflow", "TensorFlow"), ("ai_edge_litert", "LiteRT")):
        if importlib.util.find_spec(package) is None:
            raise UserError(_missing(name))
    if batch == "dynamic":
        raise UserError(f"a {SUFFIX} file takes a fixed number of images; give --batch N")
    pixels = jax.ShapeDtypeStruct((batch, resolution, resolution, 3), np.uint8)
    traced_function = traced(function, pixels)
    if traced_function.has("round") and quantise != "none":
        raise UserError(
            "the student was quantised in training and is exported with its own ranges; leave "
            "out --quantise"
        )
    if shown is not None and (traced_function.operations & GELU or traced_function.has("kernel")):
        # Layers that training left in floats stay so.
        traced_function = traced(
            function, pixels, calibrated=True, floats=not traced_function.has("kernel")
        )
        traced_function = traced_function._replace(
            steps=with_ranges(traced_function.steps, _in_batches(shown, batch))
        )
    elif quantise != "none" or not traced_function.has("kernel"):
        # int8's own input is the uint8 pixels: a float of scale 1 before it is quantised.
        pixels = pixels.update(dtype=np.float32) if quantise == "int8" else pixels
        return _converted(in_one_step(function, pixels), pixels, quantise, shown, model)
    steps = [*joined(traced_function.steps, traced_function.result)]
    kind = litert_conversion.ROUNDED if traced_function.has("round") else "none"
    data = _converted(steps, pixels, kind, None, model)
    return with_integers(data, steps)


def _converted(
    steps: list[Step], pixels: jax.ShapeDtypeStruct, kind: str, shown: Pixels | None, model: str
) -> bytes:
    """The flatbuffer that TensorFlow makes of `steps`. Raises `UserError`."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        _write_steps(folder, steps, pixels)
        (folder / litert_conversion.KIND).write_text(json.dumps(kind))
        if shown is not None:
            calibration = _calibration(shown, pixels.shape[0])
            (folder / litert_conversion.PIXELS).write_bytes(_npy(calibration))
        process = subprocess.run(
            [sys.executable, "-m", litert_conversion.__name__, name],
            capture_output=True,
            text=True,
        )
        if process.returncode:
            raise UserError(f"{model} cannot be converted to LiteRT: {_reason(process.stderr)}")
        return (folder / litert_conversion.RESULT).read_bytes()


def _write_steps(folder: pathlib.Path, steps: list[Step], pixels: jax.ShapeDtypeStruct) -> None:
    """What `litert_conversion` reads: a list, and a file for each array and function in it."""
    entries = []
    for i, step in enumerate(steps):
        entry: dict[str, Any] = {"kind": step.kind, "reads": step.reads, "makes": step.makes}
        for key, value in step.values.items():
            entry[key] = value
            if isinstance(value, np.ndarray):
                entry[key] = f"{i}_{key}.npy"
                (folder / entry[key]).write_bytes(_npy(value))
            elif isinstance(value, bytes):
                entry[key] = f"{i}_{key}"
                (folder / entry[key]).write_bytes(value)
        entries.append(entry)
    shape, dtype = pixels.shape, pixels.dtype.name
    description = {"steps": entries, "shape": shape, "dtype": dtype, "result": steps[-1].makes[0]}
    (folder / litert_conversion.STEPS).write_text(json.dumps(description))


def _npy(array: np.ndarray) -> bytes:
    """The contents of its `.npy`: NumPy's own write to a file hides that the disk is full."""
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def _in_batches(shown: Pixels, batch: int) -> Batches:
    """`shown` in whole batches, its first images again where the last one is not full."""
    images = np.resize(shown, (-(-len(shown) // batch) * batch, *shown.shape[1:]))
    return images.reshape(-1, batch, *shown.shape[1:])


def _calibration(shown: Pixels, batch: int) -> np.ndarray:
    """`shown` in whole batches, (batches, batch, resolution, resolution, 3) as float32.

    One of black and white is first, so that a step of the input is one grey level.
    """
    extremes = np.zeros((batch, *shown.shape[1:]), np.float32)
    extremes[:, ::2] = 255
    return np.concatenate([extremes[None], _in_batches(shown, batch).astype(np.float32)])


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return (errors or lines[-1:] or ["the converter printed nothing"])[0].rpartition("error: ")[2]


def load_function(data: bytes, threads: int | None = None) -> Runtime:
    """The function of a flatbuffer, on the CPU. Raises `UserError` without LiteRT."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        raise UserError(_missing("LiteRT")) from None
    interpreter = Interpreter(model_content=data, num_threads=threads)
    interpreter.allocate_tensors()
    (input_details,), (output_details,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )

    def call(pixels: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(input_details["index"], pixels)
        interpreter.invoke()
        return np.array(interpreter.get_tensor(output_details["index"]))

    return Runtime(
        f"LiteRT {importlib.metadata.version('ai-edge-litert')}", call, operations_of(interpreter)
    )


def operations_of(interpreter: Any) -> dict[str, int]:
    """How often each operation is there; `DELEGATE`: parts that XNNPACK computes as a whole."""
    names = [x["op_name"] for x in interpreter._get_ops_details()]
    return dict(collections.Counter(names))


def write_model(path: pathlib.Path, function: bytes, card: str) -> None:
    """The file. Raises `OSError`."""
    content = io.BytesIO(function)
    names = json.loads(card)["class_names"] or []
    members = {
        CARD: card,
        LABELS: "".join(f"{x}\n" for x in names),
        DIGEST: hashlib.sha256(function).hexdigest(),
    }
    with zipfile.ZipFile(content, "a") as archive:
        for name, text in members.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    path.write_bytes(content.getvalue())


def read_model(path: pathlib.Path) -> tuple[bytes, str]:
    """Flatbuffer and card of a file. Raises `UserError` where it is another's, or damaged."""
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            archive_start = min(member.header_offset for member in archive.infolist())
            card, digest = archive.read(CARD).decode(), archive.read(DIGEST).decode()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except DAMAGED_ARCHIVE as error:
        raise UserError(
            f"{path} has no card of fm-distill, or was damaged ({error}); expected a file that "
            "`fm-distill export` wrote"
        ) from None
    if hashlib.sha256(data[:archive_start]).hexdigest() != digest:
        raise UserError(
            f"{path} is damaged or was changed: it is not the function that its card was written "
            "for; export it again"
        )
    return data[:archive_start], card


def _missing(what: str) -> str:
    return f"a {SUFFIX} file needs {what}, which is not installed: pip install -e '.[litert]'"
