"""ViT: patches as tokens through pre-norm transformer blocks, and its kin DeiT and DINOv2.

Source: Dosovitskiy et al. 2020 (arXiv 2010.11929), Touvron et al. 2020 (arXiv 2012.12877) for the
distillation token, Oquab et al. 2023 (arXiv 2304.07193) for DINOv2 and Darcet et al. 2023 (arXiv
2309.16588) for registers. Compared with timm 1.0.31's models of the same names
(timm/models/vision_transformer.py, deit.py), whose names our modules have. At another resolution
than the weights' their positions are resampled in the network, as by timm's `dynamic_img_size`, so
that an export still fits. There is no dropout and no stochastic depth.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fm_distill.config import NetworkConfig
from fm_distill.models.assembly import check_resolution, make_network
from fm_distill.models.contract import HEAD, UNIT, Images, Network
from fm_distill.models.dense_layers import Dense, LayerNorm, LayerScale, gelu, truncated_normal
from fm_distill.models.inner_channels import InnerChannels, channel_axes, narrowed
from fm_distill.models.integers import matmul_integer, multiplied
from fm_distill.models.layers import Convolution, Head, identity
from fm_distill.models.quantisation import QuantisableLayer
from fm_distill.models.vit_designs import AUGREG, FACEBOOK, Design

Tokens = Float[Array, "batch _ channels"]

# Of the normal that the class token and the registers start from, as in timm.
TOKEN_DEVIATION = 1e-6


def resample_positions(
    positions: Float[Array, "1 _ channels"], prefix: int, rows: int, columns: int
) -> Float[Array, "1 _ channels"]:
    """Positions of a square grid for one of another size; the first `prefix` are of no patch.

    Bicubic and, where the new grid is coarser, low-pass. Source: `resample_abs_pos_embed` of timm.
    """
    side, channels = math.isqrt(positions.shape[1] - prefix), positions.shape[-1]
    if (rows, columns) == (side, side):
        return positions
    grid = positions[:, prefix:].reshape(1, side, side, channels)
    grid = jax.image.resize(grid, (1, rows, columns, channels), "cubic", antialias=True)
    return jnp.concatenate([positions[:, :prefix], grid.reshape(1, -1, channels)], axis=1)


class Patches(nn.Module):
    """A token of each patch, before it has a position."""

    design: Design
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Images) -> Float[Array, "batch _ _ channels"]:
        design = self.design
        convolution = Convolution(
            design.channels, design.patch, design.patch, self.dtype, "valid", bias=True, name="proj"
        )
        return convolution(images.astype(self.dtype))


class Attention(nn.Module):
    """Of all tokens to all; scores and softmax in float32."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        qkv = Dense(3 * x.shape[-1], self.dtype, name="qkv")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, x.shape[-1] // self.heads)
        attended = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return Dense(x.shape[-1], self.dtype, name="proj")(attended.reshape(x.shape))


class Mlp(nn.Module):
    """Two dense layers, with a GELU between them."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        hidden = gelu(Dense(self.hidden, self.dtype, name="fc1")(x))
        return Dense(x.shape[-1], self.dtype, name="fc2")(hidden)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a shortcut."""

    design: Design
    hidden: int  # units of the MLP
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        design = self.design
        h = Attention(design.heads, self.dtype, name="attn")(LayerNorm(name="norm1")(x))
        x = x + self._scaled("ls1", h)
        h = Mlp(self.hidden, self.dtype, name="mlp")(LayerNorm(name="norm2")(x))
        return checkpoint_name(x + self._scaled("ls2", h), UNIT)

    def _scaled(self, name: str, x: Tokens) -> Tokens:
        initial = self.design.layer_scale
        return x if initial is None else LayerScale(initial, name=name)(x)


class DistilledHead(QuantisableLayer):
    """The mean of two heads, of the class token and of the distillation token; see `Head`."""

    classes: int

    @nn.compact
    def __call__(self, pooled: Float[Array, "batch 2 inputs"]) -> Float[Array, "batch classes"]:
        if not self.classes:
            return jnp.zeros((len(pooled), 0), jnp.float32)
        # The first's parameters lie where those of any head do.
        shape = (pooled.shape[-1], self.classes)
        kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.classes,), jnp.float32)
        second = Head(self.classes, name="dist")(pooled[:, 1])
        x = pooled[:, 0]
        first = multiplied(self, x, kernel, jnp.matmul, matmul_integer, jnp.float32)
        return (first + bias + second) / 2


