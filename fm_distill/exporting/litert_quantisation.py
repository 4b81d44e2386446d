"""A function as steps for LiteRT's converter, which keep the ranges learned in training.

What multiplies a channel behind a convolution, such as a BatchNorm, multiplies the scales of its
weights and leaves their integers as they are (see `onnx_folding`).
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn
from jax.extend.core import Literal as Written

from fm_distill.errors import UserError
from fm_distill.exporting.function import Function
from fm_distill.exporting.litert_steps import (
    Product,
    Step,
    Steps,
    Unknown,
    Weights,
    exported,
    without_repeats,
)
from fm_distill.exporting.operations import CALLS, inside

# Operations that change nothing.
UNCHANGING = ("copy", "name", "stop_gradient")
NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


class Traced(NamedTuple):
    """A function in steps."""

    steps: list[Step]
    # The number of its result.
    result: int
    # Names of the operations of its calls.
    operations: set[str]

    def has(self, kind: str) -> bool:
        """Whether a step is of that kind."""
        return any(step.kind == kind for step in self.steps)


def traced(
    function: Function, pixels: jax.ShapeDtypeStruct, calibrated: bool = False, floats: bool = False
) -> Traced:
    """`function` of such `pixels`.

    If `calibrated`, layers of rounded weights round what they read and make, too, by unknown
    ranges; with `floats`, weights of the others are rounded, and they are such layers.
    """
    jaxpr = jax.make_jaxpr(function)(pixels)
    steps = Steps(calibrated, floats)
    input_tensor = Unknown(0, pixels.shape, np.dtype(pixels.dtype))
    (result,) = _run(
        steps, jaxpr.jaxpr, [np.asarray(const) for const in jaxpr.consts], [input_tensor]
    )
    return Traced(steps.found, steps.tensor(result).number, steps.operations)


def in_one_step(function: Function, pixels: jax.ShapeDtypeStruct) -> list[Step]:
    """`function` in a single step."""
    return [Step("call", (0,), (1,), {"function": exported(function, [pixels])})]


def _run(steps: Steps, jaxpr: Jaxpr, consts: list[Any], inputs: list[Any]) -> list[Any]:
    environment: dict[Any, Any] = {}
    variables = [x for equation in jaxpr.eqns for x in equation.invars] + jaxpr.outvars
    reads = collections.Counter(x for x in variables if not isinstance(x, Written))

    def read(variable: Any) -> Any:
        if not isinstance(variable, Written):
            return environment[variable]
        aval: Any = variable.aval  # the value may be a number of Python's
        return np.asarray(variable.val, aval.dtype)

    def know(names: Sequence[Any], values: list[Any]) -> None:
        for name, value in zip(names, values, strict=True):
            environment[name] = value
            if isinstance(value, Product) and reads[name] > 1:
                steps.share(value)

    know(jaxpr.constvars, consts)
    know(jaxpr.invars, inputs)
    for equation in jaxpr.eqns:
        know(equation.outvars, _of_equation(steps, equation, [read(x) for x in equation.invars]))
    return [read(x) for x in jaxpr.outvars]


def _of_equation(steps: Steps, equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name in CALLS and params.get("name") == "fake_quantise":
        return [_rounded(steps, *inputs)]
    if (called := inside(equation)) is not None:
        return _run(steps, called[0], [np.asarray(x) for x in called[1]], inputs)
    if name in UNCHANGING:
        return inputs
    all_constant = all(isinstance(x, np.ndarray) for x in inputs)
    if all_constant and name == "broadcast_in_dim":
        operand_shape = np.ones(len(params["shape"]), int)
        operand_shape[list(params["broadcast_dimensions"])] = inputs[0].shape
        return [np.broadcast_to(inputs[0].reshape(operand_shape), params["shape"])]
    bind = functools.partial(equation.primitive.bind, **params)
    if all_constant:
        outputs = bind(*inputs)
        return [
            np.asarray(x) for x in (outputs if equation.primitive.multiple_results else [outputs])
        ]
    if name in ("conv_general_dilated", "dot_general") and _is_layer(steps, equation, inputs):
        images, weights = inputs
        weights = weights if isinstance(weights, Weights) else Weights.of(weights)
        ones = np.ones(len(weights.scales))
        return [Product(equation, steps.tensor(images), weights, ones, np.zeros_like(ones))]
    if name in ("mul", "add") and (product := _followed(steps, name, *inputs)) is not None:
        return [product]
    steps.operations.add(name)
    return list(steps.call(bind, inputs))


def _is_layer(steps: Steps, equation: JaxprEqn, inputs: list[Any]) -> bool:
    """Whether it is one with rounded weights in a form that layers of `models` have."""
    params, weights = equation.params, inputs[1]
    if not isinstance(weights, (Weights, np.ndarray) if steps.floats else Weights):
        return False
    input_shape, kernel_shape, output_shape = (
        x.aval.shape  # type: ignore[attr-defined]
        for x in (*equation.invars, *equation.outvars)
    )
    dimension_numbers = params["dimension_numbers"]
    if equation.primitive.name == "dot_general":
        matrix_product: tuple[Any, ...] = (((len(input_shape) - 1,), (0,)), ((), ()))
        return (
            dimension_numbers == matrix_product and len(kernel_shape) == 2 and len(input_shape) > 1
        )
    layout = (dimension_numbers.lhs_spec, dimension_numbers.rhs_spec, dimension_numbers.out_spec)
    # A transposed convolution, which sets its pixels apart, is another operation in LiteRT.
    transposed = set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1
    return (
        layout == NHWC and not transposed and params["feature_group_count"] in (1, output_shape[-1])
    )


def _followed(steps: Steps, name: str, x: Any, other: Any) -> Product | None:
    if not isinstance(x, Product):
        x, other = other, x
    if not isinstance(x, Product) or not isinstance(other, np.ndarray) or steps.shared(x):
        return None
    values = _by_channel(other, len(x.factor))
    if values is None:
        return None
    if name == "mul":
        return dataclasses.replace(x, factor=x.factor * values, offset=x.offset * values)
    return dataclasses.replace(x, offset=x.offset + values)


def _by_channel(array: np.ndarray, channels: int) -> np.ndarray | None:
    """Its values for each channel, the last axis, where it has nothing else."""
    unrepeated = without_repeats(array)
    if unrepeated.size == 1:
        return np.full(channels, float(unrepeated.reshape(())))
    if unrepeated.size != channels or unrepeated.shape[-1] != channels:
        return None
    return unrepeated.reshape(-1).astype(np.float64)


def _rounded(steps: Steps, x: Any, *of_range: Any) -> Any:
    if not all(isinstance(value, np.ndarray) for value in of_range):
        raise UserError("a range that depends on the pixels cannot be converted to LiteRT")
    scale, zero_point, lowest, highest = of_range
    if isinstance(x, np.ndarray):
        integers = np.clip(np.rint(x / scale) + zero_point, lowest, highest).astype(np.int8)
        return Weights(integers, np.broadcast_to(scale, x.shape[-1:]), int(highest))
    x = steps.tensor(x)
    return steps.add(
        "round", [x], steps.new(x.shape), scale=float(scale), zero_point=int(zero_point)
    )
