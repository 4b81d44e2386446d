"""An owner of a part of the digits: a teacher that is trained on it alone, for `owners.py`.

Command:  fm-distill train experiments/owner_b.py
Source:   as `digits_teacher.py`, on the next 40 % of the training digits: the four writers after
          those of `owner_a.py`.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import SplitConfig

teacher = load_experiment(pathlib.Path(__file__).with_name("digits_teacher.py"))

config = dataclasses.replace(
    teacher,
    name="owner_b",
    data=dataclasses.replace(teacher.data, train=SplitConfig(name="train[41%:81%]")),
)
