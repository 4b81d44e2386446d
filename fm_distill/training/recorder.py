"""A session of recording: passes of the teachers over a run's views, and the shards they fill.

What a pass computes is in `record_program.py`.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32

from fm_distill.config import Config
from fm_distill.config.regime import regime_of
from fm_distill.config.resolved import ResolvedRun
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import Reader, TrainingStream, host_batch, read_stream, send
from fm_distill.data.resident import ResidentFeed, ResidentSteps
from fm_distill.data.target_images import view_root
from fm_distill.errors import UserError
from fm_distill.models import Variables
from fm_distill.networks.teachers import Teacher
from fm_distill.recordings.header import RecordingHeader
from fm_distill.recordings.manifest import ManifestWriter, Recording
from fm_distill.recordings.reading import RecordingReader
from fm_distill.recordings.rows import encode, encode_features, unseen
from fm_distill.recordings.shards import RecordedSteps
from fm_distill.recordings.status import unseen_text
from fm_distill.recordings.writing import ShardWriter
from fm_distill.runs.stored_run import versions
from fm_distill.system.console import COMPILING, log, steps_progress
from fm_distill.system.preemption import Stop
from fm_distill.system.sharding import Layout
from fm_distill.training.build import build
from fm_distill.training.dispatch import dispatch_sizes
from fm_distill.training.quantised_teachers import freeze_teachers
from fm_distill.training.record_program import (
    PassOutputs,
    RecordProgram,
    by_step,
    make_record_program,
)
from fm_distill.training.recorded import digests_of_draw
from fm_distill.views.draws import ViewRoot
from fm_distill.views.rendering import InputSpec

# Images of each device in one forward pass; a batch that has fewer is joined with the next ones.
PASS_IMAGES = 256
RESERVE_S = 5.0
# Mean difference of logits over their mean size, up to which they are the same on another device.
SAME = 0.02

# For each pass its first step, its examples on the host, and what the program gets.
Passes = Iterator[tuple[int, Int32[np.ndarray, "steps batch"], Batch | ResidentSteps]]


@dataclasses.dataclass(frozen=True)
class Recorder:
    """What a session calls for each pass."""

    config: Config
    resolved: ResolvedRun
    header: RecordingHeader
    program: RecordProgram
    frozen: tuple[Variables, ...]
    teachers: tuple[Teacher, ...]
    reader: Reader
    feed: ResidentFeed | None  # None: streaming
    layout: Layout
    root: ViewRoot

    @classmethod
    def make(
        cls,
        config: Config,
        resolved: ResolvedRun,
        teachers: tuple[Teacher, ...],
        reader: Reader,
        layout: Layout,
        header: RecordingHeader,
        folder: pathlib.Path,
    ) -> "Recorder":
        """Puts the teachers, and resident data, on the devices.

        The ranges of quantised teachers are kept in `folder`.
        """
        root = view_root(config, resolved, layout)
        built = build(config, resolved)
        frozen = freeze_teachers(config, resolved, built, teachers, reader, layout, folder, root)
        for note in frozen.notes:
            log(note)
        feed = None
        if resolved.feeding == "resident":
            feed = ResidentFeed(
                reader, config.seed, config.batch_size, layout.replicated, layout.ids
            )
        view_sampling = regime_of(config).views
        rendered_specs = tuple(sorted({InputSpec.of(x.network) for x in teachers if x.function}))
        program = make_record_program(
            config, view_sampling, built.teachers, layout, rendered_specs, header.tap_names
        )
        return cls(
            config, resolved, header, program, frozen.teaching, teachers, reader, feed, layout, root
        )

    def run(
        self, folder: pathlib.Path, missing: tuple[tuple[int, int], ...], stop: Stop
    ) -> tuple[str, float | None]:
        """Records the ranges. Returns why it stopped before their end, and the hours left.

        Raises `UserError` where the disk does not take a shard; those before it stay.
        """
        count = sum(b - a for a, b in missing)
        log(f"{COMPILING}; then the steps begin")
        session = {"versions": versions(), "devices": [str(x.device_kind) for x in jax.devices()]}
        start_time, done_steps, reason = 0.0, 0, ""
        hidden: list[tuple[float, float]] = []
        with (
            contextlib.closing(steps_progress(self.config.name, count, 0, True)) as bar,
            contextlib.closing(ManifestWriter(folder, self.header, session)) as manifest,
            # Where a teacher fails, the steps before are kept.
            contextlib.closing(ShardWriter(folder, manifest, self.header, stop)) as writer,
        ):
            for first, last in missing:
                pending = None
                for step, examples, fed in self._passes(first, last):
                    if reason := stop.reason(RESERVE_S) or "":
                        break
                    outputs = self._outputs(step, fed)
                    # The host encodes a pass while the devices compute the next one.
                    if pending is not None:
                        self._add(writer, pending, hidden)
                        bar.update(len(pending[1]))
                    pending = step, examples, outputs
                    done_steps += len(examples)
                    start_time = start_time or time.monotonic()
                    stop.progressed()
                if pending is not None:
                    self._add(writer, pending, hidden)
                writer.close()
                if reason:
                    break
        pace_s = (time.monotonic() - start_time) / done_steps if done_steps else None
        if pace_s:
            rate = self.config.batch_size / pace_s
            log(
                f"recorded {done_steps:,} steps at {rate:,.0f} images a second; "
                f"{self._kept(hidden)}"
            )
        return reason, None if pace_s is None else (count - done_steps) * pace_s / 3600

    def _add(
        self,
        writer: ShardWriter,
        late: tuple[int, Int32[np.ndarray, "steps batch"], PassOutputs],
        hidden: list[tuple[float, float]],
    ) -> None:
        steps = self._encoded(*late, hidden)
        writer.add(late[0], steps, hidden[-1] if hidden else None)

    def check(self, before: Recording) -> None:
        """Raises `UserError` where the teachers' outputs are not those that `before` recorded."""
        if not before.shards:
            return
        step = before.shards[-1].stop - 1
        _, examples, fed = next(iter(self._passes(step, step + 1)))
        outputs = self._outputs(step, fed)
        current = self._encoded(step, examples, outputs, []).rows
        recorded = RecordingReader(before, step + 1, self.header.tap_names).at(step).rows
        pairs = {"the logits": (recorded.values, current.values)}
        pairs |= {x: (y, current.features[x]) for x, y in recorded.features.items()}
        for name, pair in pairs.items():
            a, b = (np.asarray(x, np.float32) for x in pair)
            difference, size = float(np.abs(a - b).mean()), float(np.abs(a).mean())
            if difference > SAME * size:
                raise UserError(
                    f"the teachers' outputs are not those that {before.path} recorded: in step "
                    f"{step:,} {name} differ by {difference:.3g} on average, where their mean "
                    f"magnitude is {size:.3g}; use the same weights, or another --to"
                )

    def _outputs(self, step: int, fed: Batch | ResidentSteps) -> PassOutputs:
        data = self.feed.data if self.feed else None
        return self.program(self.frozen, data, fed, self.root, jnp.int32(step))

    def _encoded(
        self,
        step: int,
        examples: Int32[np.ndarray, "steps batch"],
        outputs: PassOutputs,
        hidden: list[tuple[float, float]],
    ) -> RecordedSteps:
        """What is stored of a pass; adds to `hidden` what a top-K recording does not know."""
        logits = self._logits(outputs, len(examples))
        if not np.isfinite(logits).all():
            raise UserError(
                f"the teacher's outputs in step {step:,} are not finite: are its weights and "
                "input_range right, and does --precision float32 help?"
            )
        header, temperature = self.header, self.header.temperature or 1.0
        if header.top_k is not None:
            hidden.append(unseen(logits, header.top_k, temperature))
        rows = encode(logits, header.dtype, header.top_k, temperature)
        features = encode_features(jax.device_get(outputs.features), header.dtype, step)
        rows = dataclasses.replace(rows, features=features)
        return RecordedSteps(rows, examples, digests_of_draw(jax.device_get(outputs.draws)))

    def _logits(
        self, outputs: PassOutputs, steps: int
    ) -> Float[np.ndarray, "steps batch teachers classes"]:
        """Of networks and functions, in the order of the teachers."""
        network_logits = jax.device_get(outputs.logits)
        columns = iter(() if network_logits is None else np.moveaxis(network_logits, 2, 0))
        logits = []
        for teacher in self.teachers:
            if teacher.function is None:
                logits.append(next(columns))
                continue
            images = np.asarray(outputs.views[InputSpec.of(teacher.network)])
            logits.append(by_step(teacher.function(images), steps))
        return np.stack(logits, axis=2)

    def _kept(self, hidden: list[tuple[float, float]]) -> str:
        if self.header.top_k is None:
            return f"all {self.header.classes:,} classes in {self.header.dtype}"
        mass, nats = np.mean(hidden, axis=0)
        return unseen_text(self.header, float(mass), float(nats))

    def _passes(self, first: int, last: int) -> Passes:
        if self.feed is None:
            yield from self._streamed(first, last)
            return
        most_steps = max(1, PASS_IMAGES * self.layout.mesh.size // self.config.batch_size)
        size = min(self.resolved.steps_per_dispatch, most_steps)
        step = first
        for steps in dispatch_sizes(first, last, size):
            ids = self.feed.ids(np.arange(step, step + steps))
            yield step, ids, ResidentSteps(send(ids, self.layout.ids, 1))
            step += steps

    def _streamed(self, first: int, last: int) -> Passes:
        size = self.config.batch_size
        stream = TrainingStream(self.reader, self.config.seed, last, size, 0, size)
        for step, item in enumerate(read_stream(stream, first), first):
            batch = jax.tree.map(lambda x: send(x, self.layout.batch, 0), host_batch(item))
            yield step, item["example"][None].astype(np.int32), batch
