"""An ONNX file teaches, run by ONNX Runtime: any framework can write one.

Command:  pip install onnxruntime
          TEACHER_ONNX=teacher.onnx fm-distill record experiments/onnx_teacher.py \\
              --data.data-dir FOLDER --to recordings/onnx
          fm-distill train experiments/onnx_teacher.py --data.data-dir FOLDER \\
              --teacher.recording recordings/onnx
          The file takes one float32 input (batch, 3, 224, 224), normalised as ImageNet's usually
          are, and returns logits first. With other classes, images or order of channels, change
          `config` and `teacher` here.
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
    name="onnx_teacher",
    teacher=TeacherConfig(
        function="onnx_teacher.py:teacher",
        network=NetworkConfig(model="function", resolution=224, input_range="imagenet"),
    ),
)


@functools.cache
def session():
    import onnxruntime

    return onnxruntime.InferenceSession(os.environ.get("TEACHER_ONNX", "teacher.onnx"))


def teacher(images: np.ndarray) -> np.ndarray:
    """Pictures (batch, height, width, 3) to logits (batch, classes)."""
    name = session().get_inputs()[0].name
    logits, *_ = session().run(None, {name: np.ascontiguousarray(images.transpose(0, 3, 1, 2))})
    return logits
