"""BiT: ResNet-v2 with GroupNorm and weight standardisation, at any depth list and width.

Source: Kolesnikov et al. 2020 (arXiv 1912.11370) and big_transfer's reference code. Unit:
norm, relu, 1x1; norm, relu, 3x3 (strided); norm, relu, 1x1; the shortcut's projection reads the
first norm's output. `norm="batch"` makes the same network with BatchNorm and plain convolutions.
"""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from fm_distill.config import NetworkConfig
from fm_distill.models.contract import Images, Network, Output, Variables, select_features

Activations = Float[Array, "batch _ _ _"]
Kernel = Float[Array, "_ _ inputs outputs"]

# Inside the square roots. Source: big_transfer's models (GroupNorm 1e-5, standardisation 1e-10).
NORM_EPSILON = 1e-5
STANDARDISATION_EPSILON = 1e-10


def standardise(kernel: Kernel) -> Kernel:
    """Zero mean and unit variance over each output channel's inputs (arXiv 1903.10520)."""
    mean = kernel.mean(axis=(0, 1, 2), keepdims=True)
    variance = kernel.var(axis=(0, 1, 2), keepdims=True)
    return (kernel - mean) / jnp.sqrt(variance + STANDARDISATION_EPSILON)


def convolve(
    images: Float[Array, "batch _ _ inputs"], kernel: Kernel, stride: int = 1
) -> Float[Array, "batch _ _ outputs"]:
    """A convolution with `kernel // 2` zeros on each side.

    On a CPU, XLA's 1x1 convolution is several times slower than the same matrix product.
    """
    padding = [(n // 2, n // 2) for n in kernel.shape[:2]]

    def convolution(x: Array, k: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x, k, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def product(x: Array, k: Array) -> Array:
        x = x[:, ::stride, ::stride]
        return (x.reshape(-1, x.shape[-1]) @ k[0, 0]).reshape(*x.shape[:-1], k.shape[-1])

    if kernel.shape[:2] != (1, 1):
        return convolution(images, kernel)
    return jax.lax.platform_dependent(images, kernel, cpu=product, default=convolution)


def group_norm(
    x: Float[Array, "batch height width channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
    groups: int,
) -> Float[Array, "batch height width channels"]:
    """GroupNorm over contiguous channels, moments in float32.

    As per-channel moments and one multiply-add: the usual form reshapes the activations into
    groups, which is 8 times slower on a CPU and moves more memory on a TPU.
    """
    n, _, _, channels = x.shape
    wide = x.astype(jnp.float32)
    moments = jnp.stack([wide.mean(axis=(1, 2)), jnp.square(wide).mean(axis=(1, 2))])
    moments = moments.reshape(2, n, groups, channels // groups).mean(axis=-1)
    mean, variance = moments[0], jnp.maximum(moments[1] - jnp.square(moments[0]), 0)
    inverse = jax.lax.rsqrt(variance + NORM_EPSILON)
    spread = jnp.repeat(jnp.stack([mean, inverse]), channels // groups, axis=-1)
    factor = spread[1] * scale
    offset = bias - spread[0] * factor
    return (wide * factor[:, None, None] + offset[:, None, None]).astype(x.dtype)


class Convolution(nn.Module):
    """A convolution without bias; standardised unless its kernel is already."""

    channels: int
    size: int
    stride: int
    standardised: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        if self.standardised:
            kernel = standardise(kernel)
        return convolve(x, kernel.astype(self.dtype), self.stride)


class Norm(nn.Module):
    """GroupNorm, or BatchNorm with the statistics of the global batch, then relu."""

    kind: str
    groups: int
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        if self.kind == "batch":
            norm = nn.BatchNorm(
                use_running_average=not self.train,
                momentum=0.9,
                epsilon=NORM_EPSILON,
                dtype=self.dtype,
                name="moments",
            )
            return nn.relu(norm(x))
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return nn.relu(group_norm(x, scale, bias, self.groups))


class Unit(nn.Module):
    """One pre-activation bottleneck."""

    middle: int
    stride: int
    config: NetworkConfig
    frozen: bool
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        out = 4 * self.middle
        h = self._norm("a_norm", x)
        shortcut = x
        if x.shape[-1] != out or self.stride != 1:
            shortcut = self._convolution("projection", h, out, 1, self.stride)
        h = self._convolution("a", h, self.middle, 1, 1)
        h = self._convolution("b", self._norm("b_norm", h), self.middle, 3, self.stride)
        h = self._convolution("c", self._norm("c_norm", h), out, 1, 1)
        return shortcut + h

    def _norm(self, name: str, x: Activations) -> Activations:
        c = self.config
        return Norm(c.norm, c.groups, self.train, self.dtype, name=name)(x)

    def _convolution(
        self, name: str, x: Activations, channels: int, size: int, stride: int
    ) -> Activations:
        standardised = self.config.norm == "group" and not self.frozen
        return Convolution(channels, size, stride, standardised, self.dtype, name=name)(x)


class ResNetV2(nn.Module):
    """The whole network: root, blocks of units, final norm, mean, head."""

    config: NetworkConfig
    classes: int
    dtype: jnp.dtype
    frozen: bool = False

    @nn.compact
    def __call__(self, images: Images, train: bool) -> tuple[Array, dict[str, Array]]:
        c = self.config
        root = round(64 * c.width)
        standardised = c.norm == "group" and not self.frozen
        x = images.astype(self.dtype)
        if c.stem == "imagenet":
            x = Convolution(root, 7, 2, standardised, self.dtype, name="root")(x)
            x = self._pool(x)
        else:
            x = Convolution(root, 3, 1, standardised, self.dtype, name="root")(x)
        features = {"root": x}
        for block, units in enumerate(c.depths, 1):
            middle = root * 2 ** (block - 1)
            for unit in range(1, units + 1):
                stride = 2 if unit == 1 and block > 1 else 1
                name = f"block{block}_unit{unit:02d}"
                x = Unit(middle, stride, c, self.frozen, train, self.dtype, name=name)(x)
            features[f"block{block}"] = x
        x = Norm(c.norm, c.groups, train, self.dtype, name="norm")(x)
        pooled = x.astype(jnp.float32).mean(axis=(1, 2))
        features["pre_logits"] = pooled
        # The head starts at zero (released configs: head_zeroinit), and computes in float32.
        head = nn.Dense(self.classes, kernel_init=nn.initializers.zeros, name="head")
        return head(pooled), features

    def _pool(self, x: Activations) -> Activations:
        """The root's 3x3 maximum. Padding: zero in BiT's files and timm, -inf when released."""
        if self.config.root_pool_padding == "zero":
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            return nn.max_pool(x, (3, 3), (2, 2), "VALID")
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def build(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
    """A member of the family, described by `depths`, `width` and `stem`."""
    _check(config)
    module = ResNetV2(config, classes, dtype)
    frozen_module = ResNetV2(config, classes, dtype, frozen=True)

    def init(key: PRNGKeyArray) -> Variables:
        images = jnp.zeros((1, config.resolution, config.resolution, 3), jnp.float32)
        tree = module.init(key, images, train=False)
        return Variables(tree["params"], tree.get("batch_stats", {}))

    def apply(
        variables: Variables, images: Images, *, train: bool, features: tuple[str, ...] = ()
    ) -> Output:
        tree = {"params": variables.params, "batch_stats": variables.statistics}
        if not train:
            logits, available = module.apply(tree, images, train=False)
            return Output(logits, select_features(available, features), variables.statistics)
        (logits, available), new = module.apply(tree, images, train=True, mutable=["batch_stats"])
        return Output(logits, select_features(available, features), new.get("batch_stats", {}))

    def freeze(variables: Variables) -> Variables:
        return Variables(_fold(variables.params, config, dtype), variables.statistics)

    def apply_frozen(
        frozen: Variables, images: Images, *, features: tuple[str, ...] = ()
    ) -> Output:
        tree = {"params": frozen.params, "batch_stats": frozen.statistics}
        logits, available = frozen_module.apply(tree, images, train=False)
        return Output(logits, select_features(available, features), frozen.statistics)

    return Network(classes, init, apply, freeze, apply_frozen)


def member(
    depths: tuple[int, ...], width: float
) -> Callable[[NetworkConfig, int, jnp.dtype], Network]:
    """A published member of the family; its config may not say otherwise."""

    def build_member(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
        for name, value, free in (
            ("depths", config.depths, ()),
            ("width", config.width, 1.0),
            ("stem", config.stem, "imagenet"),
            ("norm", config.norm, "group"),
            ("groups", config.groups, 32),
        ):
            if value != free:
                raise ValueError(f"{config.model} fixes {name}; got {value}: use model=bit for it")
        return build(dataclasses.replace(config, depths=depths, width=width), classes, dtype)

    return build_member


def _fold(params: PyTree, config: NetworkConfig, dtype: jnp.dtype) -> PyTree:
    """Standardises each kernel once, in float32, and stores it in the compute type."""

    def fold(path: tuple, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("kernel") or name.startswith("head"):
            return leaf
        return (standardise(leaf) if config.norm == "group" else leaf).astype(dtype)

    return jax.tree_util.tree_map_with_path(fold, params)


def _check(config: NetworkConfig) -> None:
    if not config.depths or min(config.depths) < 1:
        raise ValueError(
            f"model=bit needs depths, units a block, e.g. (3, 4, 6, 3); got {config.depths}"
        )
    root = round(64 * config.width)
    if config.norm == "group" and (root < 1 or root % config.groups):
        near = math.gcd(root, config.groups)
        raise ValueError(
            f"groups={config.groups} does not divide the {root} channels of width="
            f"{config.width:g}; use groups={near}"
        )
    shrink = 2 ** (len(config.depths) - 1) * (4 if config.stem == "imagenet" else 1)
    if config.resolution < shrink:
        raise ValueError(f"resolution {config.resolution} is below the network's stride {shrink}")
