"""ConvNeXt, first and second version.

Source: Liu et al. 2022 (arXiv 2201.03545) and Woo et al. 2023 (arXiv 2301.00808), whose blocks
have a global response normalisation (GRN) instead of the layer scale. Compared with timm 1.0.31's
models of the same names (timm/models/convnext.py), whose names our modules have. There is no
stochastic depth: function matching regularises by its views.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fm_distill.config import NetworkConfig
from fm_distill.models.assembly import check_resolution, make_network
from fm_distill.models.contract import HEAD, UNIT, Images, Network
from fm_distill.models.dense_layers import Dense, LayerNorm, gelu
from fm_distill.models.layers import Convolution, DepthwiseConvolution, Head, identity

Activations = Float[Array, "batch _ _ _"]


@dataclasses.dataclass(frozen=True)
class Design:
    """A whole network but for its head."""

    # Blocks of each stage, and channels of the first, which double from stage to stage.
    depths: tuple[int, ...]
    channels: int
    # timm's `conv_mlp`: the same function, but the file has 1x1 convolutions for dense layers.
    convolutions: bool = False
    second_version: bool = False


# Of both versions.
SIZES = {
    "atto": Design((2, 2, 6, 2), 40, convolutions=True),
    "femto": Design((2, 2, 6, 2), 48, convolutions=True),
    "pico": Design((2, 2, 6, 2), 64, convolutions=True),
    "nano": Design((2, 2, 8, 2), 80, convolutions=True),
    "tiny": Design((3, 3, 9, 3), 96),
    "small": Design((3, 3, 27, 3), 96),
    "base": Design((3, 3, 27, 3), 128),
    "large": Design((3, 3, 27, 3), 192),
}

KERNEL = 7
PATCH = 4
# Patches of the stem, and between stages of 2x2 pixels.
STRIDE = 32
EXPANSION = 4
LAYER_SCALE = 1e-6
# Below the line of the GRN.
GRN_EPSILON = 1e-6


@functools.partial(jax.jit, inline=True)
def _response_norm(
    x: Activations, scale: Float[Array, " channels"], bias: Float[Array, " channels"]
) -> Activations:
    squares = jnp.square(x.astype(jnp.float32)).sum(axis=(1, 2), keepdims=True)
    # Where a channel is zero, so is its gradient; a square root's is infinite.
    norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    factor = 1 + scale * norms / (norms.mean(axis=-1, keepdims=True) + GRN_EPSILON)
    return x * factor.astype(x.dtype) + bias.astype(x.dtype)


class GlobalResponseNorm(nn.Module):
    """Weighs each channel by its norm over the feature map against the mean of all norms."""

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.zeros, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        return _response_norm(x, scale, bias)


class Mlp(nn.Module):
    """Of each pixel: four times the channels, GELU, back."""

    design: Design
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        h = gelu(self._dense("fc1", x, EXPANSION * x.shape[-1]))
        if self.design.second_version:
            h = GlobalResponseNorm(name="grn")(h)
        return self._dense("fc2", h, x.shape[-1])

    def _dense(self, name: str, x: Activations, channels: int) -> Activations:
        if self.design.convolutions:
            return Convolution(channels, 1, 1, self.dtype, bias=True, name=name)(x)
        return Dense(channels, self.dtype, name=name)(x)


class Block(nn.Module):
    """A depthwise convolution and an MLP, beside a shortcut."""

    design: Design
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        h = DepthwiseConvolution(KERNEL, 1, self.dtype, "symmetric", bias=True, name="conv_dw")(x)
        h = Mlp(self.design, self.dtype, name="mlp")(LayerNorm(name="norm")(h))
        if not self.design.second_version:
            # Its parameter is the block's own in timm.
            gamma = self.param(
                "gamma", nn.initializers.constant(LAYER_SCALE), (x.shape[-1],), jnp.float32
            )
            h = h * gamma.astype(h.dtype)
        return checkpoint_name(x + h, UNIT)


class Stage(nn.Module):
    """Blocks at one resolution, which is half of the stage's before."""

    depth: int
    channels: int
    first: bool
    design: Design
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        if not self.first:
            x = LayerNorm(name="downsample_0")(x)
            x = Convolution(
                self.channels, 2, 2, self.dtype, "valid", bias=True, name="downsample_1"
            )(x)
        for i in range(self.depth):
            x = Block(self.design, self.dtype, name=f"blocks_{i}")(x)
        return x


class ConvNeXt(nn.Module):
    """Stem, stages, mean, norm, head. Features: `stem`, `block1` to `block4` by stage."""

    design: Design
    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Images, train: bool) -> tuple[Array, dict[str, Array]]:
        design, x = self.design, images.astype(self.dtype)
        x = Convolution(
            design.channels, PATCH, PATCH, self.dtype, "valid", bias=True, name="stem_0"
        )(x)
        x = LayerNorm(name="stem_1")(x)
        features = {"stem": x}
        for i, depth in enumerate(design.depths):
            stage = Stage(
                depth, design.channels * 2**i, i == 0, design, self.dtype, name=f"stages_{i}"
            )
            x = stage(x)
            features[f"block{i + 1}"] = x
        pooled = x.astype(jnp.float32).mean(axis=(1, 2))
        features["pre_logits"] = LayerNorm(name="head_norm")(pooled)
        return Head(self.classes, name=HEAD)(features["pre_logits"]), features


def member(design: Design) -> Callable[[NetworkConfig, int, jnp.dtype], Network]:
    """A published member of the family; its config may not differ."""

    def build_member(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
        check_resolution(config, STRIDE)
        module = ConvNeXt(design, classes, dtype)
        return make_network(module, module, identity, config, classes, dtype)

    return build_member


MEMBERS = {f"convnext_{size}": member(design) for size, design in SIZES.items()} | {
    f"convnextv2_{size}": member(dataclasses.replace(design, second_version=True))
    for size, design in SIZES.items()
}
