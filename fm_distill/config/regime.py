"""Which view each network gets, and where targets come from: two independent choices.

Source: Beyer et al. 2021, figure 2. `teaching` and `objective.target` name the usual pairs of them.
"""

import dataclasses
from typing import Literal

from fm_distill.config import Config
from fm_distill.config.teachers import recording_of

ViewLaw = Literal["mixed", "unmixed", "independent"]
TargetSource = Literal["teachers", "labels", "table", "recording"]


@dataclasses.dataclass(frozen=True)
class Regime:
    """What the student and its teachers see, and what the student is compared with."""

    # `mixed`: the same crop, flip and mixup; `unmixed`: the same without mixup; `independent`: a
    # draw for each side, without mixup.
    views: ViewLaw
    # `teachers`: run in each step; `labels`; `table`: computed for each example before training;
    # `recording`: read, as they were recorded for each step.
    targets: TargetSource


TEACHINGS: dict[str, Regime] = {
    "function_matching": Regime("mixed", "teachers"),
    "consistent": Regime("unmixed", "teachers"),
    "independent": Regime("independent", "teachers"),
    "fixed": Regime("unmixed", "table"),
}
# Labels are mixed as the student's view is.
LABELS = Regime("mixed", "labels")


def regime_of(config: Config) -> Regime:
    """The regime of `objective.target` and `teaching`, perhaps from a recording."""
    if config.objective.target == "labels":
        return LABELS
    regime = TEACHINGS[config.teaching]
    recorded = recording_of(config) is not None
    return dataclasses.replace(regime, targets="recording") if recorded else regime
