"""How much each inner channel of a network is worth: by its weights, or by the run's gradient.

Sources of the criteria: Fang et al. 2023 (arXiv 2301.12900) for the magnitude of all kernels that
share a channel, here each relative to its mean; Liu et al. 2017 (arXiv 1708.06519) for the scales
of norms; Molchanov et al. 2019 (arXiv 1906.10771), equation 8, for the first-order Taylor expansion
of the loss in the weights of a channel.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from fm_distill.array_tree import AnyArray
from fm_distill.config import NetworkConfig
from fm_distill.models import ChannelAxis, InnerChannels, Variables, build_network
from fm_distill.system.files import DAMAGED_ARCHIVE, replacing
from fm_distill.weights.names import leaves_by_path

FLOAT32 = jnp.dtype("float32")
PARAMS = "params/"

# For each block, and each place in it that has inner channels, what its channels are worth.
Scores = tuple[tuple[Float[np.ndarray, " _"], ...], ...]
# In the same order, of one batch: the sum over the weights of a channel of gradient times weight.
TaylorSums = tuple[tuple[Float[AnyArray, " _"], ...], ...]


def weight_scores(variables: Variables, network: NetworkConfig, criterion: str) -> Scores:
    """By `criterion`, `magnitude` or `norm_scale`, of the weights as they are multiplied.

    Raises `ValueError` where the network has nothing that `criterion` could read.
    """
    built_network = build_network(network, 2, FLOAT32)
    # As kernels are multiplied: standardised, for example.
    frozen = dict(leaves_by_path(built_network.freeze(variables)))
    score_channels = _by_norm_scale if criterion == "norm_scale" else _by_magnitude
    return tuple(
        tuple(score_channels(frozen, axes, block) for axes in block.places)
        for block in built_network.inner_channels
    )


def _by_norm_scale(
    frozen: dict[str, Array], axes: tuple[ChannelAxis, ...], block: InnerChannels
) -> Float[np.ndarray, " channels"]:
    scales = [np.abs(frozen[path]) for path, _ in axes if path.endswith("/scale")]
    if not scales:
        raise ValueError(
            "pruning.criterion=norm_scale needs norms, and the inner channels of "
            f"{block.block} have none; use magnitude or taylor"
        )
    return np.asarray(scales, np.float64).sum(axis=0)


def _by_magnitude(
    frozen: dict[str, Array], axes: tuple[ChannelAxis, ...], block: InnerChannels
) -> Float[np.ndarray, " channels"]:
    total = np.zeros(block.width)
    for path, axis in axes:
        if path.endswith("/kernel"):
            squares = np.square(np.asarray(frozen[path], np.float64))
            channel_means = np.moveaxis(squares, axis, 0).reshape(block.width, -1).mean(axis=1)
            # Relative to its kernel, or the one with the largest numbers would decide alone.
            total += channel_means / max(channel_means.mean(), np.finfo(np.float64).tiny)
    return total


def taylor_sums(params: PyTree, gradients: PyTree, blocks: tuple[InnerChannels, ...]) -> TaylorSums:
    """For each channel, how the loss changes as all of its weights grow by the same share.

    That is the sum over the kernels, biases and scales that make, normalise or read the channel
    of gradient times weight, minus the first-order change of the loss if all of them were zero.
    """
    products = {
        path: weight.astype(jnp.float32) * gradient.astype(jnp.float32)
        for (path, weight), (_, gradient) in zip(
            leaves_by_path(params), leaves_by_path(gradients), strict=True
        )
    }

    def of_place(axes: tuple[ChannelAxis, ...], width: int) -> Float[Array, " channels"]:
        return sum(
            (
                jnp.moveaxis(products[path.removeprefix(PARAMS)], axis, 0)
                .reshape(width, -1)
                .sum(axis=1)
                for path, axis in axes
                if path.startswith(PARAMS)
            ),
            jnp.zeros(width, jnp.float32),
        )

    return tuple(tuple(of_place(axes, block.width) for axes in block.places) for block in blocks)


def taylor_scores(batches: list[TaylorSums]) -> Scores:
    """The mean over the batches of the squares of their sums, in float64.

    Molchanov et al. 2019, equation 8: (sum over the weights of a channel of gradient times
    weight)^2, averaged over minibatches.
    """
    return tuple(
        tuple(
            np.mean([np.square(np.asarray(x, np.float64)) for x in batch_sums], axis=0)
            for batch_sums in zip(*places, strict=True)
        )
        for places in zip(*batches, strict=True)
    )


def write_scores(path: pathlib.Path, scores: Scores, blocks: tuple[InnerChannels, ...]) -> None:
    """Completely or not at all."""
    values = np.concatenate([x for places in scores for x in places])
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, scores=values, places=np.array(_places(blocks)))


def read_scores(path: pathlib.Path, blocks: tuple[InnerChannels, ...]) -> Scores | None:
    """What `write_scores` wrote; None where it is not there, damaged, or of another network."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            values, places = archive["scores"], str(archive["places"])
    except (OSError, *DAMAGED_ARCHIVE):
        return None
    widths = [x.width for x in blocks for _ in x.places]
    if places != _places(blocks) or values.shape != (sum(widths),):
        return None
    chunks = iter(np.split(values, np.cumsum(widths)[:-1]))
    scores = tuple(tuple(next(chunks) for _ in block.places) for block in blocks)
    return scores if values.dtype == np.float64 and np.isfinite(values).all() else None


def _places(blocks: tuple[InnerChannels, ...]) -> str:
    """Whose scores follow each other in a file."""
    return json.dumps([[x.block, len(x.places), x.width] for x in blocks])
