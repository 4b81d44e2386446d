"""The optimizer of the recipe: global-norm clip, Adam, decoupled decay, warm-up and cosine.

For fine-tuning also SGD with momentum, a learning rate of the head's own, and BiT's hyper-rule.

With s(t) the schedule's shape (peak 1), one step is

    released:  w -= s(t) * (learning_rate * adam(g) + weight_decay * w)
    adamw:     w -= s(t) *  learning_rate * (adam(g) + weight_decay * w)

and only kernels decay. Source: big_vision's optax.py and configs/proj/distill (released),
Loshchilov and Hutter 2019 (adamw).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from fm_distill.config import OptimizerConfig, ScheduleConfig
from fm_distill.config.steps import BIT_HYPER_RULE
from fm_distill.models import HEAD
from fm_distill.system.references import entry


def make_schedule(config: ScheduleConfig, total_steps: int) -> Callable[[Array | int], Array]:
    """The shape s(t) of the learning rate for steps 0 to `total_steps - 1`, with peak 1."""
    if config.shape == "bit_hyper_rule":
        return bit_hyper_rule(total_steps)
    return cosine(total_steps, config.warmup_steps)


def bit_hyper_rule(total_steps: int) -> Callable[[Array | int], Array]:
    """t / warm-up, then 1, divided by ten after each of three steps. Source: `BIT_HYPER_RULE`."""
    warmup, *drop_steps = next(x for _, x in BIT_HYPER_RULE if x[-1] == total_steps)

    def schedule(step: Array | int) -> Array:
        t = jnp.asarray(step, jnp.float32)
        dropped = sum(jnp.where(t > drop_step, 1.0, 0.0) for drop_step in drop_steps[:-1])
        return jnp.where(t < warmup, t / warmup, 10.0**-dropped)

    return schedule


def cosine(total_steps: int, warmup_steps: int) -> Callable[[Array | int], Array]:
    """Linear warm-up, then half a cosine.

    s(t) = t / warmup in the warm-up (the first update is zero, as in the released code), then half
    a cosine that is zero on the last step that runs, `total_steps - 1`.
    """
    # A run of one step has no room for the descent.
    descent = max(total_steps - 1 - warmup_steps, 1)

    def schedule(step: Array | int) -> Array:
        t = jnp.asarray(step, jnp.float32)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((t - warmup_steps) / descent, 0, 1)))
        return jnp.where(t < warmup_steps, t / max(warmup_steps, 1), cosine)

    return schedule


def kernel_mask(params: PyTree) -> PyTree[bool]:
    """True for the leaves named `kernel`: convolutions and the head, not norms and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) == "kernel", params
    )


def adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's direction; the released recipe keeps the first moment in bfloat16."""
    return optax.scale_by_adam(
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        mu_dtype=jnp.dtype(config.first_moment_dtype),
    )


def sgd(config: OptimizerConfig) -> optax.GradientTransformation:
    """The sum of past gradients, each step's smaller by `momentum`. Source: BiT's fine-tuning."""
    return optax.trace(decay=config.momentum)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adam": adam,
    "sgd": sgd,
}


def _rates(config: OptimizerConfig) -> optax.GradientTransformation:
    """Times the learning rate of each parameter's group."""
    body = config.learning_rate
    head = body if config.head_learning_rate is None else config.head_learning_rate

    def rate(path: tuple, update: Array) -> Array:
        return update * (head if jax.tree_util.keystr(path[:1], simple=True) == HEAD else body)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(rate, updates))


def make_optimizer(
    config: OptimizerConfig, schedule: Callable[[Any], Array]
) -> optax.GradientTransformation:
    """The whole update of the parameters, ready for `optax.apply_updates`."""
    decay = optax.add_decayed_weights(config.weight_decay, mask=kernel_mask)
    learning_rates = _rates(config)
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    order = {"released": (learning_rates, decay), "adamw": (decay, learning_rates)}[config.decay]
    return optax.chain(
        clip,
        entry(OPTIMIZERS, config.name, "optimizer.name")(config),
        *order,
        optax.scale_by_schedule(lambda step: -schedule(step)),
    )


def adapter_optimizer(config: OptimizerConfig) -> OptimizerConfig:
    """That of the adapters: the student's with a learning rate of its own.

    The adapters are clipped by their own norm, so that the student's step does not depend on them.
    """
    rate = config.adapter_learning_rate or config.learning_rate
    return dataclasses.replace(config, learning_rate=rate, head_learning_rate=None)


def decay_equivalent(config: OptimizerConfig) -> str:
    """The configured decay in terms of the other convention, for people who know that one."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.decay == "released":
        return (
            f"{decay:g} (released: follows the schedule, not multiplied by the learning rate) "
            f"equals {decay / rate:g} in plain AdamW at learning rate {rate:g}"
        )
    return (
        f"{decay:g} (adamw: multiplied by the learning rate) "
        f"equals {decay * rate:g} in the released convention at learning rate {rate:g}"
    )
