"""A run opened for its diagnosis: networks, and the batches of its newest steps again."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from fm_distill.config import Config, MeshConfig
from fm_distill.config.regime import Regime, regime_of
from fm_distill.config.teachers import recording_of
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import Reader, TrainingStream, refuse_other_examples, stack
from fm_distill.data.target_images import view_root
from fm_distill.data.transfer import open_training
from fm_distill.errors import UserError
from fm_distill.evaluation.inference import teachers_of_run
from fm_distill.models import Variables
from fm_distill.networks.branch import Branch
from fm_distill.objectives.terms import features_of
from fm_distill.recordings.manifest import open_recording
from fm_distill.recordings.reading import RecordingReader
from fm_distill.runs.checkpoint import abstract, restore_student, restore_terms
from fm_distill.runs.open_run import Run
from fm_distill.runs.remote import is_remote, recording_in
from fm_distill.runs.state import TermState
from fm_distill.system.sharding import Layout, make_layout, on_devices
from fm_distill.train_step.loss import Loss
from fm_distill.train_step.teach import Teach
from fm_distill.train_step.term_state import NOTHING
from fm_distill.training.build import Build, build
from fm_distill.training.quantised_teachers import freeze_teachers
from fm_distill.training.targets import fixed_targets
from fm_distill.views.draws import ViewRoot


@dataclasses.dataclass(frozen=True)
class Examined:
    """What the programs of `probes.py` need, on the devices."""

    run: Run
    config: Config
    regime: Regime
    layout: Layout
    student: Branch
    teachers: tuple[Branch, ...]  # none where only their recorded outputs are here
    evaluated: Variables  # the student, or its average where the run keeps one
    trained: Variables  # the student that the steps move
    terms: TermState  # what the terms of the loss have of their own
    frozen: tuple[Variables, ...]
    # The targets and the loss of a batch, as the step makes them.
    teach: Teach
    loss: Loss
    reader: Reader
    recording: RecordingReader | None
    table: np.ndarray | None  # targets of each example, where the teachers are fixed
    root: ViewRoot

    @property
    def teachers_have_heads(self) -> bool:
        """Whether there are teachers here that have logits."""
        return bool(self.teachers) and all(x.has_head for x in self.teachers)

    @property
    def period_steps(self) -> int:
        """Steps after which order and views repeat."""
        return self.run.resolved.period_steps or self.run.resolved.total_steps

    def steps(self, examples: int) -> range:
        """The newest steps of the run that together have so many examples, if it has them."""
        # Views that repeat are shown once.
        count = -(-examples // self.config.batch_size)
        count = min(count, self.run.step, self.period_steps)
        return range(self.run.step - count, self.run.step)

    def batches(self, steps: range) -> Iterator[tuple[int, np.ndarray, Batch]]:
        """The step as drawn, the examples' places in the training data, and the batch of each."""
        size = self.config.batch_size
        stream = TrainingStream(
            self.reader, self.config.seed, steps.stop, size, 0, size,
            self.run.resolved.period_steps,
        )  # fmt: skip
        for step in steps:
            items = [stream[step * size + row] for row in range(size)]
            examples = np.array([x["example"] for x in items])
            batch = stack(items)
            if self.table is not None:
                batch = dataclasses.replace(batch, targets=self.table[examples])
            if self.recording is not None:
                recorded = jax.tree.map(lambda x: x[0], self.recording.at(step))
                refuse_other_examples(recorded, examples)
                batch = dataclasses.replace(batch, recorded=recorded.rows)
            yield step % self.period_steps, examples, self.layout.spread(batch)


def examine(run: Run, config: Config) -> Examined:
    """Opens data, networks and targets of `run`. Raises `UserError` where one is not here."""
    recorded = recording_of(config)
    regime = regime_of(config)
    # A smaller mesh than the training's: any number of devices that divides a batch.
    layout = make_layout(MeshConfig(data=math.gcd(jax.device_count(), config.batch_size)))
    built = build(config, run.resolved)
    reader = Reader(open_training(config.data), config.data, run.classes)
    if (reader.source.identity, len(reader)) != (run.resolved.data, run.resolved.examples):
        raise UserError(
            f"the run in {run.workdir.path} was trained on {run.resolved.examples:,} examples of "
            f"{run.resolved.data}, but there are {len(reader):,} of {reader.source.identity}; "
            "give the folder of its data with --data.data-dir"
        )
    root = view_root(config, run.resolved, layout)
    loaded = freeze_teachers(
        config, run.resolved, built, teachers_of_run(run, config), reader, layout,
        run.workdir.path, root,
    )  # fmt: skip
    is_live = regime.targets == "teachers"
    teachers, frozen = loaded.branches, loaded.frozen
    if is_live:
        teachers, frozen = built.teachers, loaded.teaching
    recording = table = None
    if recorded is not None:
        path = recording_in(run.workdir.path) if is_remote(recorded) else pathlib.Path(recorded)
        steps = run.resolved.period_steps or run.resolved.total_steps
        taps = features_of(config.objective)[1]
        recording = RecordingReader(open_recording(path), steps, taps)
    if regime.targets == "table":
        table_path = run.workdir.fixed_targets
        if not table_path.is_file():
            raise UserError(
                f"{table_path}, which holds the targets of the run, is missing; restore it"
            )
        table = fixed_targets(config, run.resolved, teachers, frozen, reader, layout, table_path)

    def placed(variables: Variables) -> Variables:
        return on_devices(variables, layout.variables(variables))

    return Examined(
        run=run,
        config=config,
        regime=regime,
        layout=layout,
        student=built.student,
        teachers=teachers,
        evaluated=placed(run.student.variables),
        trained=placed(_trained(run)),
        terms=_terms(run, built, layout),
        frozen=frozen,
        teach=built.teach,
        loss=built.loss,
        reader=reader,
        recording=recording,
        table=table,
        root=root,
    )


def _terms(run: Run, built: Build, layout: Layout) -> TermState:
    abstract_terms = built.abstract_state.terms
    if abstract_terms is None:
        return NOTHING
    shapes = abstract(abstract_terms, layout.variables(abstract_terms))
    return restore_terms(run.workdir.checkpoints / str(run.step), shapes)


def _trained(run: Run) -> Variables:
    """The student itself, where `run.student` is its average."""
    if not run.averaged:
        return run.student.variables
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = abstract(
        run.student.variables, jax.tree.map(lambda _: sharding, run.student.variables)
    )
    return restore_student(run.workdir.checkpoints / str(run.step), shapes, averaged=False)
