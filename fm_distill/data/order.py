"""Which example stands where in the endless stream: a pure function of (seed, position)."""

import functools

import numpy as np
from jaxtyping import Int


def example_ids(seed: int, positions: Int[np.ndarray, "..."], examples: int) -> np.ndarray:
    """Example ids at `positions` of the stream of epoch permutations.

    Position p lies in epoch p // examples. Batches run across epoch borders, as in the recipe.
    """
    epochs, offsets = np.divmod(positions, examples)
    ids = np.empty_like(positions)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        ids[in_epoch] = epoch_permutation(seed, int(epoch), examples)[offsets[in_epoch]]
    return ids


@functools.lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, examples: int) -> Int[np.ndarray, " examples"]:
    """The order of one epoch.

    A stable sort of raw Philox bits: NumPy promises the bits of a generator forever, but not what
    its `permutation` makes of them.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(examples)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order
