"""What each of JAX's operations is in ONNX: a table, of the operations that networks here have."""

from typing import Any

import jax
import numpy as np
from onnx import helper

from fm_distill.exporting.onnx_graph import (
    Graph,
    Params,
    Rule,
    Shape,
    Unsupported,
    Value,
    Values,
    full_shaped,
)
from fm_distill.exporting.onnx_layers import convolution, max_pool, product, sum_pool
from fm_distill.exporting.onnx_quantisation import fake_quantise


def _together(values: Values) -> Shape:
    """The shape that ONNX broadcasts what is held to."""
    if all(not x.held for x in values):
        return ()
    held_shapes = [x.held for x in values if x.held]
    return tuple(
        next((size for size in sizes if size != 1), 1) for sizes in zip(*held_shapes, strict=True)
    )


def _elementwise(kind: str) -> Rule:
    def rule(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
        return _applied(graph, kind, inputs, outputs[0])

    return rule


def _applied(graph: Graph, kind: str, inputs: Values, output: Any) -> Values:
    name = graph.add(kind, *(graph.held(x) for x in inputs))
    held = _together(inputs)
    return [Value(name, held, output.shape, np.dtype(output.dtype))]


def _same(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    return inputs


def _cast(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    (x,), dtype = inputs, np.dtype(params["new_dtype"])
    name = graph.add("Cast", graph.held(x), to=helper.np_dtype_to_tensor_dtype(dtype))
    return [Value(name, x.held, x.shape, dtype)]


def _rsqrt(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    return _applied(graph, "Reciprocal", _applied(graph, "Sqrt", inputs, outputs[0]), outputs[0])


def _square(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    return _applied(graph, "Mul", inputs * 2, outputs[0])


def _integer_pow(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    exponent = Value.of(np.array(params["y"], inputs[0].dtype))
    return _applied(graph, "Pow", [*inputs, exponent], outputs[0])


def _erfc(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    one = Value.of(np.ones((), inputs[0].dtype))
    return _applied(graph, "Sub", [one, *_applied(graph, "Erf", inputs, outputs[0])], outputs[0])


def _select(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    if len(inputs) != 3:
        raise Unsupported("more than two cases")
    condition, where_false, where_true = inputs
    return _applied(graph, "Where", [condition, where_true, where_false], outputs[0])


def _clamp(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    low, x, high = inputs
    return _applied(graph, "Min", [*_applied(graph, "Max", [x, low], outputs[0]), high], outputs[0])


def _round(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    if params["rounding_method"] != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        raise Unsupported("rounding away from zero")
    return _applied(graph, "Round", inputs, outputs[0])


def _broadcast(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    x, dimensions = inputs[0], params["broadcast_dimensions"]
    held: list[Any] = [1] * len(params["shape"])
    for size, dimension in zip(x.held, dimensions, strict=True):
        held[dimension] = size
    content = x.content
    if not isinstance(content, str):
        content = content.reshape(held)
    elif tuple(held) != x.held:
        content = graph.reshaped(content, tuple(held))
    return [Value(content, tuple(held), outputs[0].shape, x.dtype)]


def _reshape(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    return full_shaped(graph.reshaped(graph.full(inputs[0]), outputs[0].shape), outputs[0])


def _transpose(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    order = params["permutation"]
    return full_shaped(graph.add("Transpose", graph.full(inputs[0]), perm=order), outputs[0])


def _concatenate(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    names = [graph.full(x) for x in inputs]
    return full_shaped(graph.add("Concat", *names, axis=params["dimension"]), outputs[0])


def _slice(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    strides = params["strides"] or (1,) * len(inputs[0].shape)
    name = _cut(graph, inputs[0], params["start_indices"], params["limit_indices"], strides)
    return full_shaped(name, outputs[0])


def _cut(graph: Graph, x: Value, starts: Shape, ends: Shape, steps: tuple[int, ...]) -> str:
    """`x` from `starts` to `ends`, by its axes."""
    shape = x.shape
    axes = [
        i
        for i, size in enumerate(shape)
        if not (isinstance(starts[i], int) and starts[i] == 0 and ends[i] == size and steps[i] == 1)
    ]
    if not all(isinstance(ends[i], int) for i in axes):
        raise Unsupported("a slice of the batch")
    if not axes:
        return graph.full(x)
    slice_inputs = [graph.integers([values[i] for i in axes]) for values in (starts, ends)]
    slice_inputs += [graph.integers(axes), graph.integers([steps[i] for i in axes])]
    return graph.add("Slice", graph.full(x), *slice_inputs)


def _gather(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    """What `x[:, 0]` is where the batch is not known: one slice, without the axes of size one."""
    x, indices = inputs
    dimension_numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if (
        isinstance(indices.content, str)
        or len(indices.shape) != 1
        or dimension_numbers.operand_batching_dims
    ):
        raise Unsupported("more than one position")
    starts = [0] * len(sizes)
    for axis, index in zip(
        dimension_numbers.start_index_map, indices.content.tolist(), strict=True
    ):
        starts[axis] = index
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    if any(
        start < 0 or end > size
        for start, end, size in zip(starts, ends, x.shape, strict=True)
        if end != size
    ):
        raise Unsupported("positions outside the array")
    name = _cut(graph, x, tuple(starts), tuple(ends), (1,) * len(sizes))
    return full_shaped(graph.reshaped(name, outputs[0].shape), outputs[0])


def _split(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    names = [graph.new_name("Split") for _ in outputs]
    split_inputs = [graph.full(inputs[0]), graph.integers(params["sizes"])]
    graph.nodes.append(helper.make_node("Split", split_inputs, names, axis=params["axis"]))
    return [full_shaped(name, output)[0] for name, output in zip(names, outputs, strict=True)]


def _pad(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
    low, high, interior = zip(*params["padding_config"], strict=True)
    if any(interior) or min(*low, *high) < 0:
        raise Unsupported("interior or negative padding")
    x, fill_value = inputs
    pads = graph.integers([*low, *high])
    return full_shaped(graph.add("Pad", graph.full(x), pads, graph.full(fill_value)), outputs[0])


def _reduction(kind: str) -> Rule:
    def rule(graph: Graph, inputs: Values, params: Params, outputs: list[Any]) -> Values:
        axes = graph.integers(params["axes"])
        return full_shaped(graph.add(kind, graph.full(inputs[0]), axes, keepdims=0), outputs[0])

    return rule


# Of functions, by their names where they are traced.
CALLS: dict[str, Rule] = {"fake_quantise": fake_quantise}

RULES: dict[str, Rule] = {
    **{
        name: _elementwise(kind)
        for name, kind in {
            "abs": "Abs",
            "add": "Add",
            "and": "And",
            "cos": "Cos",
            "div": "Div",
            "eq": "Equal",
            "erf": "Erf",
            "exp": "Exp",
            "floor": "Floor",
            "ge": "GreaterOrEqual",
            "gt": "Greater",
            "le": "LessOrEqual",
            "log": "Log",
            "logistic": "Sigmoid",
            "lt": "Less",
            "max": "Max",
            "min": "Min",
            "mul": "Mul",
            "neg": "Neg",
            "not": "Not",
            "or": "Or",
            "pow": "Pow",
            "sign": "Sign",
            "sin": "Sin",
            "sqrt": "Sqrt",
            "sub": "Sub",
            "tanh": "Tanh",
        }.items()
    },
    "broadcast_in_dim": _broadcast,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "conv_general_dilated": convolution,
    "convert_element_type": _cast,
    "copy": _same,
    "dot_general": product,
    "erfc": _erfc,
    "gather": _gather,
    "integer_pow": _integer_pow,
    "name": _same,
    "pad": _pad,
    "reduce_max": _reduction("ReduceMax"),
    "reduce_min": _reduction("ReduceMin"),
    "reduce_sum": _reduction("ReduceSum"),
    "reduce_window_max": max_pool,
    "reduce_window_sum": sum_pool,
    "reshape": _reshape,
    "round": _round,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "slice": _slice,
    "split": _split,
    "square": _square,
    "squeeze": _reshape,
    "stop_gradient": _same,
    "transpose": _transpose,
}
