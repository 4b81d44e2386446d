"""The layers that families share: convolutions, norms, and the head.

Parameters are float32; a layer computes in `dtype`, with moments in float32.
"""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fm_distill.models.contract import CONVOLUTION

Activations = Float[Array, "batch _ _ channels"]
Kernel = Float[Array, "_ _ inputs outputs"]
PerChannel = Float[Array, " channels"]

# `symmetric`: kernel // 2 zeros on each side, as in PyTorch. `same`: as in TensorFlow, which puts
# the odd zero after the picture, so that with stride 2 it depends on the picture's size. `valid`:
# none, for kernels that do not overlap.
Padding = Literal["symmetric", "same", "valid"]

# How much of the old running averages a training step keeps.
BATCH_NORM_MOMENTUM = 0.9


def _padding(size: int, kernel: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Zeros before and after one side of the picture."""
    if padding == "symmetric":
        return kernel // 2, kernel // 2
    if padding == "valid":
        return 0, 0
    # ceil(size / stride) outputs.
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _paddings(x: Array, kernel: Array, stride: int, padding: Padding) -> list[tuple[int, int]]:
    return [_padding(x.shape[1 + i], kernel.shape[i], stride, padding) for i in range(2)]


def convolve(
    images: Float[Array, "batch _ _ inputs"],
    kernel: Kernel,
    stride: int = 1,
    padding: Padding = "symmetric",
) -> Float[Array, "batch _ _ outputs"]:
    """A convolution.

    On a CPU, XLA's 1x1 convolution is several times slower than the same matrix product.
    """

    def convolution(x: Array, k: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x,
            k,
            (stride, stride),
            _paddings(x, k, stride, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def product(x: Array, k: Array) -> Array:
        x = x[:, ::stride, ::stride]
        return (x.reshape(-1, x.shape[-1]) @ k[0, 0]).reshape(*x.shape[:-1], k.shape[-1])

    if kernel.shape[:2] != (1, 1):
        return convolution(images, kernel)
    return jax.lax.platform_dependent(images, kernel, cpu=product, default=convolution)


def convolve_depthwise(
    images: Float[Array, "batch _ _ channels"],
    kernel: Float[Array, "_ _ 1 channels"],
    stride: int = 1,
    padding: Padding = "symmetric",
) -> Float[Array, "batch _ _ channels"]:
    """A convolution of each channel with a kernel of its own.

    On a CPU, XLA's grouped convolution is an order of magnitude slower than the same sum of
    shifted pictures, forward and backward.
    """

    def convolution(x: Array, k: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x,
            k,
            (stride, stride),
            _paddings(x, k, stride, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )

    def shifts(x: Array, k: Array) -> Array:
        around = _paddings(x, k, stride, padding)
        # Sums in float32, as a convolution does.
        x, k = jnp.pad(x, ((0, 0), *around, (0, 0))).astype(jnp.float32), k.astype(jnp.float32)
        return _sum_of_shifts(x, k, stride).astype(images.dtype)

    return jax.lax.platform_dependent(images, kernel, cpu=shifts, default=convolution)


def _shifted(x: Array, kernel_shape: tuple[int, ...], stride: int) -> list[Array]:
    """For each row and column of a kernel, the pixels of the padded `x` that it meets."""
    # Rows and columns of the output, minus one.
    rows, columns = ((x.shape[1 + i] - kernel_shape[i]) // stride for i in range(2))
    return [
        x[:, i : i + rows * stride + 1 : stride, j : j + columns * stride + 1 : stride]
        for i in range(kernel_shape[0])
        for j in range(kernel_shape[1])
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sum_of_shifts(x: Array, kernel: Array, stride: int) -> Array:
    taps = kernel.reshape(-1, kernel.shape[-1])
    shifted = _shifted(x, kernel.shape, stride)
    return sum(pixels * tap for pixels, tap in zip(shifted, taps, strict=True))


def _forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _sum_of_shifts(x, kernel, stride), (x, kernel)


def _backward(stride: int, saved: tuple[Array, Array], out: Array) -> tuple[Array, Array]:
    x, kernel = saved
    _, to_x = jax.vjp(lambda x: _sum_of_shifts.fun(x, kernel, stride), x)
    per_tap = [_sum_pixels(pixels * out) for pixels in _shifted(x, kernel.shape, stride)]
    return to_x(out)[0], jnp.stack(per_tap).reshape(kernel.shape)


_sum_of_shifts.defvjp(_forward, _backward)


def _sum_pixels(x: Activations) -> PerChannel:
    """Over all but the channels, by halves: XLA's own sum is several times slower on a CPU."""
    for axis in (0, 1):
        while (count := x.shape[axis]) > 1:
            low = jax.lax.slice_in_dim(x, 0, count // 2, axis=axis)
            high = jax.lax.slice_in_dim(x, count - count // 2, count, axis=axis)
            middle = jax.lax.slice_in_dim(x, count // 2, count - count // 2, axis=axis)
            x = jnp.concatenate([low + high, middle], axis) if count % 2 else low + high
    return x.sum(axis=(0, 1, 2))


def group_norm(
    x: Activations, scale: PerChannel, bias: PerChannel, groups: int, epsilon: float
) -> Activations:
    """GroupNorm over contiguous channels, moments in float32.

    As per-channel moments and one multiply-add: the usual form reshapes the activations into
    groups, which is 8 times slower on a CPU and moves more memory on a TPU. There, reshaped
    moments would too: groups are summed, and spread again, by a small matrix.
    """
    channels = x.shape[-1]
    wide = x.astype(jnp.float32)
    members = jnp.repeat(jnp.eye(groups, dtype=jnp.float32), channels // groups, axis=0)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    mean = product(wide.mean(axis=(1, 2)), members) * (groups / channels)
    square = product(jnp.square(wide).mean(axis=(1, 2)), members) * (groups / channels)
    variance = jnp.maximum(square - jnp.square(mean), 0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    factor = product(inverse, members.T) * scale
    offset = bias - product(mean, members.T) * factor
    return (wide * factor[:, None, None] + offset[:, None, None]).astype(x.dtype)


def channel_moments(x: Activations) -> tuple[PerChannel, PerChannel]:
    """Mean and variance over the batch and the picture, in float32.

    Of the global batch: under `jit` the mean runs over the shards.
    """
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=(0, 1, 2))
    return mean, jnp.maximum(jnp.square(wide).mean(axis=(0, 1, 2)) - jnp.square(mean), 0)


def identity(kernel: Array) -> Array:
    """The kernel of a family that computes none from it."""
    return kernel


class Convolution(nn.Module):
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
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        kernel = self.prepare(kernel).astype(self.dtype)
        x = convolve(x, kernel, self.stride, self.padding)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
            x = x + bias.astype(self.dtype)
        return checkpoint_name(x, CONVOLUTION)


class DepthwiseConvolution(nn.Module):
    """A convolution of each channel by itself."""

    size: int
    stride: int
    dtype: jnp.dtype
    padding: Padding
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch _ _ _"]) -> Float[Array, "batch _ _ _"]:
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        x = convolve_depthwise(x, kernel.astype(self.dtype), self.stride, self.padding)
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
                kept = BATCH_NORM_MOMENTUM * average.value
                average.value = kept + (1 - BATCH_NORM_MOMENTUM) * moment
        else:
            moments = mean.value, variance.value
        factor = scale * jax.lax.rsqrt(moments[1] + self.epsilon)
        offset = bias - moments[0] * factor
        return (x.astype(jnp.float32) * factor + offset).astype(x.dtype)


class Head(nn.Module):
    """The classifier, in float32. It starts at zero (released configs: head_zeroinit)."""

    classes: int

    @nn.compact
    def __call__(self, pooled: Float[Array, "batch inputs"]) -> Float[Array, "batch classes"]:
        shape = (pooled.shape[-1], self.classes)
        kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.classes,), jnp.float32)
        return pooled.astype(jnp.float32) @ kernel + bias
