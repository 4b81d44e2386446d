"""The networks, behind one contract; the only folder that imports Flax.

A `Network` is a bundle of pure functions, called by `step.py` and `evaluate.py`:

    init(key)                                -> Variables
    apply(variables, images, train=, features=) -> Output
    freeze(variables)                        -> FrozenVariables, what is constant computed once
    apply_frozen(frozen, images, features=)  -> Output, in evaluation mode

To add a model: a file with a function `(NetworkConfig, classes, dtype) -> Network` and a line in
`MODELS`; the tests run over the table.
"""

from collections.abc import Callable

import jax.numpy as jnp

from fm_distill.config import NetworkConfig
from fm_distill.models import bit
from fm_distill.models.contract import Network, Output, Variables, parameter_count

__all__ = [
    "MODELS",
    "Network",
    "Output",
    "Variables",
    "build_network",
    "check_network",
    "parameter_count",
]

Builder = Callable[[NetworkConfig, int, jnp.dtype], Network]

MODELS: dict[str, Builder] = {
    "bit": bit.build,
    "bit_r50x1": bit.member((3, 4, 6, 3), width=1.0),
    "bit_r50x3": bit.member((3, 4, 6, 3), width=3.0),
    "bit_r101x1": bit.member((3, 4, 23, 3), width=1.0),
    "bit_r101x3": bit.member((3, 4, 23, 3), width=3.0),
    "bit_r152x2": bit.member((3, 8, 36, 3), width=2.0),
    "bit_r152x4": bit.member((3, 8, 36, 3), width=4.0),
}


def build_network(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
    """The network of `config` with `classes` logits, computing in `dtype`.

    Raises `ValueError` where the fields of `config` do not describe a network.
    """
    return MODELS[config.model](config, classes, dtype)


def check_network(config: NetworkConfig) -> None:
    """Raises `ValueError` where the fields of `config` do not describe a network."""
    build_network(config, 2, jnp.dtype("float32"))
