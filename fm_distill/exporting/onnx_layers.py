"""What JAX's convolutions, matrix products and pools are in ONNX."""

import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from fm_distill.exporting.onnx_graph import (
    SHIFT,
    Graph,
    Params,
    Quantised,
    Unsupported,
    Value,
    Values,
    full_shaped,
)

NHWC_TO_NCHW, NCHW_TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)


def dequantised(graph: Graph, weights: Quantised, order: Sequence[int]) -> str:
    """Weights that are stored as integers, with their axes in another `order`."""
    shifted = weights.integers.transpose(order).astype(np.int16) + SHIFT
    stored = graph.constant(shifted, np.uint8)
    scales = graph.constant(weights.scales, np.float32)
    zeros = graph.constant(np.full(len(weights.scales), SHIFT, np.uint8))
    axis = list(order).index(len(order) - 1)
    return graph.add("DequantizeLinear", stored, scales, zeros, axis=axis)


def product(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    (left_sum, right_sum), (left_batch, right_batch) = params["dimension_numbers"]
    left, right = inputs
    is_matmul = not left_batch and left_sum == (len(left.shape) - 1,) and right_sum == (0,)
    is_matmul = is_matmul and len(right.shape) == 2
    if is_matmul and right.quantised is not None:
        weights = dequantised(graph, right.quantised, (0, 1))
        return full_shaped(graph.add("MatMul", graph.full(left), weights), outputs[0])
    names = [graph.full(x) for x in inputs]
    if is_matmul:
        return full_shaped(graph.add("MatMul", *names), outputs[0])
    letters = iter(string.ascii_lowercase)
    left_letters = [next(letters) for _ in left.shape]
    right_letters = [next(letters) for _ in right.shape]
    for i, j in zip((*left_sum, *left_batch), (*right_sum, *right_batch), strict=True):
        right_letters[j] = left_letters[i]
    output_letters = [left_letters[i] for i in left_batch]
    output_letters += [x for i, x in enumerate(left_letters) if i not in (*left_sum, *left_batch)]
    output_letters += [
        x for i, x in enumerate(right_letters) if i not in (*right_sum, *right_batch)
    ]
    equation = f"{''.join(left_letters)},{''.join(right_letters)}->{''.join(output_letters)}"
    return full_shaped(graph.add("Einsum", *names, equation=equation), outputs[0])


def convolution(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    dimension_numbers, padding = params["dimension_numbers"], params["padding"]
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise Unsupported("a transposed convolution, or batch groups")
    images, kernel = inputs
    nchw_images = graph.add("Transpose", graph.full(images), perm=dimension_numbers.lhs_spec)
    if kernel.quantised is not None:
        weights = dequantised(graph, kernel.quantised, dimension_numbers.rhs_spec)
    elif isinstance(kernel.content, str):
        weights = graph.add("Transpose", graph.full(kernel), perm=dimension_numbers.rhs_spec)
    else:
        constant_kernel = np.broadcast_to(kernel.content, kernel.shape)
        weights = graph.constant(constant_kernel.transpose(dimension_numbers.rhs_spec))
    output = graph.add(
        "Conv",
        nchw_images,
        weights,
        pads=[*(x for x, _ in padding), *(x for _, x in padding)],
        strides=params["window_strides"],
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
    )
    inverse_permutation = np.argsort(dimension_numbers.out_spec).tolist()
    return full_shaped(graph.add("Transpose", output, perm=inverse_permutation), outputs[0])


def _pool(graph: Graph, kind: str, x: Value, params: Params, attributes: Params) -> str:
    window, strides, padding = (
        params[name] for name in ("window_dimensions", "window_strides", "padding")
    )
    dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
    only_spatial = (window[0], window[-1], strides[0], strides[-1]) == (1, 1, 1, 1)
    if dilated or len(window) != 4 or not only_spatial or any(padding[0]) or any(padding[-1]):
        raise Unsupported("a window over other axes than height and width")
    output = graph.add(
        kind,
        graph.add("Transpose", graph.full(x), perm=NHWC_TO_NCHW),
        kernel_shape=window[1:3],
        strides=strides[1:3],
        pads=[*(x for x, _ in padding[1:3]), *(x for _, x in padding[1:3])],
        **attributes,
    )
    return graph.add("Transpose", output, perm=NCHW_TO_NHWC)


def max_pool(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    return full_shaped(_pool(graph, "MaxPool", inputs[0], params, {}), outputs[0])


def sum_pool(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    mean = _pool(graph, "AveragePool", inputs[0], params, {"count_include_pad": 1})
    pixels = np.array(np.prod(params["window_dimensions"]), inputs[0].dtype)
    return full_shaped(graph.add("Mul", mean, graph.constant(pixels)), outputs[0])
