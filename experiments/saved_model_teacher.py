"""A SavedModel teaches, run by TensorFlow.

Command:  pip install 'fm-distill[prepare]'
          TEACHER_SAVED_MODEL=FOLDER_OF_THE_MODEL fm-distill record \\
              experiments/saved_model_teacher.py --data.data-dir FOLDER --to recordings/saved_model
          fm-distill train experiments/saved_model_teacher.py --data.data-dir FOLDER \\
              --teacher.recording recordings/saved_model
          Its default signature takes one float32 input (batch, 224, 224, 3) of pixels from -1 to
          1, and returns logits; see `saved_model_cli show`, and change `config` where it differs.
Source:   the recipe of Beyer et al. 2021 (arXiv 2106.05237), shrunk as `unlabelled.py`.
Expected: not measured; depends on the teacher and the images.
"""

import dataclasses
import functools
import os
import pathlib

import numpy as np

from fm_distill import load_experiment
from fm_distill.config import NetworkConfig, TeacherConfig

unlabelled = load_experiment(pathlib.Path(__file__).with_name("unlabelled.py"))

config = dataclasses.replace(
    unlabelled,
    name="saved_model_teacher",
    teacher=TeacherConfig(
        function="saved_model_teacher.py:teacher",
        network=NetworkConfig(model="function", resolution=224, input_range="minus_one_one"),
    ),
)


@functools.cache
def model():
    import tensorflow as tf

    loaded = tf.saved_model.load(os.environ["TEACHER_SAVED_MODEL"])
    return loaded, loaded.signatures["serving_default"]  # the signature does not keep the model


def teacher(images: np.ndarray) -> np.ndarray:
    """Pictures (batch, height, width, 3) to logits (batch, classes)."""
    _, signature = model()
    (name,) = signature.structured_input_signature[1]
    (logits,) = signature(**{name: images}).values()
    return logits.numpy()
