"""Consecutive steps, gathered into shards that are written in the background."""

import concurrent.futures
import pathlib
import time

import jax
import numpy as np

from fm_distill.errors import UserError
from fm_distill.recordings.header import RecordingHeader
from fm_distill.recordings.manifest import ManifestWriter, Shard
from fm_distill.recordings.rows import RowType, row_bytes
from fm_distill.recordings.shards import RecordedSteps, shard_name, write_shard
from fm_distill.system.preemption import Stop

SHARD_BYTES = 2**26
SHARD_STEPS = 64, 512  # at least, unless the session ends before, and at most
# A shard is closed after this time, so that no more is lost where the process is killed.
SHARD_S = 600.0
IDENTITY_BYTES = 12  # of a row: its example and the digest of its view


def example_bytes(
    classes: int, teachers: int, dtype: RowType, top_k: int | None, channels: int
) -> int:
    """What one example of a step needs on disk; `channels` are those of all its features."""
    row_size = row_bytes(classes, teachers, dtype, top_k)
    return row_size + channels * np.dtype(dtype).itemsize + IDENTITY_BYTES


def step_bytes(header: RecordingHeader) -> int:
    """What one step of a recording needs on disk."""
    channels = sum(x.channels for x in header.taps)
    return header.batch_size * example_bytes(
        header.classes, len(header.teachers), header.dtype, header.top_k, channels
    )


class ShardWriter:
    """Takes steps in their order, and has all of them on disk after `close`."""

    def __init__(
        self, folder: pathlib.Path, manifest: ManifestWriter, header: RecordingHeader, stop: Stop
    ):
        self.folder, self.manifest, self.stop = folder, manifest, stop
        least, most = SHARD_STEPS
        self.limit = min(most, max(least, SHARD_BYTES // step_bytes(header)))
        self.parts: list[RecordedSteps] = []
        self.unseen: list[tuple[float, float]] = []  # of each step; of top-K recordings alone
        self.start = 0
        self.began = time.monotonic()
        self.pool = concurrent.futures.ThreadPoolExecutor(1, "shards")
        self.pending: concurrent.futures.Future[None] | None = None

    def add(
        self, step: int, steps: RecordedSteps, unseen: tuple[float, float] | None = None
    ) -> None:
        """Steps from `step` on, right behind those before, and what the top K of them do not see.

        Raises `UserError` as `close` does.
        """
        if not self.parts:
            self.start, self.began = step, time.monotonic()
            self.stop.busy()
        self.parts.append(steps)
        self.unseen += [unseen] * steps.steps if unseen else []
        if step + steps.steps - self.start >= self.limit or time.monotonic() - self.began > SHARD_S:
            self._flush()

    def close(self) -> None:
        """Ends the shard. Raises `UserError` where the disk does not take it."""
        self._flush()
        self._wait()
        self.stop.idle()

    def _flush(self) -> None:
        self._wait()
        if self.parts:
            block: RecordedSteps = jax.tree.map(lambda *x: np.concatenate(x), *self.parts)
            unseen = None
            if self.unseen:
                share, nats = np.mean(self.unseen, axis=0)
                unseen = float(share), float(nats)
            self.parts, self.unseen = [], []
            self.pending = self.pool.submit(self._write, self.start, block, unseen)

    def _write(self, start: int, block: RecordedSteps, unseen: tuple[float, float] | None) -> None:
        stop = start + block.steps
        files = write_shard(self.folder / shard_name(start, stop), block)
        self.manifest.add(Shard(start, stop, files, unseen))

    def _wait(self) -> None:
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()
        except OSError as error:
            self.parts, self.unseen = [], []  # what comes after a hole is not worth writing
            raise UserError(
                f"{self.folder} can no longer be written: {error}; free some space and run the "
                "same command again, which continues after the last shard"
            ) from None
