"""ResNet50V2 as Keras has it: pre-activation bottlenecks with BatchNorm.

Source: He et al. 2016 (arXiv 1603.05027). Compared with `keras.applications.ResNet50V2` of Keras
3.15, whose names our modules have. Unlike BiT, a stage's last unit is the strided one, with a
shortcut that takes every second pixel, and the convolutions without a norm behind them have biases.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fm_distill.config import NetworkConfig
from fm_distill.models.assembly import check_resolution, make_network
from fm_distill.models.contract import HEAD, UNIT, Images, Network
from fm_distill.models.layers import Convolution, Head, Norm, identity
from fm_distill.models.pooling import max_pool_zero_padded

Activations = Float[Array, "batch _ _ _"]

# Units, and stride of the last, of Keras's conv2 to conv5. Source: keras/applications/resnet_v2.py.
STAGES = ((3, 2), (4, 2), (6, 2), (3, 1))
ROOT_CHANNELS = 64
# Root and pool halve the image, and so do three of the stages.
STRIDE = 32

BATCH_NORM_EPSILON = 1.001e-5


class KerasResNetV2(nn.Module):
    """Root, stages of units, final norm, mean, head. Features: `root`, `block1` to `block4`."""

    classes: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Images, train: bool) -> tuple[Array, dict[str, Array]]:
        x = images.astype(self.dtype)
        x = Convolution(ROOT_CHANNELS, 7, 2, self.dtype, bias=True, name="conv1_conv")(x)
        x = max_pool_zero_padded(x)
        features = {"root": x}
        for i, (units, last_stride) in enumerate(STAGES):
            middle = ROOT_CHANNELS * 2**i
            for unit in range(1, units + 1):
                stride = last_stride if unit == units else 1
                x = self._unit(f"conv{i + 2}_block{unit}", x, middle, stride, unit == 1, train)
            features[f"block{i + 1}"] = x
        x = self._norm_relu("post_bn", x, train)
        features["pre_logits"] = x.astype(jnp.float32).mean(axis=(1, 2))
        return Head(self.classes, name=HEAD)(features["pre_logits"]), features

    def _unit(
        self, name: str, x: Activations, middle: int, stride: int, first: bool, train: bool
    ) -> Activations:
        """A unit, flat in the network because Keras's names are."""
        h = self._norm_relu(f"{name}_preact_bn", x, train)
        if first:
            shortcut = self._convolution(f"{name}_0_conv", h, 4 * middle, 1, stride, True)
        else:
            shortcut = x
            for axis in (1, 2):
                shortcut = jax.lax.slice_in_dim(shortcut, 0, None, stride, axis)
        h = self._convolution(f"{name}_1_conv", h, middle, 1, 1, False)
        h = self._norm_relu(f"{name}_1_bn", h, train)
        h = self._convolution(f"{name}_2_conv", h, middle, 3, stride, False)
        h = self._norm_relu(f"{name}_2_bn", h, train)
        h = self._convolution(f"{name}_3_conv", h, 4 * middle, 1, 1, True)
        return checkpoint_name(shortcut + h, UNIT)

    def _convolution(
        self, name: str, x: Activations, channels: int, size: int, stride: int, bias: bool
    ) -> Activations:
        return Convolution(channels, size, stride, self.dtype, bias=bias, name=name)(x)

    def _norm_relu(self, name: str, x: Activations, train: bool) -> Activations:
        return nn.relu(Norm(None, BATCH_NORM_EPSILON, train, name=name)(x))


def build(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Network:
    """ResNet50V2."""
    check_resolution(config, STRIDE)
    module = KerasResNetV2(classes, dtype)
    return make_network(module, module, identity, config, classes, dtype)
