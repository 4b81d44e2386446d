"""Distributions of the random crop, one box per example: a table from which a config chooses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fm_distill.config import ViewConfig

Sizes = Int[Array, "batch 2"]


Boxes = Float[Array, "batch 4"]
# Share of the image's area: `views.crop_area[0]`, or what the step makes of it.
Area = Float[Array, ""] | float


def tensorflow_crop(
    key: PRNGKeyArray, sizes: Sizes, config: ViewConfig, smallest_area: Area
) -> Boxes:
    """That of `tf.image.sample_distorted_bounding_box` without a box: the recipe's crop.

    Aspect (width / height) uniform, then height uniform between the heights of the smallest and
    the largest area that fit, width = round(height * aspect), offsets uniform. No rejection is
    needed: the distribution is closed-form. Source: TensorFlow's
    sample_distorted_bounding_box_op.cc (GenerateRandomCrop); its offsets leave out the last pixel,
    which is not reproduced.
    """
    height, width = sizes[:, 0].astype(jnp.float32), sizes[:, 1].astype(jnp.float32)
    aspect_key, height_key, offset_key = jax.random.split(key, 3)
    low, high = config.crop_aspect
    aspect = jax.random.uniform(aspect_key, height.shape, minval=low, maxval=high)
    area = height * width
    smallest_height = jnp.round(jnp.sqrt(smallest_area * area / aspect))
    largest_height = jnp.round(jnp.sqrt(config.crop_area[1] * area / aspect))
    # The largest height whose rounded width still fits the image.
    widest_height = jnp.floor((width + 0.5 - 1e-4) / aspect)
    largest_height = jnp.minimum(jnp.minimum(largest_height, height), widest_height)
    smallest_height = jnp.clip(smallest_height, 1, largest_height)
    step = jnp.floor(
        jax.random.uniform(height_key, height.shape) * (largest_height - smallest_height + 1)
    )
    # float32's uniform * n can round up to n.
    crop_height = jnp.minimum(smallest_height + step, largest_height)
    crop_width = jnp.clip(jnp.round(crop_height * aspect), 1, width)
    # As in the op: where rounding fell below the smallest area, one row more.
    too_small = (crop_height * crop_width < smallest_area * area) & (crop_height < largest_height)
    crop_height = crop_height + too_small
    crop_width = jnp.clip(jnp.round(crop_height * aspect), 1, width)
    return _place(offset_key, height, width, crop_height, crop_width)


def torchvision_crop(
    key: PRNGKeyArray, sizes: Sizes, config: ViewConfig, smallest_area: Area
) -> Boxes:
    """The distribution of torchvision's `RandomResizedCrop`: area uniform, aspect log-uniform.

    Ten attempts, then the largest central crop within the aspect range. Source: torchvision's
    transforms.RandomResizedCrop.get_params. Crops are larger than TensorFlow's on average.
    """
    attempts = 10
    height, width = sizes[:, 0].astype(jnp.float32), sizes[:, 1].astype(jnp.float32)
    area_key, aspect_key, offset_key = jax.random.split(key, 3)
    shape = (height.shape[0], attempts)
    area_share = jax.random.uniform(
        area_key, shape, minval=smallest_area, maxval=config.crop_area[1]
    )
    low, high = jnp.log(config.crop_aspect[0]), jnp.log(config.crop_aspect[1])
    aspect = jnp.exp(jax.random.uniform(aspect_key, shape, minval=low, maxval=high))
    area = (height * width)[:, None] * area_share
    widths, heights = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (widths > 0) & (widths <= width[:, None]) & (heights > 0)
    fits &= heights <= height[:, None]
    first_fit = jnp.argmax(fits, axis=1)[:, None]
    crop_height = jnp.take_along_axis(heights, first_fit, axis=1)[:, 0]
    crop_width = jnp.take_along_axis(widths, first_fit, axis=1)[:, 0]
    placed = _place(offset_key, height, width, crop_height, crop_width)
    # Fallback: the image's own aspect, brought into the range.
    aspect_image = width / height
    fallback_width = jnp.where(
        aspect_image > config.crop_aspect[1], jnp.round(height * config.crop_aspect[1]), width
    )
    fallback_height = jnp.where(
        aspect_image < config.crop_aspect[0], jnp.round(width / config.crop_aspect[0]), height
    )
    top, left = jnp.floor((height - fallback_height) / 2), jnp.floor((width - fallback_width) / 2)
    fallback = jnp.stack([top, left, fallback_height, fallback_width], axis=1)
    return jnp.where(fits.any(axis=1)[:, None], placed, fallback)


def whole_image(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig, smallest_area: Area) -> Boxes:
    """No crop: the whole image, squeezed into the network's square."""
    height, width = sizes[:, 0].astype(jnp.float32), sizes[:, 1].astype(jnp.float32)
    return jnp.stack([jnp.zeros_like(height), jnp.zeros_like(width), height, width], axis=1)


# `(key, sizes, config, smallest area) -> boxes`.
Crop = Callable[[PRNGKeyArray, Sizes, ViewConfig, Area], Boxes]

CROPS: dict[str, Crop] = {
    "tensorflow": tensorflow_crop,
    "torchvision": torchvision_crop,
    "whole": whole_image,
}


def _place(key: PRNGKeyArray, height: Array, width: Array, rows: Array, columns: Array) -> Boxes:
    """Boxes of `rows` x `columns` at uniform whole-pixel offsets inside the image."""
    fractions = jax.random.uniform(key, (2, *height.shape))
    top = jnp.minimum(jnp.floor(fractions[0] * (height - rows + 1)), height - rows)
    left = jnp.minimum(jnp.floor(fractions[1] * (width - columns + 1)), width - columns)
    return jnp.stack([top, left, rows, columns], axis=1)
