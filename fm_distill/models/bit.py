"""BiT: ResNet-v2 with GroupNorm and weight standardisation, at any depth list and width.

Source: Kolesnikov et al. 2020 (arXiv 1912.11370) and big_transfer's reference code. Unit:
norm, relu, 1x1; norm, relu, 3x3 (strided); norm, relu, 1x1; the shortcut's projection reads the
first norm's output. `norm="batch"` makes the same network with BatchNorm and plain convolutions.
"""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fm_distill.config import NetworkConfig
from fm_distill.models.assembly import check_named, check_resolution, make_network
from fm_distill.models.contract import HEAD, UNIT, Images, Network
from fm_distill.models.inner_channels import InnerChannels, channel_axes, narrowed
from fm_distill.models.layers import Convolution, Head, Kernel, Norm, identity
from fm_distill.models.pooling import max_pool, max_pool_zero_padded
from fm_distill.models.quantisation import quantised_branch

Activations = Float[Array, "batch _ _ _"]

# Inside the square roots. Source: big_transfer's models (GroupNorm 1e-5, standardisation 1e-10).
NORM_EPSILON = 1e-5
STANDARDISATION_EPSILON = 1e-10


def standardise(kernel: Kernel) -> Kernel:
    """Zero mean and unit variance over each output channel's inputs (arXiv 1903.10520)."""
    mean = kernel.mean(axis=(0, 1, 2), keepdims=True)
    variance = kernel.var(axis=(0, 1, 2), keepdims=True)
    return (kernel - mean) / jnp.sqrt(variance + STANDARDISATION_EPSILON)


def preparation(config: NetworkConfig, frozen: bool) -> Callable[[Kernel], Kernel]:
    """What a convolution computes from its kernel; a frozen one was standardised already."""
    return standardise if config.norm == "group" and not frozen else identity


def norm_groups(config: NetworkConfig) -> int | None:
    """Groups of the GroupNorm; None for BatchNorm."""
    assert config.groups != "auto"
    return config.groups if config.norm == "group" else None


def root_channels(config: NetworkConfig) -> int:
    return round(64 * config.width)


def fitting_groups(config: NetworkConfig) -> int:
    """The most groups that divide both 32, which is BiT's number, and the root's channels."""
    return math.gcd(32, root_channels(config)) if config.norm == "group" else 32


class Unit(nn.Module):
    """One pre-activation bottleneck."""

    middle: int
    # Channels of the two norms in between: `middle`, or fewer.
    inner: int
    stride: int
    config: NetworkConfig
    frozen: bool
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        out = 4 * self.middle
        groups = norm_groups(self.config)
        h = self._norm("a_norm", x, groups)
        # Groups keep their size, so those that are left have the moments that they had.
        groups = None if groups is None else groups * self.inner // self.middle
        shortcut = x
        if x.shape[-1] != out or self.stride != 1:
            shortcut = self._convolution("projection", h, out, 1, self.stride)
        h = self._convolution("a", h, self.inner, 1, 1)
        h = self._convolution("b", self._norm("b_norm", h, groups), self.inner, 3, self.stride)
        h = self._convolution("c", self._norm("c_norm", h, groups), out, 1, 1)
        return checkpoint_name(shortcut + quantised_branch(self, h), UNIT)

    def _norm(self, name: str, x: Activations, groups: int | None) -> Activations:
        norm = Norm(groups, NORM_EPSILON, self.train, name=name)
        return nn.relu(norm(x))

    def _convolution(
        self, name: str, x: Activations, channels: int, size: int, stride: int
    ) -> Activations:
        prepare = preparation(self.config, self.frozen)
        return Convolution(channels, size, stride, self.dtype, prepare=prepare, name=name)(x)


def unit_name(block: int, unit: int) -> str:
    """Both from 1 on."""
    return f"block{block}_unit{unit:02d}"


def middle_channels(config: NetworkConfig, block: int) -> int:
    """Of the units of a block, from 1 on, as published."""
    return root_channels(config) * 2 ** (block - 1)


