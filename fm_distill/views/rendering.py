"""From canvases to network inputs: crop, resize, flip, normalise, mix."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from fm_distill.config import NetworkConfig, ViewConfig
from fm_distill.views.crops import Boxes, Sizes
from fm_distill.views.draws import Draw, mix

Canvases = UInt8[Array, "batch side side 3"]


Pictures = Float[Array, "batch resolution resolution 3"]
# On the canvas, of each row or column of a picture.
Places = Float[Array, "batch resolution"]


# (mean, deviation) of the input ranges on uint8's scale; ImageNet's are torchvision's, times 255.
INPUT_RANGES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "minus_one_one": ((127.5,) * 3, (127.5,) * 3),
    "zero_one": ((0.0,) * 3, (255.0,) * 3),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


@dataclasses.dataclass(frozen=True, order=True)
class InputSpec:
    """What a network wants to see. Two networks that want the same share one rendering."""

    resolution: int
    input_range: str
    input_rounding: str = "none"

    @classmethod
    def of(cls, network: NetworkConfig) -> "InputSpec":
        return cls(network.resolution, network.input_range, network.input_rounding)


@dataclasses.dataclass(frozen=True)
class CentralCrop:
    """The view of evaluation: the image resized, then its central square."""

    # Side of the square over the short side of the resized image.
    fraction: float
    resize: Literal["bilinear", "area"] = "bilinear"

    @classmethod
    def of(cls, views: ViewConfig) -> "CentralCrop":
        return cls(views.central_fraction, views.central_resize)


def render(draw: Draw, canvases: Canvases, input_spec: InputSpec) -> Pictures:
    """What a network with this `input_spec` sees of `draw`: cropped, flipped, normalised, mixed."""
    low = draw.boxes[:, :2]
    high = low + draw.boxes[:, 2:] - 1
    pixels = _sample(canvases, draw.boxes, low, high, draw.flips, input_spec.resolution)
    return mix(draw, normalise(pixels, input_spec))


def render_central(
    canvases: Canvases, sizes: Sizes, crop: CentralCrop, input_spec: InputSpec
) -> Pictures:
    """The view of evaluation, as a network gets it; see `central_pixels`."""
    pixels = central_pixels(canvases, sizes, crop, input_spec.resolution)
    return normalise(pixels, input_spec)


def central_pixels(
    canvases: Canvases, sizes: Sizes, crop: CentralCrop, resolution: int
) -> Pictures:
    """The image resized, then its central square at whole pixels, on uint8's scale.

    The resized image's short side is `round(resolution / crop.fraction)`. Source: the released
    evaluation, `resize_small` and `central_crop` of big_vision's `pp/ops_image.py`, 128 of 160
    (0.8) and 224 of 256 (0.875), which resizes by area.
    """
    size = sizes.astype(jnp.float32)
    short_side = round(resolution / crop.fraction)
    resized = jnp.round(size * (short_side / size.min(axis=1, keepdims=True)))
    # Half a pixel further, as it would be without the floor, each pixel would be the mean of two.
    offsets = jnp.floor((resized - resolution) / 2)
    # From pixels of the resized image to pixels of the canvas.
    scale = size / resized
    boxes = jnp.concatenate([offsets * scale, resolution * scale], axis=1)
    if crop.resize == "area":
        of_rows, of_columns = (
            _covered(axis, canvases.shape[1], boxes, resolution) for axis in (0, 1)
        )
        return _products(canvases, of_rows, of_columns)
    flips = jnp.zeros(size.shape[0], bool)
    # The image is resized before it is cropped, so pixels beside the square count as neighbours.
    return _sample(canvases, boxes, jnp.zeros_like(size), size - 1, flips, resolution)


def normalise(pixels: Pictures, input_spec: InputSpec) -> Pictures:
    """What a network gets of pixels on uint8's scale."""
    mean, deviation = INPUT_RANGES[input_spec.input_range]
    if input_spec.input_rounding == "uint8":
        # Bilinear weights keep it within 0 to 255. No gradient has to pass.
        pixels = jnp.round(pixels)
    return (pixels - jnp.asarray(mean)) / jnp.asarray(deviation)


