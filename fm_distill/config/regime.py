"""Which view each network gets, and where targets come from: two independent choices.

Source: Beyer et al. 2021, figure 2. `teaching` and `objective.target` name the usual pairs of them.
"""

import dataclasses
from typing import Literal

ViewLaw = Literal["mixed", "unmixed", "independent"]
TargetSource = Literal["teachers", "labels", "table"]


@dataclasses.dataclass(frozen=True)
class Regime:
    """What the student and its teachers see, and what the student is compared with."""

    # `mixed`: the same crop, flip and mixup; `unmixed`: the same without mixup; `independent`: a
    # draw for each side, without mixup.
    views: ViewLaw
    # `teachers`: run in each step; `labels`; `table`: recorded for each example before training.
    targets: TargetSource


TEACHINGS: dict[str, Regime] = {
    "function_matching": Regime("mixed", "teachers"),
    "consistent": Regime("unmixed", "teachers"),
    "independent": Regime("independent", "teachers"),
    "fixed": Regime("unmixed", "table"),
}
# Labels are mixed as the student's view is.
LABELS = Regime("mixed", "labels")


def regime_of(target: str, teaching: str) -> Regime:
    """The regime of `objective.target` and `teaching`."""
    return LABELS if target == "labels" else TEACHINGS[teaching]
