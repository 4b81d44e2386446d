"""A trained student as something to call: images in, probabilities out."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, UInt8

from fm_distill.config import CanvasConfig, NetworkConfig
from fm_distill.data.images import Pixels, decode, on_canvas, shrink
from fm_distill.errors import UserError
from fm_distill.models import Variables, build_network
from fm_distill.views.rendering import CentralCrop, InputSpec, render_central

# Images that the network gets at once, at most.
BATCH = 32


@runtime_checkable
class Predictor(Protocol):
    """What `predict` asks: a `Student`, or one in a file of another runtime."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def prepare(self, image: bytes | np.ndarray) -> Pixels: ...

    def predict_pixels(self, prepared: list[np.ndarray]) -> Float[np.ndarray, "batch classes"]: ...


@dataclasses.dataclass(frozen=True)
class Student:
    """A network with its weights, its classes and the preparation of its images.

    Images are shrunk onto the canvas of the run's data and cropped as in evaluation.
    """

    network: NetworkConfig  # nothing in it is `auto`
    classes: int
    class_names: tuple[str, ...]
    canvas: CanvasConfig
    central_crop: CentralCrop
    precision: Literal["float32", "bfloat16"]
    variables: Variables

    def predict(self, images: np.ndarray) -> Float[np.ndarray, "batch classes"]:
        """Probabilities of the classes, of uint8 `images` (batch, height, width, 3) of any size.

        The last axis may also have one channel (greyscale). Raises `UserError` for another type
        or shape.
        """
        return _softmax(self.logits(images))

    def logits(self, images: np.ndarray) -> Float[np.ndarray, "batch classes"]:
        """What `predict` takes the softmax of."""
        return self.logits_of_pixels([self.prepare(image) for image in checked(images)])

    def prepare(self, image: bytes | np.ndarray) -> Pixels:
        """An encoded image, or its pixels, at its size on the canvas. Raises `CorruptImage`."""
        return shrink(decode(image), self.canvas)

    def predict_pixels(self, prepared: list[np.ndarray]) -> Float[np.ndarray, "batch classes"]:
        """Probabilities of images that went through `prepare`, uint8 (height, width, 3) each."""
        return _softmax(self.logits_of_pixels(prepared))

    def logits_of_pixels(self, prepared: list[np.ndarray]) -> Float[np.ndarray, "batch classes"]:
        """Logits of images that went through `prepare`, uint8 (height, width, 3) each."""
        all_logits = [np.zeros((0, self.classes), np.float32)]
        for start in range(0, len(prepared), BATCH):
            images = prepared[start : start + BATCH]
            # Few shapes, as each is compiled anew: the next power of two.
            rows = 1 << (len(images) - 1).bit_length()
            canvases, sizes = canvases_of(images, self.canvas.side, rows)
            logits = self._program(self.variables, canvases, sizes)
            all_logits.append(np.asarray(logits, np.float32)[: len(images)])
        return np.concatenate(all_logits)

    @functools.cached_property
    def _program(
        self,
    ) -> Callable[
        [Variables, UInt8[np.ndarray, "batch side side 3"], Int[np.ndarray, "batch 2"]], Array
    ]:
        network = build_network(self.network, self.classes, jnp.dtype(self.precision))
        input_spec = InputSpec.of(self.network)

        @jax.jit
        def program(variables: Variables, canvases: Array, sizes: Array) -> Array:
            view = render_central(canvases, sizes, self.central_crop, input_spec)
            return network.apply(variables, view, train=False).logits

        return program


def canvases_of(
    prepared: list[np.ndarray], side: int, rows: int
) -> tuple[UInt8[np.ndarray, "rows side side 3"], Int32[np.ndarray, "rows 2"]]:
    """Images that went through `prepare`, on canvases, and their sizes; black up to `rows`."""
    canvases = np.zeros((rows, side, side, 3), np.uint8)
    sizes = np.ones((rows, 2), np.int32)
    for row, pixels in enumerate(prepared):
        canvases[row] = on_canvas(pixels, side)
        sizes[row] = pixels.shape[:2]
    return canvases, sizes


def checked(images: np.ndarray, name: str = "images") -> np.ndarray:
    """`images` where they are a batch of pixels. Raises `UserError`."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise UserError(
            f"{name}: got {images.dtype} of shape {images.shape}, expected uint8 of shape (batch, "
            "height, width, 3); pass one image as images[None], and multiply values from 0 to 1 "
            "by 255"
        )
    if 0 in images.shape[1:3]:
        raise UserError(
            f"{name}: the images of shape {images.shape} have no pixels; leave them out"
        )
    return images


def _softmax(logits: Float[np.ndarray, "batch classes"]) -> Float[np.ndarray, "batch classes"]:
    return np.asarray(jax.nn.softmax(logits, axis=-1))
