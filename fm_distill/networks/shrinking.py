"""Structured pruning: the same network with fewer inner channels in each block, sliced out.

What is left computes what the network would with zeros wherever a channel that goes was read: with
norms alone at zero, act(bias) would go on. Whole groups of a GroupNorm go, and weight-standardised
kernels are standardised over what is left. What a channel is worth: `channel_scores.py`. Source of
the ranking over the network: Molchanov et al. 2017 (arXiv 1611.06440), where scores are divided by
the L2 norm of their layer's.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fm_distill.config import NetworkConfig
from fm_distill.config.pruning import PruningConfig
from fm_distill.errors import UserError
from fm_distill.models import InnerChannels, Variables, build_network
from fm_distill.networks.channel_scores import FLOAT32, Scores, weight_scores
from fm_distill.weights.load import Pretrained
from fm_distill.weights.names import leaves_by_path


def pruned_network(
    network: NetworkConfig, pruning: PruningConfig, scores: Scores | None = None
) -> NetworkConfig:
    """`network` as `pruning` leaves it. Raises `ValueError` where that is not possible.

    With `ranking=network` the `scores` of the channels decide the widths; where there are none yet,
    the widths are those of about the same share of each block.
    """
    if pruning.pattern != "channels":
        return network
    blocks = build_network(network, 2, FLOAT32).inner_channels
    if not blocks:
        raise ValueError(
            f"{network.model} has no blocks whose inner channels can be pruned; prune single "
            "weights (pruning.pattern=unstructured), or take another model"
        )
    if pruning.ranking == "network":
        check_ranking(blocks, pruning)
        widths = ranked_widths(blocks, scores, pruning) if scores else _alike(blocks, pruning)
    else:
        widths = tuple(width_after(x, pruning.sparsity, pruning.multiple_of) for x in blocks)
    return dataclasses.replace(network, block_widths=widths)


def width_after(block: InnerChannels, sparsity: float, multiple_of: int) -> int:
    """Channels that stay of `block`: the nearest number that groups and `multiple_of` divide.

    Of two as near, the larger. Raises `ValueError` where none would stay.
    """
    step = math.lcm(block.together, multiple_of)
    kept_channels = _nearest(block.width, sparsity, step)
    if kept_channels < 1:
        raise ValueError(
            f"pruning.sparsity={sparsity:g} leaves none of the {block.width} inner channels of "
            f"{block.block}, which keeps a multiple of {step} (groups of {block.together}, "
            f"pruning.multiple_of={multiple_of}); make one of the two smaller"
        )
    return kept_channels


def _nearest(width: int, sparsity: float, step: int) -> int:
    kept_channels = math.floor((1 - sparsity) * width / step + 0.5) * step
    return min(kept_channels, width // step * step)


def _steps(blocks: tuple[InnerChannels, ...], pruning: PruningConfig) -> list[int]:
    """Channels of each block that stay or go together."""
    return [math.lcm(x.together, pruning.multiple_of) for x in blocks]


def _alike(blocks: tuple[InnerChannels, ...], pruning: PruningConfig) -> tuple[int, ...]:
    """Widths after about the same share of each block; at least one step of each stays."""
    return tuple(
        max(step, _nearest(block.width, pruning.sparsity, step))
        for block, step in zip(blocks, _steps(blocks, pruning), strict=True)
    )


def check_ranking(blocks: tuple[InnerChannels, ...], pruning: PruningConfig) -> None:
    """Raises `ValueError` where a block has no step, or too few channels may go."""
    steps, total = _steps(blocks, pruning), sum(x.width for x in blocks)
    for block, step in zip(blocks, steps, strict=True):
        if step > block.width:
            raise ValueError(
                f"pruning.multiple_of={pruning.multiple_of} leaves none of the {block.width} "
                f"inner channels of {block.block}, which keeps a multiple of {step} (groups of "
                f"{block.together}); make it smaller"
            )
    largest_sparsity = (total - sum(steps)) / total
    if pruning.sparsity > largest_sparsity:
        raise ValueError(
            f"pruning.sparsity={pruning.sparsity:g} removes too many of {total:,} inner channels, "
            f"of which each block keeps some ({sum(steps):,} in all); use "
            f"{math.floor(largest_sparsity * 1000) / 1000:g} or less"
        )


def ranked_widths(
    blocks: tuple[InnerChannels, ...], scores: Scores, pruning: PruningConfig
) -> tuple[int, ...]:
    """Channels that stay of each block where those that are worth least in the network go.

    Scores are divided by the L2 norm of those of their place. Channels go in steps: one, a group of
    a GroupNorm, or as many as `multiple_of` asks for; the worst of each place in the block go
    together, and a step is worth the mean of its channels. The last step of a block stays. Steps go
    from the worst on, the first block's first among equals, until the share that is gone is nearest
    to the sparsity; of two as near, more channels stay.
    """
    steps = _steps(blocks, pruning)
    # What no step holds is removed in any case.
    widths = [block.width // step * step for block, step in zip(blocks, steps, strict=True)]
    order: list[tuple[float, int]] = []
    for i, (block, places) in enumerate(zip(blocks, scores, strict=True)):
        channel_worth = np.mean([_ascending(x, block.together) for x in places], axis=0)
        step_means = channel_worth[block.width - widths[i] :].reshape(-1, steps[i]).mean(axis=1)
        order += [(float(mean), i) for mean in step_means[:-1]]
    order.sort(key=lambda x: x[0])
    total = sum(x.width for x in blocks)
    removed = total - sum(widths) + np.cumsum([0, *(steps[i] for _, i in order)])
    count = int(np.argmin(np.abs(removed - pruning.sparsity * total)))
    for _, i in order[:count]:
        widths[i] -= steps[i]
    return tuple(widths)


def _ascending(
    scores: Float[np.ndarray, " channels"], together: int
) -> Float[np.ndarray, " channels"]:
    """Over their L2 norm, from the worst on; channels that go together have their mean."""
    norm = max(float(np.linalg.norm(scores)), np.finfo(np.float64).tiny)
    groups = (scores / norm).reshape(-1, together).mean(axis=1)
    return np.repeat(np.sort(groups), together)


def shrunk(start: Pretrained, pruning: PruningConfig, scores: Scores | None = None) -> Pretrained:
    """`start` with the channels that stay, by `scores`, or by its weights. Raises `UserError`."""
    try:
        if scores is None:
            scores = weight_scores(start.variables, start.network, pruning.criterion)
        network = pruned_network(start.network, pruning, scores)
        variables = keep_channels(start.variables, start.network, network.block_widths, scores)
    except ValueError as error:
        raise UserError(f"student.pruning: {error}") from None
    blocks = build_network(start.network, 2, FLOAT32).inner_channels
    scope = ", ranked over the network" if pruning.ranking == "network" else ""
    note = (
        f"inner channels: {sum(network.block_widths):,} of {sum(x.width for x in blocks):,} stay "
        f"in {len(blocks)} blocks, by {pruning.criterion}{scope}"
    )
    return dataclasses.replace(
        start, network=network, variables=variables, notes=(*start.notes, note)
    )


def keep_channels(
    variables: Variables, network: NetworkConfig, widths: tuple[int, ...], scores: Scores
) -> Variables:
    """`variables` of `network` with so many inner channels of each block, those of best `scores`.

    Of channels that are equally good, the first stay.
    """
    leaves = dict(leaves_by_path(variables))
    blocks = build_network(network, 2, FLOAT32).inner_channels
    for block, width, places in zip(blocks, widths, scores, strict=True):
        for axes, channel_scores in zip(block.places, places, strict=True):
            indices = _best(channel_scores, width, block.together)
            for path, axis in axes:
                leaves[path] = jnp.take(leaves[path], indices, axis=axis)
    return jax.tree.unflatten(jax.tree.structure(variables), leaves.values())


def _best(scores: Float[np.ndarray, " channels"], width: int, together: int) -> np.ndarray:
    """Indices of the `width` best channels, in their order; `together` neighbours stay or go."""
    group_scores = scores.reshape(-1, together).sum(axis=1)
    best_groups = np.argsort(-group_scores, kind="stable")[: width // together]
    first_channels = np.sort(best_groups)[:, None] * together
    return (first_channels + np.arange(together)).reshape(-1)
