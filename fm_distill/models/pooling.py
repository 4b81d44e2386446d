"""The 3x3 maximum with stride 2 behind a root, and its gradient; the mean of 2x2 pixels."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activations = Float[Array, "batch _ _ channels"]


def _forward_pass(x: Activations) -> Activations:
    return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


@jax.custom_vjp
def max_pool(x: Activations) -> Activations:
    """The maximum of what is inside of the image: outside is minus infinity.

    The gradient goes to the first of equal pixels. XLA has one instruction for that, which is right
    on a TPU, several times slower on a CPU than a sum of nine shifted images, and on a GPU not
    deterministic (XLA's documentation, determinism).
    """
    return _forward_pass(x)


def _forward(x: Activations) -> tuple[Activations, tuple[Activations, Activations]]:
    output = _forward_pass(x)
    return output, (x, output)


def _backward(saved: tuple[Activations, Activations], gradient: Activations) -> tuple[Activations]:
    x, output = saved

    def instruction(x: Array, output: Array, gradient: Array) -> Array:
        return jax.vjp(_forward_pass, x)[1](gradient)[0]

    return (jax.lax.platform_dependent(x, output, gradient, tpu=instruction, default=_by_shifts),)


max_pool.defvjp(_forward, _backward)


@functools.partial(jax.jit, inline=True)
def _by_shifts(x: Activations, out: Activations, gradient: Activations) -> Activations:
    """The gradient as a sum over the places in a window."""
    minus_infinity, zero = jnp.array(-jnp.inf, x.dtype), jnp.zeros((), gradient.dtype)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=minus_infinity)
    (height, width), (rows, columns) = padded.shape[1:3], out.shape[1:3]
    is_assigned = jnp.zeros(out.shape, bool)
    total = jnp.zeros(padded.shape, gradient.dtype)
    for i in range(3):
        for j in range(3):
            is_maximum = padded[:, i : i + 2 * rows - 1 : 2, j : j + 2 * columns - 1 : 2] == out
            share = jnp.where(is_maximum & ~is_assigned, gradient, zero)
            is_assigned |= is_maximum
            # Zeros between, before and behind: each window's share at its pixel.
            below, right = height - i - (2 * rows - 1), width - j - (2 * columns - 1)
            spread = ((0, 0, 0), (i, below, 1), (j, right, 1), (0, 0, 0))
            total += jax.lax.pad(share, zero, spread)
    return total[:, 1:-1, 1:-1]


def max_pool_zero_padded(x: Activations) -> Activations:
    """The same where what is outside of the image counts as zero.

    As the maximum of what is inside, and of zero at the border: a padded copy of the activations,
    and of their gradient, would move a tenth of a small student's memory.
    """
    pooled = max_pool(x)
    rows, columns = (_reaches_outside(x.shape[i], pooled.shape[i]) for i in (1, 2))
    border = (rows[:, None] | columns[None, :])[None, :, :, None]
    # Not `maximum`, which would send half of the gradient inside where both are zero.
    return jnp.where(border & (pooled <= 0), jnp.zeros((), x.dtype), pooled)


def _reaches_outside(size: int, windows: int) -> Array:
    """Whether each window of three, every second pixel from the one before the first, does."""
    first = 2 * jnp.arange(windows) - 1
    return (first < 0) | (first + 2 >= size)


def average_pool(x: Activations) -> Activations:
    """Means of 2x2 pixels, in float32; at an odd border, of those that are inside."""
    x_float32 = x.astype(jnp.float32)
    return nn.avg_pool(x_float32, (2, 2), (2, 2), "SAME", count_include_pad=False).astype(x.dtype)
