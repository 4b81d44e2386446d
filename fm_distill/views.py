"""One look at a batch: drawn once a step, rendered for each network.

`draw` makes everything random about a batch; `render` turns the canvases into what one network
sees of that draw. Both are called by `step.py` inside the compiled program. Nothing here knows how
many devices there are: each number belongs to an example or to the batch in its global order.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt8

from fm_distill.config import NetworkConfig, ViewConfig

Sizes = Int[Array, "batch 2"]
Boxes = Float[Array, "batch 4"]
Canvases = UInt8[Array, "batch side side 3"]
Pictures = Float[Array, "batch resolution resolution 3"]

# (mean, deviation) of the input ranges on uint8's scale; ImageNet's are torchvision's, times 255.
INPUT_RANGES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "minus_one_one": ((127.5,) * 3, (127.5,) * 3),
    "zero_one": ((0.0,) * 3, (255.0,) * 3),
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


@dataclasses.dataclass(frozen=True, order=True)
class Picture:
    """What a network wants to see. Two networks that want the same share one rendering."""

    resolution: int
    input_range: str

    @classmethod
    def of(cls, network: NetworkConfig) -> "Picture":
        return cls(network.resolution, network.input_range)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """Everything random about a batch of one step."""

    # float32 (batch, 4): top, left, height, width in canvas pixels.
    boxes: PyTree
    # bool (batch,)
    flips: PyTree
    # float32 (batch,): weight of the example itself in its mixture; None: no mixup.
    coefficients: PyTree
    # int32 (batch,): the example that each is mixed with; None: the one before it.
    partners: PyTree


def draw(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig) -> Draw:
    """Draws boxes, flips, coefficients and partners for images of `sizes` (height, width)."""
    batch = sizes.shape[0]
    box_key, flip_key, coefficient_key, partner_key = jax.random.split(key, 4)
    flips = jax.random.uniform(flip_key, (batch,)) < config.flip_probability
    permuted = config.mixup != "none" and config.mixup_partner == "permutation"
    partners = jax.random.permutation(partner_key, batch) if permuted else None
    return Draw(
        boxes=CROPS[config.crop](box_key, sizes, config),
        flips=flips,
        coefficients=_coefficients(coefficient_key, batch, config),
        partners=partners,
    )


def _same(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig) -> tuple[Draw, Draw | None]:
    both = draw(key, sizes, config)
    return both, both


def _unmixed(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig) -> tuple[Draw, Draw | None]:
    return _same(key, sizes, dataclasses.replace(config, mixup="none"))


def _independent(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig) -> tuple[Draw, Draw | None]:
    own, teachers = jax.random.split(key)
    config = dataclasses.replace(config, mixup="none")
    return draw(own, sizes, config), draw(teachers, sizes, config)


def _fixed(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig) -> tuple[Draw, Draw | None]:
    return _unmixed(key, sizes, config)[0], None


# What the student sees and what its teachers see; None: they answered before the training began.
# Source: Beyer et al. 2021, figure 2; only function matching mixes images.
TEACHINGS: dict[str, Callable[[PRNGKeyArray, Sizes, ViewConfig], tuple[Draw, Draw | None]]] = {
    "function_matching": _same,
    "consistent": _unmixed,
    "independent": _independent,
    "fixed": _fixed,
}


def draws_of(
    target: str, teaching: str
) -> Callable[[PRNGKeyArray, Sizes, ViewConfig], tuple[Draw, Draw | None]]:
    """The line of `TEACHINGS` of a run; labels are mixed with what the student sees."""
    return TEACHINGS["function_matching" if target == "labels" else teaching]


def mix(draw: Draw, values: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """The mixture of each example's values with its partner's: pictures, or class probabilities.

    Source: big_vision's get_mixup rolls the batch by one, so example i is mixed with i - 1. A roll
    moves one example between neighbouring devices; a permutation gathers the whole batch.
    """
    if draw.coefficients is None:
        return values
    others = jnp.roll(values, 1, axis=0) if draw.partners is None else values[draw.partners]
    a = jnp.expand_dims(draw.coefficients, tuple(range(1, values.ndim)))
    return a * values + (1 - a) * others


def _coefficients(
    key: PRNGKeyArray, batch: int, config: ViewConfig
) -> Float[Array, " batch"] | None:
    if config.mixup == "none":
        return None
    count = 1 if config.mixup == "batch" else batch
    alpha = config.mixup_alpha
    a = jax.random.beta(key, alpha, alpha, (count,), jnp.float32)
    if config.mixup_fold:
        a = jnp.maximum(a, 1 - a)
    return jnp.broadcast_to(a, (batch,))


def tensorflow_crop(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig) -> Boxes:
    """The law of `tf.image.sample_distorted_bounding_box` without a box: the recipe's crop.

    Aspect (width / height) uniform, then height uniform between the heights of the smallest and
    the largest area that fit, width = round(height * aspect), offsets uniform. No rejection is
    needed, so the law is closed-form. Source: TensorFlow's sample_distorted_bounding_box_op.cc
    (GenerateRandomCrop); its offsets leave out the last pixel, which is not reproduced.
    """
    height, width = sizes[:, 0].astype(jnp.float32), sizes[:, 1].astype(jnp.float32)
    aspect_key, height_key, offset_key = jax.random.split(key, 3)
    low, high = config.crop_aspect
    aspect = jax.random.uniform(aspect_key, height.shape, minval=low, maxval=high)
    area = height * width
    smallest = jnp.round(jnp.sqrt(config.crop_area[0] * area / aspect))
    largest = jnp.round(jnp.sqrt(config.crop_area[1] * area / aspect))
    # The largest height whose rounded width still fits the image.
    widest = jnp.floor((width + 0.5 - 1e-4) / aspect)
    largest = jnp.minimum(jnp.minimum(largest, height), widest)
    smallest = jnp.clip(smallest, 1, largest)
    step = jnp.floor(jax.random.uniform(height_key, height.shape) * (largest - smallest + 1))
    # float32's uniform * n can round up to n.
    crop_height = jnp.minimum(smallest + step, largest)
    crop_width = jnp.clip(jnp.round(crop_height * aspect), 1, width)
    # As in the op: where rounding fell below the smallest area, one row more.
    short = (crop_height * crop_width < config.crop_area[0] * area) & (crop_height < largest)
    crop_height = crop_height + short
    crop_width = jnp.clip(jnp.round(crop_height * aspect), 1, width)
    return _place(offset_key, height, width, crop_height, crop_width)


def torchvision_crop(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig) -> Boxes:
    """The law of torchvision's `RandomResizedCrop`: area uniform, aspect log-uniform.

    Ten attempts, then the largest central crop within the aspect range. Source: torchvision's
    transforms.RandomResizedCrop.get_params. Crops are larger than TensorFlow's on average.
    """
    attempts = 10
    height, width = sizes[:, 0].astype(jnp.float32), sizes[:, 1].astype(jnp.float32)
    area_key, aspect_key, offset_key = jax.random.split(key, 3)
    shape = (height.shape[0], attempts)
    share = jax.random.uniform(
        area_key, shape, minval=config.crop_area[0], maxval=config.crop_area[1]
    )
    low, high = jnp.log(config.crop_aspect[0]), jnp.log(config.crop_aspect[1])
    aspect = jnp.exp(jax.random.uniform(aspect_key, shape, minval=low, maxval=high))
    area = (height * width)[:, None] * share
    widths, heights = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (widths > 0) & (widths <= width[:, None]) & (heights > 0)
    fits &= heights <= height[:, None]
    first = jnp.argmax(fits, axis=1)[:, None]
    crop_height = jnp.take_along_axis(heights, first, axis=1)[:, 0]
    crop_width = jnp.take_along_axis(widths, first, axis=1)[:, 0]
    placed = _place(offset_key, height, width, crop_height, crop_width)
    # Fallback: the image's own aspect, brought into the range.
    aspect_image = width / height
    back_width = jnp.where(
        aspect_image > config.crop_aspect[1], jnp.round(height * config.crop_aspect[1]), width
    )
    back_height = jnp.where(
        aspect_image < config.crop_aspect[0], jnp.round(width / config.crop_aspect[0]), height
    )
    top, left = jnp.floor((height - back_height) / 2), jnp.floor((width - back_width) / 2)
    central = jnp.stack([top, left, back_height, back_width], axis=1)
    return jnp.where(fits.any(axis=1)[:, None], placed, central)


def whole_image(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig) -> Boxes:
    """No crop: the whole image, squeezed into the network's square."""
    height, width = sizes[:, 0].astype(jnp.float32), sizes[:, 1].astype(jnp.float32)
    return jnp.stack([jnp.zeros_like(height), jnp.zeros_like(width), height, width], axis=1)


