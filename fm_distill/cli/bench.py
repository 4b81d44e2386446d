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
    path, remaining = first(arguments, "bench FILE|DIR [FILE|DIR ...]")
    options = parse(_Bench, None, remaining, f"bench {path}")

    from fm_distill.evaluation.bench import bench, bench_text

    benchmark = bench(
        [path, *options.more],
        batch_size=options.batch_size,
        threads=options.threads,
        seconds=options.seconds,
    )
    print(json.dumps(dataclasses.asdict(benchmark)) if options.json else bench_text(benchmark))
    return EXIT_COMPLETE
