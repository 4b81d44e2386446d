"""Boxes of canvases as images of a fixed size: bilinear, by area, or of fewer pixels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from fm_distill.views.crops import Boxes

Canvases = UInt8[Array, "batch side side 3"]
Images = Float[Array, "batch resolution resolution 3"]
# On the canvas, of each row or column of an image.
Places = Float[Array, "batch resolution"]
# How much each row or column of the canvas adds to each one of an image.
Weights = Float[Array, "batch resolution side"]


def sample(
    canvases: Canvases,
    boxes: Boxes,
    low: Float[Array, "batch 2"],
    high: Float[Array, "batch 2"],
    flips: Bool[Array, " batch"],
    resolution: int,
) -> Images:
    """Bilinear sampling of `boxes`, clamped to pixels `low` to `high`, in uint8's scale.

    Half-pixel centres and no antialiasing, as in the released recipe (TensorFlow's resize). On
    accelerators it is two matrix products an image, which is what they are good at; on a CPU the
    four neighbours of each pixel are gathered, instead of products with all rows and columns of
    the canvas. The two differ by rounding, less than 1e-4 grey levels.
    """
    rows = _places(0, resolution, boxes, low, high)
    columns = _places(1, resolution, boxes, low, high)
    columns = jnp.where(flips[:, None], columns[:, ::-1], columns)
    return jax.lax.platform_dependent(canvases, rows, columns, cpu=_gathered, default=_multiplied)


def sample_area(canvases: Canvases, boxes: Boxes, resolution: int) -> Images:
    """The mean of what each pixel of an image covers of its box, in uint8's scale."""
    side, cells = canvases.shape[1], jnp.full(len(boxes), resolution, jnp.float32)
    row_weights, column_weights = (
        _covered(axis, side, boxes, resolution, cells) for axis in (0, 1)
    )
    return _products(canvases, row_weights, column_weights)


def sample_reduced(
    canvases: Canvases,
    boxes: Boxes,
    flips: Bool[Array, " batch"],
    resolution: int,
    pixels: Float[Array, ""],
) -> Images:
    """`boxes` reduced to `pixels` a side by area, and enlarged bilinearly, in uint8's scale.

    A box of fewer pixels keeps those that it has. `pixels` is less than `resolution`: shapes do
    not depend on values, so the image's own size is that of the reduced box, too.
    """

    def weights(axis: int) -> Weights:
        cells = jnp.maximum(jnp.floor(jnp.minimum(pixels, boxes[:, 2 + axis])), 1.0)
        area_weights = _covered(axis, canvases.shape[1], boxes, resolution, cells)
        centres = (jnp.arange(resolution, dtype=jnp.float32) + 0.5) / resolution
        positions = jnp.clip(centres * cells[:, None] - 0.5, 0, cells[:, None] - 1)
        bilinear_weights = _weights(positions[..., None], jnp.arange(resolution, dtype=jnp.float32))
        return jnp.einsum(
            "nrc,nch->nrh", bilinear_weights, area_weights, precision=jax.lax.Precision.HIGHEST
        )

    columns = weights(1)
    columns = jnp.where(flips[:, None, None], columns[:, ::-1], columns)
    return _products(canvases, weights(0), columns)


def _covered(
    axis: int, side: int, boxes: Boxes, count: int, cells: Float[Array, " batch"]
) -> Float[Array, "batch cells side"]:
    """The share that each row (or column) of the canvas has of each cell of a box.

    A box is divided into `cells`; `count` of them are computed, and those behind the last one
    are of no use.
    """
    scale = (boxes[:, 2 + axis] / cells)[:, None, None]
    start = boxes[:, axis, None, None] + jnp.arange(count)[:, None] * scale
    pixels = jnp.arange(side, dtype=jnp.float32)
    overlap = jnp.minimum(start + scale, pixels + 1) - jnp.maximum(start, pixels)
    return jnp.maximum(overlap, 0) / scale


def _multiplied(canvases: Canvases, rows: Places, columns: Places) -> Images:
    pixels = jnp.arange(canvases.shape[1], dtype=jnp.float32)
    row_weights, column_weights = (_weights(x[..., None], pixels) for x in (rows, columns))
    return _products(canvases, row_weights, column_weights)


def _products(canvases: Canvases, of_rows: Weights, of_columns: Weights) -> Images:
    """Images as sums over rows and columns of the canvas with these weights."""
    # In bfloat16, a TPU's default, the weights of a pixel would not add up to 1.
    precision = jax.lax.Precision.HIGHEST
    pixels = canvases.astype(jnp.float32)
    pixels = jnp.einsum("nrh,nhwc->nrwc", of_rows, pixels, precision=precision)
    return jnp.einsum("nqw,nrwc->nrqc", of_columns, pixels, precision=precision)


@jax.vmap
def _gathered(canvas: Array, row: Array, column: Array) -> Array:
    row_above, column_left, last_index = jnp.floor(row), jnp.floor(column), canvas.shape[0] - 1

    def at(y: Array, x: Array) -> Array:
        # Beside the last pixel lies one of weight 0.
        y, x = (jnp.minimum(index.astype(jnp.int32), last_index) for index in (y, x))
        return canvas[y[:, None], x[None, :]].astype(jnp.float32)

    def mixed_rows(x: Array) -> Array:
        upper, lower = (_weights(row, row_above + i)[:, None, None] for i in (0, 1))
        return upper * at(row_above, x) + lower * at(row_above + 1, x)

    near, far = (_weights(column, column_left + i)[None, :, None] for i in (0, 1))
    return near * mixed_rows(column_left) + far * mixed_rows(column_left + 1)


def _places(
    axis: int,
    resolution: int,
    boxes: Boxes,
    low: Float[Array, "batch 2"],
    high: Float[Array, "batch 2"],
) -> Places:
    """Where on the canvas each row (or column) of the image lies."""
    centres = (jnp.arange(resolution, dtype=jnp.float32) + 0.5) / resolution
    positions = boxes[:, axis, None] + centres * boxes[:, 2 + axis, None] - 0.5
    return jnp.clip(positions, low[:, axis, None], high[:, axis, None])


def _weights(at: Float[Array, "..."], pixel: Float[Array, "..."]) -> Float[Array, "..."]:
    """The weight of a row (or column) of the canvas at a place between rows."""
    return jnp.maximum(1 - jnp.abs(at - pixel), 0)