def inner_channels(config: NetworkConfig) -> tuple[InnerChannels, ...]:
    """Of each unit, between `a` and `b` and between `b` and `c`."""
    groups = norm_groups(config)

    def of_unit(block: int, unit: int) -> InnerChannels:
        middle, name = middle_channels(config, block), unit_name(block, unit)
        places = (
            channel_axes(name, (made,), (f"{read}_norm",), (read,), batch_norm=groups is None)
            for made, read in (("a", "b"), ("b", "c"))
        )
        return InnerChannels(name, middle, middle // groups if groups else 1, tuple(places))

    units = [of_unit(i, j + 1) for i, count in enumerate(config.depths, 1) for j in range(count)]
    return narrowed(tuple(units), config)


class ResNetV2(nn.Module):
    """The whole network: root, blocks of units, final norm, mean, head."""

    config: NetworkConfig
    # Inner channels of each unit.
    widths: tuple[int, ...]
    classes: int
    dtype: jnp.dtype
    frozen: bool = False

    @nn.compact
    def __call__(self, images: Images, train: bool) -> tuple[Array, dict[str, Array]]:
        c = self.config
        root = root_channels(c)
        prepare = preparation(c, self.frozen)
        x = images.astype(self.dtype)
        if c.stem == "imagenet":
            x = Convolution(root, 7, 2, self.dtype, prepare=prepare, name="root")(x)
            x = self._pool(x)
        else:
            x = Convolution(root, 3, 1, self.dtype, prepare=prepare, name="root")(x)
        features, widths = {"root": x}, iter(self.widths)
        for block, units in enumerate(c.depths, 1):
            middle = middle_channels(c, block)
            for unit in range(1, units + 1):
                stride = 2 if unit == 1 and block > 1 else 1
                sizes, name = (middle, next(widths), stride), unit_name(block, unit)
                x = Unit(*sizes, c, self.frozen, train, self.dtype, name=name)(x)
            features[f"block{block}"] = x
        x = nn.relu(Norm(norm_groups(c), NORM_EPSILON, train, name="norm")(x))
        pooled = x.astype(jnp.float32).mean(axis=(1, 2))
        features["pre_logits"] = pooled
        return Head(self.classes, name=HEAD)(pooled), features

    def _pool(self, x: Activations) -> Activations:
        """The root's 3x3 maximum. Padding: zero in BiT's files and timm, -inf when released."""
        if self.config.root_pool_padding == "zero":
            return max_pool_zero_padded(x)
        return max_pool(x)


def build(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
    """A member of the family, described by `depths`, `width` and `stem`."""
    _check(config)
    inner = inner_channels(config)
    module = ResNetV2(config, tuple(x.width for x in inner), classes, dtype)
    fold = preparation(config, frozen=False)
    return make_network(module, module.clone(frozen=True), fold, config, classes, dtype, inner)


def member(
    depths: tuple[int, ...], width: float
) -> Callable[[NetworkConfig, int, jnp.dtype], Network]:
    """A published member of the family; its config may not differ."""

    def build_member(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
        check_named(config)
        return build(dataclasses.replace(config, depths=depths, width=width), classes, dtype)

    return build_member


def _check(config: NetworkConfig) -> None:
    if not config.depths or min(config.depths) < 1:
        raise ValueError(
            f"model=bit needs depths, units a block, e.g. (3, 4, 6, 3); got {config.depths}"
        )
    root = root_channels(config)
    assert config.groups != "auto"
    if config.norm == "group" and (root < 1 or root % config.groups):
        near = math.gcd(root, config.groups)
        raise ValueError(
            f"groups={config.groups} does not divide the {root} channels of width="
            f"{config.width:g}; use groups={near}"
        )
    shrink = 2 ** (len(config.depths) - 1) * (4 if config.stem == "imagenet" else 1)
    check_resolution(config, shrink)
