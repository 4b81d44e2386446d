"""What `train.py` builds before its first step: data, teacher, program, evaluation."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from fm_distill.config import Config
from fm_distill.config.steps import total_steps
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import Reader, StreamingFeed, evaluation_batches
from fm_distill.data.resident import ResidentFeed, is_resident
from fm_distill.data.sources import Source
from fm_distill.data.splits import Data
from fm_distill.evaluation.evaluate import Evaluator
from fm_distill.models import Variables
from fm_distill.networks.branch import frozen_teachers
from fm_distill.networks.loading import Networks, with_student
from fm_distill.runs.state import TrainState
from fm_distill.system.sharding import Layout
from fm_distill.training.build import Build, build
from fm_distill.training.dispatch import steps_per_dispatch
from fm_distill.training.program import make_program
from fm_distill.training.targets import fixed_targets

# Decoded validation images are kept on the host between evaluations up to this size.
CACHE_BYTES = 2**30


def remarks_on(config: Config, steps: int) -> list[str]:
    """What is likely to be a mistake, though it can be run."""
    remarks = []
    warmup = config.schedule.warmup_steps
    if warmup > steps / 5:
        remarks.append(
            f"WARNING: the warm-up of {warmup:,} steps is {warmup / steps:.0%} of the run of "
            f"{steps:,}: the learning rate has little time at its height"
        )
    return remarks


def _remarks_on_canvas(size: int, built: Build) -> list[str]:
    branches = [("student", built.student), *(("teacher", branch) for branch in built.teachers)]
    return [
        f"WARNING: the canvas (data.canvas.size={size}) is smaller than the {name}'s resolution "
        f"{branch.input_spec.resolution}: even the largest crop is enlarged"
        for name, branch in branches
        if size < branch.input_spec.resolution
    ]


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that the loop calls."""

    config: Config
    total_steps: int
    built: Build
    layout: Layout
    feed: ResidentFeed | StreamingFeed
    reader: Reader
    frozen: tuple[Variables, ...]  # of all teachers
    networks: Networks
    program: Callable[..., tuple[TrainState, dict[str, Array]]]
    dispatch: int  # steps a dispatch
    evaluator: Evaluator
    validation: Callable[[], Iterable[tuple[Batch, np.ndarray]]] | None
    final: Callable[[], Iterable[tuple[Batch, np.ndarray]]]
    final_split: str

    def slowed(self, factor: float) -> "Setup":
        """The same with all learning rates times `factor`."""
        optimizer = self.config.optimizer
        head = optimizer.head_learning_rate
        optimizer = dataclasses.replace(
            optimizer,
            learning_rate=optimizer.learning_rate * factor,
            head_learning_rate=None if head is None else head * factor,
        )
        config = dataclasses.replace(self.config, optimizer=optimizer)
        seen = tuple(teacher.network for teacher in self.networks.teachers)
        built = build(config, self.networks.classes, seen, self.total_steps, self.layout)
        program = make_program(
            built.train_step, built.abstract_state(), self.taught_by, self.feed.data, self.layout
        )
        return dataclasses.replace(self, config=config, built=built, program=program)

    @property
    def taught_by(self) -> tuple[Variables, ...]:
        """The frozen teachers that the step runs."""
        return self.frozen[: len(self.built.taught_by)]

    @functools.cached_property
    def keys(self) -> tuple[PRNGKeyArray, PRNGKeyArray]:
        """For the student's init, and the root of all draws."""

        def split() -> tuple[PRNGKeyArray, PRNGKeyArray]:
            init_key, root_key = jax.random.split(jax.random.key(self.config.seed))
            return init_key, root_key

        return jax.jit(split, out_shardings=self.layout.replicated)()


def prepare(
    config: Config, data: Data, networks: Networks, layout: Layout, kept: pathlib.Path
) -> tuple[Setup, list[str]]:
    """Decodes or starts to read the data, puts the teachers on the devices, makes the programs.

    `kept` is the file for the targets of fixed teachers.
    """
    steps = total_steps(config, len(data.train))
    config, classes = with_student(config, networks.student), networks.classes
    seen = tuple(teacher.network for teacher in networks.teachers)
    built = build(config, classes, seen, steps, layout)
    frozen = frozen_teachers(built.teachers, tuple(x.variables for x in networks.teachers), layout)
    reader = Reader(data.train, config.data, classes)
    resident, reason = is_resident(config.data, len(reader))
    remarks = _remarks_on_canvas(config.data.canvas.size, built)
    remarks.append(f"feeding: {'resident' if resident else 'streaming'} ({reason})")
    targets = None
    if config.objective.target == "teacher" and config.teaching == "fixed":
        targets = fixed_targets(config, built.teachers, frozen, reader, layout, kept)
    feed: ResidentFeed | StreamingFeed
    if resident:
        feed = ResidentFeed(
            reader, config.seed, config.batch_size, layout.replicated, layout.ids, targets
        )
        if feed.skipped:
            remarks.append(f"WARNING: {feed.skipped} corrupt images are skipped")
    else:
        feed = StreamingFeed(reader, config.seed, config.batch_size, steps, layout.batch, targets)
    taught = frozen[: len(built.taught_by)]
    program = make_program(built.train_step, built.abstract_state(), taught, feed.data, layout)

    def batches(source: Source) -> Callable[[], Iterator[tuple[Batch, np.ndarray]]]:
        held_out = Reader(source, config.data, classes)
        return lambda: evaluation_batches(held_out, config.batch_size)

    final_split, final = data.final
    setup = Setup(
        config=config,
        total_steps=steps,
        built=built,
        layout=layout,
        feed=feed,
        reader=reader,
        frozen=frozen,
        networks=networks,
        program=program,
        dispatch=steps_per_dispatch(config, resident, layout),
        evaluator=Evaluator.make(config, built.student, built.teachers, layout),
        validation=_cached(batches(data.validation), config, data.validation)
        if data.validation
        else None,
        final=batches(final),
        final_split=final_split,
    )
    return setup, remarks


def _cached(
    batches: Callable[[], Iterator[tuple[Batch, np.ndarray]]], config: Config, source: Source
) -> Callable[[], Iterable[tuple[Batch, np.ndarray]]]:
    """`batches`, kept on the host after the first time where they are small enough."""
    if len(source) * config.data.canvas.side**2 * 3 > CACHE_BYTES:
        return batches
    kept: list[tuple[Batch, np.ndarray]] = []

    def again() -> Iterable[tuple[Batch, np.ndarray]]:
        if not kept:
            kept.extend(batches())
        return kept

    return again
