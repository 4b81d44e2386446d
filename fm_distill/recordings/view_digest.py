"""A short digest of each view, so that other views are noticed before training on them."""

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

# Boxes and coefficients are compared in these steps: devices round the last bits differently.
BOX_STEP, COEFFICIENT_STEP = 1 / 16, 1 / 4096
# A view at the border of two steps may fall to either side on another device.
SAME_SHARE = 0.9
# Source: the constants of SplitMix64 (Steele, Lea and Flood 2014).
INCREMENT, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def view_digests(
    boxes: Float[np.ndarray, "*rows 4"],
    flips: Bool[np.ndarray, "*rows"],
    coefficients: Float[np.ndarray, "*rows"] | None,
    partners: Int[np.ndarray, "*rows"] | None,
    target_images: Int[np.ndarray, "*rows"] | None = None,
) -> UInt64[np.ndarray, "*rows"]:
    """64 bits of each row's box, flip, mixup coefficient, partner and target image."""
    columns = [np.rint(boxes[..., i] / BOX_STEP) for i in range(4)]
    columns.append(flips)
    if coefficients is not None:
        columns.append(np.rint(coefficients / COEFFICIENT_STEP))
    if partners is not None:
        columns.append(partners)
    if target_images is not None:
        columns.append(target_images)
    state = np.zeros(flips.shape, np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            state = _mixed(state + column.astype(np.int64).astype(np.uint64))
    return state


def same_views(recorded: UInt64[np.ndarray, "..."], now: UInt64[np.ndarray, "..."]) -> bool:
    """Whether these are digests of the same views, up to the rounding of another device."""
    return float((recorded == now).mean()) >= SAME_SHARE


def _mixed(state: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    state = state + np.uint64(INCREMENT)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(FIRST)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(SECOND)
    return state ^ (state >> np.uint64(31))
