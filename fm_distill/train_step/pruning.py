"""Masks of the weights that are left: which are removed, after which step.

Sources: Zhu and Gupta 2017 (arXiv 1710.01878) for the schedule, and for leaving the layer that
reads the image and depthwise convolutions whole, which have few weights; Mishra et al. 2021
(arXiv 2104.08378) for n of four neighbouring inputs. The head stays whole too: it starts at zero,
and by magnitude would go first. A weight that is removed is zero from then on: its gradient is
masked, and so are the weights after each update, and their moving average.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from fm_distill.config import PruningConfig
from fm_distill.config.pruning import OF_WEIGHTS
from fm_distill.errors import UserError
from fm_distill.models import HEAD, Network
from fm_distill.weights.names import leaves_by_path

# Kernels with at most as many inputs of an output are left whole: of images and depthwise ones.
FEWEST_INPUTS = 3
# The metric: the share of the weights of all other kernels that is zero.
SPARSITY = "sparsity"

# Masks, weights after the update of a step, the step -> masks.
Prune = Callable[[PyTree, PyTree, Int[Array, ""]], PyTree]


def initial_masks(params: PyTree) -> PyTree:
    """For each kernel that may be pruned True for each weight, a single True for other arrays."""

    def of(path: tuple[Any, ...], leaf: Array) -> Bool[Array, "..."]:
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        has_few_inputs = leaf.ndim < 2 or leaf.shape[-2] <= FEWEST_INPUTS
        pruned = parts[-1] == "kernel" and parts[0] != HEAD and not has_few_inputs
        return jnp.ones(leaf.shape if pruned else (), bool)

    return jax.tree_util.tree_map_with_path(of, params)


def masks_of_zeros(masks: PyTree, params: PyTree) -> PyTree:
    """`masks` without the weights that are zero already; a kernel that is all zeros starts anew."""

    def of(mask: Array, leaf: Array) -> Array:
        nonzero = leaf != 0
        return mask & (nonzero | ~nonzero.any()) if mask.ndim else mask

    return jax.tree.map(of, masks, params)


def masked(tree: PyTree, masks: PyTree) -> PyTree:
    """Zero wherever a mask is False."""
    return jax.tree.map(lambda x, mask: jnp.where(mask, x, 0), tree, masks)


def sparsity_of(masks: PyTree) -> Float[Array, ""]:
    """Share of the weights in kernels that may be pruned that are."""
    leaves = [x for x in jax.tree.leaves(masks) if x.ndim]
    removed = sum((~x).sum(dtype=jnp.float32) for x in leaves)
    return jnp.asarray(removed / max(1, sum(x.size for x in leaves)), jnp.float32)


def make_prune(
    config: PruningConfig, network: Network, total_steps: int, model: str
) -> Prune | None:
    """What `config` asks of the weights; None where it leaves them. Raises `UserError`."""
    if config.pattern not in OF_WEIGHTS:
        return None
    if config.last_step >= total_steps:
        raise UserError(
            f"student.pruning ends after step {config.last_step:,}, and the last of the run is "
            f"{total_steps - 1:,}: begin and end before it"
        )
    if config.pattern == "kept":
        return lambda masks, params, step: masks
    masks = jax.eval_shape(initial_masks, jax.eval_shape(network.init, jax.random.key(0)).params)
    shapes = {path: mask.shape for path, mask in leaves_by_path(masks) if mask.ndim}
    if not shapes:
        raise UserError(
            f"student.pruning: {model} has no kernel besides those of its first layer and head"
        )
    if config.pattern == "unstructured":
        _check_layers(config, shapes)
        return _by_magnitude(config)
    _check_fours(config.pattern, shapes)
    kept_count = int(config.pattern[0])

    def prune(masks: PyTree, params: PyTree, step: Int[Array, ""]) -> PyTree:
        def all_fours() -> PyTree:
            return jax.tree.map(
                lambda w, m: largest_of_four(w, m, kept_count) if m.ndim else m, params, masks
            )

        return jax.lax.cond(step == config.begin_step, all_fours, lambda: masks)

    return prune


def _check_layers(config: PruningConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises `UserError` where nothing would be left of a layer."""
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    smallest = min(sizes, key=lambda path: sizes[path])
    if config.scope == "layer" and round(config.sparsity * sizes[smallest]) == sizes[smallest]:
        raise UserError(
            f"student.pruning.sparsity={config.sparsity:g} leaves none of the {sizes[smallest]:,} "
            f"weights of {smallest}; use a smaller one"
        )


