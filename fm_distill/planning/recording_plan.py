"""What it takes to record a run's teacher once, and a student that learns from it."""

import dataclasses
from typing import Any

from fm_distill.config import Config
from fm_distill.config.regime import regime_of
from fm_distill.config.teachers import teachers_of
from fm_distill.recordings.writing import example_bytes


@dataclasses.dataclass(frozen=True)
class RecordingPlan:
    """The same run with a teacher that is recorded once."""

    bytes: int  # of float16, all classes, and `taps`
    taps: tuple[str, ...]  # features that terms read, for `record --taps`
    # By their shares of the arithmetic; None where the whole is not known.
    hours: float | None
    student_hours: float | None  # of each student that learns from it


def recording_plan(
    config: Config, analysis: dict[str, Any], hours: float | None
) -> RecordingPlan | None:
    """What recording the teacher of `config` takes, by the `analysis` of its step.

    None where nothing is left to record, or where a term compares what no recording holds.
    """
    regime = regime_of(config)
    taps = analysis["recorded_taps"]
    if regime.targets != "teachers" or taps is None:
        return None
    assert config.data.classes is not None
    teachers = len(teachers_of(config))
    bytes_per_example = example_bytes(
        config.data.classes, teachers, "float16", None, sum(taps.values())
    )
    steps = min(config.views.period_steps or analysis["total_steps"], analysis["total_steps"])
    flops = analysis["flops"]
    recorded_share = (flops["teacher"] + flops["views"]) / flops["total"]
    student_share = 1 - flops["teacher"] / flops["total"]
    return RecordingPlan(
        bytes=steps * config.batch_size * bytes_per_example,
        taps=tuple(taps),
        hours=None if hours is None else hours * recorded_share * steps / analysis["total_steps"],
        student_hours=None if hours is None else hours * student_share,
    )
