"""From canvases to network inputs: crop, resize, flip, normalise, mix."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from fm_distill.config import NetworkConfig
from fm_distill.views.crops import Boxes, Sizes
from fm_distill.views.draws import Draw, mix

Canvases = UInt8[Array, "batch side side 3"]


Pictures = Float[Array, "batch resolution resolution 3"]


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

    @classmethod
    def of(cls, network: NetworkConfig) -> "InputSpec":
        return cls(network.resolution, network.input_range)


def render(draw: Draw, canvases: Canvases, input_spec: InputSpec) -> Pictures:
    """What a network with this `input_spec` sees of `draw`: cropped, flipped, normalised, mixed."""
    low = draw.boxes[:, :2]
    high = low + draw.boxes[:, 2:] - 1
    pixels = _sample(canvases, draw.boxes, low, high, draw.flips, input_spec.resolution)
    return mix(draw, _normalise(pixels, input_spec))


def render_central(
    canvases: Canvases, sizes: Sizes, fraction: float, input_spec: InputSpec
) -> Pictures:
    """The view of evaluation: the image resized, then its central square at whole pixels.

    `fraction` is the square's side over the resized image's short side, which is
    `round(resolution / fraction)`. Source: the released evaluation, `resize_small` and
    `central_crop` of big_vision's `pp/ops_image.py`, 128 of 160 (0.8) and 224 of 256 (0.875); the
    image is resized bilinearly here, by area there.
    """
    resolution = input_spec.resolution
    size = sizes.astype(jnp.float32)
    short_side = round(resolution / fraction)
    resized = jnp.round(size * (short_side / size.min(axis=1, keepdims=True)))
    # Half a pixel further, as it would be without the floor, each pixel would be the mean of two.
    offsets = jnp.floor((resized - resolution) / 2)
    # From pixels of the resized image to pixels of the canvas.
    scale = size / resized
    boxes = jnp.concatenate([offsets * scale, resolution * scale], axis=1)
    flips = jnp.zeros(size.shape[0], bool)
    # The image is resized before it is cropped, so pixels beside the square count as neighbours.
    pixels = _sample(canvases, boxes, jnp.zeros_like(size), size - 1, flips, resolution)
    return _normalise(pixels, input_spec)


def _normalise(pixels: Pictures, input_spec: InputSpec) -> Pictures:
    mean, deviation = INPUT_RANGES[input_spec.input_range]
    return (pixels - jnp.asarray(mean)) / jnp.asarray(deviation)


def _sample(
    canvases: Canvases,
    boxes: Boxes,
    low: Float[Array, "batch 2"],
    high: Float[Array, "batch 2"],
    flips: Bool[Array, " batch"],
    resolution: int,
) -> Pictures:
    """Bilinear sampling of `boxes`, clamped to pixels `low` to `high`, in uint8's scale.

    Half-pixel centres and no antialiasing, as in the released recipe (TensorFlow's resize). It is
    separable, so it is two matrix products a picture, which is what accelerators are good at.
    """
    side = canvases.shape[1]
    rows = _weights(boxes[:, 0], boxes[:, 2], low[:, 0], high[:, 0], resolution, side)
    columns = _weights(boxes[:, 1], boxes[:, 3], low[:, 1], high[:, 1], resolution, side)
    columns = jnp.where(flips[:, None, None], columns[:, ::-1], columns)
    # In bfloat16, a TPU's default, the two weights of a pixel would not add up to 1.
    precision = jax.lax.Precision.HIGHEST
    pixels = canvases.astype(jnp.float32)
    pixels = jnp.einsum("nrh,nhwc->nrwc", rows, pixels, precision=precision)
    return jnp.einsum("nqw,nrwc->nrqc", columns, pixels, precision=precision)


def _weights(
    start: Float[Array, " batch"],
    length: Float[Array, " batch"],
    low: Float[Array, " batch"],
    high: Float[Array, " batch"],
    resolution: int,
    side: int,
) -> Float[Array, "batch resolution side"]:
    """Weight of each canvas row (or column) in each row (or column) of the picture."""
    centres = (jnp.arange(resolution, dtype=jnp.float32) + 0.5) / resolution
    at = start[:, None] + centres * length[:, None] - 0.5
    at = jnp.clip(at, low[:, None], high[:, None])
    pixel = jnp.arange(side, dtype=jnp.float32)
    return jnp.maximum(1 - jnp.abs(at[:, :, None] - pixel), 0)
