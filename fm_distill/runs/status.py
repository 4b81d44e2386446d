"""How far the run in a workdir is, and which of its checkpoints are intact."""

import dataclasses
import os
from collections.abc import Collection

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
    wrong: tuple[str, ...]  # a line a file; empty where it is intact


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """What `fm-distill status --json` prints."""

    state: str  # running, paused, complete or failed
    reason: str
    step: int
    total_steps: int
    hours_left: float | None
    images_per_second: float | None
    updated: str | None  # UTC time of the run's last update
    checkpoints: tuple[CheckpointStatus, ...]  # newest first


def status(workdir: str | os.PathLike[str]) -> RunStatus:
    """The state of the run in `workdir`; the folder is only read. Raises `UserError`.

    A run whose status is `running`, though no process holds its folder, was killed: it is paused.
    """
    run_workdir = Workdir(workdir)
    teacher = None if run_workdir.has_config() else _teacher(run_workdir)
    if not (run_workdir.path / "config.json").is_file() and teacher is None:
        raise UserError(f"{workdir} is not the workdir of a run: it has no config.json")
    steps = steps_in(run_workdir.checkpoints)
    stored = run_workdir.read_status() or _status_of(run_workdir, steps)
    state, reason, step = stored.state, stored.reason, stored.step
    if teacher is not None:
        state = "running" if run_workdir.in_use() else "paused"
        reason = "; ".join(x for x in (reason, teacher) if x)
    elif state == "running" and not run_workdir.in_use():
        state, reason = "paused", "its process ended without reporting a reason"
        step = max(steps, default=0)
    checked = []
    for saved_step in progress(steps, "reading checkpoints", "checkpoints", len(steps)):
        errors = integrity_errors(run_workdir.checkpoints / str(saved_step))
        checked.append(CheckpointStatus(saved_step, not errors, errors))
    if state == "complete" and step not in [x.step for x in checked if x.whole]:
        state, reason = "paused", f"it was complete, but its checkpoint {step:,} is not intact"
    return RunStatus(
        state=state,
        reason=reason,
        step=step,
        total_steps=stored.total_steps,
        hours_left=0.0 if state == "complete" else stored.hours_left,
        images_per_second=stored.images_per_second,
        updated=stored.updated,
        checkpoints=tuple(checked),
    )


def _status_of(place: Workdir, steps: Collection[int]) -> StoredStatus:
    """Of a run whose `status.json` is lost, by its config and checkpoints."""
    total = place.stored().resolved.total_steps if place.has_config() else 0
    return StoredStatus("paused", max(steps, default=0), total)


def _teacher(place: Workdir) -> str | None:
    """Progress of the teacher that the run in `place` trains first; None without one."""
    if place.checkpoints.exists():
        return None
    for folder in sorted(place.path.glob("teacher*")):
        teacher = Workdir(folder)
        if not teacher.has_config():
            continue
        stored = teacher.read_status()
        if stored is None:
            return f"its teacher in {folder} is trained first"
        if stored.state != "complete":
            progress_text = f"{stored.step:,} of {stored.total_steps:,} steps"
            return f"its teacher in {folder} is trained first, after {progress_text}"
    return "its teachers are complete" if any(place.path.glob("teacher*/config.json")) else None


def status_text(status: RunStatus) -> str:
    """The same for people."""
    share = f" ({status.step / status.total_steps:.1%})" if status.total_steps else ""
    lines = [
        f"{status.state}{': ' + status.reason if status.reason else ''}",
        f"step {status.step:,} of {status.total_steps:,}{share}",
    ]
    if status.images_per_second:
        lines.append(f"{status.images_per_second:,.0f} images a second, at {status.updated}")
    if status.hours_left:
        lines.append(f"about {hours_text(status.hours_left)} left")
    for checkpoint in status.checkpoints:
        state = "intact" if checkpoint.whole else f"DAMAGED: {'; '.join(checkpoint.wrong[:3])}"
        lines.append(f"checkpoint {checkpoint.step:,}: {state}")
    return "\n".join(lines)
