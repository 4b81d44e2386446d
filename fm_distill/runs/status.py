"""How far the run in a workdir is, and which of its checkpoints are whole."""

import dataclasses
import os
import pathlib

from fm_distill.errors import UserError
from fm_distill.runs.integrity import integrity_errors, steps_in
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import hours_text, progress


@dataclasses.dataclass(frozen=True)
class CheckpointStatus:
    """One checkpoint; every byte of it was read."""

    step: int
    whole: bool
    wrong: tuple[str, ...]  # a line a file; empty where it is whole


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """What `fm-distill status --json` prints."""

    state: str  # running, paused, complete or failed
    reason: str
    step: int
    total_steps: int
    hours_left: float | None
    images_per_second: float | None
    updated: str | None  # UTC time of the last word from the run
    checkpoints: tuple[CheckpointStatus, ...]  # newest first


def status(workdir: str | os.PathLike[str]) -> RunStatus:
    """The state of the run in `workdir`; the folder is only read. Raises `UserError`.

    A run that says it is running, though no process holds its folder, was killed: it is paused.
    """
    place = Workdir(workdir)
    if not (pathlib.Path(workdir) / "config.json").is_file():
        raise UserError(f"{workdir} is not the workdir of a run: it has no config.json")
    said = place.read_or_none("status.json") or {}
    steps = steps_in(place.checkpoints)
    state, reason = str(said.get("state", "paused")), str(said.get("reason", ""))
    step = int(said.get("step", 0))
    if state == "running" and not place.in_use():
        state, reason = "paused", "its process is gone, though it did not say so"
        step = max(steps, default=0)
    checked = []
    for number in progress(steps, "reading checkpoints", "checkpoints", len(steps)):
        wrong = integrity_errors(place.checkpoints / str(number))
        checked.append(CheckpointStatus(number, not wrong, wrong))
    return RunStatus(
        state=state,
        reason=reason,
        step=step,
        total_steps=int(said.get("total_steps", 0)),
        hours_left=0.0 if state == "complete" else said.get("hours_left"),
        images_per_second=said.get("images_per_second"),
        updated=said.get("updated"),
        checkpoints=tuple(checked),
    )


def status_text(found: RunStatus) -> str:
    """The same for people."""
    share = f" ({found.step / found.total_steps:.1%})" if found.total_steps else ""
    lines = [
        f"{found.state}{': ' + found.reason if found.reason else ''}",
        f"step {found.step:,} of {found.total_steps:,}{share}",
    ]
    if found.images_per_second:
        lines.append(f"{found.images_per_second:,.0f} images a second, at {found.updated}")
    if found.hours_left:
        lines.append(f"about {hours_text(found.hours_left)} left")
    for checkpoint in found.checkpoints:
        state = "whole" if checkpoint.whole else f"DAMAGED: {'; '.join(checkpoint.wrong[:3])}"
        lines.append(f"checkpoint {checkpoint.step:,}: {state}")
    return "\n".join(lines)
