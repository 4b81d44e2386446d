"""Kernels of a flatbuffer as integers where the converter left floats.

It takes integers where LiteRT computes in integers: where a layer reads and makes rounded numbers.
Elsewhere a constant of integers and a DEQUANTIZE give the same floats, from a quarter of the bytes.
"""

from typing import Any

import numpy as np

from fm_distill.exporting.litert_steps import Step

# Of the input of layers that is a kernel, and the axis of its output channels.
KERNEL_INPUT = 1
CHANNEL_AXES = {"CONV_2D": 0, "FULLY_CONNECTED": 0, "DEPTHWISE_CONV_2D": 3}
# The first version of DEQUANTIZE that takes a scale for each channel.
DEQUANTIZE_VERSION = 5
IDENTIFIER = b"TFL3"
# Of a step of its grid: how far a weight of float32 may be from a whole number.
NEAR = 1e-2


def with_integers(data: bytes, steps: list[Step]) -> bytes:
    """The flatbuffer `data` of `steps`, each kernel of theirs as int8; it computes the same."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(data, 0)
    kernels = [x.values for x in steps if x.kind == "kernel"]
    for graph in model.subgraphs:
        kernel_axes = _read_as_kernels(schema, model, graph)
        dequantise_operators = [
            _dequantised(schema, model, graph, number, *integers)
            for number, axis in kernel_axes.items()
            if (integers := _integers(schema, model, graph.tensors[number], axis, kernels))
        ]
        graph.operators = dequantise_operators + graph.operators
    used_buffers = {x.buffer for graph in model.subgraphs for x in graph.tensors}
    used_buffers |= {x.buffer for x in model.metadata or []}
    for i, buffer in enumerate(model.buffers):
        buffer.data = buffer.data if i in used_buffers else None
    builder = flatbuffers.Builder(len(data))
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def _read_as_kernels(schema: Any, model: Any, graph: Any) -> dict[int, int]:
    """Numbers of the tensors that layers read as kernels, and the axis of their channels."""
    axis_by_operator = {
        getattr(schema.BuiltinOperator, x): axis for x, axis in CHANNEL_AXES.items()
    }
    axes = {}
    for operator in graph.operators:
        operator_code = model.operatorCodes[operator.opcodeIndex].builtinCode
        if operator_code in axis_by_operator:
            axes[int(operator.inputs[KERNEL_INPUT])] = axis_by_operator[operator_code]
    return axes


def _integers(
    schema: Any, model: Any, tensor: Any, axis: int, kernels: list[dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Integers and scales of a constant of floats that is one of `kernels`, and their axis."""
    content = model.buffers[tensor.buffer].data
    if tensor.type != schema.TensorType.FLOAT32 or content is None:
        return None
    floats = np.asarray(content, np.uint8).view(np.float32).reshape(tensor.shape)
    channels_last = np.moveaxis(floats, axis, -1)
    for kernel in kernels:
        weights, scales = kernel["weights"], kernel["scales"]
        if channels_last.size != weights.size or channels_last.shape[-1] != len(scales):
            continue
        integers = np.rint(weights / scales).reshape(channels_last.shape)
        if np.abs(channels_last / scales - integers).max() < NEAR:
            return np.moveaxis(integers, -1, axis).astype(np.int8), scales, axis
    return None


def _dequantised(
    schema: Any, model: Any, graph: Any, number: int, whole: np.ndarray, scales: Any, axis: int
) -> Any:
    """The operation that makes the tensor `number`, constant until now, of integers."""
    floats = graph.tensors[number]
    quantisation = schema.QuantizationParametersT()
    quantisation.scale, quantisation.quantizedDimension = scales.astype(np.float32), axis
    quantisation.zeroPoint = np.zeros(len(scales), np.int64)
    integers, content = schema.TensorT(), schema.BufferT()
    integers.name, integers.shape = floats.name + b"_integers", floats.shape
    integers.type, integers.quantization = schema.TensorType.INT8, quantisation
    integers.buffer, floats.buffer = len(model.buffers), 0  # the first one is empty
    content.data = whole.reshape(-1).view(np.uint8)
    model.buffers.append(content)
    graph.tensors.append(integers)
    operator = schema.OperatorT()
    operator.opcodeIndex = _dequantize_code(schema, model)
    operator.inputs, operator.outputs = [len(graph.tensors) - 1], [number]
    return operator


def _dequantize_code(schema: Any, model: Any) -> int:
    kind = schema.BuiltinOperator.DEQUANTIZE
    for i, code in enumerate(model.operatorCodes):
        if code.builtinCode == kind:
            code.version = max(code.version, DEQUANTIZE_VERSION)
            return i
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = kind
    code.version = DEQUANTIZE_VERSION
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1
