"""Linear CKA of features, unbiased: how similarly two layers order the same examples.

CKA = sum HSIC(K, L) / sqrt(sum HSIC(K, K) sum HSIC(L, L)), with the sums over minibatches before
the ratio, so that it does not depend on their number. Source: Kornblith et al. 2019
(arXiv 1905.00414); the unbiased HSIC of Song et al. 2012, equation 5; minibatches as in
Nguyen et al. 2021 (arXiv 2010.15327).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# The unbiased estimate divides by n - 3.
FEWEST = 4

Features = Float[Array, "batch ..."]
Square = Float[Array, "batch batch"]


def centred_gram(features: Features) -> Square:
    """The products of all pairs, U-centred, in float32.

    Off the diagonal K_ij - a_i / (n-2) - a_j / (n-2) + S / ((n-1) (n-2)) of the row sums a and
    the sum S of K without its diagonal; zero on it. Source: Szekely and Rizzo 2014 and
    google-research's `efficient_CKA.py`, whose sum of products is Song's estimate.
    """
    n = len(features)
    rows = features.reshape(n, -1).astype(jnp.float32)
    # A common shift changes nothing but the rounding.
    rows = rows - rows.mean(axis=0)
    off_diagonal = 1 - jnp.eye(n, dtype=jnp.float32)
    gram = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST) * off_diagonal
    sums = gram.sum(axis=1)
    shift = (sums[:, None] + sums) / (n - 2) - sums.sum() / ((n - 1) * (n - 2))
    return (gram - shift) * off_diagonal


def hsic(one: Sequence[Square], other: Sequence[Square]) -> Float[Array, "one other"]:
    """The unbiased HSIC of each of `one` with each of `other`, of the same batch."""
    n = len(one[0])
    a, b = (jnp.stack([*x]).reshape(len(x), -1) for x in (one, other))
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST) / (n * (n - 3))


def ratio(
    between: Float[np.ndarray, "one other"],
    one: Float[np.ndarray, " one"],
    other: Float[np.ndarray, " other"],
) -> Float[np.ndarray, "one other"]:
    """CKA of HSICs that were summed over minibatches: `between` the sides, and of each with itself.

    About 0 for independent features and 1 for equal ones; it may be slightly negative, and is NaN
    where a feature is the same for all examples.
    """
    size = np.sqrt(np.outer(one, other))
    return np.where(size > 0, between / np.where(size > 0, size, 1), np.nan)
