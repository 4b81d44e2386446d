"""Function matching on Flowers-102 with a small BiT pair: the whole path on two CPU cores.

Command:  fm-distill train experiments/flowers102_small.py --data.data-dir TFDS_DIR \\
              --teacher.workdir runs/flowers102_small_teacher
Source:   as `flowers102.py`, shrunk; the teacher is `flowers102_small_teacher.py`.
Expected: see LOG.md; a teacher from scratch on 1,020 images is weak, and so is its student.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import (
    ObjectiveConfig,
    ScheduleConfig,
    StudentConfig,
    TeacherConfig,
    ViewConfig,
)

teacher = load_experiment(pathlib.Path(__file__).with_name("flowers102_small_teacher.py"))

config = dataclasses.replace(
    teacher,
    name="flowers102_small",
    views=ViewConfig(central_fraction=0.8),
    student=StudentConfig(
        model="bit",
        resolution=64,
        options={"depths": (1, 1, 1, 1), "width": 0.25, "groups": 16, "stem": "imagenet"},
    ),
    teacher=TeacherConfig(workdir="runs/flowers102_small_teacher"),
    objective=ObjectiveConfig(temperature=2.0),
    schedule=ScheduleConfig(total_epochs=80.0, warmup_steps=100),
)