def as_pixels(pictures: Pictures, input_spec: InputSpec) -> Canvases:
    """The grey levels that `normalise` made `pictures` of, rounded to uint8."""
    mean, deviation = INPUT_RANGES[input_spec.input_range]
    pixels = pictures * jnp.asarray(deviation) + jnp.asarray(mean)
    return jnp.round(pixels).clip(0, 255).astype(jnp.uint8)


def _sample(
    canvases: Canvases,
    boxes: Boxes,
    low: Float[Array, "batch 2"],
    high: Float[Array, "batch 2"],
    flips: Bool[Array, " batch"],
    resolution: int,
) -> Pictures:
    """Bilinear sampling of `boxes`, clamped to pixels `low` to `high`, in uint8's scale.

    Half-pixel centres and no antialiasing, as in the released recipe (TensorFlow's resize). On
    accelerators it is two matrix products a picture, which is what they are good at; on a CPU the
    four neighbours of each pixel are gathered, instead of products with all rows and columns of
    the canvas. The two differ by rounding, less than 1e-4 grey levels.
    """
    rows = _places(0, resolution, boxes, low, high)
    columns = _places(1, resolution, boxes, low, high)
    columns = jnp.where(flips[:, None], columns[:, ::-1], columns)
    return jax.lax.platform_dependent(canvases, rows, columns, cpu=_gathered, default=_multiplied)


def _covered(
    axis: int, side: int, boxes: Boxes, resolution: int
) -> Float[Array, "batch resolution side"]:
    """The share of each row (or column) of a picture that each one of the canvas covers."""
    scale = boxes[:, 2 + axis, None, None] / resolution
    start = boxes[:, axis, None, None] + jnp.arange(resolution)[:, None] * scale
    pixel = jnp.arange(side, dtype=jnp.float32)
    overlap = jnp.minimum(start + scale, pixel + 1) - jnp.maximum(start, pixel)
    return jnp.maximum(overlap, 0) / scale


def _multiplied(canvases: Canvases, rows: Places, columns: Places) -> Pictures:
    pixel = jnp.arange(canvases.shape[1], dtype=jnp.float32)
    of_rows, of_columns = (_weights(x[..., None], pixel) for x in (rows, columns))
    return _products(canvases, of_rows, of_columns)


def _products(
    canvases: Canvases,
    of_rows: Float[Array, "batch resolution side"],
    of_columns: Float[Array, "batch resolution side"],
) -> Pictures:
    """Pictures as sums over rows and columns of the canvas with these weights."""
    # In bfloat16, a TPU's default, the weights of a pixel would not add up to 1.
    precision = jax.lax.Precision.HIGHEST
    pixels = canvases.astype(jnp.float32)
    pixels = jnp.einsum("nrh,nhwc->nrwc", of_rows, pixels, precision=precision)
    return jnp.einsum("nqw,nrwc->nrqc", of_columns, pixels, precision=precision)


@jax.vmap
def _gathered(canvas: Array, row: Array, column: Array) -> Array:
    above, left, last = jnp.floor(row), jnp.floor(column), canvas.shape[0] - 1

    def at(y: Array, x: Array) -> Array:
        # Beside the last pixel lies one of weight 0.
        y, x = (jnp.minimum(i.astype(jnp.int32), last) for i in (y, x))
        return canvas[y[:, None], x[None, :]].astype(jnp.float32)

    def mixed_rows(x: Array) -> Array:
        upper, lower = (_weights(row, above + i)[:, None, None] for i in (0, 1))
        return upper * at(above, x) + lower * at(above + 1, x)

    near, far = (_weights(column, left + i)[None, :, None] for i in (0, 1))
    return near * mixed_rows(left) + far * mixed_rows(left + 1)


def _places(
    axis: int,
    resolution: int,
    boxes: Boxes,
    low: Float[Array, "batch 2"],
    high: Float[Array, "batch 2"],
) -> Places:
    """Where on the canvas each row (or column) of the picture lies."""
    centres = (jnp.arange(resolution, dtype=jnp.float32) + 0.5) / resolution
    at = boxes[:, axis, None] + centres * boxes[:, 2 + axis, None] - 0.5
    return jnp.clip(at, low[:, axis, None], high[:, axis, None])


def _weights(at: Float[Array, "..."], pixel: Float[Array, "..."]) -> Float[Array, "..."]:
    """The weight of a row (or column) of the canvas at a place between rows."""
    return jnp.maximum(1 - jnp.abs(at - pixel), 0)
