"""EfficientNet-Lite 0 to 4: EfficientNet without squeeze and excitation, with ReLU6.

Source: Tan and Le 2019 (arXiv 1905.11946) and tensorflow/tpu's efficientnet/lite. Compared with
timm 1.0.31's `tf_efficientnet_lite0..4`, whose names our modules have. There is no dropout and no
stochastic depth: function matching regularises by its views.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

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

# Repeats, kernel, stride of the first, expansion, channels. Source: efficientnet_builder.py.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

# Multipliers of width and depth. Source: efficientnet_lite_builder.py.
MULTIPLIERS = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8))

# Neither is multiplied by the width in the Lite variants.
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280

BATCH_NORM_EPSILON = 1e-3


def design_of(width: float, depth: float) -> Design:
    """The first and the last stage keep their single block at any depth."""
    channels_in, stages = STEM_CHANNELS, []
    for i, (repeats, kernel, stride, expansion, channels) in enumerate(STAGES):
        if 0 < i < len(STAGES) - 1:
            repeats = math.ceil(repeats * depth)
        channels, blocks = divisible_by_8(channels * width), []
        for j in range(repeats):
            expanded = None if expansion == 1 else channels_in * expansion
            blocks.append(Block(kernel, stride if j == 0 else 1, expanded, channels, nn.relu6))
            channels_in = channels
        stages.append(tuple(blocks))
    return Design(
        stem_channels=STEM_CHANNELS,
        stages=tuple(stages),
        head_channels=HEAD_CHANNELS,
        activation=nn.relu6,
        padding="same",
        groups=None,
        epsilon=BATCH_NORM_EPSILON,
    )


class EfficientNetLite(nn.Module):
    """Stem, stages, a wide 1x1 convolution, mean, head. Features: `stem`, `block1`... by stage."""

    design: Design
    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Images, train: bool) -> tuple[Array, dict[str, Array]]:
        design = self.design
        x, features = trunk(design, images, train, self.dtype)
        x = Convolution(design.head_channels, 1, 1, self.dtype, name="conv_head")(x)
        x = design.activation(Norm(design.groups, design.epsilon, train, name="bn2")(x))
        pooled = x.astype(jnp.float32).mean(axis=(1, 2))
        features["pre_logits"] = pooled
        return Head(self.classes, name=HEAD)(pooled), features


def member(number: int) -> Callable[[NetworkConfig, int, jnp.dtype], Network]:
    """EfficientNet-Lite of that number."""
    design = design_of(*MULTIPLIERS[number])

    def build_member(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
        check_resolution(config, design.stride)
        narrowed_design, inner = with_block_widths(design, config)
        module = EfficientNetLite(narrowed_design, classes, dtype)
        return make_network(module, module, identity, config, classes, dtype, inner)

    return build_member
