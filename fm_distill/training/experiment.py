"""Experiment files: a Python file that defines `config`, overrides on top, and the checks.

`check` refuses what is wrong whatever the data and the devices are; what depends on those is
refused where they are opened.
"""

import dataclasses
import math
import os
import pathlib
import runpy

from fm_distill.config import Config, NetworkConfig, TeacherConfig
from fm_distill.config.choices import check_choice
from fm_distill.config.serialization import flatten
from fm_distill.config.steps import total_steps, transfer_examples
from fm_distill.data.sources import SOURCES
from fm_distill.errors import UserError
from fm_distill.models import MODELS, check_network
from fm_distill.objectives.distances import DISTANCES
from fm_distill.runs.checkpoint import BEST
from fm_distill.training.memory import REMATERIALISE
from fm_distill.training.optim import OPTIMIZERS, decay_equivalent
from fm_distill.views.crops import CROPS


def load_experiment(path: str | os.PathLike[str]) -> Config:
    """The checked `config` of an experiment file.

    A relative `teacher.experiment` in the file is relative to the file. Raises `UserError` where
    the file is missing, fails, or defines no config.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"there is no experiment file {path}; give the path of a .py file")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(
            f"{path} defines no `config = fm_distill.Config(...)`; got {type(config).__name__}"
        )
    config = dataclasses.replace(
        config,
        teacher=config.teacher and _beside(config.teacher, path),
        more_teachers=tuple(_beside(teacher, path) for teacher in config.more_teachers),
    )
    check(config)
    return config


def _beside(teacher: TeacherConfig, file: pathlib.Path) -> TeacherConfig:
    """With the path of its experiment from where we are, not from the file's folder."""
    if not teacher.experiment or os.path.isabs(teacher.experiment):
        return teacher
    experiment = os.path.relpath(file.parent / teacher.experiment)
    return dataclasses.replace(teacher, experiment=experiment)


def resolve_length(default: Config, asked: Config) -> Config:
    """Lets an override of steps replace the file's epochs, and the other way round."""
    a, b = default.schedule, asked.schedule
    if b.total_steps is not None and b.total_epochs is not None:
        if a.total_steps is None and b.total_epochs == a.total_epochs:
            b = dataclasses.replace(b, total_epochs=None)
        elif a.total_epochs is None and b.total_steps == a.total_steps:
            b = dataclasses.replace(b, total_steps=None)
    return dataclasses.replace(asked, schedule=b)


def check(config: Config) -> None:
    """Raises `UserError` for what is wrong whatever the data and the devices are."""
    check_choice("data.source", config.data.source, SOURCES)
    check_choice("views.crop", config.views.crop, CROPS)
    check_choice("objective.distance", config.objective.distance, DISTANCES)
    check_choice("optimizer.name", config.optimizer.name, OPTIMIZERS)
    check_choice("memory.rematerialise", config.memory.rematerialise, REMATERIALISE)
    _check_network("student", config.student)
    if config.objective.target == "teacher" and config.teacher is None:
        raise UserError(
            "objective.target=teacher needs a teacher: give teacher.weights, teacher.experiment or "
            "teacher.workdir, or use objective.target=labels"
        )
    if config.more_teachers and config.teacher is None:
        raise UserError("more_teachers come beside a teacher; give the first one as teacher")
    if config.teacher:
        _check_teacher("teacher", config.teacher)
    for i, teacher in enumerate(config.more_teachers):
        _check_teacher(f"more_teachers.{i}", teacher)
    _check_teaching(config)
    _check_length(config)
    _check_numbers(config)
    if config.checkpoint.keep_best is not None:
        check_choice("checkpoint.keep_best", config.checkpoint.keep_best, BEST)
        if not (config.data.validation and config.log.evaluate_every_steps):
            raise UserError(
                "checkpoint.keep_best needs figures of a validation split: give data.validation "
                "and log.evaluate_every_steps"
            )
    if config.data.feeding == "streaming" and config.steps_per_dispatch not in ("auto", 1):
        raise UserError(
            f"steps_per_dispatch={config.steps_per_dispatch} needs data.feeding=resident: "
            "in streaming each step waits for its own batch; use auto or 1"
        )
    if config.data.source == "images" and config.objective.target == "labels":
        raise UserError(
            "objective.target=labels needs labels, and data.source=images has none; "
            "use class_folders, or objective.target=teacher"
        )


def _check_network(option: str, network: NetworkConfig) -> None:
    check_choice(f"{option}.model", network.model, MODELS)
    _positive(f"{option}.resolution", network.resolution)
    try:
        check_network(network)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None


def _check_teacher(option: str, teacher: TeacherConfig) -> None:
    if teacher.network:
        _check_network(f"{option}.network", teacher.network)
    if teacher.weights and (teacher.experiment or teacher.workdir):
        raise UserError(
            f"{option}.weights and a teacher's run ({option}.experiment, {option}.workdir) exclude "
            f"each other; keep one (`--{option}.experiment None` drops the file's)"
        )


