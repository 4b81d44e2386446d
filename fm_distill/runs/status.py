"""How far the run in a workdir is, and which of its checkpoints are whole."""

import dataclasses
import os

from fm_distill.errors import UserError
from fm_distill.runs.integrity import integrity_errors, steps_in
from fm_distill.runs.stored_progress import StoredStatus
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
    teacher = None if place.has_config() else _teacher(place)
    if not (place.path / "config.json").is_file() and teacher is None:
        raise UserError(f"{workdir} is not the workdir of a run: it has no config.json")
    said = place.read_status() or StoredStatus("paused", 0, 0)
    steps = steps_in(place.checkpoints)
    state, reason, step = said.state, said.reason, said.step
    if teacher is not None:
        state = "running" if place.in_use() else "paused"
        reason = "; ".join(x for x in (reason, teacher) if x)
    elif state == "running" and not place.in_use():
        state, reason = "paused", "its process is gone, though it did not say so"
        step = max(steps, default=0)
    checked = []
    for number in progress(steps, "reading checkpoints", "checkpoints", len(steps)):
        wrong = integrity_errors(place.checkpoints / str(number))
        checked.append(CheckpointStatus(number, not wrong, wrong))
    if state == "complete" and step not in [x.step for x in checked if x.whole]:
        state, reason = "paused", f"it was complete, but its checkpoint {step:,} is not whole"
    return RunStatus(
        state=state,
        reason=reason,
        step=step,
        total_steps=said.total_steps,
        hours_left=0.0 if state == "complete" else said.hours_left,
        images_per_second=said.images_per_second,
        updated=said.updated,
        checkpoints=tuple(checked),
    )


def _teacher(place: Workdir) -> str | None:
    """How far the teacher is that comes before the run in `place`; None where there is none."""
    if place.checkpoints.exists():
        return None
    for folder in sorted(place.path.glob("teacher*")):
        teacher = Workdir(folder)
        if not teacher.has_config():
            continue
        stored = teacher.read_status()
        if stored is None:
            return f"its teacher in {folder} comes first"
        if stored.state != "complete":
            done = f"{stored.step:,} of {stored.total_steps:,} steps"
            return f"its teacher in {folder} comes first, after {done}"
    return "its teachers are complete" if any(place.path.glob("teacher*/config.json")) else None


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
