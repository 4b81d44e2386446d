"""A network together with the input that it expects, and the views that it sees."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fm_distill.config import (
    Config,
    NetworkConfig,
)
from fm_distill.data.batch import Batch
from fm_distill.models import Network, Variables, build_network, resolve
from fm_distill.system.sharding import Layout, on_devices
from fm_distill.views.draws import Draw
from fm_distill.views.rendering import InputSpec, render, render_central


@dataclasses.dataclass(frozen=True)
class Branch:
    """A network and the input that it expects."""

    network: Network
    input_spec: InputSpec


def render_views(drawn: Draw, batch: Batch, branches: tuple[Branch, ...]) -> dict[InputSpec, Array]:
    """What the networks in `branches` see of a draw, rendered once for all that want the same."""
    wanted = sorted({branch.input_spec for branch in branches})
    return {input_spec: render(drawn, batch.canvases, input_spec) for input_spec in wanted}


def render_central_views(
    batch: Batch, branches: tuple[Branch, ...], fraction: float
) -> dict[InputSpec, Array]:
    """What they see in evaluation: the central crop."""
    wanted = sorted({branch.input_spec for branch in branches})
    return {p: render_central(batch.canvases, batch.sizes, fraction, p) for p in wanted}


def freeze_on_devices(network: Network, variables: Variables, layout: Layout) -> Variables:
    """The frozen form of `variables`, computed once, where the step wants it."""
    variables = on_devices(variables, layout.variables(variables))
    shapes = jax.eval_shape(network.freeze, variables)
    return jax.jit(network.freeze, out_shardings=layout.variables(shapes))(variables)


def frozen_teachers(
    branches: tuple[Branch, ...], variables: tuple[Variables, ...], layout: Layout
) -> tuple[Variables, ...]:
    """The frozen form of the variables of each teacher."""
    return tuple(
        freeze_on_devices(branch.network, x, layout)
        for branch, x in zip(branches, variables, strict=True)
    )


def compute_dtype(config: Config, layout: Layout) -> jnp.dtype:
    """`auto`: bfloat16 on TPU and GPU, float32 on CPU."""
    if config.precision != "auto":
        return jnp.dtype(config.precision)
    platform = layout.mesh.devices.flat[0].platform
    return jnp.dtype("float32" if platform == "cpu" else "bfloat16")


def make_branch(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Branch:
    return Branch(build_network(config, classes, dtype), InputSpec.of(resolve(config)))
