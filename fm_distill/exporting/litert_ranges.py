"""Ranges of activations for steps that have none: the lowest and highest number on images.

Source: Krishnamoorthi 2018 (arXiv 1806.08342), section 3.1.1.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from fm_distill.exporting.litert_steps import Step
from fm_distill.models.quantisation import OF_ACTIVATIONS, Range, affine

Batches = UInt8[np.ndarray, "count rows resolution resolution 3"]


def with_ranges(steps: list[Step], batches: Batches) -> list[Step]:
    """`steps` with the scale and zero point of each rounding that has none, by those `batches`.

    Weights are rounded while images are looked at, activations are not.
    """
    unranged = [x for x in steps if _lacks_range(x)]
    observe = jax.jit(lambda pixels: _ends(steps, pixels))
    observed = [jax.device_get(observe(jnp.asarray(pixels))) for pixels in batches]
    low, high = np.min([x for x, _ in observed], axis=0), np.max([x for _, x in observed], axis=0)
    ranges = {}
    for step, *step_ends in zip(unranged, low, high, strict=True):
        step_range = Range(*map(jnp.float32, step_ends))
        scale, zero_point = map(float, affine(step_range, OF_ACTIVATIONS["int8"]))
        ranges[step.makes] = {"scale": scale, "zero_point": int(zero_point)}
    return [dataclasses.replace(x, values=ranges[x.makes]) if _lacks_range(x) else x for x in steps]


def _lacks_range(step: Step) -> bool:
    return step.kind == "round" and not step.values


def _ends(steps: list[Step], pixels: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """Lowest and highest number that each rounding without a range reads."""
    tensors, low, high = {0: pixels}, [], []
    for step in steps:
        inputs = [tensors[number] for number in step.reads]
        if _lacks_range(step):
            low.append(inputs[0].min())
            high.append(inputs[0].max())
        tensors.update(zip(step.makes, MAKERS[step.kind](step, *inputs), strict=True))
    return low, high


def _convolved(step: Step, x: jax.Array, kernel: jax.Array) -> Iterable[jax.Array]:
    output = jax.lax.conv_general_dilated(
        x,
        kernel,
        step.values["strides"],
        step.values["padding"],
        rhs_dilation=step.values["dilations"],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return (output + step.values["offset"],)


MAKERS: dict[str, Callable[..., Iterable[Any]]] = {
    "round": lambda step, x: (x,),
    "kernel": lambda step: (jnp.asarray(step.values["weights"]),),
    "convolution": _convolved,
    "call": lambda step, *inputs: step.values["python"](*inputs),
}
