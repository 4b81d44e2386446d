"""From canvases to network inputs: crop, resize, flip, normalise, mix."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from fm_distill.config import NetworkConfig, ViewConfig
from fm_distill.errors import UserError
from fm_distill.views.crops import Sizes
from fm_distill.views.draws import Draw, mix
from fm_distill.views.fourier import Spectra, with_amplitudes
from fm_distill.views.sampling import Canvases, Images, sample, sample_area, sample_reduced

# (mean, deviation) of the input ranges on uint8's scale; ImageNet's are torchvision's, times 255.
INPUT_RANGES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "minus_one_one": ((127.5,) * 3, (127.5,) * 3),
    "zero_one": ((0.0,) * 3, (255.0,) * 3),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


@dataclasses.dataclass(frozen=True, order=True)
class InputSpec:
    """The input that a network expects. Networks that expect the same share one rendering."""

    resolution: int
    input_range: str
    input_rounding: str = "none"
    # Of each channel, on uint8's scale; empty but where the range is `adapt`.
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    @classmethod
    def of(cls, network: NetworkConfig) -> "InputSpec":
        """Raises `UserError` where the range adapts to data and no moments are there yet."""
        if network.input_range == "adapt" and not network.input_mean:
            raise UserError(
                "input_range=adapt has no moments yet: a run computes them of its training images "
                "before its first step; give input_mean and input_deviation"
            )
        return cls(
            network.resolution,
            network.input_range,
            network.input_rounding,
            network.input_mean,
            network.input_deviation,
        )

    @property
    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What `normalise` subtracts from each channel and divides it by, on uint8's scale."""
        if self.input_range == "adapt":
            return self.mean, self.deviation
        return INPUT_RANGES[self.input_range]

    def in_range(self, input_range: str) -> "InputSpec":
        """The same image, normalised in another way that has a name."""
        return dataclasses.replace(self, input_range=input_range, mean=(), deviation=())


@dataclasses.dataclass(frozen=True)
class CentralCrop:
    """The view of evaluation: the image resized, then its central square."""

    # Side of the square over the short side of the resized image.
    fraction: float
    resize: Literal["bilinear", "area"] = "bilinear"

    @classmethod
    def of(cls, views: ViewConfig) -> "CentralCrop":
        return cls(views.central_fraction, views.central_resize)


def render(
    draw: Draw, canvases: Canvases, input_spec: InputSpec, spectra: Spectra | None = None
) -> Images:
    """What a network with this `input_spec` sees of `draw`: cropped, flipped, normalised, mixed.

    Before it is normalised it is adapted to the target images, where `draw` has such; `spectra`
    has to have theirs at this resolution then. Raises `ValueError`.
    """
    low = draw.boxes[:, :2]
    high = low + draw.boxes[:, 2:] - 1
    resolution, reduced_resolution = input_spec.resolution, draw.resolution

    def whole() -> Images:
        return sample(canvases, draw.boxes, low, high, draw.flips, resolution)

    if reduced_resolution is None:
        pixels = whole()
    else:
        pixels = jax.lax.cond(
            reduced_resolution < resolution,
            lambda: sample_reduced(
                canvases, draw.boxes, draw.flips, resolution, reduced_resolution
            ),
            whole,
        )
    if draw.target_images is not None:
        if spectra is None:
            raise ValueError("the draw has target images, and render got no spectra of them")
        amplitudes = spectra[resolution]
        target_amplitudes = jnp.asarray(amplitudes)[draw.target_images % len(amplitudes)]
        unadapted = (draw.target_images < 0)[:, None, None, None]
        pixels = jnp.where(unadapted, pixels, with_amplitudes(pixels, target_amplitudes))
    return mix(draw, normalise(pixels, input_spec))


def render_central(
    canvases: Canvases, sizes: Sizes, crop: CentralCrop, input_spec: InputSpec
) -> Images:
    """The view of evaluation, as a network gets it; see `central_pixels`."""
    pixels = central_pixels(canvases, sizes, crop, input_spec.resolution)
    return normalise(pixels, input_spec)


def central_pixels(canvases: Canvases, sizes: Sizes, crop: CentralCrop, resolution: int) -> Images:
    """The image resized, then its central square at whole pixels, on uint8's scale.

    The resized image's short side is `round(resolution / crop.fraction)`. Source: the released
    evaluation, `resize_small` and `central_crop` of big_vision's `pp/ops_image.py`, 128 of 160
    (0.8) and 224 of 256 (0.875), which resizes by area.
    """
    size = sizes.astype(jnp.float32)
    short_side = round(resolution / crop.fraction)
    resized_size = jnp.round(size * (short_side / size.min(axis=1, keepdims=True)))
    # Half a pixel further, as it would be without the floor, each pixel would be the mean of two.
    offsets = jnp.floor((resized_size - resolution) / 2)
    # From pixels of the resized image to pixels of the canvas.
    scale = size / resized_size
    boxes = jnp.concatenate([offsets * scale, resolution * scale], axis=1)
    if crop.resize == "area":
        return sample_area(canvases, boxes, resolution)
    flips = jnp.zeros(size.shape[0], bool)
    # The image is resized before it is cropped, so pixels beside the square count as neighbours.
    return sample(canvases, boxes, jnp.zeros_like(size), size - 1, flips, resolution)


def normalise(pixels: Images, input_spec: InputSpec) -> Images:
    """What a network gets of pixels on uint8's scale."""
    mean, deviation = input_spec.moments
    if input_spec.input_rounding == "uint8":
        # It lies within 0 to 255 already. No gradient has to pass.
        pixels = jnp.round(pixels)
    return (pixels - jnp.asarray(mean)) / jnp.asarray(deviation)


def as_pixels(views: Images, input_spec: InputSpec) -> Canvases:
    """The grey levels that `normalise` made `views` of, rounded to uint8."""
    mean, deviation = input_spec.moments
    pixels = views * jnp.asarray(deviation) + jnp.asarray(mean)
    return jnp.round(pixels).clip(0, 255).astype(jnp.uint8)
