"""The steps that LiteRT's converter gets of a fake-quantised function.

The converter takes ranges from TensorFlow's operations FakeQuant alone, so `litert_conversion`
makes one of each rounding, and reads StableHLO of what lies between them.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend.core import JaxprEqn
from jaxtyping import Float, Int8

from fm_distill.exporting.stablehlo import ANYWHERE, PLATFORM
from fm_distill.models.quantisation import OF_WEIGHTS, weight_scale

# A factor this near to zero leaves nothing of its channel.
SMALLEST_SCALE = 1e-30


@dataclasses.dataclass(frozen=True)
class Step:
    """One of the four; numbers name what is read and made, and 0 is the pixels.

    round: to int8, affine, with `scale` and `zero_point`; with neither, before `litert_ranges` has
    seen images. kernel: the constant `weights`, which are integers up to `highest` times `scales`
    of the last axis. convolution: of images with such a kernel (height, width, inputs, outputs),
    and `offset` added. call: `function`, by `jax.export`.
    """

    kind: Literal["round", "kernel", "convolution", "call"]
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    values: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A tensor that depends on the pixels."""

    number: int
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Weights:
    """A kernel that is rounded: its integers, and what one of each output channel stands for."""

    integers: Int8[np.ndarray, "*_ outputs"]
    scales: Float[np.ndarray, " outputs"]
    highest: int

    @classmethod
    def of(cls, kernel: Float[np.ndarray, "*_ outputs"]) -> "Weights":
        """Of a kernel in floats: eight bits, symmetric, by the largest of each output channel."""
        levels = OF_WEIGHTS["int8"]
        scales = np.asarray(weight_scale(jnp.asarray(kernel), levels))
        integers = np.clip(np.rint(kernel / scales), *levels).astype(np.int8)
        return cls(integers, scales, levels[1])

    @property
    def floats(self) -> np.ndarray:
        return (self.integers * self.scales).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Product:
    """A convolution or matrix product with rounded weights, and what follows: x * factor + offset.

    It is a step when it is read.
    """

    equation: JaxprEqn
    images: Unknown
    weights: Weights
    factor: Float[np.ndarray, " outputs"]
    offset: Float[np.ndarray, " outputs"]


class Steps:
    """The steps as they come in; those of a call with a function that is not exported yet.

    Where `calibrated`, what layers read and make is rounded, without a range; where `floats`, those
    of float weights, too.
    """

    def __init__(self, calibrated: bool, floats: bool) -> None:
        self.calibrated, self.floats = calibrated, floats
        self.found: list[Step] = []
        self.operations: set[str] = set()  # what is called, by JAX's names
        self.done: dict[int, Unknown] = {}  # products, by their identity
        self.kept: list[Product] = []  # so that no identity is given twice
        self._shared: set[int] = set()  # products that several read, by their identity
        self._count = itertools.count(1)

    def new(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Unknown:
        return Unknown(next(self._count), tuple(shape), np.dtype(dtype))

    def add(self, kind: Any, reads: list[Unknown], make: Unknown, **values: Any) -> Unknown:
        numbers = tuple(x.number for x in reads)
        self.found.append(Step(kind, numbers, (make.number,), values))
        return make

    def share(self, product: Product) -> None:
        """`product` becomes one step, however many read it."""
        self._shared.add(id(product))
        self.kept.append(product)

    def shared(self, product: Product) -> bool:
        """Whether several read it: with what follows in it, it would be computed for each."""
        return id(product) in self._shared

    def call(self, function: Callable[..., Any], inputs: list[Any]) -> list[Unknown]:
        """`function`, of tensors and of arrays that are known."""
        arguments = [self.tensor(x) for x in inputs]
        unknown = [x for x in arguments if isinstance(x, Unknown)]

        def of_unknown(*values: Any) -> tuple[Any, ...]:
            remaining = iter(values)
            outputs = function(
                *(next(remaining) if isinstance(x, Unknown) else _repeated(x) for x in arguments)
            )
            return tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)

        shapes = jax.eval_shape(of_unknown, *map(_spec, unknown))
        results = [self.new(x.shape, x.dtype) for x in shapes]
        numbers = tuple(x.number for x in unknown), tuple(x.number for x in results)
        values = {"python": of_unknown, "specs": [*map(_spec, unknown)]}
        self.found.append(Step("call", *numbers, values))
        return results

    def tensor(self, value: Any) -> Any:
        """`value` as others read it: a tensor, or an array."""
        if isinstance(value, Weights):
            return value.floats
        if not isinstance(value, Product):
            return value
        if id(value) not in self.done:
            self.done[id(value)] = self._product(value)
            self.kept.append(value)
        return self.done[id(value)]

    def _product(self, product: Product) -> Unknown:
        equation, images = product.equation, product.images
        scales = product.weights.scales * np.abs(product.factor)
        is_zero = scales < SMALLEST_SCALE
        signs = np.where(is_zero, 0, np.sign(product.factor))
        scales = np.where(is_zero, 1.0, scales).astype(np.float32)
        kernel = (product.weights.integers * signs * scales).astype(np.float32)
        offset, shape = product.offset.astype(np.float32), equation.outvars[0].aval.shape  # type: ignore[attr-defined]
        quantisation = {"scales": scales, "highest": product.weights.highest}
        images = self._rounded(images)
        if equation.primitive.name == "dot_general":
            # A convolution of one pixel, whose kernel the converter takes as it lies here.
            leading_shape = images.shape[:-1]
            leading_shape = (
                leading_shape
                if len(leading_shape) == 3
                else (leading_shape[0], math.prod(leading_shape[1:]), 1)
            )
            reshaped_images = self._reshaped(images, (*leading_shape, images.shape[-1]))
            output_shape = (*leading_shape, shape[-1])
            tensor = self._convolution(
                reshaped_images, kernel[None, None], quantisation, offset, output_shape
            )
            return self._reshaped(tensor, shape)
        params = equation.params
        if params["feature_group_count"] == 1:
            return self._convolution(images, kernel, quantisation, offset, shape, params)
        # The order of axes that LiteRT has: what turned them would stand behind the rounding.
        weights = kernel.transpose(2, 0, 1, 3)
        tensor = self.add("kernel", [], self.new(weights.shape), weights=weights, **quantisation)

        def depthwise(x: Any, kernel: Any) -> Any:
            output = jax.lax.conv_general_dilated(
                x,
                kernel,
                params["window_strides"],
                params["padding"],
                rhs_dilation=params["rhs_dilation"],
                dimension_numbers=("NHWC", "IHWO", "NHWC"),
                feature_group_count=params["feature_group_count"],
            )
            return output + offset

        return self._rounded(self.call(depthwise, [images, tensor])[0])

    def _reshaped(self, x: Unknown, shape: tuple[int, ...]) -> Unknown:
        return x if x.shape == shape else self.call(lambda x: x.reshape(shape), [x])[0]

    def _rounded(self, x: Unknown) -> Unknown:
        return self.add("round", [x], self.new(x.shape)) if self.calibrated else x

    def _convolution(
        self,
        images: Unknown,
        kernel: np.ndarray,
        rounded: dict[str, Any],
        offset: np.ndarray,
        shape: tuple[int, ...],
        params: dict[str, Any] | None = None,
    ) -> Unknown:
        kernel_tensor = self.add("kernel", [], self.new(kernel.shape), weights=kernel, **rounded)
        layer_params = params or {}
        output = self.add(
            "convolution",
            [images, kernel_tensor],
            self.new(shape),
            offset=offset,
            strides=tuple(layer_params.get("window_strides", (1, 1))),
            padding=tuple(map(tuple, layer_params.get("padding", ((0, 0), (0, 0))))),
            dilations=tuple(layer_params.get("rhs_dilation", (1, 1))),
        )
        return self._rounded(output)


