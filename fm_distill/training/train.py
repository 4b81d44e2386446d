"""A run from its config to its evaluated student: check, open, build, continue, finish.

It continues by itself from the newest whole checkpoint of its workdir, on the same batches and
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
from fm_distill.data.splits import open_data
from fm_distill.errors import Diverged, TrainingFailed, UserError
from fm_distill.networks.loading import load_networks
from fm_distill.networks.teachers import teachers_of
from fm_distill.runs.checkpoint import CheckpointWriter
from fm_distill.runs.integrity import NewestCheckpoint, newest_step, newest_valid
from fm_distill.runs.metrics import MetricsWriter
from fm_distill.runs.state import TrainState
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import log
from fm_distill.system.preemption import Stop, Stopped, stop_signals
from fm_distill.system.processes import broadcast_from_first, first_process, only_process
from fm_distill.system.sharding import check_batch_size, make_layout
from fm_distill.training.experiment import check, load_experiment
from fm_distill.training.loop import Loop
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
from fm_distill.training.setup import Setup, prepare, remarks_on


@dataclasses.dataclass(frozen=True)
class Result:
    """How far a run got."""

    complete: bool
    step: int
    total_steps: int
    workdir: pathlib.Path
    evaluation: dict[str, Any] | None  # of a complete run; see `evaluate.summarise`
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
    config: Config, workdir: str | os.PathLike[str], stop: Stop, extend: bool = False
) -> Result:
    """`train`, until `stop` says so."""
    check(config)
    place = Workdir(workdir)
    if (complete := _complete(config, place, extend)) is not None:
        return complete
    layout = make_layout(config.mesh)
    check_batch_size(config, layout)
    data, remarks = open_data(config)
    steps = total_steps(config, len(data.train))
    with place.locked():
        place.refuse_another(config, {"data": data.train.identity}, extend)
        done = newest_step(place.checkpoints)
        if done > steps:
            raise UserError(
                f"the run in {place.path} has done {done:,} steps, more than the {steps:,} of the "
                "schedule; give a longer one"
            )
        for remark in [*remarks, *remarks_on(config, steps)]:
            log(remark)
        with stop.recorded(lambda why: place.set_status("paused", done, steps, why)):
            if not _train_teachers(config, place, stop):
                reason = stop.reason() or "its teacher is not complete"
                place.set_status("paused", done, steps, reason)
                return Result(False, done, steps, place.path, None, reason)
        networks = load_networks(config, place, data.train.classes, data.train.class_names)
        contents = {"data": data.train.identity} | networks.contents
        place.refuse_another(config, contents, extend)
        for remark in networks.remarks:
            log(remark)
        setup, remarks = prepare(config, data, networks, layout, place.fixed_targets)
        keep = place.claim(config, contents, extend)
        for remark in remarks:
            log(remark)
        metadata = {
            "data": data.train.identity,
            "teacher": networks.contents["teacher"],
            "jax": jax.__version__,
            "device_kind": jax.devices()[0].device_kind,
            "mesh": dict(layout.mesh.shape),
            "memory": dataclasses.asdict(config.memory),
            "processes": jax.process_count(),
        }
        return _run(setup, place, stop, metadata, keep)


def _complete(config: Config, place: Workdir, extend: bool) -> Result | None:
    """The result of a run that needs nothing any more, neither its data nor its teacher."""
    status, evaluation = place.read_or_none("status.json"), place.read_or_none("evaluation.json")
    if not (status and status.get("state") == "complete" and evaluation):
        return None
    if place.refuse_another(config, {}, extend):
        return None
    steps = status["step"]
    log(f"the run in {place.path} is complete: {steps:,} steps")
    return Result(True, steps, steps, place.path, evaluation)


def _train_teachers(config: Config, place: Workdir, stop: Stop) -> bool:
    """Whether all teachers are there now; False where the training of one was stopped."""
    for _, teacher, where in teachers_of(config, place):
        if not teacher.experiment:
            continue
        status = Workdir(where).read_or_none("status.json") or {}
        if status.get("state") != "complete":
            log(f"the teacher comes first: {teacher.experiment} in {where}")
        if not train_until(load_experiment(teacher.experiment), where, stop).complete:
            return False
    return True


def _run(
    setup: Setup, place: Workdir, stop: Stop, metadata: dict[str, Any], keep: tuple[int, ...]
) -> Result:
    """From the newest checkpoint to the end, or to a stop; back again where it diverges."""
    total = setup.total_steps
    rollbacks = read_rollbacks(place)
    while True:
        found = _newest(place)
        accept(found, place, metadata, rollbacks)
        try:
            return _stretch(setup, place, stop, metadata, keep, found, rollbacks)
        except (TrainingFailed, UserError, OSError) as error:
            stop.busy()  # whoever stops now has to wait for this state to be written
            if isinstance(error, Diverged) and len(rollbacks) < allowed(setup.config):
                to_step = _newest(place).step
                rollbacks = go_back(setup.config, place, rollbacks, error.step, to_step)
                continue
            with contextlib.suppress(OSError):
                place.set_status("failed", newest_step(place.checkpoints), total, str(error))
            if isinstance(error, OSError):
                raise TrainingFailed(f"{place.path} cannot be written any more: {error}") from error
            raise


def _newest(place: Workdir) -> NewestCheckpoint:
    """The newest whole checkpoint, which has to be the same for all processes."""
    broadcast_from_first(0)  # the first process has written what it began
    found = newest_valid(place.checkpoints)
    if found.step != broadcast_from_first(found.step):
        raise TrainingFailed(
            f"this process finds checkpoint {found.step} in {place.checkpoints} and the first "
            "process another one: all have to see the same folder"
        )
    return found


def _stretch(
    setup: Setup,
    place: Workdir,
    stop: Stop,
    metadata: dict[str, Any],
    keep: tuple[int, ...],
    found: NewestCheckpoint,
    rollbacks: tuple[Rollback, ...],
) -> Result:
    """From one checkpoint to the end, or to a stop."""
    total, start = setup.total_steps, found.step
    if (factor := slowness(rollbacks)) != 1:
        setup = setup.slowed(factor)
    state = first_state(setup, place, start)
    checkpoints = CheckpointWriter(place.checkpoints, setup.config.checkpoint, keep)
    try:
        if first_process():
            for step in found.damaged:
                checkpoints.move_aside(step)
        introduce(setup, start)
        place.set_status("running", start, total)
        metadata = metadata | {"rollbacks": as_json(rollbacks)}
        evaluation_pending = bool(found.metadata.get("evaluation_owed"))
        path = place.metrics if first_process() else None
        writer = MetricsWriter(path, start, setup.config.log.tensorboard, evaluation_pending)
        with (
            writer,
            progress_bar(setup, start) as bar,
            stop.recorded(lambda why: place.set_status("paused", start, total, why)),
        ):
            reporter = Reporter(setup, place, writer, bar, start, stop)
            loop = Loop(setup, checkpoints, reporter, stop, metadata, skipped_steps(rollbacks))
            stop.idle()
            state, done, reason = loop.run(state, start, evaluation_pending)
            hours = reporter.hours_left()
            reporter.say_pace(checkpoints.blocked_s)
        if reason:
            place.set_status("paused", done, total, reason, hours)
            return Result(False, done, total, place.path, None, reason, hours)
        return _finish(setup, state, place, stop)
    finally:
        checkpoints.close()


def _finish(setup: Setup, state: TrainState, place: Workdir, stop: Stop) -> Result:
    """The evaluation of a run whose last checkpoint is on disk."""
    total = setup.total_steps
    student = state.ema or state.student
    batches = stop.checked(setup.final()) if only_process() else setup.final()
    try:
        with stop.recorded(lambda why: place.set_status("paused", total, total, why)):
            stop.idle()
            figures = setup.evaluator(student, setup.frozen, batches, setup.final_split, total)
    except Stopped as stopped:
        reason = f"{stopped}, before the last evaluation was done"
        place.set_status("paused", total, total, reason)
        return Result(False, total, total, place.path, None, reason)
    place.write("evaluation.json", figures)
    place.set_status("complete", total, total)
    return Result(True, total, total, place.path, figures)
