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
    given = Unknown(0, pixels.shape, np.dtype(pixels.dtype))
    (found,) = _run(steps, jaxpr.jaxpr, [np.asarray(x) for x in jaxpr.consts], [given])
    return Traced(steps.found, steps.tensor(found).number, steps.operations)


def in_one_step(function: Function, pixels: jax.ShapeDtypeStruct) -> list[Step]:
    """`function` in a single step."""
    return [Step("call", (0,), (1,), {"function": exported(function, [pixels])})]


def _run(steps: Steps, jaxpr: Jaxpr, consts: list[Any], inputs: list[Any]) -> list[Any]:
    known: dict[Any, Any] = {}
    variables = [x for equation in jaxpr.eqns for x in equation.invars] + jaxpr.outvars
    reads = collections.Counter(x for x in variables if not isinstance(x, Written))

    def read(variable: Any) -> Any:
        if not isinstance(variable, Written):
            return known[variable]
        kind: Any = variable.aval  # the value may be a number of Python's
        return np.asarray(variable.val, kind.dtype)

    def know(names: Sequence[Any], values: list[Any]) -> None:
        for name, value in zip(names, values, strict=True):
            known[name] = value
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
    if (found := inside(equation)) is not None:
        return _run(steps, found[0], [np.asarray(x) for x in found[1]], inputs)
    if name in UNCHANGING:
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
    places, inner, outer = (x.aval.shape for x in (*equation.invars, *equation.outvars))  # type: ignore[attr-defined]
    numbers = params["dimension_numbers"]
    if equation.primitive.name == "dot_general":
        plain: tuple[Any, ...] = (((len(places) - 1,), (0,)), ((), ()))
        return numbers == plain and len(inner) == 2 and len(places) > 1
    layout = (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec)
    # A transposed convolution, which sets its pixels apart, is another operation in LiteRT.
    apart = set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1
    return layout == NHWC and not apart and params["feature_group_count"] in (1, outer[-1])


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
    small = without_repeats(array)
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