def joined(steps: list[Step], result: int) -> Iterator[Step]:
    """With one exported function instead of several that follow each other."""
    readers = {result: {len(steps)}}
    for i, step in enumerate(steps):
        for number in step.reads:
            readers.setdefault(number, set()).add(i)
    for is_call, group in itertools.groupby(enumerate(steps), lambda x: x[1].kind == "call"):
        members = [*group]
        if not is_call:
            yield from (step for _, step in members)
            continue
        indices, calls = {i for i, _ in members}, [step for _, step in members]
        produced = {number for step in calls for number in step.makes}
        reads = {
            number: spec
            for step in calls
            for number, spec in zip(step.reads, step.values["specs"], strict=True)
            if number not in produced
        }
        makes = tuple(x for x in sorted(produced) if readers.get(x, set()) - indices)
        joined_calls = functools.partial(_in_turn, calls, tuple(reads), makes)
        serialised = exported(joined_calls, [*reads.values()])
        yield Step("call", tuple(reads), makes, {"function": serialised})


def _in_turn(
    calls: list[Step], reads: tuple[int, ...], makes: tuple[int, ...], *values: Any
) -> tuple[Any, ...]:
    tensors = dict(zip(reads, values, strict=True))
    for step in calls:
        outputs = step.values["python"](*(tensors[x] for x in step.reads))
        tensors.update(zip(step.makes, outputs, strict=True))
    return tuple(tensors[x] for x in makes)


def exported(function: Callable[..., Any], specs: Sequence[jax.ShapeDtypeStruct]) -> bytes:
    """`function` of arrays of `specs`, serialised by `jax.export`."""
    disabled_checks = (ANYWHERE,)
    exported_function = export.export(
        jax.jit(function), platforms=(PLATFORM,), disabled_checks=disabled_checks
    )
    return bytes(exported_function(*specs).serialize())


def without_repeats(array: np.ndarray) -> np.ndarray:
    """What NumPy repeats, once."""
    return array[(..., *(slice(0, 1) if x == 0 else slice(None) for x in array.strides))]


def _repeated(array: Any) -> Any:
    """Not written out, as `array` may be large where it is repeated."""
    return jax.lax.broadcast_in_dim(without_repeats(array), array.shape, range(array.ndim))


def _spec(x: Unknown) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
