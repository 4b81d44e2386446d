"""The loop: build everything, then step, log, evaluate, save. Nothing numerical is done here.

A run continues by itself from the newest checkpoint of its workdir, on the same batches and with
the same random numbers as if it had never stopped.
"""

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from fm_distill.build import dispatch_sizes
from fm_distill.checkpoint import Checkpoints, abstract
from fm_distill.config import Config
from fm_distill.errors import TrainingFailed, UserError
from fm_distill.experiment import check, load_experiment
from fm_distill.length import total_steps
from fm_distill.metrics import MetricsWriter
from fm_distill.models import parameter_count
from fm_distill.networks import load_networks
from fm_distill.probe import probe_teacher
from fm_distill.reporter import Reporter, progress_bar
from fm_distill.run import teachers_of
from fm_distill.setup import Setup, open_data, prepare, remarks_on
from fm_distill.sharding import check_batch_size, make_layout
from fm_distill.step import TrainState
from fm_distill.stopping import Stopping, say, stop_signals
from fm_distill.weights.load import start_from
from fm_distill.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Result:
    """How far a run got."""

    complete: bool
    step: int
    total_steps: int
    workdir: pathlib.Path
    evaluation: dict[str, Any] | None  # of a complete run; see `evaluate.summarise`


def train(config: Config, workdir: str | os.PathLike[str]) -> Result:
    """Trains the run of `config` in `workdir`, from where it stands to its end.

    A teacher that is an experiment is trained first, unless it is there. SIGINT or SIGTERM stops
    it after a checkpoint, with `Result.complete` False. Raises `UserError` before anything is
    compiled or overwritten, and `TrainingFailed` where the loss stops being finite.
    """
    check(config)
    place = Workdir(workdir)
    if (complete := _complete(config, place)) is not None:
        return complete
    layout = make_layout(config.mesh)
    check_batch_size(config.batch_size, layout)
    data, remarks = open_data(config)
    steps = total_steps(config, len(data.train))
    with place.locked(), stop_signals() as stopping:
        place.refuse_another(config, {"data": data.train.identity})
        for remark in [*remarks, *remarks_on(config, steps)]:
            say(remark)
        if not _train_teachers(config, place):
            return Result(False, 0, steps, place.path, None)
        networks = load_networks(config, place, data.train.classes, data.train.class_names)
        contents = {"data": data.train.identity} | networks.contents
        place.refuse_another(config, contents)
        for remark in networks.remarks:
            say(remark)
        setup, remarks = prepare(config, data, networks, layout, place.fixed_targets)
        place.claim(config, contents)
        for remark in remarks:
            say(remark)
        return _run(setup, place, stopping)


def _complete(config: Config, place: Workdir) -> Result | None:
    """The result of a run that needs nothing any more, neither its data nor its teacher."""
    status, evaluation = place.read("status.json"), place.read("evaluation.json")
    if not (status and status["state"] == "complete" and evaluation):
        return None
    place.refuse_another(config, {})
    steps = status["step"]
    say(f"the run in {place.path} is complete: {steps:,} steps")
    return Result(True, steps, steps, place.path, evaluation)


def _train_teachers(config: Config, place: Workdir) -> bool:
    """Whether all teachers are there now; False where the training of one was stopped."""
    for _, teacher, where in teachers_of(config, place):
        if not teacher.experiment:
            continue
        status = Workdir(where).read("status.json") or {}
        if status.get("state") != "complete":
            say(f"the teacher comes first: {teacher.experiment} in {where}")
        if not train(load_experiment(teacher.experiment), where).complete:
            return False
    return True


