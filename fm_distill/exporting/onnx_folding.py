"""Of a model with quantised layers: what follows a convolution becomes a part of it.

A factor for each channel, such as a BatchNorm's, multiplies the scales of its weights, and what is
added becomes its bias: int32, with the scale of input times weight (Jacob et al. 2018, arXiv
1712.05877, section 2.4). Only then runtimes compute the whole layer in integers.
"""

import dataclasses
import itertools

import numpy as np
import onnx
from jaxtyping import Float
from onnx import helper, numpy_helper

from fm_distill.exporting.onnx_graph import SHIFT

LARGEST_BIAS = np.iinfo(np.int32).max
# A factor this near to zero leaves nothing of its channel.
SMALLEST_SCALE = 1e-30

PerChannel = Float[np.ndarray, " channels"]


class _Model:
    """A model's nodes by what they give and what they take, and its weights."""

    def __init__(self, model: onnx.ModelProto):
        self.graph = model.graph
        self.weights = {x.name: x for x in model.graph.initializer}
        self.maker = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.added: list[onnx.NodeProto] = []
        # What is removed: its output, and what stands for it.
        self.instead: dict[str, str] = {}
        self._count = itertools.count()

    def array(self, name: str) -> np.ndarray | None:
        return numpy_helper.to_array(self.weights[name]) if name in self.weights else None

    def constant(self, array: np.ndarray) -> str:
        name = f"folded_{next(self._count)}"
        self.weights[name] = numpy_helper.from_array(array, name)
        return name

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 else None

    def finish(self) -> None:
        """Writes what was changed."""

        def resolved(name: str) -> str:
            while name in self.instead:
                name = self.instead[name]
            return name

        remaining_nodes = [x for x in self.graph.node if x.output[0] not in self.instead]
        for node in remaining_nodes:
            node.input[:] = map(resolved, node.input)
        nodes = [*self.added, *remaining_nodes]
        used_names = {name for node in nodes for name in node.input}
        weights = [x for name, x in self.weights.items() if name in used_names]
        for field, values in ((self.graph.node, nodes), (self.graph.initializer, weights)):
            copies = [type(x).FromString(x.SerializeToString()) for x in values]
            del field[:]
            field.extend(copies)


def fold(model: onnx.ModelProto) -> None:
    """Changes `model` in its place; one without quantised layers stays as it is."""
    indexed_model = _Model(model)
    dequantisers = [x for x in model.graph.node if x.op_type == "DequantizeLinear"]
    if not dequantisers:
        return
    for node in model.graph.node:
        if node.op_type == "Conv" and _is_quantised(indexed_model, node.input[1]):
            _fold_into(indexed_model, node)
    for node in model.graph.node:
        _as_activation(indexed_model, node)
    indexed_model.finish()


def _is_quantised(model: _Model, name: str) -> bool:
    """Whether these are weights that are stored as integers."""
    maker = model.maker.get(name)
    return (
        maker is not None
        and maker.op_type == "DequantizeLinear"
        and maker.input[0] in model.weights
    )


@dataclasses.dataclass(frozen=True)
class _Following:
    """What follows a convolution, each channel by itself: x * factor + offset."""

    factor: PerChannel
    offset: PerChannel


def _fold_into(model: _Model, convolution: onnx.NodeProto) -> None:
    weights = model.maker[convolution.input[1]]
    integers, scales = (model.array(weights.input[i]) for i in range(2))
    assert integers is not None and scales is not None
    following = _following(model, convolution.output[0], len(scales))
    folded_scales = scales.astype(np.float64) * np.abs(following.factor)
    is_zero = folded_scales < SMALLEST_SCALE
    signs = np.where(is_zero, 0, np.sign(following.factor)).astype(np.int8)
    broadcast_shape = (-1,) + (1,) * (integers.ndim - 1)
    folded_scales = np.where(is_zero, 1.0, folded_scales).astype(np.float32)
    signed_integers = (integers.astype(np.int16) - SHIFT) * signs.reshape(broadcast_shape) + SHIFT
    weights.input[0] = model.constant(signed_integers.astype(np.uint8))
    weights.input[1] = model.constant(folded_scales)
    if following.offset.any():
        bias = _bias(model, convolution.input[0], folded_scales, following.offset)
        convolution.input.append(bias)


def _following(model: _Model, name: str, channels: int) -> _Following:
    """The multiplications and additions behind the tensor `name`, which are removed."""
    factor, offset = np.ones(channels), np.zeros(channels)
    axis = 1
    while (node := model.only_reader(name)) is not None:
        if node.op_type == "Transpose":
            (permutation,) = (helper.get_attribute_value(x) for x in node.attribute)
            axis, name = list(permutation).index(axis), node.output[0]
            continue
        if node.op_type not in ("Mul", "Add"):
            break
        operand = node.input[1] if node.input[0] == name else node.input[0]
        values = _by_channel(model.array(operand), axis, channels)
        if values is None:
            break
        if node.op_type == "Mul":
            factor, offset = factor * values, offset * values
        else:
            offset = offset + values
        model.instead[node.output[0]] = name
        name = node.output[0]
    return _Following(factor, offset)


def _by_channel(array: np.ndarray | None, axis: int, channels: int) -> PerChannel | None:
    """The values of each channel where `array` has nothing else; of four axes, or a number."""
    if array is None or array.dtype != np.float32:
        return None
    if array.size == 1:
        return np.full(channels, float(array.reshape(())))
    if array.ndim != 4 or array.size != channels or array.shape[axis] != channels:
        return None
    return array.reshape(-1).astype(np.float64)


def _bias(model: _Model, read: str, scales: np.ndarray, offset: PerChannel) -> str:
    """int32 where the input is quantised and the numbers fit; else float32, which is exact too."""
    maker = model.maker.get(read)
    while maker is not None and maker.op_type == "Transpose":
        maker = model.maker.get(maker.input[0])
    if maker is not None and maker.op_type == "DequantizeLinear":
        input_scale = model.array(maker.input[1])
        assert input_scale is not None
        bias_scales = (input_scale * scales).astype(np.float32)
        with np.errstate(all="ignore"):
            integers = np.rint(offset / bias_scales)
        if np.abs(integers).max() <= LARGEST_BIAS:
            names = [model.constant(integers.astype(np.int32)), model.constant(bias_scales)]
            node = helper.make_node("DequantizeLinear", names, [f"{names[0]}_bias"], axis=0)
            model.added.append(node)
            return node.output[0]
    return model.constant(offset.astype(np.float32))


def _as_activation(model: _Model, node: onnx.NodeProto) -> None:
    """Makes Relu of max(x, 0), and Clip of that and a minimum: runtimes fold these in turn."""
    if node.op_type not in ("Max", "Min") or len(node.input) != 2:
        return
    x, bound = node.input
    array = model.array(bound)
    if array is None:
        x, bound, array = bound, x, model.array(x)
    if array is None or array.size != 1:
        return
    maker = model.maker.get(x)
    if node.op_type == "Max" and float(array.reshape(())) == 0:
        node.op_type = "Relu"
        node.input[:] = [x]
    elif node.op_type == "Min" and maker is not None and maker.op_type == "Relu":
        if model.only_reader(x) is not node:
            return
        low, high = (
            model.constant(np.asarray(limit, np.float32)) for limit in (0.0, array.reshape(()))
        )
        node.op_type = "Clip"
        node.input[:] = [maker.input[0], low, high]
        model.instead[x] = maker.input[0]
