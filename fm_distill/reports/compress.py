"""A run made smaller step by step, each step a run of its own that keeps matching the teacher."""

import dataclasses
import os
import pathlib
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fm_distill.config import Config, NetworkConfig
from fm_distill.config.serialization import differences
from fm_distill.config.steps import total_steps
from fm_distill.config.teachers import teachers_of, with_teachers
from fm_distill.errors import UserError
from fm_distill.evaluation.bench import Row, bench, check_seconds
from fm_distill.exporting.export import export
from fm_distill.models import build_network, parameter_count
from fm_distill.networks.loading import load_networks
from fm_distill.networks.shrinking import pruned_network
from fm_distill.networks.teachers import teacher_workdirs
from fm_distill.preparation.check import check
from fm_distill.reports.compression_steps import (
    CompressionStep,
    check_order,
    config_after,
    parse_step,
    recovery_schedule,
)
from fm_distill.reports.compression_table import (
    Compression,
    CompressionRow,
    FileFigures,
    Files,
    as_markdown,
    save,
)
from fm_distill.runs.metric_table import BY_NAME
from fm_distill.runs.open_run import open_run
from fm_distill.runs.run_code import refuse_code_of_run
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import log
from fm_distill.system.preemption import Stop, stop_signals
from fm_distill.train_step.pruning import make_prune
from fm_distill.training.train import train_until
from fm_distill.views.rendering import CentralCrop

# Name of the run itself in the table, and of its file.
START = "the run"
# Of a folder or file of all steps, in characters: file systems take 255, and suffixes are added.
LONGEST_NAME = 220
Format = Literal["onnx", "stablehlo", "tflite"]


def compress(
    workdir: str | os.PathLike[str],
    steps: tuple[str, ...],
    config: Config,
    folder: pathlib.Path,
    *,
    formats: tuple[Format, ...] = ("onnx",),
    seconds: float = 2.0,
    max_hours: float | None = None,
) -> str | None:
    """Runs `steps` on the student in `workdir`; returns the table, None where it was stopped.

    `config` is that of the run, with what is to be otherwise; where its length is the run's own,
    each step takes half of it. Each step is a run in `folder`, whose name has all steps before
    it, and starts from the step before. The students are exported as each of `formats` and timed
    for `seconds` each, and the figures written to `folder`. Raises `UserError` before the first
    step where a step is wrong.
    """
    check_seconds(seconds)
    run_workdir = Workdir(workdir)
    stored, figures = run_workdir.stored(), run_workdir.read_evaluation()
    refuse_code_of_run(stored, run_workdir.path, config=config)
    if not steps:
        raise UserError("compress needs --steps, e.g. --steps prune:structured:0.5 quantise:int8")
    if not formats or len({*formats}) != len(formats):
        raise UserError(f"--format is {' '.join(formats)!r}; expected each format once")
    if figures is None:
        raise UserError(
            f"the run in {workdir} is not complete, or was not evaluated: finish it with "
            "fm-distill train, without log.final_evaluation=False"
        )
    if not config.log.final_evaluation:
        raise UserError("log.final_evaluation=False leaves nothing to compare; leave it on")
    parsed_steps = tuple(map(parse_step, steps))
    run_config = stored.config
    _refuse_options_of_steps(config, run_config)
    check_order(parsed_steps, run_config.student.pruning)
    schedule = recovery_schedule(config.schedule, run_config.schedule, stored.resolved.total_steps)
    config = dataclasses.replace(_with_teachers_here(config, run_workdir.path), schedule=schedule)
    training_steps = total_steps(config, stored.resolved.examples)
    step_configs = _planned(config, parsed_steps, run_workdir.path, folder, training_steps)
    _check_planned(step_configs, folder, stored.resolved.student, training_steps)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}; give another --to") from None
    # Before the first step, so that a library that is not installed is reported now.
    data_dir = config.data.data_dir
    moved = data_dir if data_dir != stored.config.data.data_dir else None
    for file_format in formats:
        export(run_workdir.path, _file(folder, START, file_format), overwrite=True, data_dir=moved)
    rows = {START: (run_workdir.path, figures)}
    with stop_signals(Stop(max_hours)) as stop:
        for number, (name, step_config) in enumerate(step_configs.items(), 1):
            log(
                f"step {number} of {len(step_configs)}: {parsed_steps[number - 1].text}, "
                f"{training_steps:,} steps of training"
            )
            step_folder = folder / _file_name(name)
            _refuse_another_start(Workdir(step_folder), step_config)
            result = train_until(step_config, step_folder, stop)
            if not result.complete:
                return None
            assert result.evaluation is not None
            rows[name] = (result.workdir, result.evaluation)
    files = {(START, file_format): _file(folder, START, file_format) for file_format in formats}
    for name in step_configs:
        for file_format in formats:
            path = _file(folder, name, file_format)
            if _is_exported(name, rows[name][0], path):
                files[name, file_format] = path
    benchmark = bench([*files.values()], seconds=seconds)
    timings = dict(zip(files, benchmark.rows, strict=True))
    files_by_format = [
        Files(
            timings[START, file_format].runtime,
            tuple(_file_figures(name, timings.get((name, file_format))) for name in rows),
        )
        for file_format in formats
    ]
    student_rows = tuple(_row(name, path, figures) for name, (path, figures) in rows.items())
    compression = Compression(
        benchmark.device, student_rows, tuple(files_by_format), config.views != run_config.views
    )
    save(compression, folder)
    return as_markdown(compression)


