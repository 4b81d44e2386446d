"""Recorded steps, read ahead of the steps that use them."""

import concurrent.futures
import dataclasses
from collections.abc import Iterator

import jax

from fm_distill.errors import TrainingFailed, UserError
from fm_distill.recordings.manifest import Recording, Shard
from fm_distill.recordings.shards import RecordedSteps, read_shard


@dataclasses.dataclass(frozen=True)
class RecordingReader:
    """The recorded steps of a run whose views repeat after `period_steps`."""

    recording: Recording
    period_steps: int
    # Whose features are read; the others stay on the disk.
    taps: tuple[str, ...] = ()

    def steps(self, start_step: int) -> Iterator[RecordedSteps]:
        """Each step from `start_step` on, without end; the next shard is read in the background.

        Where a shard is damaged, raises `UserError` if it has `start_step`, `TrainingFailed` before
        a later step.
        """
        shards = self._shards(start_step)
        block = self._read_at_start(*next(shards))
        with concurrent.futures.ThreadPoolExecutor(1, "recording") as pool:
            while True:
                next_read = pool.submit(self._read, *next(shards))
                for i in range(block.steps):
                    yield jax.tree.map(lambda x, i=i: x[i : i + 1], block)
                block = next_read.result()

    def at(self, step: int) -> RecordedSteps:
        """One step, for checks before the training or beside it.

        Raises `UserError` where its shard is damaged.
        """
        shard, first, _ = next(self._shards(step))
        return self._read_at_start(shard, first, first + 1)

    def _shards(self, step: int) -> Iterator[tuple[Shard, int, int]]:
        """Shards in the order of their use, each with the first and the last step of it."""
        position = step % self.period_steps
        while True:
            for shard in self.recording.shards:
                if shard.stop > position and shard.start < self.period_steps:
                    first = max(position - shard.start, 0)
                    yield shard, first, min(shard.stop, self.period_steps) - shard.start
            position = 0

    def _read_at_start(self, shard: Shard, first: int, last: int) -> RecordedSteps:
        try:
            return self._read(shard, first, last)
        except TrainingFailed as error:  # nothing was trained
            raise UserError(str(error)) from None

    def _read(self, shard: Shard, first: int, last: int) -> RecordedSteps:
        block = read_shard(self.recording.path / shard.name, first, last, self.taps)
        if block.steps != last - first:
            raise TrainingFailed(
                f"the shard {self.recording.path / shard.name} is shorter than its manifest says; "
                "restore it from a copy, or remove it and run `fm-distill record` again"
            )
        return block
