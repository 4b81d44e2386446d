"""Structured pruning: the same network with fewer inner channels in each block, sliced for real.

What is left computes what the network would with zeros wherever a channel that goes was read: with
norms alone at zero, act(bias) would go on. Whole groups of a GroupNorm go, and weight-standardised
kernels are standardised over what is left. Sources of the criteria: Fang et al. 2023 (arXiv
2301.12900) for the magnitude of all kernels that share a channel, here each relative to its mean;
Liu et al. 2017 (arXiv 1708.06519) for the scales of norms.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fm_distill.config import NetworkConfig
from fm_distill.config.pruning import PruningConfig
from fm_distill.errors import UserError
from fm_distill.models import ChannelAxis, InnerChannels, Variables, build_network
from fm_distill.weights.load import Pretrained
from fm_distill.weights.names import leaves_by_path

FLOAT32 = jnp.dtype("float32")
Criterion = Literal["magnitude", "norm_scale"]


def pruned_network(network: NetworkConfig, pruning: PruningConfig) -> NetworkConfig:
    """`network` as `pruning` leaves it. Raises `ValueError` where that is not possible."""
    if pruning.pattern != "channels":
        return network
    blocks = build_network(network, 2, FLOAT32).inner_channels
    if not blocks:
        raise ValueError(
            f"{network.model} has no blocks whose inner channels could be fewer; prune single "
            "weights (pruning.pattern=unstructured), or take another model"
        )
    widths = tuple(width_after(x, pruning.sparsity, pruning.multiple_of) for x in blocks)
    return dataclasses.replace(network, block_widths=widths)


def width_after(block: InnerChannels, sparsity: float, multiple_of: int) -> int:
    """Channels that stay of `block`: the nearest number that groups and `multiple_of` divide.

    Of two as near, the larger. Raises `ValueError` where none would stay.
    """
    step = math.lcm(block.together, multiple_of)
    kept = math.floor((1 - sparsity) * block.width / step + 0.5) * step
    kept = min(kept, block.width // step * step)
    if kept < 1:
        raise ValueError(
            f"pruning.sparsity={sparsity:g} leaves none of the {block.width} inner channels of "
            f"{block.block}, of which a multiple of {step} stays (groups of {block.together}, "
            f"pruning.multiple_of={multiple_of}); make one of the two smaller"
        )
    return kept


def shrunk(start: Pretrained, pruning: PruningConfig) -> Pretrained:
    """`start` with the channels that stay. Raises `UserError`."""
    try:
        network = pruned_network(start.network, pruning)
        variables = keep_channels(
            start.variables, start.network, network.block_widths, pruning.criterion
        )
    except ValueError as error:
        raise UserError(f"student.pruning: {error}") from None
    before = build_network(start.network, 2, FLOAT32).inner_channels
    note = (
        f"inner channels: {sum(network.block_widths):,} of {sum(x.width for x in before):,} stay "
        f"in {len(before)} blocks, by {pruning.criterion}"
    )
    return dataclasses.replace(
        start, network=network, variables=variables, notes=(*start.notes, note)
    )


def keep_channels(
    variables: Variables, network: NetworkConfig, widths: tuple[int, ...], criterion: Criterion
) -> Variables:
    """`variables` of `network` with so many inner channels of each block, the best ones.

    Of channels that are equally good, the first stay. Raises `ValueError` where the network has
    nothing that `criterion` could read.
    """
    built = build_network(network, 2, FLOAT32)
    # As kernels are multiplied: standardised, for example.
    frozen = dict(leaves_by_path(built.freeze(variables)))
    leaves = dict(leaves_by_path(variables))
    for block, width in zip(built.inner_channels, widths, strict=True):
        for axes in block.places:
            scores = channel_scores(frozen, axes, block, criterion)
            kept = _best(scores, width, block.together)
            for path, axis in axes:
                leaves[path] = jnp.take(leaves[path], kept, axis=axis)
    return jax.tree.unflatten(jax.tree.structure(variables), leaves.values())


def channel_scores(
    frozen: dict[str, Array],
    axes: tuple[ChannelAxis, ...],
    block: InnerChannels,
    criterion: Criterion,
) -> Float[np.ndarray, " channels"]:
    """How much each channel is worth. Raises `ValueError` where nothing tells."""
    if criterion == "norm_scale":
        scales = [np.abs(frozen[path]) for path, _ in axes if path.endswith("/scale")]
        if not scales:
            raise ValueError(
                "pruning.criterion=norm_scale needs norms, and the inner channels of "
                f"{block.block} have none; use magnitude"
            )
        return np.asarray(scales, np.float64).sum(axis=0)
    total = np.zeros(block.width)
    for path, axis in axes:
        if path.endswith("/kernel"):
            squares = np.square(np.asarray(frozen[path], np.float64))
            by_channel = np.moveaxis(squares, axis, 0).reshape(block.width, -1).mean(axis=1)
            # Relative to its kernel, or the one with the largest numbers would decide alone.
            total += by_channel / max(by_channel.mean(), np.finfo(np.float64).tiny)
    return total


def _best(scores: Float[np.ndarray, " channels"], width: int, together: int) -> np.ndarray:
    """Indices of the `width` best channels, in their order; `together` neighbours stay or go."""
    of_groups = scores.reshape(-1, together).sum(axis=1)
    best = np.argsort(-of_groups, kind="stable")[: width // together]
    first = np.sort(best)[:, None] * together
    return (first + np.arange(together)).reshape(-1)
