"""The loop: dispatch steps, log, evaluate, save, until the end or until something asks to stop.

Nothing numerical is done here, and nothing is built here; `train.py` does.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax

from fm_distill.data.resident import Fed
from fm_distill.runs.checkpoint import CheckpointWriter
from fm_distill.runs.state import TrainState
from fm_distill.system.preemption import Stop, Stopped
from fm_distill.system.processes import agreed, only_process
from fm_distill.train_step.step import Metrics
from fm_distill.training.dispatch import dispatch_sizes, due
from fm_distill.training.reporter import Reporter
from fm_distill.training.setup import Setup
from fm_distill.views.draws import ViewRoot

# Of the time that a checkpoint and a dispatch took at most, for the next ones may take longer.
RESERVE = 1.5
RESERVE_S = 2.0


@dataclasses.dataclass
class Loop:
    """One session of a run, from the state of a checkpoint on."""

    setup: Setup
    checkpoints: CheckpointWriter
    reporter: Reporter
    stop: Stop
    metadata: dict[str, Any]  # with each checkpoint; see `train.py`
    skipped_steps: int  # batches of the stream that are left out; see `rollback.py`

    def run(
        self, state: TrainState, step: int, evaluation_pending: bool
    ) -> tuple[TrainState, int, str | None]:
        """From `step` on. Returns the state, the steps done, and why it stopped before the end.

        All is on disk then. `evaluation_pending`: that of `step` is to be done. Raises `Diverged`,
        and `TrainingFailed` where the disk does not take a checkpoint.
        """
        setup, config, total = self.setup, self.setup.config, self.setup.resolved.total_steps
        root = setup.keys.draws
        start, steps, reason, slowest_s = step, 0, None, 0.0
        sizes, feed_sizes = itertools.tee(
            dispatch_sizes(step, total, setup.resolved.steps_per_dispatch)
        )
        fed_batches: Iterator[Fed] = setup.feed.feed(
            step, feed_sizes, skipped_steps=self.skipped_steps
        )
        if evaluation_pending and (reason := self._evaluate(state, step, RESERVE_S)) is None:
            evaluation_pending = False
        while reason is None and step < total:
            reserve_s = RESERVE_S + RESERVE * (self.checkpoints.slowest_s + slowest_s)
            if reason := self._asked(step, steps, reserve_s):
                break
            start_time = time.monotonic()
            steps, batch = next(sizes), next(fed_batches)
            self.reporter.waited(time.monotonic() - start_time)
            state, metrics = self._dispatch(state, batch, root)
            self.stop.busy()
            self.stop.progressed()
            step += steps
            self.reporter.dispatched(step, steps, metrics)
            if step > start + steps:  # the first one waits for the compiler
                slowest_s = max(slowest_s, time.monotonic() - start_time)
            if step == total:
                state = setup.with_final_statistics(state)
            improved = False
            evaluate_every = config.log.evaluate_every_steps
            if setup.validation and (
                due(evaluate_every, step, steps) or (evaluate_every and step == total)
            ):
                self.reporter.catch_up()
                reason = self._evaluate(state, step, reserve_s)
                evaluation_pending = reason is not None
                improved = self.checkpoints.is_best(self.reporter.figures.get(step, {}))
            if step < total and (improved or due(config.checkpoint.every_steps, step, steps)):
                self._save(state, step, evaluation_pending)
        if step > start:
            self._save(state, step, evaluation_pending)
            self.checkpoints.wait()
        return state, step, reason

    def _dispatch(
        self, state: TrainState, batch: Fed, root: ViewRoot
    ) -> tuple[TrainState, Metrics]:
        setup = self.setup
        # An implicit transfer to the devices would delay every step.
        with jax.transfer_guard("disallow"):
            return setup.program(state, setup.live_teachers, setup.feed.data, batch, root)

    def _asked(self, step: int, steps: int, reserve_s: float) -> str | None:
        """Why to stop. Several processes agree on it where a line is logged."""
        reason = self.stop.reason(reserve_s)
        if only_process():
            return reason
        return agreed(reason) if due(self.setup.config.log.every_steps, step, steps) else None

    def _evaluate(self, state: TrainState, step: int, reserve_s: float) -> str | None:
        """Student against teacher on the validation split, or why that was left."""
        setup = self.setup
        assert setup.validation is not None
        batches = setup.validation()
        # Several processes have to run the same batches.
        checked = self.stop.checked(batches, reserve_s) if only_process() else batches
        student = state.ema or state.student
        try:
            figures = setup.evaluator(student, setup.teachers.frozen, checked, "validation", step)
        except Stopped as stopped:
            return str(stopped)
        self.reporter.evaluated(figures)
        return None

    def _save(self, state: TrainState, step: int, evaluation_pending: bool) -> None:
        self.reporter.catch_up()  # a state whose loss is not finite must not replace a good one
        self.reporter.writer.flush()
        figures = {} if evaluation_pending else self.reporter.figures.get(step, {})
        self.checkpoints.save(
            state,
            self.metadata
            | {"step": step, "validation": figures, "evaluation_pending": evaluation_pending},
        )
