"""A batch as the step gets it."""

import dataclasses

import jax
from jaxtyping import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples as the step gets them.

    A tree of arrays, so its fields may also hold what a tree is mapped to, e.g. shardings.
    """

    canvases: PyTree  # uint8 (batch, side, side, 3)
    sizes: PyTree  # int32 (batch, 2): true height and width on the canvas
    labels: PyTree  # int32 (batch,): -1 where there is none
    # float32 (batch, targets, classes): what fixed teachers said of each example; or None
    targets: PyTree = None
