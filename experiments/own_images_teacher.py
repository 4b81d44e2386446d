"""A teacher for own images in class folders: a small BiT on labels, from scratch, at 128 pixels.

Command:  fm-distill train experiments/own_images_teacher.py --data.data-dir FOLDER
          with FOLDER/train/CLASS/IMAGE and FOLDER/test/CLASS/IMAGE
Source:   as `flowers102_small_teacher.py`; a teacher with pretrained weights is better.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import CanvasConfig, DataConfig, SplitConfig

flowers = load_experiment(pathlib.Path(__file__).with_name("flowers102_small_teacher.py"))

config = dataclasses.replace(
    flowers,
    name="own_images_teacher",
    data=DataConfig(
        source="class_folders",
        train=SplitConfig(name="train"),
        test=SplitConfig(name="test"),
        canvas=CanvasConfig(size=160),
    ),
    student=dataclasses.replace(flowers.student, resolution=128),
)
