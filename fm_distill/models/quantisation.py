"""Fake quantisation: layers compute, in floats, what a file of integers will compute.

Source: Jacob et al. 2018 (arXiv 1712.05877, sections 2 and 3) and Krishnamoorthi 2018
(arXiv 1806.08342, sections 2 and 3). A number x becomes

    scale * (clip(round(x / scale) + zero_point, lowest, highest) - zero_point),

rounded half to even. Weights are symmetric, with a scale for each output channel: what multiplies
a channel later, such as a BatchNorm, multiplies its scale and leaves the integers as they are,
so it is folded when a file is written, and never before. Activations are affine, with one range for
all channels: after a ReLU, a symmetric range would waste one of the eight bits.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The collection of the observed ranges.
RANGES = "ranges"
# In it, beside a layer's ranges: whether the layer is rounded. Where it is not there, it is.
SWITCH = "rounded"
# How much of the old range an observed batch leaves. Jacob et al. smooth over thousands of steps of
# millions; runs here have thousands.
RANGE_MOMENTUM = 0.99
# Of channels and activations that are zero throughout.
SMALLEST_SCALE = 1e-12
# Lowest and highest integer. Those of weights are symmetric, as integer kernels want them.
OF_WEIGHTS = {"int8": (-127, 127), "int4": (-7, 7)}
OF_ACTIVATIONS = {"int8": (-128, 127)}


class Precision(NamedTuple):
    """Of one layer; a key of the tables above, or `none`."""

    weights: str
    activations: str


class Range(NamedTuple):
    """What an activation was seen to be in."""

    low: Float[Array, ""]
    high: Float[Array, ""]


class Quantised(nn.Module):
    """A network whose layers find in it how they are to be quantised; the names stay its own."""

    inner: nn.Module
    # Of the layers, by their paths.
    plan: tuple[tuple[str, Precision], ...]
    # Of what blocks add to their shortcuts; a key of `OF_ACTIVATIONS`, or `none`.
    branches: str = "none"
    # Of what a batch shows, where its range ends.
    percentile: float = 100.0

    def setup(self) -> None:
        nn.share_scope(self, self.inner)

    def __call__(self, images: Array, train: bool) -> Any:
        return self.inner(images, train)


class QuantisableLayer(nn.Module):
    """A layer with a parameter `kernel` that its call passes through `quantised`."""


def precision_of(layer: nn.Module) -> Precision:
    """Of a bound layer, by the network that it is a part of."""
    network = _network_of(layer)
    plan = dict(network.plan) if network else {}
    return plan.get("/".join(layer.path), Precision("none", "none"))


def _network_of(module: nn.Module) -> Quantised | None:
    """What a bound `module` is a part of; None where nothing is quantised."""
    root = module
    while isinstance(root.parent, nn.Module):
        root = root.parent
    return root if isinstance(root, Quantised) else None


def quantised(
    layer: nn.Module, x: Float[Array, "*places inputs"], kernel: Float[Array, "*_ outputs"]
) -> tuple[Float[Array, "*places inputs"], Float[Array, "*_ outputs"]]:
    """What `layer` reads, and its kernel as it was prepared, as they are to be multiplied."""
    weights, activations = precision_of(layer)
    if activations != "none":
        observed = _range_of(layer, "input", x)
        x = _switched(layer, quantised_activations(x, observed, OF_ACTIVATIONS[activations]), x)
    if weights != "none":
        kernel = _switched(layer, quantised_weights(kernel, OF_WEIGHTS[weights]), kernel)
    return x, kernel


def _switched(module: nn.Module, rounded: Array, plain: Array) -> Array:
    if not module.has_variable(RANGES, SWITCH):
        return rounded
    return jnp.where(module.get_variable(RANGES, SWITCH), rounded, plain)


def with_switches(ranges: Any, on: str, path: tuple[str, ...] = ()) -> Any:
    """The tree `ranges`, where the layer at the path `on` alone is rounded; "" is none."""
    if "low" in ranges:
        return ranges
    switched = {name: with_switches(x, on, (*path, name)) for name, x in ranges.items()}
    if any("low" in x for x in switched.values()):
        switched[SWITCH] = jnp.asarray("/".join(path) == on)
    return switched


def quantised_branch(
    block: nn.Module, x: Float[Array, "batch _ _ channels"]
) -> Float[Array, "batch _ _ channels"]:
    """What `block` adds to its shortcut: without a range of it, its last convolution has no output
    of integers, and runtimes compute it in floats."""
    network = _network_of(block)
    if network is None or network.branches == "none":
        return x
    observed = _range_of(block, "branch", x)
    rounded = quantised_activations(x, observed, OF_ACTIVATIONS[network.branches])
    return _switched(block, rounded, x)


def quantised_weights(
    kernel: Float[Array, "*_ outputs"], levels: tuple[int, int]
) -> Float[Array, "*_ outputs"]:
    """Symmetric, with the scale of each output channel by its largest weight."""
    scale = weight_scale(kernel, levels)
    return fake_quantise(kernel, scale, jnp.zeros(()), *map(float, levels))


def weight_scale(
    kernel: Float[Array, "*_ outputs"], levels: tuple[int, int]
) -> Float[Array, " outputs"]:
    """What one of the integers of each output channel stands for."""
    largest = jnp.abs(kernel.astype(jnp.float32)).max(axis=tuple(range(kernel.ndim - 1)))
    return jnp.maximum(jax.lax.stop_gradient(largest) / levels[1], SMALLEST_SCALE)


def quantised_activations(
    x: Float[Array, "*places channels"], seen: Range, levels: tuple[int, int]
) -> Float[Array, "*places channels"]:
    """Affine, such that zero, which pads images, is one of the numbers."""
    scale, zero_point = affine(seen, levels)
    return fake_quantise(x, scale, zero_point, *map(float, levels))


def affine(seen: Range, levels: tuple[int, int]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Scale and zero point of the integers that cover what was seen, and zero.

    Where zero lies inside, one number less: its rounding moves the others by up to a half, and both
    ends stay covered. (And pixels from -1 to 1 would all lie midway between two numbers.)
    """
    lowest, highest = levels
    low, high = jnp.minimum(seen.low, 0), jnp.maximum(seen.high, 0)
    steps = highest - lowest - ((low < 0) & (high > 0))
    scale = jnp.maximum((high - low) / steps, SMALLEST_SCALE)
    return scale, jnp.clip(jnp.round(lowest - low / scale), lowest, highest)


