"""Adapters: a student's feature in as many channels as the teacher's, learned beside the student.

Source: the regressor of FitNets (Romero et al. 2015, arXiv 1412.6550, section 2.2) as a 1x1
convolution. An adapter lives in the state of the training and is no part of the student.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

# `kernel`, and `bias`, or with BatchNorm `scale` and `shift`.
AdapterParams = Mapping[str, Array]

# Of BatchNorm's variance, as in PyTorch and Flax.
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class AdapterShape:
    """From how many channels to how many, and whether BatchNorm follows."""

    student_channels: int
    teacher_channels: int
    batch_norm: bool


def init_adapter(key: PRNGKeyArray, shape: AdapterShape) -> AdapterParams:
    """LeCun's normal kernel; the rest as the identity."""
    kernel_shape = (shape.student_channels, shape.teacher_channels)
    kernel = jax.random.normal(key, kernel_shape) / math.sqrt(shape.student_channels)
    zeros = jnp.zeros(shape.teacher_channels)
    if shape.batch_norm:
        return {"kernel": kernel, "scale": zeros + 1, "shift": zeros}
    return {"kernel": kernel, "bias": zeros}


def init_adapters(
    key: PRNGKeyArray, shapes: Mapping[str, AdapterShape]
) -> dict[str, AdapterParams]:
    """By the name of the term."""
    return {
        name: init_adapter(jax.random.fold_in(key, i + 1), shapes[name])
        for i, name in enumerate(sorted(shapes))
    }


def adapt(
    params: AdapterParams, features: Float[Array, "batch *places channels"]
) -> Float[Array, "batch *places teacher_channels"]:
    """The 1x1 convolution in float32, with a bias, or with BatchNorm by the batch's statistics.

    Nothing runs an adapter outside of training, so BatchNorm keeps no running statistics.
    """
    x = features.astype(jnp.float32)
    x = jnp.matmul(x, params["kernel"], precision=jax.lax.Precision.HIGHEST)
    if "bias" in params:
        return x + params["bias"]
    axes = tuple(range(x.ndim - 1))
    normalised = (x - x.mean(axes)) * jax.lax.rsqrt(x.var(axes) + EPSILON)
    return normalised * params["scale"] + params["shift"]
