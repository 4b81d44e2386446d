"""BiT: ResNet-v2 with GroupNorm and weight standardisation, at any depth list and width.

Source: Kolesnikov et al. 2020 (arXiv 1912.11370) and big_transfer's reference code. Unit:
norm, relu, 1x1; norm, relu, 3x3 (strided); norm, relu, 1x1; the shortcut's projection reads the
first norm's output. The option `norm="batch"` makes the same network with BatchNorm and plain
convolutions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fm_distill.config import NetworkConfig
from fm_distill.config.bounds import Positive, PositiveInt
from fm_distill.models.assembly import check_resolution, make_network
from fm_distill.models.contract import HEAD, UNIT, Images, Network
from fm_distill.models.inner_channels import InnerChannels, channel_axes, narrowed
from fm_distill.models.layers import Convolution, Head, Kernel, Norm, identity
from fm_distill.models.options import ModelOptions, read_options
from fm_distill.models.pooling import max_pool, max_pool_zero_padded
from fm_distill.models.quantisation import quantised_branch

Activations = Float[Array, "batch _ _ _"]

# Inside the square roots. Source: big_transfer's models (GroupNorm 1e-5, standardisation 1e-10).
NORM_EPSILON = 1e-5
STANDARDISATION_EPSILON = 1e-10


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemberOptions(ModelOptions):
    """Of a published BiT."""

    root_pool_padding: Literal["auto", "zero", "minus_infinity"] = "auto"
    (
        "The padding of the root's pool: zero as in BiT's files and timm, or minus infinity as in "
        "the released trainer; `auto`: by the naming of the weights, zero without."
    )

    def resolved(self) -> "MemberOptions":
        padding = "zero" if self.root_pool_padding == "auto" else self.root_pool_padding
        return dataclasses.replace(self, root_pool_padding=padding)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitOptions(MemberOptions):
    """Of the model `bit`."""

    depths: tuple[int, ...] = ()
    """Residual units of each block, e.g. 3 4 6 3."""
    width: Positive = 1.0
    """Multiplies the 64 channels of the root."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """`imagenet` begins with 7x7 and a pool, together stride 4; `small` with 3x3 and stride 1."""
    norm: Literal["group", "batch"] = "group"
    """GroupNorm with weight standardisation, or BatchNorm without."""
    groups: PositiveInt | Literal["auto"] = "auto"
    (
        "Groups of the GroupNorm, which have to divide the root's channels; `auto`: 32, or the "
        "most of its divisors that do."
    )

    def resolved(self) -> "BitOptions":
        groups = fitting_groups(self) if self.groups == "auto" else self.groups
        padding = super().resolved().root_pool_padding
        return dataclasses.replace(self, groups=groups, root_pool_padding=padding)


@functools.partial(jax.jit, inline=True)
def standardise(kernel: Kernel) -> Kernel:
    """Zero mean and unit variance over each output channel's inputs (arXiv 1903.10520)."""
    mean = kernel.mean(axis=(0, 1, 2), keepdims=True)
    variance = kernel.var(axis=(0, 1, 2), keepdims=True)
    return (kernel - mean) / jnp.sqrt(variance + STANDARDISATION_EPSILON)


def preparation(options: BitOptions, frozen: bool) -> Callable[[Kernel], Kernel]:
    """What a convolution computes from its kernel; a frozen one was standardised already."""
    return standardise if options.norm == "group" and not frozen else identity


def norm_groups(options: BitOptions) -> int | None:
    """Groups of the GroupNorm; None for BatchNorm."""
    assert options.groups != "auto"
    return options.groups if options.norm == "group" else None


def root_channels(options: BitOptions) -> int:
    return round(64 * options.width)


def fitting_groups(options: BitOptions) -> int:
    """The most groups that divide both 32, which is BiT's number, and the root's channels."""
    return math.gcd(32, root_channels(options)) if options.norm == "group" else 32


class Unit(nn.Module):
    """One pre-activation bottleneck."""

    middle: int
    # Channels of the two norms in between: `middle`, or fewer.
    inner: int
    stride: int
    options: BitOptions
    frozen: bool
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        output_channels = 4 * self.middle
        groups = norm_groups(self.options)
        h = self._norm("a_norm", x, groups)
        # Groups keep their size, so those that are left have the moments that they had.
        groups = None if groups is None else groups * self.inner // self.middle
        shortcut = x
        if x.shape[-1] != output_channels or self.stride != 1:
            shortcut = self._convolution("projection", h, output_channels, 1, self.stride)
        h = self._convolution("a", h, self.inner, 1, 1)
        h = self._convolution("b", self._norm("b_norm", h, groups), self.inner, 3, self.stride)
        h = self._convolution("c", self._norm("c_norm", h, groups), output_channels, 1, 1)
        return checkpoint_name(shortcut + quantised_branch(self, h), UNIT)

    def _norm(self, name: str, x: Activations, groups: int | None) -> Activations:
        norm = Norm(groups, NORM_EPSILON, self.train, name=name)
        return nn.relu(norm(x))

    def _convolution(
        self, name: str, x: Activations, channels: int, size: int, stride: int
    ) -> Activations:
        prepare = preparation(self.options, self.frozen)
        return Convolution(channels, size, stride, self.dtype, prepare=prepare, name=name)(x)


