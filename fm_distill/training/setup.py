"""What `train.py` builds before its first step: data, teacher, program, evaluation."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from fm_distill.config import Config
from fm_distill.config.regime import regime_of
from fm_distill.config.resolved import ResolvedRun
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import (
    Reader,
    StreamingFeed,
    evaluation_batches,
    sampled_batches,
)
from fm_distill.data.resident import ResidentFeed, feeding_note
from fm_distill.data.sources import Source
from fm_distill.data.splits import Data
from fm_distill.data.target_images import spectra_note, spectra_on_devices
from fm_distill.evaluation.evaluate import Evaluator
from fm_distill.models import Variables
from fm_distill.networks.batch_statistics import with_central_statistics
from fm_distill.networks.branch import Branch
from fm_distill.networks.loading import Networks
from fm_distill.objectives.terms import features_of
from fm_distill.recordings.reading import RecordingReader
from fm_distill.runs.state import TrainState
from fm_distill.runs.workdir import Workdir
from fm_distill.system.sharding import Layout
from fm_distill.train_step.program import make_program
from fm_distill.training.build import Build, build
from fm_distill.training.quantised_teachers import FrozenTeachers, freeze_teachers
from fm_distill.training.recorded import check_recording, repeated
from fm_distill.training.targets import fixed_targets
from fm_distill.views.draws import RunKeys, ViewRoot, run_keys
from fm_distill.views.fourier import Spectra
from fm_distill.views.rendering import CentralCrop

# Decoded validation images are kept on the host between evaluations up to this size.
CACHE_BYTES = 2**30
# Of `student.final_statistics`. Wu and Johnson 2021, section 3: 1,000 to 10,000 images are enough.
STATISTICS_EXAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that the loop calls."""

    config: Config
    resolved: ResolvedRun
    built: Build
    layout: Layout
    feed: ResidentFeed | StreamingFeed
    reader: Reader
    teachers: FrozenTeachers  # none where only their recorded outputs are here
    networks: Networks
    keys: RunKeys
    program: jax.stages.Wrapped
    evaluator: Evaluator
    validation: Callable[[], Iterable[tuple[Batch, np.ndarray]]] | None
    final: Callable[[], Iterable[tuple[Batch, np.ndarray]]]
    final_split: str

    def slowed(self, factor: float) -> "Setup":
        """The same with all learning rates times `factor`."""
        optimizer = self.config.optimizer
        head, adapters = optimizer.head_learning_rate, optimizer.adapter_learning_rate
        optimizer = dataclasses.replace(
            optimizer,
            learning_rate=optimizer.learning_rate * factor,
            head_learning_rate=None if head is None else head * factor,
            adapter_learning_rate=None if adapters is None else adapters * factor,
        )
        config = dataclasses.replace(self.config, optimizer=optimizer)
        built = build(config, self.resolved)
        program = make_program(
            built.train_step,
            built.abstract_state,
            self.live_teachers,
            self.feed.data,
            self.layout,
        )
        return dataclasses.replace(self, config=config, built=built, program=program)

    @property
    def live_teachers(self) -> tuple[Variables, ...]:
        """The frozen teachers that the step runs."""
        return self.teachers.live(self.built)

    @property
    def teachers_to_check(self) -> tuple[tuple[Branch, Variables], ...]:
        """Those that are here, in floats."""
        if self.resolved.headless:
            return tuple(zip(self.built.live_teachers, self.live_teachers, strict=True))
        return tuple(zip(self.teachers.branches, self.teachers.frozen, strict=True))

    def with_final_statistics(self, state: TrainState) -> TrainState:
        """The state after the last step, with the statistics that it is to be used with."""
        config = self.config
        if config.student.final_statistics == "kept":
            return state
        batches = sampled_batches(self.reader, config.seed, config.batch_size, STATISTICS_EXAMPLES)
        student = with_central_statistics(
            self.built.student,
            state.ema or state.student,
            batches,
            CentralCrop.of(config.views),
            self.layout,
        )
        if state.ema is not None:
            return dataclasses.replace(state, ema=student)
        return dataclasses.replace(state, student=student)


