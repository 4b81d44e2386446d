"""Images for a student to predict: files, folders of them, and `.npy` arrays."""

import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from fm_distill.data.images import CorruptImage, Pixels
from fm_distill.data.sources import SUFFIXES
from fm_distill.errors import UserError
from fm_distill.runs.student import Predictor, checked


def prepared(
    student: Predictor, places: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
) -> Iterator[tuple[str, Pixels]]:
    """Name and pixels of each image: of a file, of all in a folder, of the rows of a `.npy` array.

    Rows are named `ARRAY.npy[ROW]`. Raises `UserError`, for places that are not there before the
    first image.
    """
    if isinstance(places, str | os.PathLike):
        places = [places]
    for path in [path for source in places for path in _files(pathlib.Path(source))]:
        if path.suffix == ".npy":
            for row, image in enumerate(_array(path)):
                yield f"{path}[{row}]", student.prepare(image)
            continue
        try:
            yield str(path), student.prepare(path.read_bytes())
        except CorruptImage as error:
            raise UserError(f"{path} is not a complete image ({error})") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from None


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no image, folder or array {path}")
    kinds = (*SUFFIXES, ".npy")
    paths = sorted(x for x in path.rglob("*") if x.suffix.lower() in kinds and x.is_file())
    if not paths:
        raise UserError(f"{path} holds no images; expected files that end in {', '.join(kinds)}")
    return paths


def _array(path: pathlib.Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a complete array of numbers: {error}") from None
    if not len(array):
        raise UserError(f"{path} holds no images: its shape is {array.shape}")
    return checked(array, str(path))
