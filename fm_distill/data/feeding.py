"""One stream of batches, fed in two ways: read as it is needed, or from device memory.

Position p of the stream is example `p % batch_size` of step `p // batch_size`, whoever asks.
`setup.py` makes a feed and `loop.py` calls it; what it yields is the argument of the compiled step
in `step.py`. Device memory: `resident.py`.
"""

import collections
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Array

from fm_distill.config import DataConfig
from fm_distill.data.batch import Batch
from fm_distill.data.images import CorruptImage, decode, on_canvas, shrink
from fm_distill.data.order import example_ids
from fm_distill.data.sources import Source
from fm_distill.errors import UserError
from fm_distill.recordings.reading import RecordingReader
from fm_distill.recordings.shards import RecordedSteps

DEVICE_PREFETCH = 2  # batches in flight while the device works


@dataclasses.dataclass(frozen=True)
class Reader:
    """Example id -> canvas. Random access, and can be sent to a reader process."""

    source: Source
    config: DataConfig
    classes: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Canvas, size, label and whether the image is valid (else it is black, or refused)."""
        raw = self.source[index]
        if raw.label >= self.classes or raw.label < -1:
            raise UserError(
                f"{raw.name} has the label {raw.label}; expected 0 to {self.classes - 1}: set "
                "data.classes, or fix the data"
            )
        try:
            pixels, valid = shrink(decode(raw.image), self.config.canvas), True
        except CorruptImage as error:
            if self.config.corrupt == "stop":
                raise UserError(
                    f"{raw.name} is not a complete image ({error}); remove it, or skip such "
                    "images with --data.corrupt skip"
                ) from None
            pixels, valid = np.zeros((1, 1, 3), np.uint8), False
        return {
            "canvas": on_canvas(pixels, self.config.canvas.side),
            "size": np.array(pixels.shape[:2], np.int32),
            "label": np.int32(raw.label),
            "valid": np.bool_(valid),
            "example": np.int64(index),
        }


@dataclasses.dataclass(frozen=True)
class TrainingStream:
    """This process's share of the stream, as a random access source for Grain."""

    reader: Reader
    seed: int
    total_steps: int
    batch_size: int
    first_row: int  # of each batch, for this process
    rows: int
    period_steps: int | None = None  # after which the order repeats

    def __len__(self) -> int:
        return self.total_steps * self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, row = divmod(int(index), self.rows)
        if self.period_steps:
            step %= self.period_steps
        position = np.array([step * self.batch_size + self.first_row + row])
        example = int(example_ids(self.seed, position, len(self.reader))[0])
        # The next valid image stands for a corrupt one, in both ways of feeding.
        for offset in range(len(self.reader)):
            item = self.reader[(example + offset) % len(self.reader)]
            if item["valid"]:
                return item | {"valid": np.bool_(offset == 0)}
        raise UserError(f"no image of {self.reader.source.identity} can be read")


def read_stream(stream: TrainingStream, start_step: int) -> Iterator[dict[str, np.ndarray]]:
    """The rows of each step from `start_step` on, read and decoded ahead."""
    dataset = grain.MapDataset.source(stream)[start_step * stream.rows :]
    return read_ahead(dataset.batch(stream.rows), stream.reader.config.workers)


