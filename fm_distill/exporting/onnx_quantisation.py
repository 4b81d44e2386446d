"""Fake quantisation as ONNX's pairs of QuantizeLinear and DequantizeLinear.

Runtimes know such pairs, and compute a layer between them in integers. Source: ONNX Runtime's
"Quantize ONNX models", the QDQ format.
"""

import dataclasses
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

SIGNED = np.iinfo(np.int8)


def fake_quantise(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    """Weights become integers here; activations, in the graph."""
    x, scale, zero_point, *levels = inputs
    parameters = [scale, zero_point, *levels]
    if any(isinstance(value.content, str) for value in parameters):
        raise Unsupported("an unknown range")
    scale_array, zero_array, lowest, highest = (np.asarray(value.content) for value in parameters)
    if not (np.isfinite(scale_array).all() and (scale_array > 0).all()):
        raise Unsupported("a scale that is not positive: the ranges of the run are invalid")
    if lowest < SIGNED.min or highest > SIGNED.max:
        raise Unsupported("more than eight bits")
    if isinstance(x.content, str):
        key = x.content, float(scale_array), float(zero_array)
        if key not in graph.quantised:
            shifted = graph.constant(zero_array + SHIFT, np.uint8)
            quantisation_inputs = graph.constant(scale_array, np.float32), shifted
            integers_name = graph.add("QuantizeLinear", graph.full(x), *quantisation_inputs)
            graph.quantised[key] = graph.add(
                "DequantizeLinear", integers_name, *quantisation_inputs
            )
        return full_shaped(graph.quantised[key], outputs[0])
    array = np.broadcast_to(x.content, x.shape)
    integers = np.clip(np.rint(array / scale_array) + zero_array, lowest, highest)
    rounded_value = Value.of(((integers - zero_array) * scale_array).astype(np.float32))
    quantised = Quantised(integers.astype(np.int8), np.broadcast_to(scale_array, x.shape[-1:]))
    return [dataclasses.replace(rounded_value, quantised=quantised)]
