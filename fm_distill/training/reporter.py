"""What a running loop reports: lines of `metrics.jsonl`, messages, and the progress bar."""

import math
import time
from typing import Any

import jax
from jaxtyping import Array

from fm_distill.config import Config
from fm_distill.errors import Diverged
from fm_distill.evaluation.teacher_check import check_teacher
from fm_distill.models import parameter_count
from fm_distill.runs.checkpoint import bytes_of
from fm_distill.runs.metric_table import BY_NAME, line, logged
from fm_distill.runs.metrics import MetricsWriter
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import COMPILING, Progress, log, steps_progress
from fm_distill.system.preemption import Stop
from fm_distill.system.processes import first_process
from fm_distill.train_step.program import FINITE
from fm_distill.train_step.step import ADAPTER_GRADIENT
from fm_distill.training.compare_recording import compare_with_teachers
from fm_distill.training.dispatch import due
from fm_distill.training.setup import Setup

# `status.json` is written with a logged line, but not more often than this.
STATUS_EVERY_S = 5.0
# Share of the time that steps spend waiting for their batches, and lines in a row of that, from
# which a run is input-bound.
MOST_WAIT, LINES_OF_WAITING = 0.3, 3
LINE_BYTES = 300  # of metrics.jsonl, about


class Reporter:
    """Fetches metrics a dispatch late, so that the device never waits for the host."""

    def __init__(
        self,
        setup: Setup,
        workdir: Workdir,
        writer: MetricsWriter,
        bar: Progress,
        start: int,
        stop: Stop,
    ):
        self.setup, self.workdir, self.writer, self.bar = setup, workdir, writer, bar
        self.stop = stop
        self.late: tuple[int, int, dict[str, Array]] | None = None
        self.mark = start, time.monotonic()
        self.waited_s = 0.0  # for batches, since the mark
        # Step and time when the first dispatch was done.
        self.first: tuple[int, float] | None = None
        self.step = start
        self.figures: dict[int, dict[str, float]] = {}  # step -> of the last evaluation
        self.status_at = -STATUS_EVERY_S
        self.dead: set[str] = set()  # the adapters that have been warned of
        self.waiting = 0  # lines in a row in which the steps waited

    def waited(self, seconds: float) -> None:
        """Adds what the loop waited for a batch."""
        self.waited_s += seconds

    def dispatched(self, step: int, steps: int, metrics: dict[str, Array]) -> None:
        """Reports the dispatch before, and keeps this one for later."""
        self.catch_up()
        self.late = step, steps, metrics

    def catch_up(self) -> None:
        """Reports what is late. Raises `Diverged` where loss, gradient or update is not finite."""
        if self.late is None:
            return
        (step, steps, metrics), self.late = self.late, None
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if not all(math.isfinite(values[name]) for name in FINITE):
            raise Diverged(step)
        self.step = step
        if self.first is None:
            self.first = step, time.monotonic()
            log(f"the first new step ended {3600 * self.stop.hours():.1f} s after the start")
        every_steps, text = self.setup.config.log.every_steps, ""
        if due(every_steps, step, steps) or step == self.setup.resolved.total_steps:
            text = self._log(step, values)
        self.bar.update(steps, text)

    def evaluated(self, figures: dict[str, Any]) -> None:
        """Writes the figures of the validation split."""
        values = logged(figures)
        step = figures["step"]
        self.figures = {step: values}
        self.writer.write(step, self._epoch(step), "validation", values)
        log(f"step {step:,} validation: {line(values)}; all in {self.workdir.metrics}")
        self.mark, self.waited_s = (step, time.monotonic()), 0.0

    def hours_left(self) -> float | None:
        """At the pace of this session, evaluations and checkpoints included; None if not known."""
        if self.first is None or self.step == self.first[0]:
            return None
        pace_s = (time.monotonic() - self.first[1]) / (self.step - self.first[0])
        return (self.setup.resolved.total_steps - self.step) * pace_s / 3600

    def log_pace(self, blocked_s: float) -> None:
        """What this session did after its first dispatch, and what its checkpoints cost."""
        if self.first is None or self.step == self.first[0]:
            return
        steps, seconds = self.step - self.first[0], time.monotonic() - self.first[1]
        log(
            f"{steps:,} steps in {seconds:,.1f} s; checkpoints blocked training for "
            f"{blocked_s:.2f} s ({blocked_s / seconds:.2%})"
        )

    def _log(self, step: int, values: dict[str, float]) -> str:
        """Writes the values of a step, and returns those that the progress shows."""
        last_step, last_time = self.mark
        self.mark = step, time.monotonic()
        seconds = max(self.mark[1] - last_time, 1e-9)
        wait_fraction, self.waited_s = self.waited_s / seconds, 0.0
        config = self.setup.config
        rate = (step - last_step) * config.batch_size / seconds
        shape = float(jax.device_get(self.setup.built.schedule(step - 1)))
        epoch = self._epoch(step)
        values |= {
            "learning_rate": config.optimizer.learning_rate * shape,
            "images_per_second": rate,
            "data_wait": wait_fraction,
        }
        if self.setup.feed.skipped:
            values["corrupt_images"] = self.setup.feed.skipped
        self.writer.write(step, epoch, "train", values)
        self._warn_of_dead_adapters(values)
        self._warn_of_waiting(wait_fraction)
        loss, speed = (BY_NAME[x].text(values[x]) for x in ("loss", "images_per_second"))
        text = f"epoch {epoch:.1f}, loss {loss}, {speed}"
        if self.mark[1] - self.status_at > STATUS_EVERY_S:
            self.status_at = self.mark[1]
            self.workdir.set_status(
                "running", step, self.setup.resolved.total_steps, "", self.hours_left(), rate
            )
        return text

    def _warn_of_waiting(self, wait: float) -> None:
        """Once, where the device waits for its batches."""
        # The first line has the time of the compiler in it.
        self.waiting = self.waiting + 1 if wait > MOST_WAIT else 0
        if self.waiting == LINES_OF_WAITING:
            log(
                f"WARNING: the steps spend {wait:.0%} of the time waiting for their batches: "
                "`fm-distill profile` shows where it goes; --data.feeding resident, more "
                "data.workers or smaller images help"
            )

    def _warn_of_dead_adapters(self, values: dict[str, float]) -> None:
        """Once for each whose term has a weight and whose kernel has no gradient."""
        for name, value in values.items():
            term = name.removeprefix(ADAPTER_GRADIENT)
            weight = values.get(f"weight_{term}", 1.0)  # not logged where it is the only term
            if term == name or term in self.dead or value > 0 or weight == 0:
                continue
            self.dead.add(term)
            log(
                f"WARNING: the adapter of the term {term} learns nothing: its gradient is zero. "
                "The student's feature may be zero everywhere (dead activations); read another "
                "student_tap, or lower optimizer.learning_rate"
            )

    def _epoch(self, step: int) -> float:
        return step * self.setup.config.batch_size / len(self.setup.reader)


