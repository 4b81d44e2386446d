"""A student from a file with its whole function, run by that file's own runtime."""

import dataclasses
import os
import pathlib

import jax
import numpy as np
from jaxtyping import Float

from fm_distill.config import CanvasConfig
from fm_distill.data.images import Pixels, decode, shrink
from fm_distill.errors import UserError
from fm_distill.exporting.formats import FORMATS
from fm_distill.exporting.function import Runtime, central_squares, in_batches
from fm_distill.exporting.load_student import canvas_of
from fm_distill.runs.open_run import names_of
from fm_distill.runs.student import canvases_of
from fm_distill.weights.card import Card, FunctionFacts, card_from_json


@dataclasses.dataclass(frozen=True)
class ExportedStudent:
    """A function from a file, with the preparation of images that belongs to it.

    Images are shrunk onto the canvas of the run's data, cropped as in evaluation, and rounded to
    uint8. The rounding is all that the student of the run does not do.
    """

    runtime: Runtime
    card: Card
    facts: FunctionFacts
    canvas: CanvasConfig

    @property
    def class_names(self) -> tuple[str, ...]:
        return names_of(self.card.class_names, self.card.classes)

    def prepare(self, image: bytes | np.ndarray) -> Pixels:
        """As a `Student` does."""
        return shrink(decode(image), self.canvas)

    def predict_pixels(self, prepared: list[np.ndarray]) -> Float[np.ndarray, "batch classes"]:
        """Probabilities of images that went through `prepare`, uint8 (height, width, 3) each."""
        canvases, sizes = canvases_of(prepared, self.canvas.side, len(prepared))
        pixels = central_squares(canvases, sizes, self.card.central_crop, self.card.resolution)
        outputs = in_batches(self.runtime.call, pixels, self.facts.batch, self.card.classes)
        if self.facts.output == "logits":
            return np.asarray(jax.nn.softmax(outputs, axis=-1))
        return outputs


def card_of(path: str | os.PathLike[str]) -> Card:
    """The card in a file of `FORMATS`. Raises `UserError` where `export` did not write it."""
    _, text = FORMATS[pathlib.Path(path).suffix].read(pathlib.Path(path))
    return card_from_json(text, str(path))


def load_exported(path: str | os.PathLike[str], threads: int | None = None) -> ExportedStudent:
    """The student in a file of `FORMATS`. Raises `UserError` where `export` did not write it."""
    path = pathlib.Path(path)
    file_format = FORMATS[path.suffix]
    data, text = file_format.read(path)
    card = card_from_json(text, str(path))
    if card.function is None:
        raise UserError(f"{path}: its card describes no function; export it again")
    try:
        runtime = file_format.load(data, threads)
    except UserError:
        raise
    except Exception as error:  # of many kinds, by what the bytes seem to be
        raise UserError(
            f"{path} cannot be run here ({type(error).__name__}: {str(error).splitlines()[:1]}): "
            "it is damaged, or was made for a newer version of its runtime; export it again"
        ) from error
    return ExportedStudent(runtime, card, card.function, canvas_of(card, path))