def _check_fours(pattern: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises `UserError` where inputs do not come in fours."""
    paths = [f"{path} ({shape[-2]})" for path, shape in shapes.items() if shape[-2] % 4]
    if paths:
        raise UserError(
            f"student.pruning.pattern={pattern} groups neighbouring inputs in fours, and those of "
            f"{', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''} are not a multiple of 4: "
            "use pattern=unstructured"
        )


def largest_of_four(
    weights: Float[Array, "*_ inputs outputs"], mask: Bool[Array, "*_ inputs outputs"], left: int
) -> Bool[Array, "*_ inputs outputs"]:
    """True for the `left` largest of four neighbouring inputs of an output, the first of equals."""
    *leading, inputs, outputs = weights.shape
    size = jnp.where(mask, jnp.abs(weights), -1).reshape(*leading, inputs // 4, 4, outputs)
    rank = jnp.argsort(jnp.argsort(-size, axis=-2, stable=True), axis=-2)
    return (rank < left).reshape(weights.shape) & mask


def sparsity_after(config: PruningConfig, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """s (1 - (1 - p)^power) at the share p of the way from the first to the last removal."""
    end = config.last_step
    if end == config.begin_step:
        return jnp.asarray(config.sparsity, jnp.float32)
    progress = (jnp.asarray(step, jnp.float32) - config.begin_step) / (end - config.begin_step)
    return config.sparsity * (1 - (1 - jnp.clip(progress, 0, 1)) ** config.power)


def _by_magnitude(config: PruningConfig) -> Prune:
    def prune(masks: PyTree, params: PyTree, step: Int[Array, ""]) -> PyTree:
        elapsed = step - config.begin_step
        end, interval = config.last_step, config.every_steps
        is_due = (elapsed >= 0) & (step <= end) & ((elapsed % interval == 0) | (step == end))

        def removed() -> PyTree:
            return smallest_removed(params, masks, sparsity_after(config, step), config.scope)

        return jax.lax.cond(is_due, removed, lambda: masks)

    return prune


def smallest_removed(
    params: PyTree, masks: PyTree, sparsity: Float[Array, ""] | float, scope: str
) -> PyTree:
    """`masks` without the `sparsity` smallest weights, of each layer or of all together.

    Those that are removed already go first, and of equal ones the first. The largest of each layer
    stays.
    """
    flat, tree = jax.tree.flatten(masks)
    weights = [
        jnp.where(mask, jnp.abs(w), -1).reshape(-1) if mask.ndim else None
        for w, mask in zip(jax.tree.leaves(params), flat, strict=True)
    ]

    def kept(sizes: Float[Array, " weights"]) -> Bool[Array, " weights"]:
        count = jnp.round(sparsity * sizes.size).astype(jnp.int32)
        order = jnp.argsort(sizes, stable=True)
        return jnp.zeros(sizes.size, bool).at[order].set(jnp.arange(sizes.size) >= count)

    magnitudes = [jnp.where(x == x.max(), jnp.inf, x) for x in weights if x is not None]
    if scope == "layer":
        parts = iter([kept(x) for x in magnitudes])
    else:
        split_points = [
            sum(x.size for x in magnitudes[: i + 1]) for i in range(len(magnitudes) - 1)
        ]
        parts = iter(jnp.split(kept(jnp.concatenate(magnitudes)), split_points))
    new_masks = [mask & next(parts).reshape(mask.shape) if mask.ndim else mask for mask in flat]
    return jax.tree.unflatten(tree, new_masks)
