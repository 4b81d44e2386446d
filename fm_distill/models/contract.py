"""What every network offers; see the package's docstring."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from fm_distill.models.inner_channels import InnerChannels

Images = Float[Array, "batch height width 3"]

# The module of the classifier, in every network.
HEAD = "head"
# What a network calls the outputs of its convolutions and of its residual blocks, for those who
# keep only these for the gradient.
CONVOLUTION = "convolution"
UNIT = "unit"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Variables:
    """What a network is made of, in float32."""

    params: PyTree  # trained by gradient
    statistics: PyTree  # trained by observation (BatchNorm's moments); {} where there are none
    # Observed too, of quantised activations; {} where none are. See `quantisation.py`.
    ranges: PyTree = dataclasses.field(default_factory=dict)


class Output(NamedTuple):
    """The outputs of a network for a batch."""

    logits: Float[Array, "batch classes"]  # float32
    features: dict[str, Array]  # the named features that were requested
    statistics: PyTree  # the new ones in training, else those that were given
    # The new ones where they are observed, else those that were given; None where there are none.
    ranges: PyTree = None


# key -> variables
Init = Callable[[PRNGKeyArray], Variables]
# variables, images, *, train: bool, features: tuple[str, ...] = () -> output
Apply = Callable[..., Output]
# variables -> variables, what is constant computed once
Freeze = Callable[[Variables], Variables]
# frozen variables, images, *, features: tuple[str, ...] = () -> output, in evaluation mode
ApplyFrozen = Callable[..., Output]


ApplyPortable = Callable[[Variables, Images], Float[Array, "batch classes"]]
FeatureShapes = Callable[..., dict[str, tuple[int, ...]]]


def no_features(modules: bool = False) -> dict[str, tuple[int, ...]]:
    """Of a network that names none."""
    return {}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as pure functions."""

    # 0 where there is no head: `apply` then returns logits of no column.
    classes: int
    init: Init
    apply: Apply
    freeze: Freeze
    apply_frozen: ApplyFrozen
    # Shapes of all named features of a batch of two; with `modules=True` of the output of each
    # module too, by its path.
    feature_shapes: FeatureShapes = no_features
    # frozen variables, images -> logits, in evaluation mode and with each convolution as one
    # operation on every platform. None for a custom network that has only one form.
    apply_portable: ApplyPortable | None = None
    # As `apply`, where the ranges of activations follow the batch, in training mode or not; None
    # where no activation is quantised.
    apply_observing: Apply | None = None
    # As `freeze`, with kernels of integers: `apply_frozen` then multiplies in integers.
    # None where no activation is quantised.
    freeze_integer: Freeze | None = None
    # Paths of the quantised layers, in the order of their calls.
    quantised_layers: tuple[str, ...] = ()
    # Of each block that has them, in order; none of a network that cannot have fewer.
    inner_channels: tuple[InnerChannels, ...] = ()
    # Whether a weight that is zero multiplies by zero; not where kernels are standardised.
    zeros_stay: bool = True


def parameter_count(params: PyTree) -> int:
    """Number of trained numbers; takes arrays or their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def ranges_of(variables: Variables) -> dict[str, tuple[float, float, float]]:
    """Lowest and highest number and batches of each quantised activation.

    `PATH/input` is what a layer reads, `PATH/branch` what a block adds to its shortcut.
    """
    ranges: dict[str, dict[str, float]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables.ranges):
        activation, _, name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
        ranges.setdefault(activation, {})[name] = float(leaf)
    return {activation: (x["low"], x["high"], x["batches"]) for activation, x in ranges.items()}


def with_ranges(
    network: Network, variables: Variables, found: Mapping[str, tuple[float, float, float]]
) -> Variables:
    """`variables` with the ranges that `ranges_of` returned; the inverse of it.

    Raises `ValueError` where they are not those of `network`.
    """
    shapes = jax.eval_shape(network.init, jax.random.key(0)).ranges
    unused = dict.fromkeys(found)

    def leaf_of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        activation, _, name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
        if activation not in found:
            raise ValueError(f"there is no range for {activation}")
        unused.pop(activation, None)
        low, high, batches = found[activation]
        return jnp.asarray({"low": low, "high": high, "batches": batches}[name], leaf.dtype)

    ranges = jax.tree_util.tree_map_with_path(leaf_of, shapes)
    if unused:
        raise ValueError(f"no activation of the network is {next(iter(unused))}")
    return dataclasses.replace(variables, ranges=ranges)


def select_features(available: Any, requested: tuple[str, ...]) -> dict[str, Array]:
    """The requested ones of a network's features; the compiler drops what is not requested."""
    unknown = [name for name in requested if name not in available]
    if unknown:
        raise ValueError(f"no features {unknown}; this network has {sorted(available)}")
    return {name: available[name] for name in requested}
