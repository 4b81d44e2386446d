"""A run from its config to its evaluated student: check, open, build, continue, finish.

It continues by itself from the newest intact checkpoint of its workdir, on the same batches and
with the same random numbers as if it had never stopped. The loop itself is in `loop.py`.
"""

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import jax

from fm_distill.config import Config
from fm_distill.config.steps import total_steps
from fm_distill.config.teachers import recording_of, teachers_of
from fm_distill.data.labels import refuse_unlabelled
from fm_distill.data.splits import open_data
from fm_distill.errors import Diverged, TrainingFailed, UserError
from fm_distill.networks.cost import run_cost
from fm_distill.networks.loading import check_student_weights
from fm_distill.networks.teachers import teacher_workdirs
from fm_distill.objectives.terms import needs_labels
from fm_distill.preparation.check import check
from fm_distill.preparation.check_features import check_features_of_experiment
from fm_distill.preparation.experiment import check_chain, load_experiment
from fm_distill.preparation.input_moments import with_input_moments
from fm_distill.preparation.open_networks import open_networks
from fm_distill.preparation.resolve import resolve
from fm_distill.preparation.warnings import warnings_on
from fm_distill.runs.checkpoint import CheckpointWriter
from fm_distill.runs.integrity import (
    NewestCheckpoint,
    integrity_errors,
    newest_step,
    newest_valid,
)
from fm_distill.runs.metrics import MetricsWriter
from fm_distill.runs.state import TrainState
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import log
from fm_distill.system.preemption import Stop, Stopped, stop_signals
from fm_distill.system.processes import broadcast_from_first, first_process, only_process
from fm_distill.system.sharding import check_batch_size, make_layout
from fm_distill.training.channels import decided_networks
from fm_distill.training.loop import Loop
from fm_distill.training.recorded import refuse_another_recording, with_recording_here
from fm_distill.training.reporter import Reporter, introduce, progress_bar
from fm_distill.training.resume import accept, first_state
from fm_distill.training.rollback import (
    Rollback,
    allowed,
    as_json,
    go_back,
    read_rollbacks,
    skipped_steps,
    slowness,
)
from fm_distill.training.setup import Setup, prepare


@dataclasses.dataclass(frozen=True)
class Result:
    """How far a run got."""

    complete: bool
    step: int
    total_steps: int
    workdir: pathlib.Path
    evaluation: (
        dict[str, Any] | None
    )  # of a complete run, unless left out; see `evaluate.summarise`
    reason: str = ""  # why it is not complete
    hours_left: float | None = None  # where that is known


def train(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    max_hours: float | None = None,
    extend: bool = False,
) -> Result:
    """Trains the run of `config` in `workdir`, from where it stands to its end.

    A teacher that is an experiment is trained first, unless it is there. SIGINT, SIGTERM or the end
    of `max_hours` stops it after a checkpoint, with `Result.complete` False. `extend` allows a
    longer schedule than the one that `workdir` was trained with. Raises `UserError` before anything
    is compiled or overwritten, and `TrainingFailed` where the loss stops being finite.
    """
    with stop_signals(Stop(max_hours)) as stop:
        return train_until(config, workdir, stop, extend)


def train_until(
    config: Config, path: str | os.PathLike[str], stop: Stop, extend: bool = False
) -> Result:
    """`train`, until `stop` asks for it."""
    check(config)
    workdir = Workdir(path)
    lengthened = workdir.refuse_another_config(config, extend)
    if not lengthened and (complete := _complete(config, workdir)) is not None:
        return complete
    if recording_of(config) is None:
        check_chain(config)
    refuse_another_recording(config)
    layout = make_layout(config.mesh)
    check_batch_size(config, layout)
    data, warnings = open_data(config)
    steps = total_steps(config, len(data.train))
    if needs_labels(config.objective):
        refuse_unlabelled(data.train)
    check_features_of_experiment(config, len(data.train))
    check_student_weights(config)
    with workdir.locked():
        steps_done = newest_step(workdir.checkpoints)
        workdir.refuse_lost_checkpoints(steps_done)
        if steps_done > steps:
            raise UserError(
                f"the run in {workdir.path} has done {steps_done:,} steps, more than the {steps:,} "
                "of the schedule; give a longer one"
            )
        _log_all(warnings)
        config = with_recording_here(config, workdir)
        with stop.recorded(lambda why: workdir.set_status("paused", steps_done, steps, why)):
            if not train_teachers(config, workdir.path, stop):
                reason = stop.reason() or "its teacher is not complete"
                workdir.set_status("paused", steps_done, steps, reason)
                return Result(False, steps_done, steps, workdir.path, None, reason)
        networks = open_networks(config, workdir.path, data)
        stored_student = workdir.stored().resolved.student if workdir.has_config() else None
        networks = with_input_moments(networks, config, data.train, stored_student)
        networks = decided_networks(config, networks, data, layout, workdir.path)
        resolved = resolve(config, data.facts, networks.facts, layout)
        workdir.refuse_other_contents(resolved)
        _log_all([*networks.notes, *warnings_on(config, resolved)])
        setup, notes = prepare(config, resolved, data, networks, layout, workdir.path)
        kept_steps = workdir.claim(config, resolved, lengthened)
        _log_all(notes)
        metadata = {
            "data": resolved.data,
            "teacher": resolved.teacher_fingerprint,
            "jax": jax.__version__,
            "device_kind": jax.devices()[0].device_kind,
            "mesh": resolved.mesh,
            "memory": dataclasses.asdict(config.memory),
            "processes": jax.process_count(),
        }
        return _run(setup, workdir, stop, metadata, kept_steps)


def _log_all(lines: list[str]) -> None:
    for line in lines:
        log(line)


