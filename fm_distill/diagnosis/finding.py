"""What a rule finds, and how sure it is."""

import dataclasses
from collections.abc import Callable

from fm_distill.diagnosis.evidence import Evidence

# How much of a run's trouble a finding explains: causes are named in this order.
MEASURED = 1.0  # seen on the data: what is wrong, and what would be right
CLEAR = 0.8  # measured on the data, or recorded by the run itself
LIKELY = 0.6  # a setting, or a curve that hardly has another cause
POSSIBLE = 0.4  # a curve that other causes explain too


@dataclasses.dataclass(frozen=True)
class Finding:
    """One cause, as it shows in a run."""

    strength: float  # 0 to 1
    evidence: str  # numbers, a sentence
    advice: str  # what to change, a sentence


Rule = Callable[[Evidence], Finding | None]
