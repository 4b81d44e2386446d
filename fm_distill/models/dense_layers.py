"""Layers on the channels of each token or pixel: dense, LayerNorm, layer scale.

Parameters are float32; a layer computes in `dtype`, with moments in float32.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fm_distill.models.contract import CONVOLUTION
from fm_distill.models.integers import matmul_integer, multiplied
from fm_distill.models.quantisation import QuantisableLayer

Channels = Float[Array, "*places channels"]
Channel = Float[Array, " channels"]

# Inside the square root, in timm's ViT and ConvNeXt.
LAYER_NORM_EPSILON = 1e-6
# Of the truncated normal that dense kernels, tokens and positions start from, as in timm.
INITIAL_DEVIATION = 0.02
truncated_normal = jax.jit(
    nn.initializers.truncated_normal(INITIAL_DEVIATION), static_argnums=(1, 2), inline=True
)


@functools.partial(jax.jit, inline=True)
def gelu(x: Channels) -> Channels:
    """With the error function, not its usual approximation."""
    return nn.gelu(x, approximate=False)


@functools.partial(jax.jit, inline=True)
def layer_norm(x: Channels, scale: Channel, bias: Channel) -> Channels:
    x_float32 = x.astype(jnp.float32)
    x_float32 = x_float32 - x_float32.mean(axis=-1, keepdims=True)
    variance = jnp.square(x_float32).mean(axis=-1, keepdims=True)
    x_float32 = x_float32 * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    return (x_float32 * scale + bias).astype(x.dtype)


class Dense(QuantisableLayer):
    """A matrix product and a bias. For rematerialisation its output counts as a convolution's."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*places _"]) -> Float[Array, "*places _"]:
        kernel = self.param("kernel", truncated_normal, (x.shape[-1], self.channels), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
        x = multiplied(self, x, kernel, jnp.matmul, matmul_integer, self.dtype)
        return checkpoint_name(x + bias.astype(self.dtype), CONVOLUTION)


class LayerNorm(nn.Module):
    """Over the channels of each place, in float32."""

    @nn.compact
    def __call__(self, x: Channels) -> Channels:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        return layer_norm(x, scale, bias)


class LayerScale(nn.Module):
    """A factor of each channel (arXiv 2103.17239), small at first."""

    initial: float

    @nn.compact
    def __call__(self, x: Channels) -> Channels:
        initial = nn.initializers.constant(self.initial)
        gamma = self.param("gamma", initial, (x.shape[-1],), jnp.float32)
        return x * gamma.astype(x.dtype)
