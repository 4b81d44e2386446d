"""ResNet: residual units of convolutions with BatchNorm, and the variant D.

Source: He et al. 2015 (arXiv 1512.03385), with the stride in the 3x3 convolution, and He et al.
2018 (arXiv 1812.01187) for the D: three 3x3 convolutions as the root, and a shortcut that averages
2x2 pixels before its 1x1 convolution. Compared with timm 1.0.31's models of the same names
(timm/models/resnet.py), whose names our modules have.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fm_distill.config import NetworkConfig
from fm_distill.models.assembly import check_resolution, make_network
from fm_distill.models.contract import HEAD, UNIT, Images, Network
from fm_distill.models.inner_channels import InnerChannels, channel_axes, narrowed
from fm_distill.models.layers import Convolution, Head, Norm, identity
from fm_distill.models.pooling import average_pool, max_pool

Activations = Float[Array, "batch _ _ _"]


@dataclasses.dataclass(frozen=True)
class Design:
    """Units of each stage; of three convolutions or of two."""

    depths: tuple[int, ...]
    bottleneck: bool
    # Whether it is a D.
    deep: bool = False


DESIGNS = {
    "resnet18": Design((2, 2, 2, 2), bottleneck=False),
    "resnet34": Design((3, 4, 6, 3), bottleneck=False),
    "resnet50": Design((3, 4, 6, 3), bottleneck=True),
    "resnet50d": Design((3, 4, 6, 3), bottleneck=True, deep=True),
    "resnet101": Design((3, 4, 23, 3), bottleneck=True),
}

ROOT_CHANNELS = 64
# Of the first two convolutions of a deep root.
DEEP_ROOT_CHANNELS = 32
# Root and pool halve the image, and so do three of the stages.
STRIDE = 32

# PyTorch's default.
BATCH_NORM_EPSILON = 1e-5


class Unit(nn.Module):
    """One post-activation unit: 3x3, 3x3, or 1x1, 3x3, 1x1 to four times the channels."""

    middle: int
    # Channels between the convolutions: `middle`, or fewer.
    inner: int
    stride: int
    design: Design
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        inner, output_channels = self.inner, self.middle
        convolutions = [(inner, 3, self.stride), (output_channels, 3, 1)]
        if self.design.bottleneck:
            convolutions = [(inner, 1, 1), (inner, 3, self.stride), (4 * output_channels, 1, 1)]
        h = x
        for i, (channels, size, stride) in enumerate(convolutions, 1):
            h = nn.relu(h) if i > 1 else h
            h = Convolution(channels, size, stride, self.dtype, name=f"conv{i}")(h)
            h = self._norm(f"bn{i}", h)
        return checkpoint_name(nn.relu(h + self._shortcut(x, h.shape[-1])), UNIT)

    def _shortcut(self, x: Activations, channels: int) -> Activations:
        if x.shape[-1] == channels and self.stride == 1:
            return x
        stride, index = self.stride, 0
        if self.design.deep:
            x = average_pool(x) if stride == 2 else x
            # timm counts the pool, where there is none too.
            stride, index = 1, 1
        x = Convolution(channels, 1, stride, self.dtype, name=f"downsample_{index}")(x)
        return self._norm(f"downsample_{index + 1}", x)

    def _norm(self, name: str, x: Activations) -> Activations:
        return Norm(None, BATCH_NORM_EPSILON, self.train, name=name)(x)


def inner_channels(design: Design) -> tuple[InnerChannels, ...]:
    """Of each unit, between its convolutions."""

    def of_unit(stage: int, unit: int) -> InnerChannels:
        name = f"layer{stage + 1}_{unit}"
        places = (
            channel_axes(name, (f"conv{i}",), (f"bn{i}",), (f"conv{i + 1}",), batch_norm=True)
            for i in range(1, 3 if design.bottleneck else 2)
        )
        return InnerChannels(name, ROOT_CHANNELS * 2**stage, 1, tuple(places))

    return tuple(of_unit(i, j) for i, units in enumerate(design.depths) for j in range(units))


class ResNet(nn.Module):
    """Root, stages of units, mean, head. Features: `root`, `block1` to `block4`."""

    design: Design
    # Inner channels of each unit.
    widths: tuple[int, ...]
    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Images, train: bool) -> tuple[Array, dict[str, Array]]:
        x = self._root(images.astype(self.dtype), train)
        features, widths = {"root": x}, iter(self.widths)
        for i, units in enumerate(self.design.depths):
            for j in range(units):
                stride = 2 if i > 0 and j == 0 else 1
                sizes, name = (ROOT_CHANNELS * 2**i, next(widths), stride), f"layer{i + 1}_{j}"
                x = Unit(*sizes, self.design, train, self.dtype, name=name)(x)
            features[f"block{i + 1}"] = x
        features["pre_logits"] = x.astype(jnp.float32).mean(axis=(1, 2))
        return Head(self.classes, name=HEAD)(features["pre_logits"]), features

    def _root(self, x: Activations, train: bool) -> Activations:
        if self.design.deep:
            # The module counts its activations too.
            for i, stride in ((0, 2), (3, 1)):
                x = Convolution(DEEP_ROOT_CHANNELS, 3, stride, self.dtype, name=f"conv1_{i}")(x)
                x = nn.relu(Norm(None, BATCH_NORM_EPSILON, train, name=f"conv1_{i + 1}")(x))
            x = Convolution(ROOT_CHANNELS, 3, 1, self.dtype, name="conv1_6")(x)
        else:
            x = Convolution(ROOT_CHANNELS, 7, 2, self.dtype, name="conv1")(x)
        return max_pool(nn.relu(Norm(None, BATCH_NORM_EPSILON, train, name="bn1")(x)))


def member(design: Design) -> Callable[[NetworkConfig, int, jnp.dtype], Network]:
    """A published member of the family; its config may not differ."""

    def build_member(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
        check_resolution(config, STRIDE)
        inner = narrowed(inner_channels(design), config)
        module = ResNet(design, tuple(x.width for x in inner), classes, dtype)
        return make_network(module, module, identity, config, classes, dtype, inner)

    return build_member


MEMBERS = {name: member(design) for name, design in DESIGNS.items()}