def keys_on_devices(config: Config, layout: Layout, spectra: Spectra | None) -> RunKeys:
    """The keys of the run, on all devices; `spectra` are there already."""

    def keys() -> RunKeys:
        return run_keys(config.seed, config.student.seed)

    device_keys: RunKeys = jax.jit(keys, out_shardings=layout.replicated)()
    return device_keys._replace(draws=dataclasses.replace(device_keys.draws, spectra=spectra))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the steps read beside their state."""

    reader: Reader
    teachers: FrozenTeachers  # none where only their recorded outputs are here
    recording: RecordingReader | None
    targets: np.ndarray | None  # of each example, where the teachers are fixed


def open_inputs(
    config: Config,
    resolved: ResolvedRun,
    built: Build,
    data: Data,
    networks: Networks,
    layout: Layout,
    folder: pathlib.Path,
    root: ViewRoot,
) -> Inputs:
    """Puts the teachers on the devices and checks the recording, if there is one.

    The targets of fixed teachers and the ranges of quantised ones are kept in `folder`. Raises
    `UserError`.
    """
    reader = Reader(data.train, config.data, resolved.classes)
    recording = None
    if networks.recording is not None:
        steps = resolved.period_steps or resolved.total_steps
        check_recording(config, resolved, networks.recording, reader, steps)
        taps = features_of(config.objective)[1]
        recording = RecordingReader(networks.recording, steps, taps)
    teachers = freeze_teachers(
        config, resolved, built, networks.teachers, reader, layout, folder, root
    )
    targets = None
    if regime_of(config).targets == "table":
        branches, frozen = teachers.branches, teachers.frozen
        table_path = Workdir(folder).fixed_targets
        targets = fixed_targets(config, resolved, branches, frozen, reader, layout, table_path)
    return Inputs(reader, teachers, recording, targets)


def prepare(
    config: Config,
    resolved: ResolvedRun,
    data: Data,
    networks: Networks,
    layout: Layout,
    folder: pathlib.Path,
) -> tuple[Setup, list[str]]:
    """Decodes or starts to read the data, puts the teachers on the devices, makes the programs.

    The targets of fixed teachers and the ranges of quantised ones are kept in `folder`. Also
    returns what is worth saying.
    """
    built = build(config, resolved)
    keys = keys_on_devices(config, layout, spectra_on_devices(config, resolved, layout))
    inputs = open_inputs(config, resolved, built, data, networks, layout, folder, keys.draws)
    reader, teachers = inputs.reader, inputs.teachers
    notes = [f"feeding: {resolved.feeding} ({feeding_note(config.data, len(reader))})"]
    notes += repeated(resolved, config.batch_size)
    notes += [*spectra_note(keys.draws.spectra), *teachers.notes]
    feed: ResidentFeed | StreamingFeed
    if resolved.feeding == "resident":
        feed = ResidentFeed(
            reader,
            config.seed,
            config.batch_size,
            layout.replicated,
            layout.ids,
            inputs.targets,
            inputs.recording,
            resolved.period_steps,
        )
        if feed.skipped:
            notes.append(f"WARNING: {feed.skipped} corrupt images are skipped")
    else:
        feed = StreamingFeed(
            reader,
            config.seed,
            config.batch_size,
            resolved.total_steps,
            layout.batch,
            inputs.targets,
            inputs.recording,
            resolved.period_steps,
        )
    live_variables = teachers.live(built)
    program = make_program(
        built.train_step, built.abstract_state, live_variables, feed.data, layout
    )

    def batches(source: Source) -> Callable[[], Iterator[tuple[Batch, np.ndarray]]]:
        split_reader = Reader(source, config.data, resolved.classes)
        return lambda: evaluation_batches(split_reader, config.batch_size)

    final_split, final = data.final
    setup = Setup(
        config=config,
        resolved=resolved,
        built=built,
        layout=layout,
        feed=feed,
        reader=reader,
        teachers=teachers,
        networks=networks,
        keys=keys,
        program=program,
        evaluator=Evaluator.make(
            config, built.student, teachers.branches, layout, resolved.class_counts
        ),
        validation=_cached(batches(data.validation), config, data.validation)
        if data.validation
        else None,
        final=batches(final),
        final_split=final_split,
    )
    return setup, notes


def _cached(
    batches: Callable[[], Iterator[tuple[Batch, np.ndarray]]], config: Config, source: Source
) -> Callable[[], Iterable[tuple[Batch, np.ndarray]]]:
    """`batches`, kept on the host after the first time where they are small enough."""
    if len(source) * config.data.canvas.side**2 * 3 > CACHE_BYTES:
        return batches
    cached: list[tuple[Batch, np.ndarray]] = []

    def again() -> Iterable[tuple[Batch, np.ndarray]]:
        if not cached:
            cached.extend(batches())
        return cached

    return again