def _with_teachers_here(config: Config, path: pathlib.Path) -> Config:
    """Teachers that were trained for the run are those of its steps, too."""
    pairs = zip(teachers_of(config), teacher_workdirs(config, path), strict=True)
    return with_teachers(
        config,
        [
            dataclasses.replace(teacher.config, experiment=None, workdir=teacher_workdir)
            if teacher.config.experiment
            else teacher.config
            for teacher, teacher_workdir in pairs
        ],
    )


def _refuse_options_of_steps(config: Config, own: Config) -> None:
    """Raises `UserError` where an option sets what `--steps` sets, or judges by other data."""
    student, run_student = config.student, own.student
    for option, unchanged in (
        ("weights", student.weights == run_student.weights),
        ("block_widths", student.block_widths == run_student.block_widths),
        ("pruning", student.pruning == run_student.pruning),
        ("quantisation", student.quantisation == run_student.quantisation),
    ):
        if not unchanged:
            raise UserError(f"student.{option} follows from --steps; leave it out")
    split, run_split = (x.data.test or x.data.validation for x in (config, own))
    if split != run_split or CentralCrop.of(config.views) != CentralCrop.of(own.views):
        raise UserError(
            f"data.{'test' if own.data.test else 'validation'}, views.central_fraction and "
            "views.central_resize have to stay those that the run was evaluated with; leave them "
            "out"
        )


def _planned(
    config: Config,
    steps: tuple[CompressionStep, ...],
    start: pathlib.Path,
    folder: pathlib.Path,
    total: int,
) -> dict[str, Config]:
    """The run of each step, by the names of all steps up to it."""
    step_configs: dict[str, Config] = {}
    name, weights = "", str(start)
    for step in steps:
        config = config_after(config, step, weights, total)
        name = f"{name} + {step.text}" if name else step.text
        step_configs[name], weights = config, str(folder / _file_name(name))
    return step_configs


def _check_planned(
    runs: dict[str, Config], folder: pathlib.Path, network: NetworkConfig, total: int
) -> None:
    """Raises `UserError` where a run cannot be, or its folder is that of another one.

    `network` is the student that the first one starts from. Widths that weights decide are not
    known yet; whatever depends on them is checked when the step begins.
    """
    longest = max(map(_file_name, runs), key=len)
    if len(longest) > LONGEST_NAME:
        raise UserError(
            f"the names of {len(runs)} steps have {len(longest)} characters together, and a "
            f"file's may have {LONGEST_NAME}; give fewer, and compress the last student further"
        )
    widths_known = True
    for name, step_config in runs.items():
        check(step_config)
        pruning, quantisation = step_config.student.pruning, step_config.student.quantisation
        if widths_known:
            try:
                network = pruned_network(network, pruning)
                network = dataclasses.replace(network, quantisation=quantisation)
                built_network = build_network(network, 2, jnp.dtype("float32"))
            except ValueError as error:
                raise UserError(f"{name}: {error}") from None
            make_prune(pruning, built_network, total, network.model)
        widths_known = widths_known and pruning.ranking == "block"
        step_workdir = Workdir(folder / _file_name(name))
        if step_workdir.has_config() and (
            changes := differences(step_workdir.stored().config, step_config)
        ):
            raise UserError(
                f"{step_workdir.path} belongs to another compression ({'; '.join(changes)}); give "
                "another --to"
            )


def _refuse_another_start(place: Workdir, run: Config) -> None:
    """Raises `UserError` where a step in the folder was started from other weights or teachers."""
    if not place.has_config():
        return
    resolved = place.stored().resolved
    networks = load_networks(run, place.path, resolved.classes, resolved.class_names)
    facts = networks.facts
    # Where the scores of the channels are gone, the run itself compares them when they are back.
    same_student = networks.undecided or facts.student_weights == resolved.student_weights
    if not same_student or facts.teacher_weights != resolved.teacher_weights:
        raise UserError(
            f"{place.path} was started from other weights or teachers than this compression; give "
            "another --to, or remove it"
        )


def _file_name(name: str) -> str:
    return name.replace(" + ", "+").replace(":", "-").replace(" ", "_")


def _file(folder: pathlib.Path, name: str, format: Format) -> pathlib.Path:
    return folder / f"{_file_name(name)}.{format}"


def _is_exported(name: str, workdir: pathlib.Path, path: pathlib.Path) -> bool:
    """False, and why, where the file would not compute what the run computes."""
    try:
        export(workdir, path, overwrite=True)
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # a full disk, for example
            raise
        log(f"WARNING: {name} has no {path.suffix} file: {error}")
        return False
    return True


def _file_figures(name: str, timed: Row | None) -> FileFigures:
    if timed is None:
        return FileFigures(name)
    content = pathlib.Path(timed.name).read_bytes()
    zipped_bytes = len(zlib.compress(content, 9))
    return FileFigures(name, len(content), zipped_bytes, timed.median_ms, timed.p95_ms)


def _row(name: str, workdir: pathlib.Path, figures: dict[str, Any]) -> CompressionRow:
    params = open_run(workdir).student.variables.params
    zero_weights = sum(int((np.asarray(leaf) == 0).sum()) for leaf in jax.tree.leaves(params))

    def of(metric: str) -> float | None:
        return BY_NAME[metric].of(figures)

    agreement, kl, view_agreement = (
        of(metric) for metric in ("agreement_top1", "kl_one", "training_view_agreement_top1")
    )
    flops = of("student_flops")
    return CompressionRow(
        name=name,
        split=figures["split"],
        top1=of("student_top1"),
        teacher_top1=of("teacher_top1"),
        agreement=agreement,
        kl_one=kl,
        training_view_agreement=view_agreement,
        parameters=parameter_count(params),
        zero_weights=zero_weights,
        flops=None if flops is None else int(flops),
    )
