"""Products in integers: what a frozen layer of eight bits computes.

With x = s (q - z) and w = t u, where q, z and u are 8-bit integers, a product is

    sum x w = s t (sum q u - z sum u)

(Jacob et al. 2018, arXiv 1712.05877, section 2.3). A TPU computes both sums from eight bits into
32. Elsewhere q - z and u are multiplied in float32, which holds every integer up to 2^24:
below it, the sums are the same in every bit, in whatever order they are added.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, Int8, Int32, PyTree

from fm_distill.models.contract import HEAD
from fm_distill.models.quantisation import (
    OF_ACTIVATIONS,
    OF_WEIGHTS,
    RANGES,
    Precision,
    QuantisableLayer,
    Range,
    affine,
    precision_of,
    quantised,
    weight_scale,
)

# Beside a kernel of integers: what one of them stands for, by output channel.
SCALE = "kernel_scale"

# `(x, kernel) -> product`, in their type.
Product = Callable[[Array, Array], Array]
# `(x, what stands around it, kernel) -> product` of eight bits, in 32.
IntegerProduct = Callable[[Array, Array, Array], Array]


def multiplied(
    layer: QuantisableLayer,
    x: Float[Array, "*places inputs"],
    kernel: Array,
    floats: Product,
    whole: IntegerProduct,
    dtype: Any,
) -> Float[Array, "*_ outputs"]:
    """`floats(x, kernel)` in `dtype`, of rounded numbers where `layer` is quantised.

    In integers, by `whole`, where the kernel is one of `integer_kernels`.
    """
    if kernel.dtype != jnp.int8:
        x, kernel = quantised(layer, x, kernel)
        return floats(x, kernel.astype(dtype))
    observed: dict[str, Array] = layer.get_variable(RANGES, "input")
    levels = OF_ACTIVATIONS[precision_of(layer).activations]
    scale, zero_point = affine(Range(observed["low"], observed["high"]), levels)
    integers = jnp.clip(jnp.round(x.astype(jnp.float32) / scale) + zero_point, *levels)

    def by_floats(integers: Array, zero_point: Array, kernel: Array) -> Array:
        return floats(integers - zero_point, kernel.astype(jnp.float32))

    def in_integers(integers: Array, zero_point: Array, kernel: Array) -> Array:
        zero = zero_point.astype(jnp.int8)
        sums = whole(integers.astype(jnp.int8), zero, kernel)
        kernel_sums = kernel.astype(jnp.int32).sum(axis=tuple(range(kernel.ndim - 1)))
        return (sums - zero.astype(jnp.int32) * kernel_sums).astype(jnp.float32)

    # On GPUs in floats: cuDNN has these convolutions in eight bits for some shapes alone.
    sums = jax.lax.platform_dependent(
        integers, zero_point, kernel, tpu=in_integers, default=by_floats
    )
    return (sums * (scale * layer.get_variable("params", SCALE))).astype(dtype)


def matmul_integer(
    x: Int8[Array, "*places inputs"], around: Array, kernel: Int8[Array, "inputs outputs"]
) -> Int32[Array, "*places outputs"]:
    """The product of a dense layer; nothing stands around `x`."""
    dimensions = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, kernel, dimensions, preferred_element_type=jnp.int32)


def integer_kernels(
    params: PyTree, plan: Mapping[str, Precision], fold: Callable[[Array], Array]
) -> PyTree:
    """`params` with the kernels of the layers in `plan` in integers, their scales beside them.

    A kernel is prepared by `fold` first, in float32, the head's excepted. Layers of which weights
    alone are quantised stay as they are.
    """
    leaves: dict[tuple[str, ...], Array] = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        *modules, name = path
        precision = plan.get("/".join(modules), Precision("none", "none"))
        if name != "kernel" or precision.activations == "none":
            leaves[path] = leaf
            continue
        kernel = leaf if modules[0] == HEAD else fold(leaf)
        levels = OF_WEIGHTS[precision.weights]
        scale = weight_scale(kernel, levels)
        integers = jnp.clip(jnp.round(kernel.astype(jnp.float32) / scale), *levels)
        leaves[path], leaves[(*modules, SCALE)] = integers.astype(jnp.int8), scale
    return traverse_util.unflatten_dict(leaves)