def _complete(config: Config, workdir: Workdir) -> Result | None:
    """The result of a complete run, which needs neither its data nor its teacher."""
    status = workdir.read_status()
    if not workdir.has_config() or status is None or status.state != "complete":
        return None
    steps = status.step
    if integrity_errors(workdir.checkpoints / str(steps)):
        return None
    evaluation = workdir.read_evaluation()
    if config.log.final_evaluation and evaluation is None:
        return None
    log(f"the run in {workdir.path} is complete: {steps:,} steps")
    return Result(True, steps, steps, workdir.path, evaluation)


def train_teachers(config: Config, path: pathlib.Path, stop: Stop) -> bool:
    """Whether all teachers are there now; False where the training of one was stopped.

    A run that learns from a recording needs none.
    """
    if recording_of(config) is not None:
        return True
    for teacher, folder in zip(teachers_of(config), teacher_workdirs(config, path), strict=True):
        experiment = teacher.config.experiment
        if not experiment:
            continue
        status = Workdir(folder).read_status()
        if status is None or status.state != "complete":
            log(f"training the teacher first: {experiment} in {folder}")
        if not train_until(load_experiment(experiment), folder, stop).complete:
            return False
    return True


def _run(
    setup: Setup, workdir: Workdir, stop: Stop, metadata: dict[str, Any], keep: tuple[int, ...]
) -> Result:
    """From the newest checkpoint to the end, or to a stop; back again where it diverges."""
    total = setup.resolved.total_steps
    rollbacks = read_rollbacks(workdir)
    while True:
        newest = _newest(workdir)
        accept(newest, workdir, metadata, rollbacks)
        try:
            return _session(setup, workdir, stop, metadata, keep, newest, rollbacks)
        except (TrainingFailed, UserError, OSError) as error:
            stop.busy()  # whoever stops now has to wait for this state to be written
            if isinstance(error, Diverged) and len(rollbacks) < allowed(setup.config):
                to_step = _newest(workdir).step
                rollbacks = go_back(setup.config, workdir, rollbacks, error.step, to_step)
                continue
            with contextlib.suppress(OSError):
                workdir.set_status("failed", newest_step(workdir.checkpoints), total, str(error))
            if isinstance(error, OSError):
                raise TrainingFailed(f"{workdir.path} can no longer be written: {error}") from error
            raise


def _newest(workdir: Workdir) -> NewestCheckpoint:
    """The newest intact checkpoint, which has to be the same for all processes."""
    broadcast_from_first(0)  # the first process has written what it began
    newest = newest_valid(workdir.checkpoints)
    if newest.step != broadcast_from_first(newest.step):
        raise TrainingFailed(
            f"this process finds checkpoint {newest.step} in {workdir.checkpoints} and the first "
            "process finds another one: all must see the same folder"
        )
    return newest


def _session(
    setup: Setup,
    workdir: Workdir,
    stop: Stop,
    metadata: dict[str, Any],
    keep: tuple[int, ...],
    newest: NewestCheckpoint,
    rollbacks: tuple[Rollback, ...],
) -> Result:
    """From one checkpoint to the end, or to a stop."""
    total, start = setup.resolved.total_steps, newest.step
    if (factor := slowness(rollbacks)) != 1:
        setup = setup.slowed(factor)
    state = first_state(setup, workdir, start)
    checkpoints = CheckpointWriter(workdir.checkpoints, setup.config.checkpoint, keep)
    try:
        if first_process():
            for step in newest.damaged:
                checkpoints.move_aside(step)
        introduce(setup, start)
        workdir.set_status("running", start, total)
        metadata = metadata | {"rollbacks": as_json(rollbacks)}
        evaluation_pending = bool(newest.metadata.get("evaluation_pending"))
        path = workdir.metrics if first_process() else None
        writer = MetricsWriter(path, start, setup.config.log.tensorboard, evaluation_pending)
        with (
            writer,
            contextlib.closing(progress_bar(setup, start)) as bar,
            stop.recorded(lambda why: workdir.set_status("paused", start, total, why)),
        ):
            reporter = Reporter(setup, workdir, writer, bar, start, stop)
            loop = Loop(setup, checkpoints, reporter, stop, metadata, skipped_steps(rollbacks))
            stop.idle()
            state, steps_done, reason = loop.run(state, start, evaluation_pending)
            hours = reporter.hours_left()
            reporter.log_pace(checkpoints.blocked_s)
        if reason:
            workdir.set_status("paused", steps_done, total, reason, hours)
            return Result(False, steps_done, total, workdir.path, None, reason, hours)
        return _finish(setup, state, workdir, stop)
    finally:
        checkpoints.close()


def _finish(setup: Setup, state: TrainState, workdir: Workdir, stop: Stop) -> Result:
    """The evaluation of a run whose last checkpoint is on disk."""
    total = setup.resolved.total_steps
    if not setup.config.log.final_evaluation:
        workdir.set_status("complete", total, total)
        return Result(True, total, total, workdir.path, None)
    student = state.ema or state.student
    batches = stop.checked(setup.final()) if only_process() else setup.final()
    try:
        with stop.recorded(lambda why: workdir.set_status("paused", total, total, why)):
            stop.idle()
            figures = setup.evaluator(
                student, setup.teachers.frozen, batches, setup.final_split, total
            )
            figures |= {"cost": run_cost(setup.resolved)}
    except Stopped as stopped:
        reason = f"{stopped}, before the last evaluation was done"
        workdir.set_status("paused", total, total, reason)
        return Result(False, total, total, workdir.path, None, reason, hours_left=0.0)
    workdir.write_from_first("evaluation.json", figures)
    workdir.set_status("complete", total, total)
    return Result(True, total, total, workdir.path, figures)
