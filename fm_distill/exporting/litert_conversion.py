"""StableHLO to LiteRT, by TensorFlow: a process of its own, as TensorFlow shares much with JAX.

Its argument is a folder, which has `function.jax_export`, `kind.json` and for int8 `pixels.npy`;
`function.tflite` is written there.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np

FUNCTION, PIXELS, KIND, RESULT = (
    "function.jax_export", "pixels.npy", "kind.json", "function.tflite"
)  # fmt: skip


def main(folder: pathlib.Path) -> None:
    """Converts what lies in `folder`."""
    import tensorflow as tf
    from jax import export
    from jax.experimental import jax2tf

    exported = export.deserialize(bytearray((folder / FUNCTION).read_bytes()))
    (pixels,) = exported.in_avals
    converted = tf.function(
        jax2tf.convert(
            exported.call, with_gradient=False, native_serialization_platforms=exported.platforms
        ),
        input_signature=[tf.TensorSpec(pixels.shape, pixels.dtype, name="pixels")],
        autograph=False,
    )
    found = [converted.get_concrete_function()]
    converter = tf.lite.TFLiteConverter.from_concrete_functions(found, converted)
    _quantise(tf, converter, json.loads((folder / KIND).read_text()), folder)
    (folder / RESULT).write_bytes(converter.convert())


def _quantise(tf: Any, converter: Any, kind: str, folder: pathlib.Path) -> None:
    if kind == "none":
        return
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if kind == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if kind == "int8":
        shown = np.load(folder / PIXELS)
        converter.representative_dataset = lambda: ([x] for x in shown)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = tf.uint8


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
