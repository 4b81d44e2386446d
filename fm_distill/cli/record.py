"""The command `fm-distill record`."""

import dataclasses
import os
import pathlib
from typing import Literal

from fm_distill.cli.command import first_experiment
from fm_distill.cli.train import check_hours, say_paused
from fm_distill.errors import EXIT_COMPLETE, EXIT_PAUSED, UserError
from fm_distill.preparation.parse_options import OverConfig, parse_over
from fm_distill.system.console import log, sessions_left
from fm_distill.system.preemption import Stop, stop_signals


@dataclasses.dataclass(frozen=True)
class _Record(OverConfig):
    """Records the teachers' outputs for the views of a run, or continues a recording."""

    to: str = ""
    """The folder of the recording; recordings/NAME if it is not given."""
    steps: str = ":"
    """The steps to record, as A:B, B excluded; by default the whole run."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored logits; float16 stores each row minus its maximum."""
    top_k: int | None = None
    """Store only the K largest logits, and the log-sum-exp of the others."""
    taps: tuple[str, ...] = ()
    (
        "Features of the teacher to store too, each averaged over its positions; `show --taps` "
        "lists them."
    )
    max_hours: float | None = None
    """Stop within this many hours, with everything saved."""


def record_command(arguments: list[str]) -> int:
    experiment, experiment_config, remaining = first_experiment(
        arguments, "record EXPERIMENT.py --to DIR"
    )
    options = parse_over(_Record, experiment_config, remaining, f"record {experiment}")
    check_hours(options.max_hours)
    steps = parse_steps(options.steps)
    folder = options.to or os.path.join("recordings", options.config.name)
    command = ["record", *arguments]
    stop = Stop(
        options.max_hours,
        leave=lambda reason: say_paused(command, f": {reason}; nothing is lost"),
    )
    with stop_signals(stop):
        from fm_distill.recordings.status import status_text
        from fm_distill.system.compilation_cache import use_compilation_cache
        from fm_distill.training.record import record

        log(use_compilation_cache(pathlib.Path(folder)))
        outcome = record(
            options.config,
            folder,
            stop,
            steps=steps,
            dtype=options.dtype,
            top_k=options.top_k,
            taps=options.taps,
        )
        if outcome.recording:
            print(status_text(outcome.recording))
        if outcome.complete:
            return EXIT_COMPLETE
        sessions_text = sessions_left(outcome.hours_left, stop.max_hours or stop.hours())
        say_paused(command, f": {outcome.reason}; {sessions_text}")
        return EXIT_PAUSED


def parse_steps(text: str) -> tuple[int, int | None]:
    """`A:B` as numbers; either may be left out. Raises `UserError`."""
    first, colon, last = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return int(first or 0), int(last) if last else None
    except ValueError:
        raise UserError(f"--steps is {text!r}; expected A:B, e.g. 0:1000 or 1000:") from None
