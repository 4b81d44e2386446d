"""The networks of the page that `fm-distill demo` serves: a student, its teachers, one image."""

import base64
import dataclasses
import io
import os
import pathlib
import time
from typing import Literal

import numpy as np
from PIL import Image

from fm_distill.config import CanvasConfig, Config
from fm_distill.data.images import CorruptImage
from fm_distill.errors import UserError
from fm_distill.evaluation.evaluate_file import config_of_card, teachers_of_file
from fm_distill.evaluation.inference import most_likely, teachers_if_here, teachers_of_run
from fm_distill.exporting.function import central_squares
from fm_distill.exporting.load_exported import load_exported
from fm_distill.networks.teachers import Teacher
from fm_distill.runs.open_run import open_run
from fm_distill.runs.student import Predictor, Student, canvases_of
from fm_distill.views.rendering import CentralCrop

TOP = 5  # classes that are shown


@dataclasses.dataclass(frozen=True)
class Judge:
    """A network that sees the image."""

    name: str
    description: str
    predictor: Predictor
    # What it sees of an image.
    crop: CentralCrop
    resolution: int
    canvas: CanvasConfig


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One network's prediction for one image, as the page shows it."""

    name: str
    description: str
    # Most likely first: name and probability.
    classes: tuple[tuple[str, float], ...]
    # The square that it saw, a PNG as a data URL.
    view: str
    milliseconds: float


def judges(path: str | os.PathLike[str], config: Config | None = None) -> tuple[Judge, ...]:
    """The student at `path`, a workdir or a file of `FORMATS`, and its teachers, if they are here.

    `config` may name new places of the teachers. Raises `UserError` where there is no student.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        run = open_run(path)
        run_judge = _judge("student", run.student)
        config = config or run.config
        teachers = teachers_if_here(lambda: teachers_of_run(run, config), run.config, config)
        return (run_judge, *_teachers(teachers, run_judge, run.resolved.precision))
    student = load_exported(path)
    card, stored = student.card, config_of_card(student.card, path)
    exported = Judge(
        "student",
        f"{card.model}, {card.resolution} px, by {student.runtime.name}",
        student,
        card.central_crop,
        card.resolution,
        student.canvas,
    )
    teachers = teachers_of_file(path, card, stored, config or stored)
    return (exported, *_teachers(teachers, exported, card.precision))


def _teachers(
    teachers: tuple[Teacher, ...], student: Judge, precision: Literal["float32", "bfloat16"]
) -> tuple[Judge, ...]:
    """For images that are prepared as the student's are."""
    teacher_judges: list[Judge] = []
    for teacher in teachers:
        if teacher.variables is None or not teacher.has_head:
            continue
        network = Student(
            network=teacher.network,
            classes=teacher.classes,
            class_names=student.predictor.class_names,
            canvas=student.canvas,
            central_crop=student.crop,
            precision=precision,
            variables=teacher.variables,
        )
        teacher_judges.append(
            _judge(f"teacher {len(teacher_judges) + 1}" if teacher_judges else "teacher", network)
        )
    return tuple(teacher_judges)


def _judge(name: str, student: Student) -> Judge:
    network = student.network
    description = f"{network.model}, {network.resolution} px, {student.precision}"
    return Judge(
        name, description, student, student.central_crop, network.resolution, student.canvas
    )


def warm_up(judge: Judge) -> None:
    """Compiles what the first image would wait for."""
    grey = np.full((judge.canvas.size, judge.canvas.size, 3), 128, np.uint8)
    pixels = judge.predictor.prepare(grey)
    judge.predictor.predict_pixels([pixels])
    _view(judge, pixels)


def judged(judge: Judge, image: bytes) -> Judgement:
    """The predictions of `judge` for an encoded image. Raises `UserError` where it is none."""
    try:
        pixels = judge.predictor.prepare(image)
    except CorruptImage as error:
        raise UserError(f"this is not an image that can be read: {error}") from None
    start = time.perf_counter()
    probabilities = judge.predictor.predict_pixels([pixels])[0]
    seconds = time.perf_counter() - start
    return Judgement(
        judge.name,
        judge.description,
        most_likely(judge.predictor.class_names, probabilities, TOP),
        _view(judge, pixels),
        1000 * seconds,
    )


def _view(judge: Judge, pixels: np.ndarray) -> str:
    canvases, sizes = canvases_of([pixels], judge.canvas.side, 1)
    (square,) = central_squares(canvases, sizes, judge.crop, judge.resolution)
    buffer = io.BytesIO()
    Image.fromarray(square).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
