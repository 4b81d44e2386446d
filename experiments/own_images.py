"""Function matching on own images: the student of `own_images_teacher.py`.

Command:  fm-distill train experiments/own_images.py --data.data-dir FOLDER \\
              --teacher.workdir runs/own_images_teacher
Source:   the recipe of Beyer et al. 2021 (arXiv 2106.05237), shrunk as `flowers102_small.py`.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import TeacherConfig

here = pathlib.Path(__file__)
matching = load_experiment(here.with_name("flowers102_small.py"))
teacher = load_experiment(here.with_name("own_images_teacher.py"))

config = dataclasses.replace(
    matching,
    name="own_images",
    data=teacher.data,
    student=dataclasses.replace(matching.student, resolution=128),
    teacher=TeacherConfig(workdir="runs/own_images_teacher"),
)
