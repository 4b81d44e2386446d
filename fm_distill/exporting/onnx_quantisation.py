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
    known = [scale, zero_point, *levels]
    if any(isinstance(value.content, str) for value in known):
        raise Unsupported("an unknown range")
    of_scale, zero, lowest, highest = (np.asarray(value.content) for value in known)
    if not (np.isfinite(of_scale).all() and (of_scale > 0).all()):
        raise Unsupported("a scale that is not positive: the ranges of the run are invalid")
    if lowest < SIGNED.min or highest > SIGNED.max:
        raise Unsupported("more than eight bits")
    if isinstance(x.content, str):
        key = x.content, float(of_scale), float(zero)
        if key not in graph.quantised:
            shifted = graph.constant(zero + SHIFT, np.uint8)
            of_range = graph.constant(of_scale, np.float32), shifted
            rounded = graph.add("QuantizeLinear", graph.full(x), *of_range)
            graph.quantised[key] = graph.add("DequantizeLinear", rounded, *of_range)
        return full_shaped(graph.quantised[key], outputs[0])
    array = np.broadcast_to(x.content, x.shape)
    integers = np.clip(np.rint(array / of_scale) + zero, lowest, highest)
    found = Value.of(((integers - zero) * of_scale).astype(np.float32))
    quantised = Quantised(integers.astype(np.int8), np.broadcast_to(of_scale, x.shape[-1:]))
    return [dataclasses.replace(found, quantised=quantised)]
