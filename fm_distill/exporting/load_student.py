"""A student from an export, to call as one from its run."""

import os

import msgspec

from fm_distill.config import CanvasConfig
from fm_distill.config.serialization import converted
from fm_distill.errors import UserError
from fm_distill.runs.open_run import names_of
from fm_distill.runs.student import Student
from fm_distill.weights.card import Card
from fm_distill.weights.files import read
from fm_distill.weights.load import load_weights


def load_student(path: str | os.PathLike[str]) -> Student:
    """The student that `export` wrote to `path`, with its preparation of images.

    Raises `UserError` where the file is not intact, or lacks the preparation because
    another tool wrote it.
    """
    card = read(os.fspath(path)).facts.card
    if card is None:
        raise UserError(
            f"{path} has no card of fm-distill, so how its images are prepared is not known; "
            "expected a file that `fm-distill export` wrote"
        )
    canvas = canvas_of(card, path)
    pretrained = load_weights(os.fspath(path), None, "student")
    return Student(
        network=pretrained.network,
        classes=pretrained.classes,
        class_names=names_of(pretrained.class_names, pretrained.classes),
        canvas=canvas,
        central_crop=card.central_crop,
        precision=card.precision,
        variables=pretrained.variables,
    )


def canvas_of(card: Card, path: str | os.PathLike[str]) -> CanvasConfig:
    """The canvas of the run's data, in the config on the `card` of `path`. Raises `UserError`."""
    try:
        return converted(card.config["data"]["canvas"], CanvasConfig)
    except (KeyError, TypeError, msgspec.ValidationError) as error:
        raise UserError(
            f"{path}: the config on its card does not fit this version ({error}); export it again "
            "with this one"
        ) from None
