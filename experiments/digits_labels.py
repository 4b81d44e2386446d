"""The baseline of `digits.py`: the same student, steps and optimizer, on labels.

Command:  fm-distill train experiments/digits_labels.py
Source:   as `digits.py`, with the milder crops of `digits_teacher.py`, which suit labels better;
          `digits.py --objective.target labels` is the baseline on the very same views.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import ObjectiveConfig

here = pathlib.Path(__file__)
matching = load_experiment(here.with_name("digits.py"))
teacher = load_experiment(here.with_name("digits_teacher.py"))

config = dataclasses.replace(
    matching,
    name="digits_labels",
    views=teacher.views,
    teacher=None,
    objective=ObjectiveConfig(target="labels"),
)