def sampled_batches(reader: Reader, seed: int, batch_size: int, examples: int) -> Iterator[Batch]:
    """The first batches of the training's stream, together of at most so many examples, or one.

    This process's rows of each, with the settings of the reader's data.
    """
    steps = max(1, min(examples, len(reader)) // batch_size)
    return first_batches(reader, seed, batch_size, steps)


def first_batches(reader: Reader, seed: int, batch_size: int, steps: int) -> Iterator[Batch]:
    """This process's rows of the first `steps` batches of the training's stream."""
    first, rows = process_rows(batch_size)
    stream = TrainingStream(reader, seed, steps, batch_size, first, rows)
    return map(host_batch, read_stream(stream, 0))


def process_rows(batch_size: int) -> tuple[int, int]:
    """First row and number of rows of each batch that this process feeds."""
    rows = batch_size // jax.process_count()
    return jax.process_index() * rows, rows


class StreamingFeed:
    """Grain reads and decodes ahead; batches are sent to the devices before they are needed."""

    def __init__(
        self,
        reader: Reader,
        seed: int,
        batch_size: int,
        total_steps: int,
        sharding: jax.sharding.Sharding,
        targets: np.ndarray | None = None,  # of each example, where the teachers are fixed
        recording: RecordingReader | None = None,
        period_steps: int | None = None,
    ):
        first, rows = process_rows(batch_size)
        self.stream = TrainingStream(
            reader, seed, total_steps, batch_size, first, rows, period_steps
        )
        self.recording = recording
        self.sharding = sharding
        self.targets = targets
        self.data = None
        self.skipped = 0

    def feed(
        self, start_step: int, dispatches: Iterator[int], skipped_steps: int = 0
    ) -> Iterator[Batch]:
        """For each dispatch, of one step, its batch."""
        rows = self.stream.rows
        stream = dataclasses.replace(
            self.stream, total_steps=self.stream.total_steps + skipped_steps
        )
        items = read_stream(stream, start_step + skipped_steps)
        recorded = self.recording.steps(start_step) if self.recording else None
        ready: collections.deque[Batch] = collections.deque()
        for steps in dispatches:
            assert steps == 1
            while len(ready) < DEVICE_PREFETCH and (item := next(items, None)) is not None:
                self.skipped += int((~item["valid"]).sum())
                batch = host_batch(item)
                if self.targets is not None:
                    batch = dataclasses.replace(batch, targets=self.targets[item["example"]])
                if recorded is not None:
                    local_rows = slice(self.stream.first_row, self.stream.first_row + rows)
                    recorded_steps = jax.tree.map(
                        lambda x, local_rows=local_rows: x[0, local_rows], next(recorded)
                    )
                    refuse_other_examples(recorded_steps, item["example"])
                    batch = dataclasses.replace(batch, recorded=recorded_steps.rows)
                ready.append(jax.tree.map(lambda x: send(x, self.sharding, 0), batch))
            yield ready.popleft()


def refuse_other_examples(found: RecordedSteps, examples: np.ndarray) -> None:
    """Raises `UserError` where the recorded outputs belong to other examples."""
    if not np.array_equal(found.examples, examples):
        row = int(np.argmax((found.examples != examples).ravel()))
        raise UserError(
            f"the recording has example {found.examples.ravel()[row]} where this run has example "
            f"{examples.ravel()[row]}: the data or their order differ; use the data that was "
            "recorded, or record this data"
        )


def evaluation_batches(reader: Reader, batch_size: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Every example once in order, as host batches of this process's rows, and their mask.

    The last batch is padded with black images that the mask leaves out, as are corrupt images.
    """
    first, rows = process_rows(batch_size)
    count = -(-len(reader) // batch_size)
    source = _Padded(reader, batch_size, first, rows, count)
    for item in read_ahead(grain.MapDataset.source(source).batch(rows), 0):
        yield host_batch(item), item["valid"]


@dataclasses.dataclass(frozen=True)
class _Padded:
    reader: Reader
    batch_size: int
    first_row: int
    rows: int
    batches: int

    def __len__(self) -> int:
        return self.batches * self.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch, row = divmod(int(index), self.rows)
        example = batch * self.batch_size + self.first_row + row
        if example < len(self.reader):
            return self.reader[example]
        side = self.reader.config.canvas.side
        return {
            "canvas": np.zeros((side, side, 3), np.uint8),
            "size": np.ones(2, np.int32),
            "label": np.int32(-1),
            "valid": np.bool_(False),
            "example": np.int64(-1),
        }


def read_ahead(dataset: Any, workers: int) -> Iterator[dict[str, np.ndarray]]:
    options = grain.ReadOptions(num_threads=os.cpu_count() or 1, prefetch_buffer_size=64)
    iter_dataset = dataset.to_iter_dataset(options)
    if workers:
        # Grain's worker processes read absl flags, which nobody parses here.
        flags.FLAGS.mark_as_parsed()
        iter_dataset = iter_dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(iter_dataset)


def stack(items: list[dict[str, Any]]) -> Batch:
    """A batch of what a `Reader` returns."""
    names = ("canvas", "size", "label")
    return host_batch({name: np.stack([x[name] for x in items]) for name in names})


def host_batch(item: dict[str, np.ndarray]) -> Batch:
    """What a reader returned for the rows of a batch."""
    return Batch(item["canvas"], item["size"], item["label"])


def send(local: np.ndarray, sharding: jax.sharding.Sharding, batch_axis: int) -> Array:
    """This process's rows, as its part of the global array on the devices."""
    if batch_axis == 1:  # ids are the same in all processes, which hold all of them
        return jax.device_put(local, sharding)
    return jax.make_array_from_process_local_data(sharding, local)
