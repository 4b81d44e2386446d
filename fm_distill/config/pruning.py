"""Which weights or channels the student loses, and when."""

import dataclasses
from typing import Literal

from fm_distill.config.bounds import Count, Positive, PositiveInt, Share

# Patterns of single weights, which are zero from some step on. The others keep fewer channels.
OF_WEIGHTS = ("unstructured", "2:4", "1:4", "kept")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """Which weights or channels are removed from the student."""

    pattern: Literal["none", "unstructured", "2:4", "1:4", "kept", "channels"] = "none"
    (
        "What is removed: single weights, `unstructured` or all but 2 (`2:4`) or 1 (`1:4`) of "
        "four neighbouring inputs; only what is already zero in the student's weights (`kept`); "
        "or inner `channels` of each block, before the first step, for a smaller network."
    )
    sparsity: Share = 0.5
    """Share of the weights that may be pruned, or of the inner channels, to remove."""
    scope: Literal["global", "layer"] = "global"
    (
        "With `unstructured`: the weights that are smallest in the whole network, or in each "
        "layer by itself."
    )
    begin_step: Count = 0
    """Step of the first removal of weights, or of the only one."""
    end_step: Count | None = None
    (
        "With `unstructured`: the step after which no more are removed; None: all at once at "
        "`begin_step`."
    )
    every_steps: PositiveInt = 100
    """With `unstructured`: steps between two removals from `begin_step` to `end_step`."""
    power: Positive = 3.0
    (
        "With `unstructured`, the exponent of the schedule: 1 - (1 - p)^power of the sparsity is "
        "reached at the share p of the way from `begin_step` to `end_step`."
    )
    criterion: Literal["magnitude", "norm_scale", "taylor"] = "magnitude"
    (
        "With `channels`, which ones stay: those with the largest weights in all kernels that "
        "make or read them (`magnitude`), those with the largest scales in their norms "
        "(`norm_scale`), or those on which the run's own loss depends most, to first order "
        "(`taylor`)."
    )
    ranking: Literal["block", "network"] = "block"
    (
        "With `channels`: each block loses the share `sparsity` of its own (`block`), or the "
        "`network` loses it of all together, wherever they matter least."
    )
    taylor_batches: PositiveInt = 10
    (
        "With `criterion=taylor`: the training batches over which the gradients are averaged, "
        "those of the run's first steps (all of them, where it has fewer)."
    )
    multiple_of: PositiveInt = 1
    """With `channels`: each block keeps a multiple of this; 8 suits accelerators."""

    @property
    def by_gradient(self) -> bool:
        """Whether channels are chosen by the gradient of the run's loss."""
        return self.pattern == "channels" and self.criterion == "taylor"

    @property
    def last_step(self) -> int:
        """The step after which single weights are removed for the last time."""
        return self.begin_step if self.end_step is None else self.end_step
