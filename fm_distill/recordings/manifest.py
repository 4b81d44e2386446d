"""Which steps a recording holds: completeness comes from its manifests, never from the data.

Each session of `fm-distill record` appends to a manifest of its own, first the header, then a line
for each shard that is on disk. So ranges of other sessions and machines are joined by lying in one
folder.
"""

import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import uuid
from typing import IO, Any

import msgspec

from fm_distill.errors import UserError
from fm_distill.recordings.header import RecordingHeader, parse_header
from fm_distill.recordings.shards import shard_name

MANIFESTS = "manifest-*.jsonl"


@dataclasses.dataclass(frozen=True, order=True)
class Shard:
    """A line of a manifest: a shard that was written completely."""

    start: int
    stop: int
    files: dict[str, str] = dataclasses.field(compare=False)  # SHA-256 of each
    # Of a top-K recording, by `rows.unseen`: the share of the others, and nats that the KL misses.
    unseen: tuple[float, float] | None = dataclasses.field(default=None, compare=False)

    @property
    def name(self) -> str:
        return shard_name(self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class Recording:
    """The header and shards of a folder, the shards in the order of their steps."""

    path: pathlib.Path
    header: RecordingHeader
    shards: tuple[Shard, ...]

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Maximal ranges of consecutive steps."""
        merged: list[tuple[int, int]] = []
        for shard in self.shards:
            if merged and merged[-1][1] == shard.start:
                merged[-1] = merged[-1][0], shard.stop
            else:
                merged.append((shard.start, shard.stop))
        return tuple(merged)

    @property
    def steps(self) -> int:
        """How many steps there are from the first one of the run without a hole."""
        return self.ranges[0][1] if self.ranges and self.ranges[0][0] == 0 else 0

    @property
    def unseen(self) -> tuple[float, float] | None:
        """What the KL to a top-K recording does not see, over all steps; None where not known."""
        measured = [(x.stop - x.start, *x.unseen) for x in self.shards if x.unseen is not None]
        if not measured or len(measured) < len(self.shards):
            return None
        steps = sum(count for count, _, _ in measured)
        share = sum(count * share for count, share, _ in measured) / steps
        return share, sum(count * nats for count, _, nats in measured) / steps

    def missing(self, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """Ranges of `start` to `stop` that are not there."""
        gaps = []
        for first, end in self.ranges:
            if start < min(first, stop):
                gaps.append((start, min(first, stop)))
            start = max(start, end)
        if start < stop:
            gaps.append((start, stop))
        return tuple(gaps)


def is_recording(path: str | os.PathLike[str]) -> bool:
    """Whether there is a manifest."""
    return any(pathlib.Path(path).glob(MANIFESTS))


def open_recording(path: str | os.PathLike[str]) -> Recording:
    """The recording in a folder. Raises `UserError` where it is none, or cannot be one."""
    folder = pathlib.Path(path)
    header, shards = read_manifests(folder)
    ordered = _without_replaced(folder, shards)
    for first, other in itertools.pairwise(ordered):
        if other.start < first.stop:
            raise UserError(
                f"{folder} has the steps {other.start:,} to {min(first.stop, other.stop):,} twice, "
                f"in {first.name} and in {other.name}; remove one folder and its line of the "
                "manifest"
            )
    return Recording(folder, header, ordered)


def read_manifests(folder: pathlib.Path) -> tuple[RecordingHeader, list[Shard]]:
    """Their header and all their lines, session after session. Raises `UserError`."""
    manifests = sorted(folder.glob(MANIFESTS))
    if not manifests:
        raise UserError(f"{folder} is not a recording: it has no {MANIFESTS}")
    header, shards = None, []
    for manifest in manifests:
        current_header, lines = _read(manifest)
        if header is not None and current_header.identity != header.identity:
            differing = [x for x, y in vars(header).items() if vars(current_header)[x] != y]
            raise UserError(
                f"{manifests[0]} and {manifest} belong to different recordings: "
                + "; ".join(
                    f"{x}: {vars(header)[x]} and {vars(current_header)[x]}" for x in differing
                )
                + "; move one of them with its shards to another folder"
            )
        header = current_header
        shards += lines
    assert header is not None
    return header, shards


def _without_replaced(folder: pathlib.Path, lines: list[Shard]) -> tuple[Shard, ...]:
    """The shards that count, by their steps.

    One that was lost is recorded again, in the same piece or in others: what is there counts, and
    of what was lost again, the last line.
    """
    latest: dict[str, Shard] = {}
    for line in reversed(lines):
        latest.setdefault(line.name, line)
    counted = [x for x in latest.values() if (folder / x.name).is_dir()]
    present_names = {x.name for x in counted}
    for missing in (x for x in latest.values() if x.name not in present_names):
        if not any(x.start < missing.stop and missing.start < x.stop for x in counted):
            counted.append(missing)
    return tuple(sorted(counted))


def present(recording: Recording) -> Recording:
    """The same with those shards alone whose folders are there."""
    shards = tuple(x for x in recording.shards if (recording.path / x.name).is_dir())
    return dataclasses.replace(recording, shards=shards)


class ManifestWriter:
    """Appends to a manifest of its own; each line is on disk when `add` returns."""

    def __init__(self, folder: pathlib.Path, header: RecordingHeader, versions: dict[str, Any]):
        # In the order of their names, the line of a later session replaces that of an earlier one.
        # The letter is behind those of hexadecimal numbers, which names were once.
        timestamp = datetime.datetime.now(datetime.UTC).strftime("t%Y%m%d-%H%M%S-%f")
        self.path = folder / f"manifest-{timestamp}-{uuid.uuid4().hex[:12]}.jsonl"
        self.first = msgspec.to_builtins(header) | {"versions": versions}
        self._file: IO[str] | None = None

    def add(self, shard: Shard) -> None:
        if self._file is None:  # a session that records nothing leaves nothing
            self._file = self.path.open("w")
            self._write(self.first)
        self._write(msgspec.to_builtins(shard))

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _read(manifest: pathlib.Path) -> tuple[RecordingHeader, list[Shard]]:
    try:
        lines = manifest.read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{manifest} cannot be read: {error}") from None
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # a crash while it was written: its shard does not count
    try:
        first, *shards = [json.loads(line) for line in lines]
        return parse_header(first, str(manifest)), msgspec.convert(shards, list[Shard])
    except (ValueError, msgspec.ValidationError) as error:
        raise UserError(
            f"{manifest} is not the manifest of a recording ({error}); restore it from a copy"
        ) from None
