"""A traced function as an ONNX graph.

JAX traces the function to a list of operations. What depends on weights alone is computed here, and
each of the others becomes what `onnx_operations.py` says. The library for this, jax2onnx, holds
orbax-checkpoint below the version that writes the checkpoints here, so both cannot be installed.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
from jax import export
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from onnx import helper, numpy_helper

from fm_distill.exporting.function import BatchSize, Function
from fm_distill.exporting.operations import CALLS, inside

# An integer, or JAX's symbol for the size of the batch.
Shape = tuple[Any, ...]

OPSET = 18
# Of the same release, so that older runtimes read the file too.
IR_VERSION = 8
INPUT, OUTPUT, BATCH = "pixels", "output", "batch"


class Unsupported(Exception):
    """An operation that has no rule, or that its rule does not cover."""


@dataclasses.dataclass(frozen=True)
class Quantised:
    """Weights as integers, int8, with the scale of each along the last axis."""

    integers: np.ndarray
    scales: np.ndarray


# Whole numbers are stored without a sign, shifted by this. ONNX Runtime has no kernels for x86 that
# read signed activations, and those of signed weights without VNNI saturate: sums of two products
# are kept in 16 bits, silently. Where both are unsigned, the sums are exact on any processor.
SHIFT = 128


@dataclasses.dataclass(frozen=True)
class Value:
    """A result on the way: the name of a tensor in the graph, or an array that is known already.

    A broadcast costs nothing until it is needed: `held` is the shape in the graph, which
    broadcasts to `shape`.
    """

    content: str | np.ndarray
    held: Shape
    shape: Shape
    dtype: np.dtype
    # What `content`, which is known then, is made of.
    quantised: Quantised | None = None

    @classmethod
    def of(cls, array: Any) -> "Value":
        content = np.asarray(array)
        return cls(content, content.shape, content.shape, content.dtype)


class Graph:
    """Nodes and weights as they come in."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        # Quantised activations, by what they are of: two layers may read one.
        self.quantised: dict[tuple[str, float, float], str] = {}
        self._count = itertools.count()
        self._batch: str | None = None

    def new_name(self, kind: str) -> str:
        return f"{kind}_{next(self._count)}"

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output, whose name is returned."""
        name = self.new_name(kind)
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, array: Any, dtype: Any = None) -> str:
        name = self.new_name("weight")
        contiguous = np.ascontiguousarray(np.asarray(array, dtype)).reshape(np.shape(array))
        self.weights.append(numpy_helper.from_array(contiguous, name))
        return name

    def integers(self, values: Sequence[int | np.integer]) -> str:
        return self.constant(np.array(values, np.int64))

    def held(self, value: Value) -> str:
        """The name of `value` as it is held; its broadcast is still to be done."""
        if isinstance(value.content, str):
            return value.content
        return self.constant(value.content)

    def full(self, value: Value) -> str:
        """The name of `value` in its whole shape."""
        name = self.held(value)
        return name if value.held == value.shape else self.add("Expand", name, self._sizes(value))

    def _sizes(self, value: Value) -> str:
        if all(isinstance(x, int) for x in value.shape):
            return self.integers(value.shape)
        sizes = [self._batch_size() if is_batch(x) else self.integers([x]) for x in value.shape]
        return self.add("Concat", *sizes, axis=0)

    def _batch_size(self) -> str:
        if self._batch is None:
            self._batch = self.add("Shape", INPUT, start=0, end=1)
        return self._batch

    def reshaped(self, name: str, shape: Shape) -> str:
        """The tensor `name` in another shape of which at most one number is not known."""
        sizes = [-1 if not isinstance(x, int) else x for x in shape]
        if sizes.count(-1) > 1:
            raise Unsupported("several sizes that depend on the batch")
        return self.add("Reshape", name, self.integers(sizes))


Values = list[Value]
Params = dict[str, Any]
# Of an operation: the graph, its inputs, its parameters, and the shapes and types of its outputs;
# the outputs.
Rule = Callable[[Graph, Values, Params, list[Any]], Values]


class Rules(NamedTuple):
    """Of operations, and of functions that are called, by their names."""

    operations: dict[str, Rule]
    calls: dict[str, Rule]


def full_shaped(name: str, output: Any) -> Values:
    """A tensor that is held in its whole shape."""
    return [Value(name, output.shape, output.shape, np.dtype(output.dtype))]


def is_batch(size: Any) -> bool:
    """Whether `size` is the batch's. Raises `Unsupported` for what is computed from it."""
    if isinstance(size, int):
        return False
    if str(size) != BATCH:
        raise Unsupported(f"a shape with {size}")
    return True


