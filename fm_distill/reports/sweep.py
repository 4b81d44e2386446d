"""Many runs of one experiment: every combination of given values, and their means and spreads.

Each combination is a run of its own in a folder of its own, so a sweep that was stopped goes on
where it was, and one that is complete only prints its table.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Collection, Iterable
from typing import Any

from fm_distill.config import Config, TeacherConfig
from fm_distill.config.code import NETWORKS
from fm_distill.config.serialization import changed, parse_value
from fm_distill.config.teachers import recording_of, teachers_of, with_teachers
from fm_distill.errors import TrainingFailed, UserError
from fm_distill.networks.cost import cost_of, run_cost
from fm_distill.networks.teachers import teacher_workdirs
from fm_distill.preparation.check import check
from fm_distill.reports.sweep_table import SweptRun, as_markdown, save
from fm_distill.runs.run_code import refuse_code_of_run
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import log
from fm_distill.system.preemption import Stop, stop_signals
from fm_distill.training.train import train_until

SEED = "seed"
BETWEEN = re.compile(r",(?![^\[]*\])")  # a comma that is not inside of a list


def sweep(
    config: Config,
    over: dict[str, tuple[Any, ...]],
    workdir: str | os.PathLike[str],
    *,
    max_hours: float | None = None,
    cost: bool = False,
) -> str | None:
    """Runs every combination of `over` (option -> values) in folders of `workdir`.

    Returns the table, which is also written there as `sweep.csv` and, with links to the runs, as
    `sweep.html`: a line for each combination of what is not the seed, with mean and sample
    standard deviation over the seeds; None where a signal or `max_hours` stopped it. Where the
    students differ in FLOPs, a second one says which of them are Pareto-optimal, also as
    `pareto.csv` and `pareto.svg`. With `cost`, latency and memory are measured when all runs are
    complete. Teachers that are experiments are trained once each, in `workdir`. Raises `UserError`
    before the first run where a combination is wrong, and `TrainingFailed` after the last one where
    one failed; the tables of the others are written then.
    """
    folder = pathlib.Path(workdir)
    for option, option_values in over.items():
        _refuse_repeated(option, option_values)
    combinations = [
        dict(zip(over, combination, strict=True))
        for combination in itertools.product(*over.values())
    ]
    folders = [_folder_name(_name(combination, "__")) for combination in combinations]
    if len({*folders}) < len(folders):
        duplicate = next(candidate for candidate in folders if folders.count(candidate) > 1)
        raise UserError(f"two runs of the sweep would share the folder {duplicate}; rename a value")
    runs = [
        _with_shared_teachers(changed(config, combination), folder, over)
        for combination in combinations
    ]
    _refuse_shared_workdirs(runs)
    for run in runs:
        check(run)
        if not run.log.final_evaluation:
            raise UserError(
                "log.final_evaluation is False, but a sweep compares the last evaluations of its "
                "runs; leave it on"
            )
    completed, failed = [], []
    with stop_signals(Stop(max_hours)) as stop:
        for i, (values, name, run) in enumerate(zip(combinations, folders, runs, strict=True), 1):
            label = _name(values, ", ")
            log(f"run {i} of {len(runs)}: {label}")
            try:
                result = train_until(run, folder / name, stop)
            except TrainingFailed as error:
                log(f"WARNING: {label} failed: {error}")
                failed.append(label)
                continue
            if not result.complete:
                return None
            assert result.evaluation is not None
            group = {option: value for option, value in values.items() if option != SEED}
            completed.append(SweptRun(_name(group, ", "), name, result.evaluation))
    if not completed:
        raise TrainingFailed("all runs of the sweep failed")
    if cost:
        log("measuring latency and memory of the networks")
        completed = _measured(completed, folder)
    save(completed, folder)
    if failed:
        raise TrainingFailed(
            f"{len(failed)} of {len(runs)} runs ({'; '.join(failed)}); the table of the others is "
            f"{folder / 'sweep.html'}"
        )
    return as_markdown(completed)


def _refuse_repeated(option: str, values: tuple[Any, ...]) -> None:
    if not values:
        raise UserError(f"{option} has no values to sweep over; give one or more")
    for i, value in enumerate(values):
        if value in values[:i]:
            raise UserError(f"{option}={value} is given twice; give each value once")


def _measured(runs: list[SweptRun], folder: pathlib.Path) -> list[SweptRun]:
    """One after another on this device; equal networks, as of several seeds, once."""
    measure = functools.cache(cost_of)
    measured = []
    for run in runs:
        stored = Workdir(folder / run.folder).stored()
        refuse_code_of_run(stored, folder / run.folder, NETWORKS)
        figures = {"cost": run_cost(stored.resolved, stored.config.batch_size, measure)}
        measured.append(dataclasses.replace(run, figures=run.figures | figures))
    return measured


def parse_over(text: str) -> tuple[str, tuple[Any, ...]]:
    """`"objective.temperature=1,2.5"` as a name and values, each read as JSON or else as text.

    A list is one value: `"student.options.depths=[1,1],[2,2]"`.
    """
    name, separator, values = text.partition("=")
    if not separator or not name or not values:
        raise UserError(f"--over {text!r}: expected OPTION=VALUE,VALUE,..., e.g. seed=0,1,2")

    return name.strip().replace("-", "_"), tuple(
        parse_value(part.strip()) for part in BETWEEN.split(values)
    )


def _name(values: dict[str, Any], between: str) -> str:
    return between.join(f"{name}={value}" for name, value in values.items()) or "all"


def _folder_name(text: str) -> str:
    # Brackets would be a pattern to whatever globs below the folder, checkpoints among it.
    return re.sub(r"[\[\] ]", "", text.replace("/", "_"))


def _with_shared_teachers(run: Config, folder: pathlib.Path, over: Collection[str]) -> Config:
    """Teachers that are trained first lie beside the runs, not in each of them.

    Where `over` names a teacher's experiment, each of its experiments has a folder of its own.
    """
    if recording_of(run) is not None:  # they lie there
        return run

    def shared(option: str, teacher: TeacherConfig, teacher_workdir: str) -> TeacherConfig:
        if not teacher.experiment:
            return teacher
        if f"{option}.experiment" in over and not teacher.workdir:
            teacher_workdir += _folder_name(f"={teacher.experiment}")
        return dataclasses.replace(teacher, workdir=teacher_workdir)

    teachers_and_workdirs = zip(teachers_of(run), teacher_workdirs(run, folder), strict=True)
    return with_teachers(
        run,
        [shared(*teacher, teacher_workdir) for teacher, teacher_workdir in teachers_and_workdirs],
    )


def _refuse_shared_workdirs(runs: Iterable[Config]) -> None:
    """Raises `UserError` where teachers of several experiments would be trained in one folder."""
    experiments: dict[str, str] = {}
    for option, teacher in itertools.chain.from_iterable(map(teachers_of, runs)):
        experiment, workdir = teacher.experiment, teacher.workdir
        if experiment and workdir and experiments.setdefault(workdir, experiment) != experiment:
            raise UserError(
                f"{option}.workdir is {workdir} for the teachers of {experiments[workdir]} and "
                f"{experiment}; leave it out, so that each has a folder of its own"
            )
