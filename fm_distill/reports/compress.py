"""A run made smaller step after step, each a run of its own that goes on matching the teacher."""

import dataclasses
import os
import pathlib
import zlib
from typing import Any, Literal

import jax
import numpy as np

from fm_distill.config import Config
from fm_distill.config.teachers import teachers_of, with_teachers
from fm_distill.errors import UserError
from fm_distill.evaluation.bench import Row, bench
from fm_distill.exporting.export import export
from fm_distill.models import parameter_count
from fm_distill.networks.teachers import teacher_workdirs
from fm_distill.reports.compression_steps import (
    CompressionStep,
    check_order,
    config_after,
    parse_step,
    recovery_schedule,
)
from fm_distill.reports.compression_table import Compression, CompressionRow, as_markdown, save
from fm_distill.runs.metric_table import BY_NAME
from fm_distill.runs.open_run import open_run
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import log
from fm_distill.system.preemption import Stop, stop_signals
from fm_distill.training.check import check
from fm_distill.training.train import train_until

# Name of the run itself in the table, and of its file.
START = "the run"
Format = Literal["onnx", "stablehlo"]


def compress(
    workdir: str | os.PathLike[str],
    steps: tuple[str, ...],
    config: Config,
    folder: pathlib.Path,
    *,
    format: Format = "onnx",
    seconds: float = 2.0,
    max_hours: float | None = None,
) -> str | None:
    """Runs `steps` on the student in `workdir`; returns the table, None where it was stopped.

    `config` is that of the run, with what is to be otherwise; where its schedule is the run's own,
    each step takes half of it. Each step is a run in `folder`, whose name has all steps before
    it, and starts from the step before. The students are exported as `format` and timed for
    `seconds` each, and the figures written to `folder`. Raises `UserError` before the first step
    where a step is wrong.
    """
    place = Workdir(workdir)
    stored, figures = place.stored(), place.read_evaluation()
    if not steps:
        raise UserError("compress needs what to do: --steps prune:structured:0.5 quantise:int8")
    if figures is None:
        raise UserError(
            f"the run in {workdir} is not complete, or was not evaluated: finish it with "
            "fm-distill train, without log.final_evaluation=False"
        )
    if not config.log.final_evaluation:
        raise UserError("log.final_evaluation=False leaves nothing to compare; leave it on")
    parsed = tuple(map(parse_step, steps))
    check_order(parsed, config.student.pruning)
    config = _with_teachers_here(config, place.path)
    if config.schedule == stored.config.schedule:
        total = stored.resolved.total_steps
        schedule = recovery_schedule(total, config.schedule.warmup_steps)
        config = dataclasses.replace(config, schedule=schedule)
    runs = _planned(config, parsed, place.path, folder)
    for run in runs.values():
        check(run)
    folder.mkdir(parents=True, exist_ok=True)
    # Before the first step, since whatever is not installed is missed here.
    data_dir = config.data.data_dir
    start = folder / f"{_file_name(START)}.{format}"
    moved = data_dir if data_dir != stored.config.data.data_dir else None
    export(place.path, start, overwrite=True, data_dir=moved)
    rows = {START: (place.path, figures)}
    with stop_signals(Stop(max_hours)) as stop:
        for i, (name, run) in enumerate(runs.items(), 1):
            log(f"step {i} of {len(runs)}: {steps[i - 1]}")
            result = train_until(run, folder / _file_name(name), stop)
            if not result.complete:
                return None
            assert result.evaluation is not None
            rows[name] = (result.workdir, result.evaluation)
    files: dict[str, pathlib.Path | None] = {START: start}
    for name in runs:
        files[name] = _exported(name, rows[name][0], folder, format)
    timed = bench([x for x in files.values() if x is not None], seconds=seconds)
    times = {x.name: x for x in timed.rows}
    found = Compression(
        times[str(start)].runtime,
        timed.device,
        tuple(
            _row(name, path, figures, times.get(str(files[name])))
            for name, (path, figures) in rows.items()
        ),
    )
    save(found, folder)
    return as_markdown(found)


def _with_teachers_here(config: Config, path: pathlib.Path) -> Config:
    """Teachers that were trained for the run are those of its steps, too."""
    pairs = zip(teachers_of(config), teacher_workdirs(config, path), strict=True)
    return with_teachers(
        config,
        [
            dataclasses.replace(x.config, experiment=None, workdir=where)
            if x.config.experiment
            else x.config
            for x, where in pairs
        ],
    )


def _planned(
    config: Config, steps: tuple[CompressionStep, ...], start: pathlib.Path, folder: pathlib.Path
) -> dict[str, Config]:
    """The run of each step, by the names of all steps up to it."""
    total, runs, name, weights = config.schedule.total_steps or 1, {}, "", str(start)
    for step in steps:
        config = config_after(config, step, weights, total)
        name = f"{name} + {step.text}" if name else step.text
        runs[name], weights = config, str(folder / _file_name(name))
    return runs


def _file_name(name: str) -> str:
    return name.replace(" + ", "+").replace(":", "-").replace(" ", "_")


def _exported(
    name: str, workdir: pathlib.Path, folder: pathlib.Path, format: Format
) -> pathlib.Path | None:
    """The file; None, and why, where it does not compute what the run computes."""
    path = folder / f"{_file_name(name)}.{format}"
    try:
        export(workdir, path, overwrite=True)
    except UserError as error:
        log(f"WARNING: {name} has no file: {error}")
        return None
    return path


def _row(
    name: str, workdir: pathlib.Path, figures: dict[str, Any], timed: Row | None
) -> CompressionRow:
    params = open_run(workdir).student.variables.params
    zeros = sum(int((np.asarray(x) == 0).sum()) for x in jax.tree.leaves(params))

    def of(metric: str) -> float | None:
        return BY_NAME[metric].of(figures)

    agreement, kl, view = (
        of(x) for x in ("agreement_top1", "kl_one", "training_view_agreement_top1")
    )
    flops = of("student_flops")
    data = None if timed is None else pathlib.Path(timed.name).read_bytes()
    return CompressionRow(
        name=name,
        split=figures["split"],
        top1=of("student_top1"),
        teacher_top1=of("teacher_top1"),
        agreement=agreement,
        kl_one=kl,
        training_view_agreement=view,
        parameters=parameter_count(params),
        zero_weights=zeros,
        flops=None if flops is None else int(flops),
        file_bytes=None if data is None else len(data),
        zipped_bytes=None if data is None else len(zlib.compress(data, 9)),
        median_ms=None if timed is None else timed.median_ms,
        p95_ms=None if timed is None else timed.p95_ms,
    )
