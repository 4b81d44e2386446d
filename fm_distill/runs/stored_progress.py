"""`status.json` and `evaluation.json` of a workdir, checked: a file may be damaged in any way."""

import dataclasses
from typing import Any, Literal

import msgspec

from fm_distill.runs.metric_table import METRICS

Status = Literal["running", "paused", "complete", "failed"]


@dataclasses.dataclass(frozen=True)
class StoredStatus:
    """The contents of `status.json`."""

    state: Status
    step: int
    total_steps: int
    reason: str = ""
    hours_left: float | None = None
    images_per_second: float | None = None
    updated: str | None = None


@dataclasses.dataclass(frozen=True)
class _Top1:
    top1: float | None


@dataclasses.dataclass(frozen=True)
class _Divergence:
    train_temperature: float | None
    one: float | None


@dataclasses.dataclass(frozen=True)
class _Match:
    agreement: _Top1
    kl: _Divergence


@dataclasses.dataclass(frozen=True)
class _Calls:
    batch_size: int
    median_ms: float
    p95_ms: float
    activation_bytes: int | None


@dataclasses.dataclass(frozen=True)
class _Cost:
    parameters: int | None
    flops: int | None
    one: _Calls | None
    batch: _Calls | None


@dataclasses.dataclass(frozen=True)
class _Costs:
    student: _Cost
    teacher: _Cost | None
    device: str | None


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """What is read of `evaluation.json`; there may be more in it."""

    split: str
    examples: int
    step: int
    student: _Top1
    teacher: _Top1
    agreement: _Top1
    kl: _Divergence
    training_view: _Match
    retention: float | None
    # Written since there is a cost; a run is complete without them.
    retention_interval: tuple[float, float] | None = None
    cost: _Costs | None = None


def as_status(tree: Any) -> StoredStatus:
    """Raises `msgspec.ValidationError` where `tree` is no status."""
    return msgspec.convert(tree, StoredStatus)


def as_evaluation(tree: Any) -> dict[str, Any]:
    """`tree` itself. Raises `msgspec.ValidationError` where figures are missing or no numbers."""
    msgspec.convert(tree, _Evaluation)
    for metric in (x for x in METRICS if x.path):
        try:
            metric.of(tree)
            metric.interval_of(tree)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise msgspec.ValidationError(f"{metric.name} is not a number: {error}") from None
    return tree
