"""The root's pool and its gradient against a loop in float64, with ties and odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_distill.models.pooling import _by_shifts, _forward_pass, max_pool, max_pool_zero_padded

POOLS = {"minus_infinity": (max_pool, -np.inf), "zero": (max_pool_zero_padded, 0.0)}


def by_loops(x, gradient, outside):
    """Maxima, and the gradient, which goes to the first of equal pixels."""
    n, height, width, channels = x.shape
    padded = np.full((n, height + 2, width + 2, channels), outside)
    padded[:, 1:-1, 1:-1] = x
    out, back = np.zeros_like(gradient), np.zeros_like(padded)
    for index in np.ndindex(gradient.shape):
        k, row, column, c = index
        window = padded[k, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3, c]
        i, j = np.unravel_index(np.argmax(window), window.shape)
        out[index] = window[i, j]
        back[k, 2 * row + i, 2 * column + j, c] += gradient[index]
    return out, back[:, 1:-1, 1:-1]


@pytest.mark.parametrize("padding", POOLS)
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 6), (3, 1)])
def test_pool_and_gradient(padding, size):
    pool, outside = POOLS[padding]
    rng = np.random.default_rng(0)
    # Whole numbers from -2 to 2: every window has ties, many of them of zeros.
    x = rng.integers(-2, 3, (2, *size, 3)).astype(np.float64)
    shape = jax.eval_shape(pool, jax.ShapeDtypeStruct(x.shape, jnp.float32)).shape
    gradient = rng.normal(size=shape)
    out, back = by_loops(x, gradient, outside)
    found, to_x = jax.vjp(pool, jnp.float32(x))
    np.testing.assert_array_equal(found, out)
    np.testing.assert_allclose(to_x(jnp.float32(gradient))[0], back, atol=1e-5)


def test_the_way_of_a_tpu_is_the_same():
    x = jnp.round(jax.random.normal(jax.random.key(0), (2, 9, 8, 4)), 1)
    gradient = jax.random.normal(jax.random.key(1), (2, 5, 4, 4))
    instruction = jax.vjp(_forward_pass, x)[1](gradient)[0]
    found = _by_shifts(x, _forward_pass(x), gradient)
    np.testing.assert_allclose(found, instruction, atol=1e-5)
    program = jax.jit(jax.grad(lambda x: max_pool(x).sum())).trace(x)
    texts = {p: program.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cpu", "cuda")}
    held = {platform: "select_and_scatter" in text for platform, text in texts.items()}
    assert held == {"tpu": True, "cpu": False, "cuda": False}
