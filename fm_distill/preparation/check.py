"""The checks of a config that need neither data nor devices.

What depends on those is refused where they are opened.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from fm_distill.config import (
    Config,
    DataConfig,
    FourierConfig,
    PruningConfig,
    StudentConfig,
    ViewConfig,
)
from fm_distill.config.bounds import out_of_bounds
from fm_distill.config.choices import not_a_choice
from fm_distill.config.pruning import OF_WEIGHTS
from fm_distill.data.sources import SOURCES
from fm_distill.errors import UserError
from fm_distill.models import build_network, resolve
from fm_distill.networks.shrinking import pruned_network
from fm_distill.preparation.check_networks import wrong_network, wrong_teachers
from fm_distill.preparation.check_objective import wrong_objective
from fm_distill.preparation.check_own_parts import wrong_own_parts
from fm_distill.runs.metric_table import RANKED
from fm_distill.system.references import not_an_entry
from fm_distill.train_step.memory import REMATERIALISE
from fm_distill.train_step.optim import OPTIMIZERS
from fm_distill.views.crops import CROPS
from fm_distill.weights.card import only_network

# Of a curriculum: steps, and values from there on.
Points = tuple[tuple[int, float], ...]


def check(config: Config) -> None:
    """Raises one `UserError` with everything that is wrong."""
    messages = list(dict.fromkeys(problems(config)))
    if len(messages) == 1:
        raise UserError(messages[0])
    if messages:
        raise UserError("\n  ".join([f"{len(messages)} settings are wrong:", *messages]))


def problems(config: Config) -> Iterator[str]:
    """A sentence for each thing that is wrong, with what to change."""
    yield from out_of_bounds(config)
    yield from not_an_entry(SOURCES, config.data.source, "data.source")
    for i, part in enumerate(config.data.transfer):
        yield from not_an_entry(SOURCES, part.source, f"data.transfer.{i}.source")
    yield from not_an_entry(CROPS, config.views.crop, "views.crop")
    yield from not_an_entry(OPTIMIZERS, config.optimizer.name, "optimizer.name")
    yield from not_a_choice("memory.rematerialise", config.memory.rematerialise, REMATERIALISE)
    student_problems = list(wrong_network("student", config.student))
    yield from student_problems or _wrong_pruning(config.student)
    yield from () if student_problems else _wrong_final_statistics(config.student)
    yield from wrong_teachers(config)
    yield from _wrong_teaching(config)
    yield from _wrong_long_tail(config.data)
    yield from wrong_objective(config)
    yield from wrong_own_parts(config)
    yield from _wrong_length(config)
    yield from _wrong_views(config)
    keep_best = config.checkpoint.keep_best
    if keep_best is not None:
        yield from not_a_choice("checkpoint.keep_best", keep_best, RANKED)
        if not (config.data.validation and config.log.evaluate_every_steps):
            yield (
                "checkpoint.keep_best needs figures of a validation split: give data.validation "
                "and log.evaluate_every_steps"
            )
    if config.data.feeding == "streaming" and config.steps_per_dispatch not in ("auto", 1):
        yield (
            f"steps_per_dispatch={config.steps_per_dispatch} needs data.feeding=resident: "
            "in streaming each step waits for its own batch; use auto or 1"
        )


def _wrong_pruning(student: StudentConfig) -> Iterator[str]:
    """Of a student whose network is right."""
    pruning, option = student.pruning, "student.pruning"
    options_by_pattern = {
        "unstructured": ("sparsity", "scope", "begin_step", "end_step", "every_steps", "power"),
        "2:4": ("begin_step",),
        "1:4": ("begin_step",),
        "channels": ("sparsity", "criterion", "ranking", "multiple_of"),
    }
    used_options = options_by_pattern.get(pruning.pattern, ())
    if pruning.by_gradient:
        used_options = (*used_options, "taylor_batches")
    default = dataclasses.replace(PruningConfig(), pattern=pruning.pattern)
    unused = [
        x for x in vars(pruning) if x not in used_options and vars(pruning)[x] != vars(default)[x]
    ]
    if unused:
        criterion_text = (
            f" with criterion={pruning.criterion}" if pruning.pattern == "channels" else ""
        )
        yield (
            f"{option}: pattern={pruning.pattern}{criterion_text} does not use "
            f"{', '.join(unused)}; leave it out"
        )
    if pruning.pattern in ("kept", "channels") and not student.weights:
        yield (
            f"{option}.pattern={pruning.pattern} needs weights to start from: give "
            "student.weights, a run or a file"
        )
    if pruning.pattern in ("unstructured", "channels") and not 0 < pruning.sparsity < 1:
        yield f"{option}.sparsity is {pruning.sparsity:g}; expected more than 0 and less than 1"
    elif pruning.end_step is not None and pruning.end_step < pruning.begin_step:
        yield (
            f"{option}.end_step={pruning.end_step:,} is before begin_step={pruning.begin_step:,}; "
            "give a later one, or leave it out to prune all at once"
        )
    elif pruning.pattern in OF_WEIGHTS and not _zeros_stay(student):
        yield (
            f"{option}.pattern={pruning.pattern} needs zeros that stay zero, and {student.model} "
            "standardises its kernels, which makes them non-zero: use options.norm=batch, or "
            "pattern=channels"
        )
    elif pruning.pattern == "channels":
        try:
            pruned_network(resolve(only_network(student)), pruning)
        except ValueError as error:
            yield f"student: {error}"


def _wrong_final_statistics(student: StudentConfig) -> Iterator[str]:
    """Of a student whose network is right."""
    if student.final_statistics == "kept":
        return
    network = build_network(student, 2, jnp.dtype("float32"))
    variables = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)))
    if not jax.tree.leaves(variables.statistics):
        yield (
            f"student.final_statistics={student.final_statistics} is for a student with BatchNorm, "
            f"and {student.model} as configured has none; leave it out"
        )


def _zeros_stay(student: StudentConfig) -> bool:
    return build_network(student, 2, jnp.dtype("float32")).zeros_stay


def _wrong_teaching(config: Config) -> Iterator[str]:
    data = config.data
    if config.student.keep_statistics and not config.student.weights:
        yield (
            "student.keep_statistics needs student.weights: from scratch there are no statistics "
            "to keep"
        )
    if config.student.keep_statistics and config.student.final_statistics != "kept":
        yield (
            f"student.final_statistics={config.student.final_statistics} replaces the statistics "
            "that student.keep_statistics is to keep; leave out one of them"
        )
    if config.fixed_crops and config.teaching != "fixed":
        yield (
            f"fixed_crops={config.fixed_crops} belongs to teaching=fixed, and teaching is "
            f"{config.teaching}"
        )
    if data.class_names and data.source != "images":
        yield (
            f"data.class_names are for images without labels, and data.source={data.source} has "
            "names of its own; leave it out"
        )


def _wrong_long_tail(data: DataConfig) -> Iterator[str]:
    if data.long_tail is None:
        return
    if data.transfer:
        yield (
            f"data.long_tail={data.long_tail:g} thins data.train, and data.transfer is trained on "
            "instead of it; leave out one of them"
        )
    if data.source == "images":
        yield (
            f"data.long_tail={data.long_tail:g} needs labels, and data.source=images has none; "
            "use class_folders, or leave it out"
        )


def _wrong_length(config: Config) -> Iterator[str]:
    schedule = config.schedule
    if schedule.shape == "bit_hyper_rule":
        if schedule.total_steps or schedule.total_epochs or schedule.warmup_steps:
            yield (
                "schedule.shape=bit_hyper_rule sets steps and warm-up by the number of examples; "
                "give neither total_steps, total_epochs nor warmup_steps"
            )
    elif (schedule.total_steps is None) == (schedule.total_epochs is None):
        given = "neither" if schedule.total_steps is None else "both"
        yield f"schedule: got {given} of total_steps and total_epochs; give exactly one of them"


def _wrong_views(config: Config) -> Iterator[str]:
    views = config.views
    low, high = views.crop_area
    if not 0 < low <= high <= 1:
        yield f"views.crop_area is ({low}, {high}); expected 0 < lowest <= highest <= 1"
    low, high = views.crop_aspect
    if not 0 < low <= high < float("inf"):
        yield f"views.crop_aspect is ({low}, {high}); expected 0 < lowest <= highest"
    for name, (points, greatest) in _curricula(views).items():
        yield from _wrong_points(f"views.{name}", points, greatest)
    if views.period_steps is not None:
        yield from points_after(views, views.period_steps, "views.period_steps")
    if any(area <= 0 for _, area in views.smallest_area_points):
        yield "views.smallest_area_points: got an area of 0 or less; expected more than 0"
    if any(pixels < 1 for _, pixels in views.resolution_points):
        yield "views.resolution_points: got less than 1 pixel; expected 1 or more"
    if views.smallest_area_points and views.crop == "whole":
        yield "views.smallest_area_points are for crops, and views.crop=whole has none; drop one"
    if views.mixup_strength_points and views.mixup == "none":
        yield "views.mixup_strength_points need mixup, and views.mixup=none has none; drop one"
    yield from _wrong_fourier(config)


def _wrong_fourier(config: Config) -> Iterator[str]:
    fourier = config.views.fourier
    if fourier.folder is None:
        default = FourierConfig()
        for name in ("beta", "probability"):
            if (value := vars(fourier)[name]) != vars(default)[name]:
                yield (
                    f"views.fourier.{name} is {value}, and there are no target images; give "
                    "views.fourier.folder, or leave it out"
                )
    elif config.teaching == "fixed" and config.objective.target != "labels":
        yield (
            "views.fourier gives teacher and student the same target images, and with "
            "teaching=fixed the teacher runs before the training; choose another teaching, or "
            "leave out views.fourier.folder"
        )


def _curricula(views: ViewConfig) -> dict[str, tuple[Points, float]]:
    """The points of each, and the greatest value that they may have."""
    return {
        "smallest_area_points": (views.smallest_area_points, views.crop_area[1]),
        "resolution_points": (views.resolution_points, float("inf")),
        "mixup_strength_points": (views.mixup_strength_points, 1.0),
    }


def points_after(views: ViewConfig, period: int, option: str) -> Iterator[str]:
    """A sentence for each curriculum that views which repeat after `period` steps would cut off.

    They repeat so by `option`.
    """
    for name, (points, _) in _curricula(views).items():
        if points and points[-1][0] >= period:
            yield (
                f"views.{name} go to step {points[-1][0]:,}, and the views repeat after {period:,} "
                f"steps ({option}); end before it, or leave out one of them"
            )


def points_after_run(views: ViewConfig, total_steps: int) -> Iterator[str]:
    """A sentence for each curriculum of which a run of `total_steps` would not see the end."""
    for name, (points, _) in _curricula(views).items():
        if points and points[-1][0] > total_steps:
            yield (
                f"views.{name} go to step {points[-1][0]:,}, and the run ends after "
                f"{total_steps:,} steps; end them by then, or train longer"
            )


def _wrong_points(option: str, points: Points, greatest: float) -> Iterator[str]:
    steps = [step for step, _ in points]
    if sorted(set(steps)) != steps or any(step < 0 for step in steps):
        yield f"{option}: the steps must increase, from 0 or more; got {steps}"
    if any(not 0 <= value <= greatest for _, value in points):
        yield f"{option}: expected values from 0 to {greatest:g}; got {[y for _, y in points]}"
