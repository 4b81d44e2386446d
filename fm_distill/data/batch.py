"""A batch as the step gets it."""

import dataclasses

from jaxtyping import Float32, Int32, UInt8

from fm_distill.array_tree import AnyArray, array_tree
from fm_distill.recordings.rows import TargetRows


@array_tree
@dataclasses.dataclass(frozen=True)
class Batch:
    """Examples of one step, or of a whole split."""

    canvases: UInt8[AnyArray, "batch side side 3"]
    # True height and width on the canvas.
    sizes: Int32[AnyArray, "batch 2"]
    # -1 where there is none.
    labels: Int32[AnyArray, " batch"]
    # Teacher logits of each example, where the targets are a table.
    targets: Float32[AnyArray, "batch targets classes"] | None = None
    # The recorded outputs of the teachers for these views, where a recording teaches.
    recorded: TargetRows | None = None
