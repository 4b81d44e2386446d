"""The command `fm-distill bench`."""

import dataclasses
import json

import tyro

from fm_distill.cli.command import first
from fm_distill.errors import EXIT_COMPLETE
from fm_distill.preparation.parse_options import parse


@dataclasses.dataclass(frozen=True)
class _Bench:
    """Latency, throughput and memory of exported files and of runs, side by side, on the CPU."""

    more: tyro.conf.Positional[tuple[str, ...]] = ()
    """Further files and workdirs, timed in turn with the first."""
    batch_size: int = 1
    """Images of a call."""
    threads: int | None = None
    """Threads of each runtime; None: one for each core."""
    seconds: float = 2.0
    """How long each is called, after its warm-up."""
    json: bool = False
    """Print one JSON object."""


def bench_command(arguments: list[str]) -> int:
    path, rest = first(arguments, "bench FILE|DIR [FILE|DIR ...]")
    asked = parse(_Bench, None, rest, f"bench {path}")

    from fm_distill.evaluation.bench import bench, bench_text

    found = bench(
        [path, *asked.more],
        batch_size=asked.batch_size,
        threads=asked.threads,
        seconds=asked.seconds,
    )
    print(json.dumps(dataclasses.asdict(found)) if asked.json else bench_text(found))
    return EXIT_COMPLETE