def unit_name(block: int, unit: int) -> str:
    """Both from 1 on."""
    return f"block{block}_unit{unit:02d}"


def middle_channels(options: BitOptions, block: int) -> int:
    """Of the units of a block, from 1 on, as published."""
    return root_channels(options) * 2 ** (block - 1)


def inner_channels(config: NetworkConfig, options: BitOptions) -> tuple[InnerChannels, ...]:
    """Of each unit, between `a` and `b` and between `b` and `c`."""
    groups = norm_groups(options)

    def of_unit(block: int, unit: int) -> InnerChannels:
        middle, name = middle_channels(options, block), unit_name(block, unit)
        places = (
            channel_axes(name, (maker,), (f"{reader}_norm",), (reader,), batch_norm=groups is None)
            for maker, reader in (("a", "b"), ("b", "c"))
        )
        return InnerChannels(name, middle, middle // groups if groups else 1, tuple(places))

    units = [of_unit(i, j + 1) for i, count in enumerate(options.depths, 1) for j in range(count)]
    return narrowed(tuple(units), config)


class ResNetV2(nn.Module):
    """The whole network: root, blocks of units, final norm, mean, head."""

    options: BitOptions
    # Inner channels of each unit.
    widths: tuple[int, ...]
    classes: int
    dtype: jnp.dtype
    frozen: bool = False

    @nn.compact
    def __call__(self, images: Images, train: bool) -> tuple[Array, dict[str, Array]]:
        options = self.options
        stem_channels = root_channels(options)
        prepare = preparation(options, self.frozen)
        x = images.astype(self.dtype)
        if options.stem == "imagenet":
            x = Convolution(stem_channels, 7, 2, self.dtype, prepare=prepare, name="root")(x)
            x = self._pool(x)
        else:
            x = Convolution(stem_channels, 3, 1, self.dtype, prepare=prepare, name="root")(x)
        features, widths = {"root": x}, iter(self.widths)
        for block, units in enumerate(options.depths, 1):
            middle = middle_channels(options, block)
            for unit in range(1, units + 1):
                stride = 2 if unit == 1 and block > 1 else 1
                sizes, name = (middle, next(widths), stride), unit_name(block, unit)
                x = Unit(*sizes, options, self.frozen, train, self.dtype, name=name)(x)
            features[f"block{block}"] = x
        x = nn.relu(Norm(norm_groups(options), NORM_EPSILON, train, name="norm")(x))
        pooled = x.astype(jnp.float32).mean(axis=(1, 2))
        features["pre_logits"] = pooled
        return Head(self.classes, name=HEAD)(pooled), features

    def _pool(self, x: Activations) -> Activations:
        """The root's 3x3 maximum. Padding: zero in BiT's files and timm, -inf when released."""
        if self.options.root_pool_padding == "zero":
            return max_pool_zero_padded(x)
        return max_pool(x)


def build(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
    """A member of the family, described by its `BitOptions`."""
    return _build(config, read_options(config, BitOptions).resolved(), classes, dtype)


def member(
    depths: tuple[int, ...], width: float
) -> Callable[[NetworkConfig, int, jnp.dtype], Network]:
    """A published member of the family."""

    def build_member(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
        padding = read_options(config, MemberOptions).root_pool_padding
        options = BitOptions(depths=depths, width=width, root_pool_padding=padding)
        return _build(config, options.resolved(), classes, dtype)

    return build_member


def _build(config: NetworkConfig, options: BitOptions, classes: int, dtype: jnp.dtype) -> Network:
    _check(config, options)
    inner = inner_channels(config, options)
    module = ResNetV2(options, tuple(x.width for x in inner), classes, dtype)
    fold = preparation(options, frozen=False)
    return make_network(module, module.clone(frozen=True), fold, config, classes, dtype, inner)


def _check(config: NetworkConfig, options: BitOptions) -> None:
    if not options.depths or min(options.depths) < 1:
        raise ValueError(
            "model=bit needs the option depths, the units of each block, e.g. (3, 4, 6, 3); got "
            f"{options.depths}"
        )
    stem_channels = root_channels(options)
    assert options.groups != "auto"
    if options.norm == "group" and (stem_channels < 1 or stem_channels % options.groups):
        usable_groups = math.gcd(stem_channels, options.groups)
        raise ValueError(
            f"options.groups={options.groups} does not divide the {stem_channels} channels of "
            f"options.width={options.width:g}; use groups={usable_groups}"
        )
    stride = 2 ** (len(options.depths) - 1) * (4 if options.stem == "imagenet" else 1)
    check_resolution(config, stride)
