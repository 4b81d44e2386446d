"""The loop: build everything, then step, log, evaluate, save. Nothing numerical is done here.

A run continues by itself from the newest checkpoint of its workdir, on the same batches and with
the same random numbers as if it had never stopped.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import sys
import time
from typing import Any

import jax
from jaxtyping import Array
from tqdm import tqdm

from fm_distill.build import dispatch_sizes
from fm_distill.checkpoint import Checkpoints, abstract
from fm_distill.config import Config, total_steps
from fm_distill.errors import TrainingFailed, UserError
from fm_distill.experiment import check, load_experiment
from fm_distill.metrics import MetricsWriter
from fm_distill.models import parameter_count
from fm_distill.probe import probe_teacher
from fm_distill.run import agreed_classes, load_teachers, teachers_of
from fm_distill.setup import Setup, open_data, prepare, remarks_on
from fm_distill.sharding import check_batch_size, make_layout
from fm_distill.step import TrainState
from fm_distill.stopping import Stopping, say, stop_signals
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
        if not _train_teacher(config, place):
            return Result(False, 0, steps, place.path, None)
        teachers = load_teachers(config, place)
        teacher = teachers[0] if teachers else None
        classes = agreed_classes(
            config.data.classes, data.train.classes, data.train.class_names, teachers
        )
        names = data.train.class_names or (teacher.class_names if teacher else None)
        contents = {
            "data": data.train.identity,
            "classes": classes,
            "class_names": list(names or ()),
            "teacher": teacher.fingerprint if teacher else None,
        }
        place.refuse_another(config, contents)
        setup, remarks = prepare(config, data, teacher, classes, layout)
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


def _train_teacher(config: Config, place: Workdir) -> bool:
    """Whether the teacher is there now; False where its training was stopped."""
    if not (config.teacher and config.teacher.experiment):
        return True
    where = teachers_of(config, place)[0][2]
    teacher = load_experiment(config.teacher.experiment)
    status = Workdir(where).read("status.json") or {}
    if status.get("state") != "complete":
        say(f"the teacher comes first: {config.teacher.experiment} in {where}")
    return train(teacher, where).complete


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
        with writer, _progress_bar(setup, start) as bar:
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
    reporter = _Reporter(setup, writer, bar, start)
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


class _Reporter:
    """Fetches metrics a dispatch late, so that the device never waits for the host."""

    def __init__(self, setup: Setup, writer: MetricsWriter, bar: Any, start: int):
        self.setup, self.writer, self.bar = setup, writer, bar
        self.late: tuple[int, int, dict[str, Array]] | None = None
        self.mark = start, time.monotonic()

    def dispatched(self, step: int, steps: int, metrics: dict[str, Array]) -> None:
        """Reports the dispatch before, and keeps this one for later."""
        self.catch_up()
        self.late = step, steps, metrics

    def catch_up(self) -> None:
        """Reports what is late. Raises `TrainingFailed` where its loss is not finite."""
        if self.late is None:
            return
        (step, steps, metrics), self.late = self.late, None
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if not math.isfinite(values["loss"]):
            raise TrainingFailed(
                f"the loss is not finite at step {step:,}; the last checkpoint before it is kept. "
                "Try a lower optimizer.learning_rate, a longer schedule.warmup_steps or "
                "--precision float32"
            )
        self.bar.update(steps)
        every = self.setup.config.log.every_steps
        if step // every > (step - steps) // every or step == self.setup.total_steps:
            self._log(step, values)

    def evaluated(self, figures: dict[str, Any]) -> None:
        """Writes the figures of the validation split."""
        values = {
            "student_top1": figures["student"]["top1"],
            "student_cross_entropy": figures["student"]["cross_entropy"],
            "teacher_top1": figures["teacher"]["top1"],
            "agreement_top1": figures["agreement"]["top1"],
            "kl_train_temperature": figures["kl"]["train_temperature"],
            "kl_one": figures["kl"]["one"],
        }
        known = {name: value for name, value in values.items() if value is not None}
        step = figures["step"]
        self.writer.write(step, self._epoch(step), "validation", known)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in known.items())
        say(f"step {step:,} validation: {shown}")
        self.mark = step, time.monotonic()

    def _log(self, step: int, values: dict[str, float]) -> None:
        before, since = self.mark
        self.mark = step, time.monotonic()
        seconds = max(self.mark[1] - since, 1e-9)
        config = self.setup.config
        rate = (step - before) * config.batch_size / seconds
        shape = float(jax.device_get(self.setup.built.schedule(step - 1)))
        epoch = self._epoch(step)
        values |= {
            "learning_rate": config.optimizer.learning_rate * shape,
            "images_per_second": rate,
        }
        if self.setup.feed.skipped:
            values["corrupt_images"] = self.setup.feed.skipped
        self.writer.write(step, epoch, "train", values)
        text = f"epoch {epoch:.1f}, loss {values['loss']:.4f}, {rate:,.0f} img/s"
        self.bar.set_postfix_str(text, refresh=False)

    def _epoch(self, step: int) -> float:
        return step * self.setup.config.batch_size / len(self.setup.reader)


def _first_state(setup: Setup, checkpoints: Checkpoints, start: int) -> TrainState:
    """The state of the newest checkpoint, or a new one, straight on its shards."""
    shapes = setup.built.abstract_state()
    shardings = setup.layout.variables(shapes)
    if start:
        return checkpoints.restore(start, abstract(shapes, shardings))
    init_key, _ = setup.keys()
    return jax.jit(setup.built.init, out_shardings=shardings)(init_key)


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


def _progress_bar(setup: Setup, start: int) -> Any:
    return tqdm(
        total=setup.total_steps,
        initial=start,
        unit="step",
        desc=setup.config.name,
        # A log file gets a line every half minute, a terminal ten a second.
        mininterval=0.1 if sys.stderr.isatty() else 30,
        dynamic_ncols=True,
    )
