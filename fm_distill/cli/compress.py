"""The command `fm-distill compress`."""

import dataclasses
import pathlib
from typing import Literal

from fm_distill.cli.command import first_run
from fm_distill.cli.train import check_hours, say_paused
from fm_distill.errors import EXIT_COMPLETE, EXIT_PAUSED
from fm_distill.preparation.parse_options import OverConfig, parse_over
from fm_distill.system.console import log


@dataclasses.dataclass(frozen=True)
class _Compress(OverConfig):
    """Makes the student of a run smaller, step after step, and measures each."""

    steps: tuple[str, ...] = ()
    (
        "What is done, in order: prune:structured:0.5 (or prune:structured:taylor:0.5, "
        "prune:structured:network:0.5, prune:structured:taylor:network:0.5), "
        "prune:unstructured:0.8, prune:2:4, prune:1:4, quantise:int8, quantise:int8-weights or "
        "quantise:int4-weights."
    )
    to: str = ""
    """The folder of the steps' runs and files; by default `compressed` in the run's workdir."""
    format: tuple[Literal["onnx", "stablehlo", "tflite"], ...] = ("onnx",)
    """The files whose bytes and latency are measured: one format, or several side by side."""
    seconds: float = 2.0
    """How long each file is called, after its warm-up."""
    max_hours: float | None = None
    """Stop training within this many hours, with everything saved."""


def compress_command(arguments: list[str]) -> int:
    workdir, stored, remaining = first_run(arguments, "compress DIR --steps prune:structured:0.5")
    options = parse_over(_Compress, stored, remaining, f"compress {workdir}")
    check_hours(options.max_hours)

    from fm_distill.reports.compress import compress
    from fm_distill.reports.compression_table import FOLDER
    from fm_distill.system.compilation_cache import use_compilation_cache

    folder = pathlib.Path(options.to or pathlib.Path(workdir) / FOLDER)
    log(use_compilation_cache(pathlib.Path(workdir)))
    table = compress(
        workdir,
        options.steps,
        options.config,
        folder,
        formats=options.format,
        seconds=options.seconds,
        max_hours=options.max_hours,
    )
    if table is None:
        say_paused(["compress", *arguments], "")
        return EXIT_PAUSED
    print(table)
    return EXIT_COMPLETE
