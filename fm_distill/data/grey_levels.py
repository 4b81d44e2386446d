"""How often each grey level occurs in the images of a split, and the moments that follow, exact.

Counts are integers, so that neither the order of the images nor who counted which of them
changes a bit.
"""

import math
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int64

from fm_distill.data.feeding import Reader, read_ahead
from fm_distill.errors import UserError
from fm_distill.system.console import progress

CHANNELS = ("red", "green", "blue")
LEVELS = 256

LevelCounts = Int64[np.ndarray, "3 256"]


class Moments(NamedTuple):
    """Of each channel, in grey levels, 0 to 255; the deviation is that of all pixels (no n - 1)."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def count_levels(reader: Reader, first: int = 0, every: int = 1) -> LevelCounts:
    """The pixels of each grey level of every `every`th image from `first` on.

    Of the images as they lie on their canvases, without the black beside them and without corrupt
    ones. One image is in memory at a time. Raises `UserError` as `reader` does.
    """
    counts = np.zeros((len(CHANNELS), LEVELS), np.int64)
    images = grain.MapDataset.source(reader)[first::every]
    items = read_ahead(images, reader.config.workers) if len(images) else iter(())
    for item in progress(items, "grey levels", "images", len(images)):
        if item["valid"]:
            height, width = item["size"]
            pixels = item["canvas"][:height, :width]
            for channel, levels in enumerate(counts):
                levels += np.bincount(pixels[..., channel].ravel(), minlength=LEVELS)
    return counts


def moments_of(counts: LevelCounts, identity: str) -> Moments:
    """Of the pixels counted, each with the same weight: each quotient is rounded once.

    Raises `UserError` where `identity`, the split, has no pixels or none that differ in a channel.
    """
    means, deviations = [], []
    for levels in counts:
        pairs = [(level, int(count)) for level, count in enumerate(levels)]
        pixels = sum(count for _, count in pairs)
        if not pixels:
            raise UserError(f"no image of {identity} can be read")
        total = sum(level * count for level, count in pairs)
        squares = sum(level**2 * count for level, count in pairs)
        means.append(total / pixels)
        deviations.append(math.sqrt((pixels * squares - total**2) / pixels**2))
    if not all(deviations):
        constant = [x for x, deviation in zip(CHANNELS, deviations, strict=True) if not deviation]
        raise UserError(
            f"every pixel of {identity} has the same {' and '.join(constant)}, and "
            "student.input_range=adapt divides by the deviation; use another input_range, or give "
            "student.input_mean and student.input_deviation"
        )
    return Moments(tuple(means), tuple(deviations))