def progress_bar(setup: Setup, start: int) -> Progress:
    """On standard error."""
    total = setup.resolved.total_steps
    return steps_progress(setup.config.name, total, start, first_process())


def introduce(setup: Setup, start: int) -> None:
    """Logs what is about to run, and warns of a teacher that cannot teach."""
    config = setup.config
    shapes = setup.built.abstract_state
    student_size = parameter_count(shapes.student.params)
    teacher_size = sum(
        parameter_count(x.params) for x in setup.teachers.frozen or setup.teachers.teaching
    )
    teacher_text = f", teacher of {teacher_size:,}" if teacher_size else ""
    devices = f"{setup.layout.mesh.size} x {jax.devices()[0].device_kind}"
    log(
        f"{config.name}: student of {student_size:,} parameters{teacher_text}; "
        f"{setup.resolved.total_steps:,} steps of batch size {config.batch_size} on {devices}"
        + (f", continuing after step {start:,}" if start else "")
    )
    log(disk_use(config, setup.resolved.total_steps, bytes_of(shapes)))
    if start < setup.resolved.total_steps:
        log(f"{COMPILING}; then the steps begin")
    recording = setup.feed.recording
    if recording is not None and setup.teachers.frozen:
        log(
            compare_with_teachers(
                config,
                setup.teachers.branches,
                setup.teachers.frozen,
                recording,
                setup.reader,
                setup.layout,
                setup.keys.draws,
            )
        )
    if start == 0:
        for branch, frozen in setup.teachers_to_check:
            for warning in check_teacher(
                config,
                setup.built.student,
                branch,
                frozen,
                setup.reader,
                setup.layout,
                setup.keys.draws,
            ):
                log(warning)


def disk_use(config: Config, total: int, state_bytes: int) -> str:
    """What the run will need on disk, in a sentence."""
    policy = config.checkpoint
    count = policy.keep + 1 + (1 if policy.keep_best else 0)  # one more while it is written
    if policy.keep_every_steps:
        count += total // policy.keep_every_steps
    lines = total // config.log.every_steps
    if config.log.evaluate_every_steps:
        lines += total // config.log.evaluate_every_steps
    return (
        f"disk: up to {count:,} checkpoints of {state_bytes / 1e6:,.1f} MB, "
        f"{count * state_bytes / 1e9:,.2f} GB in all; metrics.jsonl grows to {lines:,} "
        f"lines, about {lines * LINE_BYTES / 1e6:,.1f} MB"
    )
