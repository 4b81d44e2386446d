"""A TensorFlow SavedModel of BiT, read by its variables. The only file that imports TensorFlow."""

import pathlib

import numpy as np

from fm_distill.errors import UserError


def read_saved_model(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The variables of the SavedModel in `folder`."""
    raise UserError(f"{folder}: SavedModels are not read yet")
