"""The commands that train: `fm-distill train` and `fm-distill sweep`."""

import dataclasses
import os
import pathlib
import shlex
import sys

from fm_distill.cli.command import first_experiment, guarded, quiet
from fm_distill.config.options import ALIASES
from fm_distill.errors import EXIT_COMPLETE, EXIT_PAUSED, UserError
from fm_distill.preparation.parse_options import OverConfig, parse_over
from fm_distill.system.console import log, sessions_left
from fm_distill.system.preemption import Stop, stop_signals
from fm_distill.system.processes import (
    Distributed,
    broadcast_from_first,
    first_process,
    is_distributed,
    join,
    supervised,
)


@dataclasses.dataclass(frozen=True)
class _Train(OverConfig):
    """Trains the run of an experiment, or continues it."""

    workdir: str = ""
    """The run's folder; runs/NAME if it is not given."""
    max_hours: float | None = None
    (
        "Stop within this many hours, those of teachers that are trained first too, all saved; "
        "at least one step is done."
    )
    resume_from: str | None = None
    """Continue a copy of the run in this workdir or bucket (gs://...), which is only read."""
    extend: bool = False
    """Allow a longer schedule than the workdir was trained with."""
    distributed: Distributed = dataclasses.field(default_factory=Distributed)


def train_command(arguments: list[str]) -> int:
    # Before the libraries are there, which takes seconds.
    stop = Stop(
        leave=lambda reason: say_paused(["train", *arguments], f": {reason}; nothing is lost")
    )
    with stop_signals(stop):
        options, workdir = _train_options(arguments)
        if not is_distributed(options.distributed):
            return _train_here(options, workdir, stop, arguments)
    return supervised(_train_as_one_of_many, arguments)


def _train_as_one_of_many(arguments: list[str]) -> None:
    """In a child of its own; see `processes.supervised`."""

    def command(arguments: list[str]) -> int:
        quiet(arguments)
        options, workdir = _train_options(arguments)
        join(options.distributed)
        stop = Stop()
        with stop_signals(stop):
            return _train_here(options, workdir, stop, arguments)

    exit_code = guarded(command, arguments)
    if exit_code not in (EXIT_COMPLETE, EXIT_PAUSED):
        os._exit(exit_code)  # an exit that waits for peers would hide the error
    sys.exit(exit_code)


def _train_options(arguments: list[str]) -> tuple[_Train, str]:
    experiment, experiment_config, remaining = first_experiment(arguments, "train EXPERIMENT.py")
    options = parse_over(_Train, experiment_config, remaining, f"train {experiment}")
    check_hours(options.max_hours)
    return options, options.workdir or os.path.join("runs", options.config.name)


def _train_here(asked: _Train, workdir: str, stop: Stop, arguments: list[str]) -> int:
    from fm_distill.evaluation.evaluate import table
    from fm_distill.runs.resume_from import copy_run
    from fm_distill.system.compilation_cache import use_compilation_cache
    from fm_distill.training.train import train_until

    stop.max_hours = asked.max_hours
    if asked.resume_from and first_process():
        copy_run(asked.resume_from, pathlib.Path(workdir))
    broadcast_from_first(0)  # the others wait until it is there
    log(use_compilation_cache(pathlib.Path(workdir)))
    result = train_until(asked.config, workdir, stop, asked.extend)
    if result.complete:
        if first_process():
            summary = f"{result.step:,} steps are done; evaluate: fm-distill evaluate {workdir}"
            print(table(result.evaluation) if result.evaluation else summary)
        return EXIT_COMPLETE
    sessions_text = sessions_left(result.hours_left, stop.max_hours or stop.hours())
    progress = f"after {result.step:,} of {result.total_steps:,} steps"
    say_paused(["train", *arguments], f" {progress}: {result.reason}; {sessions_text}")
    return EXIT_PAUSED


def check_hours(hours: float | None) -> None:
    if hours is not None and not hours > 0:
        raise UserError(f"--max-hours is {hours}; expected a number above zero")


def say_paused(command: list[str], reason: str) -> None:
    """Why a command stopped, and the command that continues."""
    command_line = shlex.join(["fm-distill", *command])
    print(f"paused{reason}; run again to continue:\n  {command_line}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class _Sweep(OverConfig):
    """Trains every combination of the values of some options."""

    over: tuple[str, ...] = ()
    """Options and their values, e.g. `seed=0,1,2 objective.temperature=1,2`."""
    workdir: str = ""
    """The folder of the runs, each in a sub-folder of its own."""
    max_hours: float | None = None
    """Stop within this many hours, with everything saved."""
    cost: bool = False
    """Also measure latency and activation memory of the networks, when all runs are complete."""


def sweep_command(arguments: list[str]) -> int:
    usage = "sweep EXPERIMENT.py --over seed=0,1,2"
    experiment, experiment_config, remaining = first_experiment(arguments, usage)
    options = parse_over(_Sweep, experiment_config, remaining, f"sweep {experiment}")
    check_hours(options.max_hours)
    if not options.over:
        raise UserError("sweep needs what to sweep over: --over seed=0,1,2 optimizer.name=adam,sgd")

    from fm_distill.reports import sweep as sweeping
    from fm_distill.system.compilation_cache import use_compilation_cache

    workdir = options.workdir or os.path.join("runs", f"{options.config.name}_sweep")
    log(use_compilation_cache(pathlib.Path(workdir)))
    parsed_options = [sweeping.parse_over(text) for text in options.over]
    over = {ALIASES.get(name, name): option_values for name, option_values in parsed_options}
    table = sweeping.sweep(
        options.config, over, workdir, max_hours=options.max_hours, cost=options.cost
    )
    if table is None:
        say_paused(["sweep", *arguments], "")
        return EXIT_PAUSED
    print(table)
    return EXIT_COMPLETE