CROPS: dict[str, Callable[[PRNGKeyArray, Sizes, ViewConfig], Boxes]] = {
    "tensorflow": tensorflow_crop,
    "torchvision": torchvision_crop,
    "whole": whole_image,
}


def _place(key: PRNGKeyArray, height: Array, width: Array, rows: Array, columns: Array) -> Boxes:
    """Boxes of `rows` x `columns` at uniform whole-pixel offsets inside the image."""
    u = jax.random.uniform(key, (2, *height.shape))
    top = jnp.minimum(jnp.floor(u[0] * (height - rows + 1)), height - rows)
    left = jnp.minimum(jnp.floor(u[1] * (width - columns + 1)), width - columns)
    return jnp.stack([top, left, rows, columns], axis=1)


def render(draw: Draw, canvases: Canvases, picture: Picture) -> Pictures:
    """What a network with this `picture` sees of `draw`: cropped, flipped, normalised, mixed."""
    low = draw.boxes[:, :2]
    high = low + draw.boxes[:, 2:] - 1
    pixels = _sample(canvases, draw.boxes, low, high, draw.flips, picture.resolution)
    return mix(draw, _normalise(pixels, picture))


def render_central(canvases: Canvases, sizes: Sizes, fraction: float, picture: Picture) -> Pictures:
    """The view of evaluation: short side resized, then the central square.

    `fraction` is the square's side over the image's short side. Source: the paper's evaluation,
    `resize_small(160)|central_crop(128)` (0.8) and `resize_small(256)|central_crop(224)` (0.875).
    """
    size = sizes.astype(jnp.float32)
    side = fraction * size.min(axis=1, keepdims=True)
    boxes = jnp.concatenate([(size - side) / 2, side, side], axis=1)
    flips = jnp.zeros(size.shape[0], bool)
    # The image is resized before it is cropped, so pixels beside the square count as neighbours.
    pixels = _sample(canvases, boxes, jnp.zeros_like(size), size - 1, flips, picture.resolution)
    return _normalise(pixels, picture)


def _normalise(pixels: Pictures, picture: Picture) -> Pictures:
    mean, deviation = INPUT_RANGES[picture.input_range]
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
