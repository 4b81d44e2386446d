"""The layers that families share: convolutions with parameters, norms, and the head.

Parameters are float32; a layer computes in `dtype`, with moments in float32.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fm_distill.models.contract import CONVOLUTION
from fm_distill.models.convolutions import (
    Kernel,
    Padding,
    convolve,
    convolve_depthwise,
    convolve_integer,
)
from fm_distill.models.integers import matmul_integer, multiplied
from fm_distill.models.quantisation import QuantisableLayer

Activations = Float[Array, "batch _ _ channels"]
PerChannel = Float[Array, " channels"]

# How much of the old running averages a training step keeps.
BATCH_NORM_MOMENTUM = 0.9

# A flag of the Flax scope that a network's modules run in, the same in all of them.
PORTABLE = "portable"


def is_portable(module: nn.Module) -> bool:
    """Whether `module` runs in its network's `apply_portable`."""
    return module.scope is not None and bool(module.scope.get_flag(PORTABLE, False))


@functools.partial(jax.jit, static_argnames=("groups", "epsilon"), inline=True)
def group_norm(
    x: Activations, scale: PerChannel, bias: PerChannel, groups: int, epsilon: float
) -> Activations:
    """GroupNorm over contiguous channels, moments in float32.

    As per-channel moments and one multiply-add: the usual form reshapes the activations into
    groups, which is 8 times slower on a CPU and moves more memory on a TPU. There, reshaped
    moments would too: groups are summed, and spread again, by a small matrix.
    """
    channels = x.shape[-1]
    x_float32 = x.astype(jnp.float32)
    group_matrix = jnp.repeat(jnp.eye(groups, dtype=jnp.float32), channels // groups, axis=0)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    mean = product(x_float32.mean(axis=(1, 2)), group_matrix) * (groups / channels)
    mean_square = product(jnp.square(x_float32).mean(axis=(1, 2)), group_matrix) * (
        groups / channels
    )
    variance = jnp.maximum(mean_square - jnp.square(mean), 0)
    inverse_deviation = jax.lax.rsqrt(variance + epsilon)
    factor = product(inverse_deviation, group_matrix.T) * scale
    offset = bias - product(mean, group_matrix.T) * factor
    return (x_float32 * factor[:, None, None] + offset[:, None, None]).astype(x.dtype)


@functools.partial(jax.jit, inline=True)
def channel_moments(x: Activations) -> tuple[PerChannel, PerChannel]:
    """Mean and variance over the batch and the image, in float32.

    Of the global batch: under `jit` the mean runs over the shards.
    """
    x_float32 = x.astype(jnp.float32)
    mean = x_float32.mean(axis=(0, 1, 2))
    return mean, jnp.maximum(jnp.square(x_float32).mean(axis=(0, 1, 2)) - jnp.square(mean), 0)


# Functions with `inline=True` are traced once for each shape, not once for each layer and each time
# that a network is traced; the program is the same.
initial_kernel = jax.jit(nn.initializers.lecun_normal(), static_argnums=(1, 2), inline=True)


@functools.partial(jax.jit, static_argnames="epsilon", inline=True)
def batch_norm(
    x: Activations,
    scale: PerChannel,
    bias: PerChannel,
    moments: tuple[PerChannel, PerChannel],
    epsilon: float,
) -> Activations:
    """As one multiply-add in float32, by mean and variance of each channel."""
    factor = scale * jax.lax.rsqrt(moments[1] + epsilon)
    offset = bias - moments[0] * factor
    return (x.astype(jnp.float32) * factor + offset).astype(x.dtype)


def identity(kernel: Array) -> Array:
    """The kernel of a family that computes none from it."""
    return kernel


class Convolution(QuantisableLayer):
    """A convolution with `prepare(kernel)`."""

    channels: int
    size: int
    stride: int
    dtype: jnp.dtype
    padding: Padding = "symmetric"
    bias: bool = False
    prepare: Callable[[Kernel], Kernel] = identity

    @nn.compact
    def __call__(self, x: Float[Array, "batch _ _ _"]) -> Float[Array, "batch _ _ _"]:
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", initial_kernel, shape, jnp.float32)
        stride, padding = self.stride, self.padding
        float_convolve = functools.partial(
            convolve, stride=stride, padding=padding, portable=is_portable(self)
        )
        integer_convolve = functools.partial(convolve_integer, stride=stride, padding=padding)
        x = multiplied(self, x, self.prepare(kernel), float_convolve, integer_convolve, self.dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
            x = x + bias.astype(self.dtype)
        return checkpoint_name(x, CONVOLUTION)


class DepthwiseConvolution(QuantisableLayer):
    """A convolution of each channel by itself."""

    size: int
    stride: int
    dtype: jnp.dtype
    padding: Padding
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch _ _ _"]) -> Float[Array, "batch _ _ _"]:
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", initial_kernel, shape, jnp.float32)
        stride, padding = self.stride, self.padding
        float_convolve = functools.partial(
            convolve_depthwise, stride=stride, padding=padding, portable=is_portable(self)
        )
        integer_convolve = functools.partial(
            convolve_integer, stride=stride, padding=padding, groups=x.shape[-1]
        )
        x = multiplied(self, x, kernel, float_convolve, integer_convolve, self.dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
            x = x + bias.astype(self.dtype)
        return checkpoint_name(x, CONVOLUTION)


class Norm(nn.Module):
    """GroupNorm, or BatchNorm with the statistics of the global batch where `groups` is None."""

    groups: int | None
    epsilon: float
    train: bool

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        if self.groups is not None:
            return group_norm(x, scale, bias, self.groups, self.epsilon)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if self.train:
            moments = channel_moments(x)
            for average, moment in zip((mean, variance), moments, strict=True):
                retained = BATCH_NORM_MOMENTUM * average.value
                average.value = retained + (1 - BATCH_NORM_MOMENTUM) * moment
        else:
            moments = mean.value, variance.value
        return batch_norm(x, scale, bias, moments, self.epsilon)


class Head(QuantisableLayer):
    """The classifier, in float32. It starts at zero (released configs: head_zeroinit).

    Of no classes it has no parameters either: weights that come without a head.
    """

    classes: int

    @nn.compact
    def __call__(self, pooled: Float[Array, "batch inputs"]) -> Float[Array, "batch classes"]:
        if not self.classes:
            return jnp.zeros((len(pooled), 0), jnp.float32)
        shape = (pooled.shape[-1], self.classes)
        kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.classes,), jnp.float32)
        pooled_float32 = pooled.astype(jnp.float32)
        return (
            multiplied(self, pooled_float32, kernel, jnp.matmul, matmul_integer, jnp.float32) + bias
        )
