"""The formats of a file with a whole function: a table, by suffix."""

import pathlib
from collections.abc import Callable
from typing import Literal, NamedTuple

from fm_distill.exporting import litert_file, onnx_file, stablehlo
from fm_distill.exporting.function import BatchSize, Function, Pixels, Quantise, Runtime


class Format(NamedTuple):
    """A line of the table."""

    name: Literal["stablehlo", "onnx", "tflite"]
    # Function, resolution, batch and the network's name -> the function, serialised.
    convert: Callable[[Function, int, BatchSize, str], bytes]
    # The function, and the threads that run it; None: as many as its runtime takes by itself.
    load: Callable[[bytes, int | None], Runtime]
    # A place, the function and its card.
    write: Callable[[pathlib.Path, bytes, str], None]
    # A place -> the function and its card.
    read: Callable[[pathlib.Path], tuple[bytes, str]]
    # Kinds of quantisation that a float student may be exported in.
    quantisations: tuple[Quantise, ...] = ()
    # As `convert`, with one of these and the images that int8 is calibrated by; None where the
    # student is calibrated before it is converted.
    quantise: Callable[[Function, int, BatchSize, str, Quantise, Pixels | None], bytes] | None = (
        None
    )


FORMATS: dict[str, Format] = {
    onnx_file.SUFFIX: Format(
        "onnx",
        onnx_file.to_onnx,
        onnx_file.load_function,
        onnx_file.write_model,
        onnx_file.read_model,
        ("int8",),
    ),
    stablehlo.SUFFIX: Format(
        "stablehlo",
        stablehlo.to_stablehlo,
        stablehlo.load_function,
        stablehlo.write_archive,
        stablehlo.read_archive,
    ),
    litert_file.SUFFIX: Format(
        "tflite",
        litert_file.to_litert,
        litert_file.load_function,
        litert_file.write_model,
        litert_file.read_model,
        ("float16", "dynamic", "int8"),
        litert_file.to_quantised,
    ),
}
