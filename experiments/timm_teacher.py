"""Any model of timm teaches, run by PyTorch.

Command:  pip install timm
          TEACHER_TIMM=convnext_tiny.in12k_ft_in1k fm-distill record experiments/timm_teacher.py \\
              --data.data-dir FOLDER --to recordings/timm
          fm-distill train experiments/timm_teacher.py --data.data-dir FOLDER \\
              --teacher.recording recordings/timm
          Its images have 224 pixels, normalised as ImageNet's usually are; see its
          `pretrained_cfg`, and change `config` where it says otherwise.
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
    name="timm_teacher",
    teacher=TeacherConfig(
        function="timm_teacher.py:teacher",
        network=NetworkConfig(model="function", resolution=224, input_range="imagenet"),
    ),
)


@functools.cache
def model():
    import timm

    name = os.environ.get("TEACHER_TIMM", "convnext_tiny.in12k_ft_in1k")
    return timm.create_model(name, pretrained=True).eval()


def teacher(images: np.ndarray) -> np.ndarray:
    """Pictures (batch, height, width, 3) to logits (batch, classes)."""
    import torch

    with torch.inference_mode():
        return model()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
