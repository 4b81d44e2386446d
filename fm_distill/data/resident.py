"""The whole split in device memory: decoded once, then gathered by ids inside of the step."""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32, UInt8

from fm_distill.array_tree import AnyArray, array_tree
from fm_distill.config import DataConfig
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import Reader, read_ahead, refuse_other_examples, send
from fm_distill.data.order import example_ids
from fm_distill.errors import UserError
from fm_distill.recordings.reading import RecordingReader
from fm_distill.recordings.rows import TargetRows
from fm_distill.system.console import progress

SMALLEST_DEVICE_BYTES = 8 * 2**30  # a TPU v2 core's, where a device does not report it
# What a TPU moves at once, of bytes. Source: shapes and layouts in its compiler's output.
TILE = (32, 128)


@array_tree
@dataclasses.dataclass(frozen=True)
class Resident:
    """The whole split in device memory."""

    # Each canvas as planes of red, green and blue, row by row, with zeros behind. A TPU keeps this
    # shape as it is; any other it would copy whole into one that it can gather from, in each
    # dispatch.
    tiles: UInt8[AnyArray, "examples tiles 32 128"]
    sizes: Int32[AnyArray, "examples 2"]
    labels: Int32[AnyArray, " examples"]
    targets: Float32[AnyArray, "examples targets classes"] | None
    side: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, split: Batch) -> "Resident":
        """A split on the host."""
        examples, side = split.canvases.shape[:2]
        tiles = np.zeros((examples, *tiles_of(side)), np.uint8)
        planes = np.moveaxis(split.canvases, -1, 1).reshape(examples, -1)
        tiles.reshape(examples, -1)[:, : planes.shape[1]] = planes
        return cls(tiles, split.sizes, split.labels, split.targets, side)

    def at(self, ids: Int[Array, " batch"]) -> Batch:
        """The examples `ids`."""
        flat = self.tiles[ids].reshape(len(ids), -1)[:, : 3 * self.side**2]
        canvases = jnp.moveaxis(flat.reshape(-1, 3, self.side, self.side), 1, -1)
        targets = None if self.targets is None else self.targets[ids]
        return Batch(canvases, self.sizes[ids], self.labels[ids], targets)


@array_tree
@dataclasses.dataclass(frozen=True)
class ResidentSteps:
    """What the host sends for some steps on resident examples."""

    ids: Int32[AnyArray, "steps batch"]
    recorded: TargetRows | None = None

    def step(self, index: int) -> "ResidentSteps":
        """One step, without the axis of steps."""
        return jax.tree.map(lambda x: x[index], self)


# What the host sends for a dispatch: a batch, or ids of resident examples.
Fed = Batch | ResidentSteps


def tiles_of(side: int) -> tuple[int, int, int]:
    """Shape of one canvas in `Resident.tiles`."""
    return -(-3 * side**2 // math.prod(TILE)), *TILE


class ResidentFeed:
    """The decoded split lies in device memory; the host sends ids."""

    def __init__(
        self,
        reader: Reader,
        seed: int,
        batch_size: int,
        replicated: jax.sharding.Sharding,
        split: jax.sharding.Sharding,
        targets: np.ndarray | None = None,  # of each example, where the teachers are fixed
        recording: RecordingReader | None = None,
        period_steps: int | None = None,
    ):
        self.recording, self.period_steps = recording, period_steps
        self.seed, self.batch_size, self.ids_sharding = seed, batch_size, split
        arrays, valid = load_split(reader)
        if not valid.any():
            raise UserError(f"no image of {reader.source.identity} can be read")
        self.skipped = int((~valid).sum())
        self.stand_in = _next_valid(valid)
        resident = Resident.of(dataclasses.replace(arrays, targets=targets))
        self.data: Resident | None = jax.device_put(resident, replicated)

    def feed(
        self, start_step: int, dispatches: Iterator[int], skipped_steps: int = 0
    ) -> Iterator[ResidentSteps]:
        """For each dispatch its steps."""
        step = start_step + skipped_steps
        recorded = self.recording.steps(start_step) if self.recording else None
        for steps in dispatches:
            resident_steps = ResidentSteps(self.ids(np.arange(step, step + steps)))
            if recorded is not None:
                parts = list(itertools.islice(recorded, steps))
                recorded_steps = jax.tree.map(lambda *x: np.concatenate(x), *parts)
                refuse_other_examples(recorded_steps, resident_steps.ids)
                resident_steps = dataclasses.replace(resident_steps, recorded=recorded_steps.rows)
            yield jax.tree.map(lambda x: send(x, self.ids_sharding, 1), resident_steps)
            step += steps

    def ids(self, steps: Int[np.ndarray, " steps"]) -> Int32[np.ndarray, "steps batch"]:
        """The examples of each of `steps`."""
        if self.period_steps:
            steps = steps % self.period_steps
        positions = steps[:, None] * self.batch_size + np.arange(self.batch_size)
        return self.stand_in[example_ids(self.seed, positions, len(self.stand_in))].astype(np.int32)


def load_split(reader: Reader) -> tuple[Batch, np.ndarray]:
    """The whole split as one host batch, and which of its images are valid."""
    side, count = reader.config.canvas.side, len(reader)
    canvases = np.zeros((count, side, side, 3), np.uint8)
    sizes, labels = np.ones((count, 2), np.int32), np.full(count, -1, np.int32)
    valid = np.zeros(count, bool)
    items = read_ahead(grain.MapDataset.source(reader), 0)
    for i, item in enumerate(progress(items, "decoding", "images", count)):
        canvases[i], sizes[i] = item["canvas"], item["size"]
        labels[i], valid[i] = item["label"], item["valid"]
    return Batch(canvases, sizes, labels), valid


def is_resident(config: DataConfig, examples: int, memory_bytes: int | None = None) -> bool:
    """Whether the split lies in device memory.

    `memory_bytes` is what a device has; None for those that are here.
    """
    if config.feeding != "auto":
        return config.feeding == "resident"
    available_bytes = _memory_bytes() if memory_bytes is None else memory_bytes
    return split_bytes(config, examples) <= config.resident_share * available_bytes


def split_bytes(config: DataConfig, examples: int) -> int:
    """What the canvases of a split need in the memory of each device."""
    return examples * math.prod(tiles_of(config.canvas.side))


def feeding_note(config: DataConfig, examples: int) -> str:
    """Why `auto` chooses as it does on the devices that are here."""
    return (
        f"{examples:,} canvases need {split_bytes(config, examples) / 1e9:.2f} GB on each device; "
        f"resident may take at most {config.resident_share:.0%} of its "
        f"{_memory_bytes() / 1e9:.1f} GB"
    )


def _memory_bytes() -> int:
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return int((device.memory_stats() or {}).get("bytes_limit", SMALLEST_DEVICE_BYTES))
    # Simulated devices share the host's memory, each with a copy of its own.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def _next_valid(valid: np.ndarray) -> np.ndarray:
    """For each example the first valid one at or after it, around the end."""
    ids = np.flatnonzero(valid)
    return ids[np.searchsorted(ids, np.arange(len(valid))) % len(ids)]
