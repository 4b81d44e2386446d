"""Networks of inverted residual blocks: what EfficientNet-Lite and MobileNetV3 share.

Source of the block: Sandler et al. 2018 (arXiv 1801.04381). Modules have timm's names, where
`blocks_0_0` stands for `blocks.0.0`.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fm_distill.config import NetworkConfig
from fm_distill.models.contract import UNIT, Images
from fm_distill.models.convolutions import Padding
from fm_distill.models.inner_channels import InnerChannels, channel_axes, narrowed
from fm_distill.models.layers import Convolution, DepthwiseConvolution, Norm
from fm_distill.models.quantisation import quantised_branch

Activations = Float[Array, "batch _ _ _"]
Activation = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Block:
    """One block. `expanded` channels are convolved depthwise; None: those that come in."""

    kernel: int
    stride: int
    expanded: int | None
    channels: int
    activation: Activation
    # Channels of the squeeze and excitation; 0 for none.
    squeezed: int = 0
    # Groups of the GroupNorms of the expanded channels; None: as the network's.
    groups: int | None = None


@dataclasses.dataclass(frozen=True)
class Design:
    """A whole network but for its head."""

    stem_channels: int
    stages: tuple[tuple[Block, ...], ...]
    # Width of the 1x1 convolution before the classifier.
    head_channels: int
    activation: Activation
    padding: Padding
    # Of the GroupNorm; None for BatchNorm.
    groups: int | None
    epsilon: float

    @property
    def stride(self) -> int:
        """Of the whole network; the stem halves the image."""
        return 2 ** (1 + sum(block.stride == 2 for stage in self.stages for block in stage))


def divisible_by_8(channels: float) -> int:
    """The nearest multiple of 8 that is not below 90 %. Source: both papers' reference code."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class SqueezeAndExcitation(nn.Module):
    """Multiplies each channel by a hard sigmoid of all channels' means (arXiv 1905.02244)."""

    squeezed: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        means = x.astype(jnp.float32).mean(axis=(1, 2), keepdims=True).astype(self.dtype)
        squeeze = Convolution(self.squeezed, 1, 1, self.dtype, bias=True, name="conv_reduce")
        excite = Convolution(x.shape[-1], 1, 1, self.dtype, bias=True, name="conv_expand")
        return x * nn.hard_sigmoid(excite(nn.relu(squeeze(means))))


class InvertedResidual(nn.Module):
    """Expand, convolve depthwise, weigh the channels, project; the shortcut where shapes allow.

    Its parts are counted as timm counts them: the first norm is `bn1` whether a block expands or
    not, and the projection `conv_pwl` where it expands, else `conv_pw`.
    """

    block: Block
    design: Design
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        block = self.block
        h, norms = x, iter(("bn1", "bn2", "bn3"))
        if block.expanded is not None:
            h = Convolution(block.expanded, 1, 1, self.dtype, name="conv_pw")(h)
            h = block.activation(self._norm(next(norms), h, block.groups))
        h = DepthwiseConvolution(
            block.kernel, block.stride, self.dtype, self.design.padding, name="conv_dw"
        )(h)
        h = block.activation(self._norm(next(norms), h, block.groups))
        if block.squeezed:
            h = SqueezeAndExcitation(block.squeezed, self.dtype, name="se")(h)
        name = "conv_pw" if block.expanded is None else "conv_pwl"
        h = Convolution(block.channels, 1, 1, self.dtype, name=name)(h)
        h = self._norm(next(norms), h)
        if block.stride == 1 and x.shape == h.shape:
            h = x + quantised_branch(self, h)
        return checkpoint_name(h, UNIT)

    def _norm(self, name: str, x: Activations, groups: int | None = None) -> Activations:
        design = self.design
        return Norm(groups or design.groups, design.epsilon, self.train, name=name)(x)


def inner_channels(design: Design) -> tuple[InnerChannels, ...]:
    """The expanded channels of each block that expands."""

    def of_block(name: str, block: Block, width: int) -> InnerChannels:
        squeeze = bool(block.squeezed)
        axes = channel_axes(
            name,
            makes=("conv_pw", "conv_dw", *(("se/conv_expand",) * squeeze)),
            norms=("bn1", "bn2"),
            reads=("conv_pwl", *(("se/conv_reduce",) * squeeze)),
            biases=("se/conv_expand",) * squeeze,
            batch_norm=design.groups is None,
        )
        return InnerChannels(name, width, width // design.groups if design.groups else 1, (axes,))

    return tuple(
        of_block(f"blocks_{i}_{j}", block, block.expanded)
        for i, stage in enumerate(design.stages)
        for j, block in enumerate(stage)
        if block.expanded is not None
    )


def with_block_widths(
    design: Design, config: NetworkConfig
) -> tuple[Design, tuple[InnerChannels, ...]]:
    """`design` with the expanded channels of `config`, and these. Raises `ValueError`.

    The squeeze keeps the channels that it was published with.
    """
    published = inner_channels(design)
    inner = narrowed(published, config)
    pairs = iter(zip(published, inner, strict=True))

    def of(block: Block) -> Block:
        if block.expanded is None:
            return block
        published_channels, new_channels = next(pairs)
        groups = (
            None
            if design.groups is None
            else design.groups * new_channels.width // published_channels.width
        )
        return dataclasses.replace(block, expanded=new_channels.width, groups=groups)

    stages = tuple(tuple(map(of, stage)) for stage in design.stages)
    return dataclasses.replace(design, stages=stages), inner


def trunk(
    design: Design, images: Images, train: bool, dtype: jnp.dtype
) -> tuple[Activations, dict[str, Array]]:
    """Stem and stages, as modules of the caller."""
    x = images.astype(dtype)
    x = Convolution(design.stem_channels, 3, 2, dtype, design.padding, name="conv_stem")(x)
    x = Norm(design.groups, design.epsilon, train, name="bn1")(x)
    x = design.activation(x)
    features = {"stem": x}
    for i, stage in enumerate(design.stages):
        for j, block in enumerate(stage):
            x = InvertedResidual(block, design, train, dtype, name=f"blocks_{i}_{j}")(x)
        features[f"block{i + 1}"] = x
    return x, features
