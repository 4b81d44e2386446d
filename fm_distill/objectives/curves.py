"""Factors over the run: weights of terms, and the temperature."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from fm_distill.config import CurveConfig

# The share of the run that is behind a step: 0 in the first, 1 in the last.
Progress = Float[Array, ""] | float


def progress_of(step: Array | int, total_steps: int) -> Array:
    return jnp.asarray(step, jnp.float32) / max(total_steps - 1, 1)


def value_at(curve: CurveConfig, progress: Progress) -> Float[Array, ""]:
    """The factor of `curve` at `progress`, float32."""
    if not curve.points:
        return jnp.ones((), jnp.float32)
    positions, factors = (jnp.asarray(x, jnp.float32) for x in zip(*curve.points, strict=True))
    position = jnp.clip(progress, positions[0], positions[-1])
    if curve.interpolation == "linear":
        return jnp.interp(position, positions, factors)
    before = jnp.searchsorted(positions, position, side="right") - 1
    if curve.interpolation == "step":
        return factors[before]
    after = jnp.minimum(before + 1, len(curve.points) - 1)
    width = jnp.where(after > before, positions[after] - positions[before], 1)
    eased_share = 0.5 * (1 - jnp.cos(jnp.pi * (position - positions[before]) / width))
    return factors[before] + eased_share * (factors[after] - factors[before])
