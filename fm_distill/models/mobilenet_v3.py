"""MobileNetV3, large and small, with BatchNorm or with GroupNorm.

Source: Howard et al. 2019 (arXiv 1905.02244), tables 1 and 2. Compared with timm 1.0.31's
`mobilenetv3_large_100` and `mobilenetv3_small_100`, whose names our modules have, and with the
same where GroupNorm of 8 groups replaces each BatchNorm: the students of Beyer et al. 2021. There
is no dropout and no stochastic depth: function matching regularises by its views.
"""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fm_distill.config import NetworkConfig
from fm_distill.models.assembly import check_resolution, make_network
from fm_distill.models.contract import HEAD, Images, Network
from fm_distill.models.inverted_residual import (
    Block,
    Design,
    divisible_by_8,
    trunk,
    with_block_widths,
)
from fm_distill.models.layers import Convolution, Head, Norm, identity

# By stage: kernel, stride, expanded channels (None: no expansion), channels, squeeze and
# excitation, activation. Stages are timm's.
Row = tuple[int, int, int | None, int, bool, Literal["relu", "hard_swish"]]

LARGE: tuple[tuple[Row, ...], ...] = (
    ((3, 1, None, 16, False, "relu"),),
    ((3, 2, 64, 24, False, "relu"), (3, 1, 72, 24, False, "relu")),
    ((5, 2, 72, 40, True, "relu"), (5, 1, 120, 40, True, "relu"), (5, 1, 120, 40, True, "relu")),
    (
        (3, 2, 240, 80, False, "hard_swish"),
        (3, 1, 200, 80, False, "hard_swish"),
        (3, 1, 184, 80, False, "hard_swish"),
        (3, 1, 184, 80, False, "hard_swish"),
    ),
    ((3, 1, 480, 112, True, "hard_swish"), (3, 1, 672, 112, True, "hard_swish")),
    (
        (5, 2, 672, 160, True, "hard_swish"),
        (5, 1, 960, 160, True, "hard_swish"),
        (5, 1, 960, 160, True, "hard_swish"),
    ),
)

SMALL: tuple[tuple[Row, ...], ...] = (
    ((3, 2, None, 16, True, "relu"),),
    ((3, 2, 72, 24, False, "relu"), (3, 1, 88, 24, False, "relu")),
    (
        (5, 2, 96, 40, True, "hard_swish"),
        (5, 1, 240, 40, True, "hard_swish"),
        (5, 1, 240, 40, True, "hard_swish"),
    ),
    ((5, 1, 120, 48, True, "hard_swish"), (5, 1, 144, 48, True, "hard_swish")),
    (
        (5, 2, 288, 96, True, "hard_swish"),
        (5, 1, 576, 96, True, "hard_swish"),
        (5, 1, 576, 96, True, "hard_swish"),
    ),
)

# Rows, and width of the 1x1 convolution before the classifier.
SIZES = {"large": (LARGE, 1280), "small": (SMALL, 1024)}

STEM_CHANNELS = 16
# The last stage is a 1x1 convolution to six times the channels.
LAST_EXPANSION = 6
# The squeeze and excitation keeps a quarter of the expanded channels.
SQUEEZE = 0.25
# Of both norms: PyTorch's default, which timm keeps.
NORM_EPSILON = 1e-5

ACTIVATIONS = {"relu": nn.relu, "hard_swish": nn.hard_swish}


def design_of(size: Literal["large", "small"], groups: int | None) -> Design:
    """Of that size, with GroupNorm of `groups`, or with BatchNorm where it is None."""
    rows, head_channels = SIZES[size]
    channels_in, stages = STEM_CHANNELS, []
    for stage in rows:
        blocks = []
        for kernel, stride, expanded, channels, squeeze, activation in stage:
            squeezed = divisible_by_8(SQUEEZE * (expanded or channels_in)) if squeeze else 0
            blocks.append(
                Block(kernel, stride, expanded, channels, ACTIVATIONS[activation], squeezed)
            )
            channels_in = channels
        stages.append(tuple(blocks))
    return Design(
        stem_channels=STEM_CHANNELS,
        stages=tuple(stages),
        head_channels=head_channels,
        activation=nn.hard_swish,
        padding="symmetric",
        groups=groups,
        epsilon=NORM_EPSILON,
    )


class LastStage(nn.Module):
    """The 1x1 convolution that widens the last feature map."""

    design: Design
    train: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch _ _ _"]) -> Float[Array, "batch _ _ _"]:
        design = self.design
        x = Convolution(LAST_EXPANSION * x.shape[-1], 1, 1, self.dtype, name="conv")(x)
        return design.activation(Norm(design.groups, design.epsilon, self.train, name="bn1")(x))


class MobileNetV3(nn.Module):
    """Stem, stages, mean, a wide 1x1 convolution, head. Features: `stem`, `block1`... by stage."""

    design: Design
    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Images, train: bool) -> tuple[Array, dict[str, Array]]:
        design = self.design
        x, features = trunk(design, images, train, self.dtype)
        last_stage = len(design.stages)
        x = LastStage(design, train, self.dtype, name=f"blocks_{last_stage}_0")(x)
        features[f"block{last_stage + 1}"] = x
        # After the mean, where it costs a 49th at 224 px; without a norm, hence with a bias.
        x = x.astype(jnp.float32).mean(axis=(1, 2), keepdims=True).astype(self.dtype)
        x = Convolution(design.head_channels, 1, 1, self.dtype, bias=True, name="conv_head")(x)
        features["pre_logits"] = design.activation(x)[:, 0, 0].astype(jnp.float32)
        return Head(self.classes, name=HEAD)(features["pre_logits"]), features


def member(
    size: Literal["large", "small"], groups: int | None = None
) -> Callable[[NetworkConfig, int, jnp.dtype], Network]:
    """MobileNetV3 of that size, with GroupNorm of `groups`, or with BatchNorm."""
    design = design_of(size, groups)

    def build_member(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
        check_resolution(config, design.stride)
        narrowed_design, inner = with_block_widths(design, config)
        module = MobileNetV3(narrowed_design, classes, dtype)
        return make_network(module, module, identity, config, classes, dtype, inner)

    return build_member