def convert(
    function: Function,
    resolution: int,
    batch: BatchSize,
    rules: dict[str, Rule],
    calls: dict[str, Rule],
) -> onnx.ModelProto:
    """`function` as a model with one input and one output. Raises `Unsupported`.

    By the rules of operations, and those of `calls` of functions that have a name.
    """
    batch_size = export.symbolic_shape(BATCH)[0] if batch == "dynamic" else batch
    shape = (batch_size, resolution, resolution, 3)
    try:
        traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, np.uint8))
    except Exception as error:  # of many kinds, in code that may be the user's
        reason = str(error).strip().partition("\n")[0]
        raise Unsupported(
            f"a batch of {batch} cannot be traced: {type(error).__name__}: {reason}"
        ) from error
    graph = Graph()
    pixels = Value(INPUT, shape, shape, np.dtype(np.uint8))
    consts = [Value.of(const) for const in traced.consts]
    (result,) = _run(graph, traced.jaxpr, consts, [pixels], Rules(rules, calls))
    graph.nodes.append(helper.make_node("Identity", [graph.full(result)], [OUTPUT]))
    batch_dimension = BATCH if batch == "dynamic" else batch
    return helper.make_model(
        helper.make_graph(
            graph.nodes,
            "student",
            [
                helper.make_tensor_value_info(
                    INPUT, onnx.TensorProto.UINT8, (batch_dimension, *shape[1:])
                )
            ],
            [
                helper.make_tensor_value_info(
                    OUTPUT, onnx.TensorProto.FLOAT, (batch_dimension, *result.shape[1:])
                )
            ],
            graph.weights,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="fm-distill",
    )


def _run(
    graph: Graph,
    jaxpr: Jaxpr,
    consts: list[Value],
    inputs: list[Value],
    rules: Rules,
) -> list[Value]:
    environment: dict[Any, Value] = {}
    environment.update(zip(jaxpr.constvars, consts, strict=True))
    environment.update(zip(jaxpr.invars, inputs, strict=True))

    def read(variable: Any) -> Value:
        if not isinstance(variable, Literal):
            return environment[variable]
        aval: Any = variable.aval  # the value may be a number of Python's
        return Value.of(np.asarray(variable.val, aval.dtype))

    for equation in jaxpr.eqns:
        results = _of_equation(graph, equation, [read(x) for x in equation.invars], rules)
        environment.update(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _of_equation(
    graph: Graph, equation: JaxprEqn, inputs: list[Value], rules: Rules
) -> list[Value]:
    name, params = equation.primitive.name, equation.params
    outputs = [x.aval for x in equation.outvars]
    if name in CALLS and params.get("name") in rules.calls:
        return rules.calls[params["name"]](graph, inputs, params, outputs)
    if (called := inside(equation)) is not None:
        return _run(graph, called[0], [Value.of(x) for x in called[1]], inputs, rules)
    # A broadcast of what is known waits, as any does.
    if name != "broadcast_in_dim" and (computed := _computed(equation, inputs, outputs)):
        return computed
    if name not in rules.operations:
        raise Unsupported(f"the operation {name} is not supported")
    try:
        return rules.operations[name](graph, inputs, params, outputs)
    except Unsupported as error:
        raise Unsupported(f"the operation {name} is not supported with {error}") from None


def _computed(equation: JaxprEqn, inputs: list[Value], outputs: list[Any]) -> list[Value] | None:
    """The outputs where all inputs are known; None where they are not, or depend on the batch."""
    shapes = [*(x.shape for x in inputs), *(x.shape for x in outputs)]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return None
    arrays = []
    for value in inputs:
        if isinstance(value.content, str):
            return None
        arrays.append(np.broadcast_to(value.content, value.shape))
    results = equation.primitive.bind(*arrays, **equation.params)
    return [Value.of(x) for x in (results if equation.primitive.multiple_results else [results])]
