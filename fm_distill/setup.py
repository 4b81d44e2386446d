"""What `train.py` builds before its first step: data, teacher, program, evaluation."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from fm_distill.build import Build, build, steps_per_dispatch
from fm_distill.config import Config, SplitConfig
from fm_distill.data.feeding import (
    Batch,
    Reader,
    StreamingFeed,
    evaluation_batches,
)
from fm_distill.data.resident import ResidentFeed, is_resident
from fm_distill.data.sources import Source, open_source
from fm_distill.data.transfer import open_training
from fm_distill.evaluate import Evaluator
from fm_distill.length import total_steps, transfer_examples
from fm_distill.models import Network, Variables
from fm_distill.networks import Networks, with_student
from fm_distill.run import Teacher
from fm_distill.sharding import Layout, on_devices
from fm_distill.step import TrainState, make_program
from fm_distill.targets import fixed_targets

# Decoded validation images are kept on the host between evaluations up to this size.
CACHE_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Data:
    """The opened splits of a run."""

    train: Source
    validation: Source | None
    test: Source | None

    @property
    def final(self) -> tuple[str, Source]:
        """The split that a complete run is judged on."""
        for name, source in (("test", self.test), ("validation", self.validation)):
            if source is not None:
                return name, source
        return "train", self.train


def open_data(config: Config) -> tuple[Data, list[str]]:
    """All splits that the experiment names, and what is worth saying. Raises `UserError`."""

    def opened(split: SplitConfig | None) -> Source | None:
        return None if split is None else open_source(config.data, split.name)

    data = config.data
    train = open_training(data)
    remarks = []
    if (said := transfer_examples(data)) is not None and said != len(train):
        option = "data.transfer.examples" if data.transfer else "data.train.examples"
        remarks.append(
            f"WARNING: {option} is {said:,}, but {train.identity} has {len(train):,}; the run's "
            "length follows the data"
        )
    return Data(train, opened(data.validation), opened(data.test)), remarks


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
    seats = [("student", built.student), *(("teacher", seat) for seat in built.teachers)]
    return [
        f"WARNING: the canvas (data.canvas.size={size}) is smaller than the {name}'s resolution "
        f"{seat.picture.resolution}: even the largest crop is enlarged"
        for name, seat in seats
        if size < seat.picture.resolution
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
    frozen = frozen_teachers(built, networks.teachers, layout)
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


def frozen_teachers(
    built: Build, teachers: tuple[Teacher, ...], layout: Layout
) -> tuple[Variables, ...]:
    """The frozen variables of each of `built.teachers`."""
    return tuple(
        freeze_on_devices(seat.network, teacher.variables, layout)
        for seat, teacher in zip(built.teachers, teachers, strict=True)
    )


def freeze_on_devices(network: Network, variables: Variables, layout: Layout) -> Variables:
    """The frozen form of `variables`, computed once, where the step wants it."""
    variables = on_devices(variables, layout.variables(variables))
    shapes = jax.eval_shape(network.freeze, variables)
    return jax.jit(network.freeze, out_shardings=layout.variables(shapes))(variables)


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
