"""A student as one function, from uint8 pixels to probabilities or logits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from fm_distill.errors import UserError
from fm_distill.models import build_network
from fm_distill.runs.student import BATCH, Student
from fm_distill.views.rendering import CentralCrop, InputSpec, central_pixels, normalise

Output = Literal["probabilities", "logits"]
BatchSize = int | Literal["dynamic"]
Quantise = Literal["none", "float16", "dynamic", "int8"]
Pixels = UInt8[np.ndarray, "batch resolution resolution 3"]
Outputs = Float[np.ndarray, "batch classes"]
# uint8; or float32 of the same values, for what quantises its input by itself.
GreyLevels = (
    UInt8[Array, "batch resolution resolution 3"] | Float[Array, "batch resolution resolution 3"]
)
# Traced by what writes a file.
Function = Callable[[GreyLevels], Float[Array, "batch classes"]]


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A function read back from a file, and what runs it, with its version."""

    name: str
    call: Callable[[Pixels], Outputs]
    # How often it has each operation; None where the runtime does not tell.
    operations: dict[str, int] | None = None


def function_of(student: Student, output: Output) -> Function:
    """`student` in float32, weights and normalisation inside; each convolution is one operation.

    What is computed from weights alone (BiT's standardised kernels) is computed here.
    """
    network = build_network(student.network, student.classes, jnp.dtype("float32"))
    frozen = jax.jit(network.freeze)(student.variables)
    # Whole numbers come in, whether the student rounded its images or not.
    spec = dataclasses.replace(InputSpec.of(student.network), input_rounding="none")

    def function(pixels: GreyLevels) -> Float[Array, "batch classes"]:
        images = normalise(pixels.astype(jnp.float32), spec)
        if network.apply_portable is None:
            logits = network.apply_frozen(frozen, images).logits
        else:
            logits = network.apply_portable(frozen, images)
        return jax.nn.softmax(logits, axis=-1) if output == "probabilities" else logits

    return function


def central_squares(
    canvases: UInt8[np.ndarray, "batch side side 3"],
    sizes: Int32[np.ndarray, "batch 2"],
    crop: CentralCrop,
    resolution: int,
) -> Pixels:
    """What such a function takes: the central view of evaluation, rounded to uint8."""
    slices = [slice(start, start + BATCH) for start in range(0, len(canvases), BATCH)]
    return np.concatenate(
        [np.asarray(_square(canvases[rows], sizes[rows], crop, resolution)) for rows in slices]
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _square(canvases: Array, sizes: Array, crop: CentralCrop, resolution: int) -> Array:
    pixels = central_pixels(canvases, sizes, crop, resolution)
    return jnp.round(pixels).astype(jnp.uint8)


def in_batches(
    call: Callable[[Pixels], Outputs], pixels: Pixels, batch: BatchSize, classes: int
) -> Outputs:
    """`call` on all `pixels`, so many at a time; the last ones of a fixed batch beside black."""
    batch_size = BATCH if batch == "dynamic" else batch
    outputs = [np.zeros((0, classes), np.float32)]
    for start in range(0, len(pixels), batch_size):
        chunk = pixels[start : start + batch_size]
        padding = 0 if batch == "dynamic" else batch_size - len(chunk)
        padded = np.pad(chunk, ((0, padding), (0, 0), (0, 0), (0, 0)))
        batch_outputs = np.asarray(call(padded), np.float32)
        if batch_outputs.shape != (len(padded), classes):
            raise UserError(
                f"the function returned an array of shape {batch_outputs.shape} for {len(padded)} "
                f"images, and its card describes {classes} classes; export it again"
            )
        outputs.append(batch_outputs[: len(chunk)])
    return np.concatenate(outputs)
