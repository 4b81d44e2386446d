"""What every network offers; see the package's docstring."""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

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


class Output(NamedTuple):
    """What a network says of a batch."""

    logits: Float[Array, "batch classes"]  # float32
    features: dict[str, Array]  # the named features that were asked for
    statistics: PyTree  # the new ones in training, else those that were given


@runtime_checkable
class Init(Protocol):
    def __call__(self, key: PRNGKeyArray) -> Variables: ...


@runtime_checkable
class Apply(Protocol):
    def __call__(
        self,
        variables: Variables,
        images: Images,
        *,
        train: bool,
        features: tuple[str, ...] = (),
    ) -> Output: ...


@runtime_checkable
class Freeze(Protocol):
    def __call__(self, variables: Variables) -> Variables: ...


@runtime_checkable
class ApplyFrozen(Protocol):
    def __call__(
        self, frozen: Variables, images: Images, *, features: tuple[str, ...] = ()
    ) -> Output: ...


@dataclasses.dataclass(frozen=True)
class Network:
    """A network as pure functions."""

    classes: int
    init: Init
    apply: Apply
    freeze: Freeze
    apply_frozen: ApplyFrozen


def parameter_count(params: PyTree) -> int:
    """Number of trained numbers; takes arrays or their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def select_features(available: Any, asked: tuple[str, ...]) -> dict[str, Array]:
    """The asked ones of a network's features; the compiler drops what nobody asked for."""
    unknown = [name for name in asked if name not in available]
    if unknown:
        raise ValueError(f"no features {unknown}; this network has {sorted(available)}")
    return {name: available[name] for name in asked}
