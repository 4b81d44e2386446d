"""Weights from a formula: each tensor is a function of its name in the original BiT files."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from fm_distill.config import NetworkConfig
from fm_distill.models import Variables, build_network
from fm_distill.weights.names import bit_original, to_ours


def formula_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same as in the script that wrote the reference's weights."""
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("gamma"):
        z = 1 + 0.1 * z
    elif name.endswith(("beta", "bias")):
        z = 0.1 * z
    else:
        z = (0.02 if "head" in name else 0.05) * z
    return z.astype(np.float32)


def formula_variables(network: NetworkConfig, classes: int) -> Variables:
    """The variables of a BiT with the formula's weights."""
    init = build_network(network, classes, jnp.dtype("float32")).init
    shapes = jax.eval_shape(init, jax.random.key(0))
    names = bit_original(network, shapes)

    def of(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        stored = names["params/" + jax.tree_util.keystr(path, simple=True, separator="/")]
        return jnp.asarray(to_ours(formula_tensor(stored.name, stored.shape), stored, leaf.shape))

    return Variables(jax.tree_util.tree_map_with_path(of, shapes.params), {})