def _run(setup: Setup, place: Workdir, stopping: Stopping) -> Result:
    """From the newest checkpoint to the end, or to a stop."""
    checkpoints = Checkpoints(place.checkpoints, setup.config.checkpoint.keep, writing=True)
    done = 0
    try:
        start = checkpoints.latest() or 0
        state = _first_state(setup, checkpoints, start)
        _introduce(setup, start)
        place.set_status("running", start, setup.total_steps)
        writer = MetricsWriter(place.metrics, start, setup.config.log.tensorboard)
        with writer, progress_bar(setup, start) as bar:
            state, done = _loop(setup, state, start, checkpoints, writer, bar, stopping)
        if done < setup.total_steps:
            place.set_status("paused", done, setup.total_steps, "stopped by a signal")
            return Result(False, done, setup.total_steps, place.path, None)
        figures = setup.evaluator(
            state.ema or state.student, setup.frozen, setup.final(), setup.final_split, done
        )
        place.write("evaluation.json", figures)
        place.set_status("complete", done, setup.total_steps)
        return Result(True, done, setup.total_steps, place.path, figures)
    except (TrainingFailed, UserError, OSError) as error:
        with contextlib.suppress(OSError):
            on_disk = checkpoints.latest() or 0
            place.set_status("failed", on_disk, setup.total_steps, str(error))
        if isinstance(error, OSError):
            raise TrainingFailed(f"{place.path} cannot be written any more: {error}") from error
        raise
    finally:
        checkpoints.close()


def _loop(
    setup: Setup,
    state: TrainState,
    start: int,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    bar: Any,
    stopping: Stopping,
) -> tuple[TrainState, int]:
    """The steps themselves. Returns the state and the steps done, which are on disk."""
    config, total = setup.config, setup.total_steps
    _, root_key = setup.keys()
    reporter = Reporter(setup, writer, bar, start)
    step = start
    fed = setup.feed.feed(start, dispatch_sizes(start, total, setup.dispatch))
    for steps, batch in zip(dispatch_sizes(start, total, setup.dispatch), fed, strict=True):
        if stopping():
            break
        # Whatever were sent to the devices unasked for, each step would wait for.
        with jax.transfer_guard("disallow"):
            state, metrics = setup.program(state, setup.taught_by, setup.feed.data, batch, root_key)
        step += steps
        reporter.dispatched(step, steps, metrics)

        def due(every: int, step: int = step, steps: int = steps) -> bool:
            return every > 0 and (step // every > (step - steps) // every or step == total)

        if due(config.log.evaluate_every_steps) and setup.validation:
            reporter.catch_up()
            student = state.ema or state.student
            reporter.evaluated(
                setup.evaluator(student, setup.frozen, setup.validation(), "validation", step)
            )
        if due(config.checkpoint.every_steps) and step < total:
            reporter.catch_up()  # a state whose loss is not finite must not replace a good one
            writer.flush()
            checkpoints.save(state)
    reporter.catch_up()
    writer.flush()
    if step > 0:
        checkpoints.save(state)
        checkpoints.wait()
    return state, step


def _first_state(setup: Setup, checkpoints: Checkpoints, start: int) -> TrainState:
    """The state of the newest checkpoint, or a new one, straight on its shards."""
    shapes = setup.built.abstract_state()
    shardings = setup.layout.variables(shapes)
    if start:
        return checkpoints.restore(start, abstract(shapes, shardings))
    init_key, _ = setup.keys()
    state = jax.jit(setup.built.init, out_shardings=shardings)(init_key)
    networks = setup.networks
    if networks.pretrained is None:
        return state
    student, remark = start_from(
        state.student, networks.pretrained, networks.classes, networks.class_names
    )
    say(remark)
    student = jax.device_put(student, shardings.student)
    # A copy: the same buffer cannot be donated twice.
    ema = None if state.ema is None else jax.tree.map(jnp.copy, student)
    return dataclasses.replace(state, student=student, ema=ema)


def _introduce(setup: Setup, start: int) -> None:
    """Says what is about to run, and warns of a teacher that cannot teach."""
    config = setup.config
    students = parameter_count(setup.built.abstract_state().student.params)
    teachers = sum(parameter_count(x.params) for x in setup.frozen)
    against = f", teacher of {teachers:,}" if teachers else ""
    say(
        f"{config.name}: student of {students:,} parameters{against}; {setup.total_steps:,} steps "
        f"of {config.batch_size} on {setup.layout.mesh.size} x "
        f"{jax.devices()[0].device_kind}" + (f", continuing after step {start:,}" if start else "")
    )
    if start == 0:
        for seat, frozen in zip(setup.built.teachers, setup.frozen, strict=True):
            for warning in probe_teacher(config, seat, frozen, setup.reader, setup.layout):
                say(warning)