@jax.jit  # a call of this name in what is traced for an export
def fake_quantise(
    x: Float[Array, "*shape"],
    scale: Float[Array, ""] | Float[Array, " channels"],
    zero_point: Float[Array, ""],
    lowest: Array | float,
    highest: Array | float,
) -> Float[Array, "*shape"]:
    """`x` rounded to the numbers that whole ones stand for; `scale` is one, or by the last axis.

    The gradient passes as if nothing was rounded (a straight-through estimator), but not where `x`
    was clipped (Krishnamoorthi 2018, section 2.4).
    """
    return _rounded(x, scale, zero_point, lowest, highest)


@jax.custom_jvp
def _rounded(
    x: Array, scale: Array, zero_point: Array, lowest: Array | float, highest: Array | float
) -> Array:
    integers = jnp.round(x.astype(jnp.float32) / scale) + zero_point
    return ((jnp.clip(integers, lowest, highest) - zero_point) * scale).astype(x.dtype)


@_rounded.defjvp
def _straight_through(
    primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    x, scale, zero_point, lowest, highest = primals
    integers = jnp.round(x.astype(jnp.float32) / scale) + zero_point
    is_unclipped = (lowest <= integers) & (integers <= highest)
    return _rounded(*primals), jnp.where(is_unclipped, tangents[0], 0)


def _range_of(module: nn.Module, name: str, x: Array) -> Range:
    """What `x` was seen to be in. Where ranges may change, this batch is observed first.

    The first batch's range is taken as it is; until `RANGE_MOMENTUM` is reached, all batches weigh
    the same.
    """
    zeros = functools.partial(jnp.zeros, (), jnp.float32)
    range_variable = module.variable(
        RANGES, name, lambda: {"low": zeros(), "high": zeros(), "batches": zeros()}
    )
    if module.is_mutable_collection(RANGES) and not module.is_initializing():
        x_float32 = jax.lax.stop_gradient(x).astype(jnp.float32)
        batch_count = range_variable.value["batches"]
        momentum = jnp.minimum(batch_count / (batch_count + 1), RANGE_MOMENTUM)
        network = _network_of(module)
        low, high = _ends(x_float32, network.percentile if network else 100.0)
        range_variable.value = {
            "low": momentum * range_variable.value["low"] + (1 - momentum) * low,
            "high": momentum * range_variable.value["high"] + (1 - momentum) * high,
            "batches": batch_count + 1,
        }
    return Range(range_variable.value["low"], range_variable.value["high"])


def _ends(x: Array, percentile: float) -> tuple[Array, Array]:
    if percentile == 100:
        return x.min(), x.max()
    low, high = jnp.percentile(x, jnp.array([100 - percentile, percentile]))
    return low, high
