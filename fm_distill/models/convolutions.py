"""Convolutions, each in the form that a backend computes fast.

Accelerators have one good form, XLA's own. On a CPU, the same sums are written out where that is
faster: `tools/bench_convolutions.py` prints by how much.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

Images = Float[Array, "batch _ _ inputs"]
Kernel = Float[Array, "_ _ inputs outputs"]
Convolved = Float[Array, "batch _ _ outputs"]

# `symmetric`: kernel // 2 zeros on each side, as in PyTorch. `same`: as in TensorFlow, which puts
# the odd zero after the image, so that with stride 2 it depends on the image's size. `valid`:
# none, for kernels that do not overlap.
Padding = Literal["symmetric", "same", "valid"]
Around = tuple[tuple[int, int], tuple[int, int]]

# Outputs up to this many pixels are one product with the columns of their images. For larger
# ones it is no faster (`tools/bench_convolutions.py`) and takes as many times the image's memory
# as the kernel has taps.
MOST_PIXELS_AS_COLUMNS = 64
# Larger kernels (the patches of a ViT) would be too many slices to compile.
LARGEST_AS_COLUMNS = 7


def _padding(size: int, kernel: int, stride: int, padding: Padding) -> tuple[int, int]:
    """Zeros before and after one side of the image."""
    if padding == "symmetric":
        return kernel // 2, kernel // 2
    if padding == "valid":
        return 0, 0
    # ceil(size / stride) outputs.
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _around(x: Array, kernel: Array, stride: int, padding: Padding) -> Around:
    height, width = (_padding(x.shape[1 + i], kernel.shape[i], stride, padding) for i in range(2))
    return height, width


@functools.partial(jax.jit, static_argnames=("stride", "padding", "portable"), inline=True)
def convolve(
    images: Images,
    kernel: Kernel,
    stride: int = 1,
    padding: Padding = "symmetric",
    portable: bool = False,
) -> Convolved:
    """A convolution; where it is to be `portable`, one operation on every platform.

    On a CPU, XLA's convolution to 4x4 or 2x2 pixels, and any of 1x1, is far slower than the same
    matrix product.
    """
    around = _around(images, kernel, stride, padding)
    xla_form = functools.partial(_xla, stride=stride, around=around)
    if portable:
        return xla_form(images, kernel)
    rows, columns = (
        (images.shape[1 + i] + sum(around[i]) - kernel.shape[i]) // stride + 1 for i in range(2)
    )
    if kernel.shape[:2] == (1, 1):
        cpu_form = functools.partial(_pointwise, stride=stride)
    elif rows * columns <= MOST_PIXELS_AS_COLUMNS and max(kernel.shape[:2]) <= LARGEST_AS_COLUMNS:
        cpu_form = functools.partial(_by_columns, stride=stride, around=around)
    else:
        return xla_form(images, kernel)
    return jax.lax.platform_dependent(images, kernel, cpu=cpu_form, default=xla_form)


def convolve_integer(
    images: Int8[Array, "batch _ _ inputs"],
    around: Int8[Array, ""],
    kernel: Int8[Array, "_ _ inputs_of_group outputs"],
    stride: int = 1,
    padding: Padding = "symmetric",
    groups: int = 1,
) -> Int32[Array, "batch _ _ outputs"]:
    """A convolution of integers, with `around` where a padding has zeros."""
    rows, columns = _around(images, kernel, stride, padding)
    images = jax.lax.pad(images, around, ((0, 0, 0), (*rows, 0), (*columns, 0), (0, 0, 0)))
    return _xla(images, kernel, stride, ((0, 0), (0, 0)), groups, jnp.int32)


def _xla(
    x: Array, kernel: Array, stride: int, around: Around, groups: int = 1, dtype: Any = None
) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        around,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        preferred_element_type=dtype,
    )


def _pointwise(x: Array, kernel: Array, stride: int) -> Array:
    x = x[:, ::stride, ::stride]
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], kernel.shape[-1])


def _shifted(x: Array, kernel: Array, stride: int, around: Around) -> list[Array]:
    """For each row and column of a kernel, the pixels of `x` that it meets."""
    x = jnp.pad(x, ((0, 0), *around, (0, 0)))
    # Rows and columns of the output, minus one.
    rows, columns = ((x.shape[1 + i] - kernel.shape[i]) // stride for i in range(2))
    return [
        x[:, i : i + rows * stride + 1 : stride, j : j + columns * stride + 1 : stride]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]


def _by_columns(x: Array, kernel: Array, stride: int, around: Around) -> Array:
    """One product, with what a kernel meets at each place side by side."""
    patches = jnp.concatenate(_shifted(x, kernel, stride, around), axis=-1)
    product = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return product.reshape(*patches.shape[:-1], kernel.shape[-1])


@functools.partial(jax.jit, static_argnames=("stride", "padding", "portable"), inline=True)
def convolve_depthwise(
    images: Float[Array, "batch _ _ channels"],
    kernel: Float[Array, "_ _ 1 channels"],
    stride: int = 1,
    padding: Padding = "symmetric",
    portable: bool = False,
) -> Float[Array, "batch _ _ channels"]:
    """A convolution of each channel with a kernel of its own; `portable` as for `convolve`.

    On a CPU, XLA's grouped convolution is an order of magnitude slower than the same sum of
    shifted images, forward and backward.
    """
    around = _around(images, kernel, stride, padding)
    grouped = functools.partial(_xla, stride=stride, around=around, groups=images.shape[-1])
    if portable:
        return grouped(images, kernel)

    def shifts(x: Array, k: Array) -> Array:
        # Sums in float32, as a convolution does.
        output = _sum_of_shifts(stride, around, x.astype(jnp.float32), k.astype(jnp.float32))
        return output.astype(images.dtype)

    return jax.lax.platform_dependent(images, kernel, cpu=shifts, default=grouped)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_shifts(stride: int, around: Around, x: Array, kernel: Array) -> Array:
    taps = kernel.reshape(-1, kernel.shape[-1])
    shifted = _shifted(x, kernel, stride, around)
    return sum(pixels * tap for pixels, tap in zip(shifted, taps, strict=True))


def _forward_of_shifts(
    stride: int, around: Around, x: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _sum_of_shifts(stride, around, x, kernel), (x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _backward_of_shifts(
    stride: int, around: Around, saved: tuple[Array, Array], out: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    _, vjp_of_x = jax.vjp(lambda x: _sum_of_shifts.fun(stride, around, x, kernel), x)
    tap_gradients = [_sum_pixels(pixels * out) for pixels in _shifted(x, kernel, stride, around)]
    return vjp_of_x(out)[0], jnp.stack(tap_gradients).reshape(kernel.shape)


_sum_of_shifts.defvjp(_forward_of_shifts, _backward_of_shifts)


def _sum_pixels(x: Float[Array, "batch _ _ channels"]) -> Float[Array, " channels"]:
    """Over all but the channels, by halves: XLA's own sum is several times slower on a CPU."""
    for axis in (0, 1):
        while (count := x.shape[axis]) > 1:
            first_half = jax.lax.slice_in_dim(x, 0, count // 2, axis=axis)
            second_half = jax.lax.slice_in_dim(x, count - count // 2, count, axis=axis)
            middle = jax.lax.slice_in_dim(x, count // 2, count - count // 2, axis=axis)
            x = (
                jnp.concatenate([first_half + second_half, middle], axis)
                if count % 2
                else first_half + second_half
            )
    return x.sum(axis=(0, 1, 2))
