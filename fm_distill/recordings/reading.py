"""Recorded steps, read ahead of the steps that use them."""

import concurrent.futures
import dataclasses
from collections.abc import Iterator

import jax

from fm_distill.errors import TrainingFailed
from fm_distill.recordings.manifest import Recording, Shard
from fm_distill.recordings.shards import RecordedSteps, read_shard


@dataclasses.dataclass(frozen=True)
class RecordingReader:
    """The recorded steps of a run whose views repeat after `period_steps`."""

    recording: Recording
    period_steps: int

    def steps(self, start_step: int) -> Iterator[RecordedSteps]:
        """Each step from `start_step` on, without end; the next shard is read in the background.

        Raises `TrainingFailed` before a step whose shard is damaged.
        """
        with concurrent.futures.ThreadPoolExecutor(1, "recording") as pool:
            waiting = (
                pool.submit(self._read, shard, first, last)
                for shard, first, last in self._shards(start_step)
            )
            ahead = next(waiting)
            while True:
                block, ahead = ahead.result(), next(waiting)
                for i in range(block.steps):
                    yield jax.tree.map(lambda x, i=i: x[i : i + 1], block)

    def at(self, step: int) -> RecordedSteps:
        """One step."""
        shard, first, _ = next(self._shards(step))
        return self._read(shard, first, first + 1)

    def _shards(self, step: int) -> Iterator[tuple[Shard, int, int]]:
        """Shards in the order of their use, each with the first and the last step of it."""
        at = step % self.period_steps
        while True:
            for shard in self.recording.shards:
                if shard.stop > at and shard.start < self.period_steps:
                    first = max(at - shard.start, 0)
                    yield shard, first, min(shard.stop, self.period_steps) - shard.start
            at = 0

    def _read(self, shard: Shard, first: int, last: int) -> RecordedSteps:
        block = read_shard(self.recording.path / shard.name, first, last)
        if block.steps != last - first:
            raise TrainingFailed(
                f"the shard {self.recording.path / shard.name} is shorter than its manifest says; "
                "bring it back from a copy, or remove it and run `fm-distill record` again"
            )
        return block
