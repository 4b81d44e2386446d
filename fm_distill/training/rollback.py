"""Going back after a loss that was not finite, and what changes from then on.

Each time is a line in `rollbacks.json`, written before the run goes on, so that a run that was
killed afterwards continues with the same.
"""

import dataclasses
import math
from typing import Any, Literal

import msgspec

from fm_distill.config import Config
from fm_distill.errors import UserError
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import log

ROLLBACKS = "rollbacks.json"


@dataclasses.dataclass(frozen=True)
class Rollback:
    """The run went from `at_step`, where it had diverged, back to the checkpoint of `to_step`."""

    at_step: int
    to_step: int
    action: Literal["skip", "slow"]
    factor: float  # of the learning rates from there on; 1 with `skip`


def read_rollbacks(workdir: Workdir) -> tuple[Rollback, ...]:
    """Of the run in `workdir`. Raises `UserError` where the file is damaged."""
    stored = workdir.read(ROLLBACKS) if (workdir.path / ROLLBACKS).exists() else []
    try:
        return msgspec.convert(stored, tuple[Rollback, ...])
    except msgspec.ValidationError as error:
        raise UserError(f"{workdir.path / ROLLBACKS} is damaged: {error}") from None


def as_json(rollbacks: tuple[Rollback, ...]) -> Any:
    return [msgspec.to_builtins(x) for x in rollbacks]


def skipped_steps(rollbacks: tuple[Rollback, ...]) -> int:
    """How many batches of the stream are left out before what is read now."""
    return sum(x.at_step - x.to_step for x in rollbacks if x.action == "skip")


def slowness(rollbacks: tuple[Rollback, ...]) -> float:
    """What multiplies the config's learning rates."""
    return math.prod((x.factor for x in rollbacks), start=1.0)


def allowed(config: Config) -> int:
    """How often the run may go back."""
    return 0 if config.divergence.action == "stop" else config.divergence.most


def go_back(
    config: Config, workdir: Workdir, rollbacks: tuple[Rollback, ...], at_step: int, to_step: int
) -> tuple[Rollback, ...]:
    """Writes down that the run goes back."""
    action, slows = config.divergence.action, config.divergence.action == "slow"
    assert action != "stop"
    factor = config.divergence.factor if slows else 1.0
    rollbacks = (*rollbacks, Rollback(at_step, to_step, action, factor))
    workdir.write_from_first(ROLLBACKS, as_json(rollbacks))
    remedy = (
        f"learning rates times {slowness(rollbacks):g}"
        if slows
        else f"{skipped_steps(rollbacks):,} batches left out so far"
    )
    log(
        f"WARNING: the loss was not finite at step {at_step:,}: back to step {to_step:,} "
        f"({len(rollbacks)} of at most {config.divergence.most} times), {remedy}"
    )
    return rollbacks
