"""Writes `tests/data/central_views.npz`: central views as the released evaluation makes them.

`resize_small(short side)|central_crop(resolution)` of big_vision's `pp/ops_image.py`, before the
cast to uint8. Needs TensorFlow: `python tools/make_central_views.py OUT.npz`.
"""

import sys

import numpy as np
import tensorflow as tf

# Resolution and central fraction; the resized image's short side is 20, 8 and 16 pixels.
SQUARES = ((16, 0.8), (7, 0.875), (16, 1.0))
# Height and width; the margins of (20, 27) at 16 of 20 pixels are 4 and 11, of (20, 26) 4 and 10.
SIZES = ((20, 27), (27, 20), (20, 26), (26, 20), (20, 20), (40, 53), (53, 40), (12, 16), (16, 11))
# Larger than a canvas of 20 pixels.
PHOTOGRAPHS = ((80, 107), (107, 80), (80, 104))


def central_view(image: np.ndarray, resolution: int, fraction: float, method: str) -> np.ndarray:
    """`resize_small` and `central_crop`, as released, without the cast back to uint8."""
    height, width = image.shape[:2]
    ratio = tf.cast(round(resolution / fraction), tf.float32) / tf.cast(
        min(height, width), tf.float32
    )
    rows = tf.cast(tf.round(tf.cast(height, tf.float32) * ratio), tf.int32)
    columns = tf.cast(tf.round(tf.cast(width, tf.float32) * ratio), tf.int32)
    resized = tf.image.resize(image, (rows, columns), method)
    top, left = (rows - resolution) // 2, (columns - resolution) // 2
    return tf.image.crop_to_bounding_box(resized, top, left, resolution, resolution).numpy()


def photograph(height: int, width: int) -> np.ndarray:
    """A smooth image: waves of 24 pixels, which survive that the image is shrunk by four."""
    y, x = np.mgrid[:height, :width][..., None] / 24 * 2 * np.pi
    phases = np.array([0.0, 1.0, 2.0])
    return np.round(127.5 + 60 * np.sin(x + phases) + 60 * np.sin(y + 2 * phases)).astype(np.uint8)


def main() -> None:
    """Each image, and its view in bilinear and, of the smooth ones, in the released `area`."""
    rng = np.random.default_rng(0)
    arrays = {}
    for height, width in SIZES:
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        arrays[f"image_{height}_{width}"] = image
        for resolution, fraction in SQUARES:
            view = central_view(image, resolution, fraction, "bilinear")
            arrays[f"bilinear_{height}_{width}_{resolution}_{fraction}"] = view
    for height, width in PHOTOGRAPHS:
        image = photograph(height, width)
        arrays[f"image_{height}_{width}"] = image
        arrays[f"area_{height}_{width}_16_0.8"] = central_view(image, 16, 0.8, "area")
    np.savez_compressed(sys.argv[1], allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