def _check_teaching(config: Config) -> None:
    objective, data = config.objective, config.data
    if config.student.keep_statistics and not config.student.weights:
        raise UserError(
            "student.keep_statistics needs student.weights: from scratch there are no statistics "
            "to keep"
        )
    if config.fixed_crops and config.teaching != "fixed":
        raise UserError(
            f"fixed_crops={config.fixed_crops} belongs to teaching=fixed, and teaching is "
            f"{config.teaching}"
        )
    if objective.target == "teacher" and objective.label_smoothing:
        raise UserError(
            "objective.label_smoothing needs objective.target=labels: a teacher's output is not "
            "smoothed; use a higher objective.temperature"
        )
    if data.transfer and objective.target == "labels":
        raise UserError(
            "data.transfer are images without labels; with objective.target=labels train on "
            "data.train"
        )
    for i, part in enumerate(data.transfer):
        check_choice(f"data.transfer.{i}.source", part.source, SOURCES)


def _check_length(config: Config) -> None:
    schedule = config.schedule
    if schedule.shape == "bit_hyper_rule":
        if schedule.total_steps or schedule.total_epochs or schedule.warmup_steps:
            raise UserError(
                "schedule.shape=bit_hyper_rule sets steps and warm-up by the number of examples; "
                "give neither total_steps, total_epochs nor warmup_steps"
            )
        return
    given = [x for x in (schedule.total_steps, schedule.total_epochs) if x is not None]
    if len(given) != 1:
        got = "neither" if not given else "both"
        raise UserError(
            f"schedule: got {got} of total_steps and total_epochs; give exactly one of them"
        )
    _positive("schedule.total_steps or total_epochs", given[0])
    if schedule.warmup_steps < 0:
        raise UserError(f"schedule.warmup_steps is {schedule.warmup_steps}; expected 0 or more")


def _check_numbers(config: Config) -> None:
    views, optimizer, data = config.views, config.optimizer, config.data
    positive: dict[str, int | float] = {
        "batch_size": config.batch_size,
        "objective.temperature": config.objective.temperature,
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.epsilon": optimizer.epsilon,
        "data.canvas.size": data.canvas.size,
        "views.mixup_alpha": views.mixup_alpha,
        "mesh.fsdp": config.mesh.fsdp,
        "memory.accumulate": config.memory.accumulate,
        "memory.teacher_parts": config.memory.teacher_parts,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep": config.checkpoint.keep,
        "log.every_steps": config.log.every_steps,
    }
    if optimizer.clip_norm is not None:
        positive["optimizer.clip_norm"] = optimizer.clip_norm
    if optimizer.head_learning_rate is not None:
        positive["optimizer.head_learning_rate"] = optimizer.head_learning_rate
    if config.mesh.data != "auto":
        positive["mesh.data"] = config.mesh.data
    if config.steps_per_dispatch != "auto":
        positive["steps_per_dispatch"] = config.steps_per_dispatch
    for option, value in positive.items():
        _positive(option, value)
    _within("views.flip_probability", views.flip_probability, 0.0, 1.0)
    _within("views.central_fraction", views.central_fraction, 0.01, 1.0)
    _within("data.resident_share", data.resident_share, 0.0, 1.0)
    _within("optimizer.weight_decay", optimizer.weight_decay, 0.0, 1.0)
    _within("optimizer.momentum", optimizer.momentum, 0.0, 1.0 - 1e-12)
    _within("objective.label_smoothing", config.objective.label_smoothing, 0.0, 1.0)
    _within("fixed_crops", config.fixed_crops, 0, 100_000)
    _within("optimizer.beta1", optimizer.beta1, 0.0, 1.0 - 1e-12)
    _within("optimizer.beta2", optimizer.beta2, 0.0, 1.0 - 1e-12)
    _within("seed", config.seed, 0, 2**32 - 1)
    _within("data.workers", data.workers, 0, 512)
    _within("checkpoint.keep_every_steps", config.checkpoint.keep_every_steps, 0, math.inf)
    _within("divergence.most", config.divergence.most, 0, 1000)
    _within("divergence.factor", config.divergence.factor, 0.0, 1.0)
    _within("log.evaluate_every_steps", config.log.evaluate_every_steps, 0, math.inf)
    if config.ema_decay is not None:
        _within("ema_decay", config.ema_decay, 0.0, 1.0 - 1e-12)
    if data.classes is not None:
        _within("data.classes", data.classes, 2, math.inf)
    if data.canvas.max_aspect < 1.0:
        raise UserError(f"data.canvas.max_aspect is {data.canvas.max_aspect}; expected 1 or more")
    for option, (low, high) in {
        "views.crop_area": views.crop_area,
        "views.crop_aspect": views.crop_aspect,
    }.items():
        if not 0 < low <= high or (option == "views.crop_area" and high > 1):
            raise UserError(f"{option} is ({low}, {high}); expected 0 < lowest <= highest")


def _positive(option: str, value: int | float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{option} is {value}; expected a number above zero")


def _within(option: str, value: int | float, low: int | float, high: int | float) -> None:
    if not low <= value <= high:
        raise UserError(f"{option} is {value}; expected {low:g} to {high:g}")


def describe(config: Config) -> str:
    """The resolved config as text, one option a line, and what follows from it."""
    lines = [f"{name} = {value}" for name, value in flatten(config).items()]
    return "\n".join([*lines, "", *_notes(config)])


def _notes(config: Config) -> list[str]:
    examples = transfer_examples(config.data)
    notes = [f"# weight decay: {decay_equivalent(config.optimizer)}"]
    if examples:
        steps = total_steps(config, examples)
        epochs = steps * config.batch_size / examples
        notes.append(f"# length: {steps:,} steps, {epochs:,.1f} epochs of {examples:,} examples")
    return notes
