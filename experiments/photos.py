"""Function matching on one's own photos: a small student of `photos_teacher.py`.

Command:  fm-distill record experiments/photos.py --data.data-dir FOLDER --to recordings/photos \\
              --epochs 100
          fm-distill train experiments/photos.py --data.data-dir FOLDER \\
              --teacher.recording recordings/photos --epochs 1000
Source:   `flowers102_patience.py` on class folders; docs/photos.md has each step and its cost.
Expected: depends on the photos; two thirds of the teacher's accuracy on Flowers-102 (LOG.md).
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import TeacherConfig

here = pathlib.Path(__file__)
flowers = load_experiment(here.with_name("flowers102_patience.py"))
own_images = load_experiment(here.with_name("own_images_teacher.py"))

config = dataclasses.replace(
    flowers,
    name="photos",
    data=own_images.data,
    teacher=TeacherConfig(workdir="runs/photos_teacher"),
)
