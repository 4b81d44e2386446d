"""The named features of networks, as a table for people who choose which ones a term reads."""

import jax.numpy as jnp

from fm_distill.config import NetworkConfig
from fm_distill.models import build_network


def tap_table(option: str, config: NetworkConfig, modules: bool) -> str:
    """Name, shape for an image, and stride in pixels of each feature of a network.

    With `modules` of the output of each module too, by its path.
    """
    shapes = build_network(config, 2, jnp.dtype("float32")).feature_shapes(modules=modules)
    name_width = max(map(len, shapes), default=0)
    rows = [f"# {option}: {config.model} at {config.resolution} pixels"]
    for name, (_, *shape) in shapes.items():
        stride = f"stride {config.resolution / shape[0]:g}" if len(shape) == 3 else ""
        rows.append(
            f"{name:<{max(12, name_width)}} {' x '.join(map(str, shape)):<16} {stride}".rstrip()
        )
    return "\n".join(rows if shapes else [*rows, "none"])
