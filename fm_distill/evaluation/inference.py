"""A run in a workdir, put to use: evaluated on a split, or applied to the user's images."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fm_distill.config import Config, MeshConfig
from fm_distill.config.code import IMAGES, TEACHERS
from fm_distill.config.serialization import refuse_other_config
from fm_distill.config.teachers import moved
from fm_distill.data.feeding import Reader, evaluation_batches
from fm_distill.data.splits import open_named
from fm_distill.errors import UserError
from fm_distill.evaluation.evaluate import Evaluator
from fm_distill.evaluation.image_files import prepared
from fm_distill.exporting.formats import FORMATS
from fm_distill.exporting.load_exported import load_exported
from fm_distill.exporting.load_student import load_student
from fm_distill.models import Variables
from fm_distill.networks.branch import Branch, frozen_teachers, make_branch
from fm_distill.networks.cost import run_cost
from fm_distill.networks.teachers import (
    Teacher,
    load_teachers,
    only_recorded,
    refuse_other_teachers,
)
from fm_distill.runs.open_run import Run, open_run
from fm_distill.runs.run_code import refuse_code_of_run
from fm_distill.runs.student import BATCH, Predictor
from fm_distill.system.console import COMPILING, log
from fm_distill.system.sharding import Layout, make_layout, on_devices


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run's networks on the devices, and the split that they are applied to."""

    run: Run
    config: Config
    student_branch: Branch
    teacher_branches: tuple[Branch, ...]
    layout: Layout
    student: Variables
    frozen: tuple[Variables, ...]  # of all teachers that have a head
    reader: Reader
    batch_size: int


def evaluate(
    workdir: str | os.PathLike[str],
    split: str = "test",
    config: Config | None = None,
    step: int | None = None,
    *,
    cost: bool = False,
) -> dict[str, Any]:
    """Student and teacher of the run in `workdir` on every example of `split` exactly once.

    Returns the figures of `evaluate.summarise`: accuracies and agreement as fractions of 1, KL
    and cross-entropy in nats. `config` may name new places of data and teacher. Where the run
    keeps an average of the student, that is evaluated. `step` names a checkpoint; else it is the
    newest. With `cost`, latency and memory are measured too. Raises `UserError`.
    """
    opened = open_split(workdir, split, config, step)
    batches = evaluation_batches(opened.reader, opened.batch_size)
    evaluator = Evaluator.make(
        opened.config,
        opened.student_branch,
        opened.teacher_branches,
        opened.layout,
        opened.run.resolved.class_counts,
    )
    figures = evaluator(opened.student, opened.frozen, batches, split, opened.run.step)
    batch_size = opened.config.batch_size if cost else None
    return figures | {"cost": run_cost(opened.run.resolved, batch_size)}


def open_split(
    workdir: str | os.PathLike[str],
    split: str,
    config: Config | None = None,
    step: int | None = None,
) -> Opened:
    """What `evaluate` needs, checked to be the run's own. Raises `UserError`."""
    run = open_run(workdir, step)
    config = config or run.config
    refuse_other_config(run.config, config, f"the run in {workdir}")
    refuse_code_of_run(run.stored, run.workdir.path, IMAGES, config)
    source = open_named(config, split)
    teachers = tuple(x for x in teachers_of_run(run, config) if x.has_head)
    layout = _evaluation_layout(config)
    dtype = jnp.dtype(run.resolved.precision)
    branches = tuple(make_branch(teacher.network, run.classes, dtype) for teacher in teachers)
    return Opened(
        run=run,
        config=config,
        student_branch=make_branch(run.network, run.classes, dtype),
        teacher_branches=branches,
        layout=layout,
        student=on_devices(run.student.variables, layout.variables(run.student.variables)),
        frozen=frozen_teachers(
            branches, tuple(x.variables for x in teachers if x.variables), layout
        ),
        reader=Reader(source, config.data, run.classes),
        # Whole batches for any number of devices; the mask takes care of the rest.
        batch_size=-(-config.batch_size // layout.mesh.size) * layout.mesh.size,
    )


def teachers_of_run(run: Run, config: Config) -> tuple[Teacher, ...]:
    """The teachers of `run`, checked to be its own; none where only a recording of them is here.

    `config` may name new places of theirs. Raises `UserError`.
    """
    refuse_code_of_run(run.stored, run.workdir.path, TEACHERS, config)
    if only_recorded(config, run.config, run.workdir.path):
        return ()
    teachers = load_teachers(config, run.workdir.path)
    if teachers:
        expected = run.resolved.teacher_weights
        refuse_other_teachers(teachers, expected, f"the run in {run.workdir.path}")
    return teachers


def teachers_if_here(
    load: Callable[[], tuple[Teacher, ...]], stored: Config, config: Config
) -> tuple[Teacher, ...]:
    """What `load` finds; none, with a message, where it raises `UserError`.

    Where `config` names other places of the teachers than `stored`, the error is raised.
    """
    try:
        return load()
    except UserError as error:
        if moved(config, stored):
            raise
        log(
            f"continuing without the teacher, which is not available ({error}); give "
            "--teacher.workdir DIR or --teacher.weights FILE"
        )
        return ()


def _evaluation_layout(config: Config) -> Layout:
    """All devices, whatever the run was trained on."""
    fsdp = config.mesh.fsdp
    return make_layout(MeshConfig(fsdp=fsdp if jax.device_count() % fsdp == 0 else 1))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image, by falling probability."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    student: str | os.PathLike[str],
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    top: int = 5,
) -> list[Prediction]:
    """The `top` classes of each image, by the student of a run or of an export.

    `student` is a workdir or a file of `export`, whose own runtime runs it; `images` are image
    files, folders of them and `.npy` arrays, uint8 of shape (batch, height, width, 3). Each image
    gets the central view of evaluation. Raises `UserError`, also for a file that is no image.
    """
    if top < 1:
        raise UserError(f"top is {top}; expected 1 or more")
    predictor = open_student(student)
    predictions = []
    remaining = prepared(predictor, images)
    compiled = pathlib.Path(student).suffix in FORMATS
    while batch := list(itertools.islice(remaining, BATCH)):
        if not compiled:
            log(COMPILING)
        compiled = True
        names, pixels = zip(*batch, strict=True)
        for name, probabilities in zip(names, predictor.predict_pixels(list(pixels)), strict=True):
            top_classes = most_likely(predictor.class_names, probabilities, top)
            predictions.append(
                Prediction(name, tuple(x for x, _ in top_classes), tuple(y for _, y in top_classes))
            )
    return predictions


def most_likely(
    names: tuple[str, ...], probabilities: Float[np.ndarray, " classes"], top: int
) -> tuple[tuple[str, float], ...]:
    """The `top` classes and their probabilities, the largest first."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    return tuple((names[i], float(probabilities[i])) for i in order)


def open_student(path: str | os.PathLike[str]) -> Predictor:
    """The student of the run in a workdir, or of an export. Raises `UserError`."""
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        return load_student(path)
    if path.suffix in FORMATS:
        return load_exported(path)
    return open_run(path).student
