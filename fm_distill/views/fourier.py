"""Fourier domain adaptation: images with the amplitudes of target images at low frequencies.

Source: Yang and Soatto 2020, equation 2, and `FDA_source_to_target_np` of their code
(YanchaoYang/FDA, `utils/__init__.py`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fm_distill.array_tree import AnyArray
from fm_distill.views.sampling import Images

Amplitudes = Float[AnyArray, "targets rows rows 3"]
# By the pixels a side of an image: the amplitudes of the target images in the square of low
# frequencies, the lowest one in its middle.
Spectra = dict[int, Amplitudes]

# Below this share of the sum of its pixels a coefficient is rounding, and has no phase.
ROUNDING = 1e-6


def square_rows(beta: float, side: int) -> int:
    """Rows of the square of low frequencies of an image of `side` x `side` pixels."""
    return min(2 * int(beta * side) + 1, side)


def square_start(rows: int, side: int) -> int:
    """Where the square begins on a spectrum whose lowest frequency lies in the middle."""
    return side // 2 - rows // 2


def with_amplitudes(pixels: Images, amplitudes: Float[Array, "batch rows rows 3"]) -> Images:
    """`pixels` with these amplitudes at low frequencies, and their own phases everywhere.

    On uint8's scale and within it: unlike the authors', who leave what the inverse transform
    gives, it is cut off at 0 and 255, beyond which no image lies. A coefficient that is zero has
    phase 0, as for `numpy.angle`. Only the low frequencies are computed, as products of matrices.
    """
    rows = amplitudes.shape[1]
    waves = _waves(rows, pixels.shape[1])
    precision = jax.lax.Precision.HIGHEST
    coefficients = jnp.einsum("ah,nhwc,bw->nabc", waves, pixels, waves, precision=precision)
    cosine, sine = slice(rows), slice(rows, None)
    real = coefficients[:, cosine, cosine] - coefficients[:, sine, sine]
    imaginary = -(coefficients[:, cosine, sine] + coefficients[:, sine, cosine])
    magnitudes = jnp.hypot(real, imaginary)
    has_phase = magnitudes > ROUNDING * pixels.sum(axis=(1, 2), keepdims=True)
    factor = jnp.where(has_phase, amplitudes / jnp.where(has_phase, magnitudes, 1), 0)
    # How much is added to each coefficient.
    real = jnp.where(has_phase, factor * real, amplitudes) - real
    imaginary = factor * imaginary - imaginary
    upper = jnp.concatenate([real, -imaginary], axis=2)
    lower = jnp.concatenate([-imaginary, -real], axis=2)
    changes = jnp.concatenate([upper, lower], axis=1)
    difference = jnp.einsum("ah,nabc,bw->nhwc", waves, changes, waves, precision=precision)
    return jnp.clip(pixels + difference / pixels.shape[1] ** 2, 0, 255)


def _waves(rows: int, side: int) -> Float[np.ndarray, "twice_rows side"]:
    """The cosines of the low frequencies along a side, then their sines."""
    frequencies = np.arange(rows) + square_start(rows, side) - side // 2
    # In whole numbers, so that the waves of opposite frequencies are exactly opposite.
    turns = frequencies[:, None] * np.arange(side) % side
    angles = 2 * np.pi / side * turns
    return np.concatenate([np.cos(angles), np.sin(angles)]).astype(np.float32)
