"""A function as steps for LiteRT's converter, which keep the ranges learned in training.

What multiplies a channel behind a convolution, such as a BatchNorm, multiplies the scales of its
weights and leaves their integers as they are (see `onnx_folding`).
"""

import dataclasses
import functools
from typing import Any

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
    joined,
    once,
)
from fm_distill.exporting.operations import CALLS, inside

# Operations that change nothing.
SAME = ("copy", "name", "stop_gradient")
NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def steps_of(function: Function, pixels: jax.ShapeDtypeStruct) -> list[Step]:
    """Those of `function` of such `pixels`; the last one makes its result alone."""
    traced = jax.make_jaxpr(function)(pixels)
    steps = Steps()
    given = Unknown(0, pixels.shape, np.dtype(pixels.dtype))
    (found,) = _run(steps, traced.jaxpr, [np.asarray(x) for x in traced.consts], [given])
    if not any(step.kind == "round" for step in steps.found):  # it stays one whole
        return [Step("call", (0,), (1,), {"function": exported(function, [pixels])})]
    return [*joined(steps.found, steps.tensor(found).number)]


def _run(steps: Steps, jaxpr: Jaxpr, consts: list[Any], inputs: list[Any]) -> list[Any]:
    known: dict[Any, Any] = {}
    known.update(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def read(variable: Any) -> Any:
        if not isinstance(variable, Written):
            return known[variable]
        kind: Any = variable.aval  # the value may be a number of Python's
        return np.asarray(variable.val, kind.dtype)

    for equation in jaxpr.eqns:
        results = _of_equation(steps, equation, [read(x) for x in equation.invars])
        known.update(zip(equation.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _of_equation(steps: Steps, equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name in CALLS and params.get("name") == "fake_quantise":
        return [_rounded(steps, *inputs)]
    if (found := inside(equation)) is not None:
        return _run(steps, found[0], [np.asarray(x) for x in found[1]], inputs)
    if name in SAME:
        return inputs
    known = all(isinstance(x, np.ndarray) for x in inputs)
    if known and name == "broadcast_in_dim":
        held = np.ones(len(params["shape"]), int)
        held[list(params["broadcast_dimensions"])] = inputs[0].shape
        return [np.broadcast_to(inputs[0].reshape(held), params["shape"])]
    bind = functools.partial(equation.primitive.bind, **params)
    if known:
        out = bind(*inputs)
        return [np.asarray(x) for x in (out if equation.primitive.multiple_results else [out])]
    if name in ("conv_general_dilated", "dot_general") and _is_layer(equation, inputs):
        images, weights = inputs
        ones = np.ones(len(weights.scales))
        return [Product(equation, steps.tensor(images), weights, ones, np.zeros_like(ones))]
    if name in ("mul", "add") and (product := _followed(name, *inputs)) is not None:
        return [product]
    return list(steps.call(bind, inputs))


def _is_layer(equation: JaxprEqn, inputs: list[Any]) -> bool:
    """Whether it is one with rounded weights in a form that layers of `models` have."""
    params, weights = equation.params, inputs[1]
    if not isinstance(weights, Weights):
        return False
    numbers = params["dimension_numbers"]
    if equation.primitive.name == "dot_general":
        plain: tuple[Any, ...] = (((1,), (0,)), ((), ()))
        return numbers == plain and weights.integers.ndim == 2
    layout = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    groups = params["feature_group_count"]
    return layout == NHWC and groups in (1, weights.integers.shape[-1])


def _followed(name: str, x: Any, other: Any) -> Product | None:
    if not isinstance(x, Product):
        x, other = other, x
    if not isinstance(x, Product) or not isinstance(other, np.ndarray):
        return None
    values = _by_channel(other, len(x.factor))
    if values is None:
        return None
    if name == "mul":
        return dataclasses.replace(x, factor=x.factor * values, offset=x.offset * values)
    return dataclasses.replace(x, offset=x.offset + values)


def _by_channel(array: np.ndarray, channels: int) -> np.ndarray | None:
    """Its values for each channel, the last axis, where it has nothing else."""
    small = once(array)
    if small.size == 1:
        return np.full(channels, float(small.reshape(())))
    if small.size != channels or small.shape[-1] != channels:
        return None
    return small.reshape(-1).astype(np.float64)


def _rounded(steps: Steps, x: Any, *of_range: Any) -> Any:
    if not all(isinstance(value, np.ndarray) for value in of_range):
        raise UserError("a range that depends on the pixels cannot be converted to LiteRT")
    scale, zero, lowest, highest = of_range
    if isinstance(x, np.ndarray):
        integers = np.clip(np.rint(x / scale) + zero, lowest, highest).astype(np.int8)
        return Weights(integers, np.broadcast_to(scale, x.shape[-1:]), int(highest))
    x = steps.tensor(x)
    return steps.add("round", [x], steps.new(x.shape), scale=float(scale), zero_point=int(zero))