def inner_channels(design: Design) -> tuple[InnerChannels, ...]:
    """The hidden units of each block's MLP."""

    def of_block(i: int) -> InnerChannels:
        hidden, name = int(design.channels * design.mlp_ratio), f"blocks_{i}"
        axes = channel_axes(name, ("mlp/fc1",), (), ("mlp/fc2",), biases=("mlp/fc1",))
        return InnerChannels(name, hidden, 1, (axes,))

    return tuple(map(of_block, range(design.depth)))


class VisionTransformer(nn.Module):
    """Patches, blocks, pool, head. Features are the patches' tokens as maps: `stem`, `block1`..."""

    design: Design
    # Hidden units of the MLP of each block.
    widths: tuple[int, ...]
    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Images, train: bool) -> tuple[Array, dict[str, Array]]:
        design = self.design
        patches = Patches(design, self.dtype, name="patch_embed")(images)
        x = self._embedded(patches)

        def as_map(x: Tokens) -> Float[Array, "batch rows columns channels"]:
            return x[:, design.prefix :].reshape(patches.shape)

        features = {"stem": as_map(x)}
        for i, hidden in enumerate(self.widths):
            x = Block(design, hidden, self.dtype, name=f"blocks_{i}")(x)
            features[f"block{i + 1}"] = as_map(x)
        if design.mean_pooled:
            # Of the patches alone, and before the norm.
            pooled = x[:, design.prefix :].astype(jnp.float32).mean(axis=1)
            pooled = LayerNorm(name="fc_norm")(pooled)
        else:
            # Of all tokens that the norm is defined for, those that are read.
            pooled = LayerNorm(name="norm")(
                x[:, : 2 if design.distilled else 1].astype(jnp.float32)
            )
        features["pre_logits"] = pooled.reshape(pooled.shape[0], -1)
        if design.distilled:
            return DistilledHead(self.classes, name=HEAD)(pooled), features
        return Head(self.classes, name=HEAD)(features["pre_logits"]), features

    def _embedded(self, patches: Float[Array, "batch _ _ channels"]) -> Tokens:
        """With their positions, behind class token, distillation token and registers."""
        design = self.design
        batch, rows, columns, channels = patches.shape
        prefix = 0 if design.bare_prefix else design.prefix
        shape = (1, (design.resolution // design.patch) ** 2 + prefix, channels)
        positions = self.param("pos_embed", truncated_normal, shape, jnp.float32)
        positions = resample_positions(positions, prefix, rows, columns).astype(self.dtype)
        x = patches.reshape(batch, -1, channels) + positions[:, prefix:]
        prefix_tokens = []
        for name, count in design.tokens:
            normal_initializer = nn.initializers.normal(TOKEN_DEVIATION)
            initializer = truncated_normal if name == "dist_token" else normal_initializer
            prefix_tokens.append(self.param(name, initializer, (1, count, channels), jnp.float32))
        if not prefix_tokens:
            return x
        tokens = jnp.concatenate(prefix_tokens, axis=1).astype(self.dtype)
        tokens = tokens if design.bare_prefix else tokens + positions[:, :prefix]
        return jnp.concatenate([jnp.broadcast_to(tokens, (batch, *tokens.shape[1:])), x], axis=1)


def member(design: Design) -> Callable[[NetworkConfig, int, jnp.dtype], Network]:
    """A published member of the family; its config may not differ."""

    def build_member(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
        check_resolution(config, design.patch)
        if remainder := config.resolution % design.patch:
            lower = config.resolution - remainder
            raise ValueError(
                f"resolution {config.resolution} is not a multiple of the patch size of "
                f"{config.model}, {design.patch} pixels; use {lower} or {lower + design.patch}"
            )
        inner = narrowed(inner_channels(design), config)
        module = VisionTransformer(design, tuple(x.width for x in inner), classes, dtype)
        return make_network(module, module, identity, config, classes, dtype, inner)

    return build_member


MEMBERS_OF_AUGREG = {name: member(design) for name, design in AUGREG.items()}
MEMBERS_OF_FACEBOOK = {name: member(design) for name, design in FACEBOOK.items()}
