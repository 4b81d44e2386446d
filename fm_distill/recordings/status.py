"""What a recording holds, and whether every byte of it is as it was written."""

import dataclasses

from fm_distill.recordings.header import RecordingHeader
from fm_distill.recordings.manifest import Recording, Shard
from fm_distill.recordings.shards import digests_of
from fm_distill.system.console import progress


@dataclasses.dataclass(frozen=True)
class RecordingStatus:
    """What `fm-distill status --json` prints of a recording."""

    ranges: tuple[tuple[int, int], ...]
    holes: tuple[tuple[int, int], ...]  # between them, and before the first
    shards: int
    bytes: int
    identity: str
    damaged: dict[str, str]  # name of a shard -> what is wrong
    # Of a top-K recording: the share of the other classes, and nats that the KL misses.
    unseen: tuple[float, float] | None
    taps: tuple[str, ...]  # whose pooled features it holds


def status(recording: Recording) -> RecordingStatus:
    """Reads every byte of the recording."""
    last = recording.shards[-1].stop if recording.shards else 0
    shards = progress(recording.shards, "reading the recording", "shards", len(recording.shards))
    damaged = {shard.name: problem for shard in shards if (problem := _wrong(recording, shard))}
    return RecordingStatus(
        ranges=recording.ranges,
        holes=recording.missing(0, last),
        shards=len(recording.shards),
        bytes=sum(x.stat().st_size for x in recording.path.glob("steps-*/**/*") if x.is_file()),
        identity=recording.header.identity,
        damaged=damaged,
        unseen=recording.unseen,
        taps=recording.header.tap_names,
    )


def _wrong(recording: Recording, shard: Shard) -> str:
    """What is wrong with a shard; empty where it is intact."""
    folder = recording.path / shard.name
    if not folder.is_dir():
        return "is missing"
    digests = digests_of(folder)
    if missing := sorted(shard.files.keys() - digests.keys()):
        return f"{missing[0]} is missing"
    damaged = [name for name, digest in shard.files.items() if digests[name] != digest]
    return f"{damaged[0]} is damaged" if damaged else ""


def unseen_text(header: RecordingHeader, share: float, nats: float) -> str:
    """How a top-K recording is biased; see `rows.unseen`."""
    return (
        f"the top {header.top_k} of {header.classes:,} classes at temperature "
        f"{header.temperature:g}: the others have {share:.2%} of the probability, and the KL is "
        f"{nats:.2g} nats too low for a student that spreads it evenly"
    )


def status_text(recording: Recording, checked: RecordingStatus | None = None) -> str:
    """The same for people; without `checked`, of the manifests alone."""
    header = recording.header
    names = ", ".join(f"{x.model} at {x.resolution}" for x in header.teachers)
    classes_text = "all" if header.top_k is None else f"the top {header.top_k} of"
    lines = [
        f"recording of {names}: {classes_text} {header.classes:,} classes in {header.dtype}",
        f"{header.data}, {header.examples:,} examples, batches of {header.batch_size}, "
        f"seed {header.seed}",
    ]
    if recording.unseen is not None:
        lines.append(unseen_text(header, *recording.unseen))
    if header.taps:
        taps = ", ".join(f"{x.name} ({x.channels:,} channels)" for x in header.taps)
        lines.append(f"features, averaged over positions: {taps}")
    for first, last in recording.ranges:
        epochs = (last - first) * header.batch_size / header.examples
        lines.append(f"steps {first:,} to {last:,}, {epochs:,.1f} epochs")
    missing = recording.missing(0, recording.shards[-1].stop) if recording.shards else ()
    lines += [f"MISSING: steps {first:,} to {last:,}" for first, last in missing]
    if checked is not None:
        lines += [f"DAMAGED: {name}: {problem}" for name, problem in checked.damaged.items()]
        intact = checked.shards - len(checked.damaged)
        lines.append(
            f"{intact:,} of {checked.shards:,} shards are intact, {checked.bytes / 1e6:,.1f} MB"
        )
    return "\n".join(lines)
