"""Steps of a function to LiteRT, by TensorFlow, in a process of its own: it shares much with JAX.

Its argument is a folder, which has `steps.json` and `kind.json`, and for int8 by the converter's
own calibration `pixels.npy`; `function.tflite` is written there. The steps are those of
`litert_quantisation`, whose arrays and functions lie beside.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

STEPS, PIXELS, KIND, RESULT = "steps.json", "pixels.npy", "kind.json", "function.tflite"
# The kind of a function whose steps name what is rounded.
ROUNDED = "rounded"
# Of the range of activations; that of weights is symmetric.
LOWEST, HIGHEST = -128, 127

# Before and after each of two sides.
Zeros = Sequence[Sequence[int]]


def main(folder: pathlib.Path) -> None:
    """Converts what lies in `folder`."""
    import tensorflow as tf

    description = json.loads((folder / STEPS).read_text())
    makers = MAKERS
    if all(step["kind"] != "round" for step in description["steps"]):
        # Of a FakeQuant alone the converter makes layers that round what they read as they run.
        makers = MAKERS | {"kernel": _plain_kernel}

    def function(pixels: Any) -> Any:
        tensors = {0: pixels}
        for step in description["steps"]:
            outputs = makers[step["kind"]](
                tf, folder, step, *(tensors[number] for number in step["reads"])
            )
            tensors.update(zip(step["makes"], outputs, strict=True))
        return tensors[description["result"]]

    spec = tf.TensorSpec(description["shape"], tf.as_dtype(description["dtype"]), name="pixels")
    tf_function = tf.function(function, input_signature=[spec], autograph=False)
    concrete_functions = [tf_function.get_concrete_function()]
    converter = tf.lite.TFLiteConverter.from_concrete_functions(concrete_functions, tf_function)
    _quantise(tf, converter, json.loads((folder / KIND).read_text()), folder)
    (folder / RESULT).write_bytes(converter.convert())


def _called(tf: Any, folder: pathlib.Path, step: dict[str, Any], *inputs: Any) -> Any:
    from jax import export
    from jax.experimental import jax2tf

    exported = export.deserialize(bytearray((folder / step["function"]).read_bytes()))
    outputs = jax2tf.convert(
        exported.call, with_gradient=False, native_serialization_platforms=exported.platforms
    )(*inputs)
    return outputs if isinstance(outputs, list | tuple) else (outputs,)


def _rounded(tf: Any, folder: pathlib.Path, step: dict[str, Any], x: Any) -> Any:
    scale, zero_point = step["scale"], step["zero_point"]
    low, high = (np.float32(scale * (level - zero_point)) for level in (LOWEST, HIGHEST))
    return (tf.quantization.fake_quant_with_min_max_vars(x, low, high),)


def _kernel(tf: Any, folder: pathlib.Path, step: dict[str, Any]) -> Any:
    weights, scales = (np.load(folder / step[key]) for key in ("weights", "scales"))
    highest = np.float32(step["highest"])
    bounds = -highest * scales, highest * scales  # constants, or the converter does not see them
    bits = step["highest"].bit_length() + 1
    return (
        tf.quantization.fake_quant_with_min_max_vars_per_channel(
            weights, *bounds, num_bits=bits, narrow_range=True
        ),
    )


def _plain_kernel(tf: Any, folder: pathlib.Path, step: dict[str, Any]) -> Any:
    return (tf.constant(np.load(folder / step["weights"])),)


def _convolved(tf: Any, folder: pathlib.Path, step: dict[str, Any], x: Any, kernel: Any) -> Any:
    strides, padding, dilations = (step[key] for key in ("strides", "padding", "dilations"))
    name, zeros = padding_of(x.shape[1:3], kernel.shape[:2], strides, padding, dilations)
    x = tf.pad(x, [[0, 0], *zeros, [0, 0]]) if zeros else x
    output = tf.nn.conv2d(x, kernel, strides, name, dilations=dilations)
    return (tf.nn.bias_add(output, np.load(folder / step["offset"])),)


def padding_of(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Zeros,
    dilations: Sequence[int],
) -> tuple[str, Zeros]:
    """TensorFlow's name of `padding`, and the zeros that have to stand there before; none: []."""
    if all([*x] == [0, 0] for x in padding):
        return "VALID", []
    same = [
        same_padding(int(sizes[i]), (int(kernel[i]) - 1) * dilations[i] + 1, strides[i])
        for i in range(2)
    ]
    return ("SAME", []) if same == [[*x] for x in padding] else ("VALID", padding)


def same_padding(size: int, kernel: int, stride: int) -> list[int]:
    """Zeros before and after a side, as TensorFlow's SAME has them."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return [total // 2, total - total // 2]


MAKERS: dict[str, Any] = {
    "call": _called,
    "round": _rounded,
    "kernel": _kernel,
    "convolution": _convolved,
}


def _quantise(tf: Any, converter: Any, kind: str, folder: pathlib.Path) -> None:
    if kind == "none":
        return
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if kind == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if kind == "int8":
        calibration_pixels = np.load(folder / PIXELS)
        converter.representative_dataset = lambda: ([x] for x in calibration_pixels)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = tf.uint8


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
