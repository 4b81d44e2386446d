"""An owner of a part of the digits: a teacher that is trained on it alone, for `owners.py`.

Command:  fm-distill train experiments/owner_a.py
Source:   as `digits_teacher.py`, on the first 41 % of the training digits. They come writer by
          writer, each filling in the same form of about 130 digits; this is the end of the fourth.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import SplitConfig

teacher = load_experiment(pathlib.Path(__file__).with_name("digits_teacher.py"))

config = dataclasses.replace(
    teacher,
    name="owner_a",
    data=dataclasses.replace(teacher.data, train=SplitConfig(name="train[:41%]")),
)
