"""Several owners: teachers of disjoint data teach one student on images that are public.

Each owner trains on images that stay with it, and gives away a network. The student sees neither
these images nor any label: it matches the mean of the owners' logits on the last 18 %
of the training digits, by other writers than the owners'.

Command:  fm-distill train experiments/owners.py
          of finished owners: --teacher.experiment None --teacher.workdir DIR_A
          --more-teachers.0.experiment None --more-teachers.0.workdir DIR_B
Source:   Lin et al. 2020, "Ensemble Distillation for Robust Model Fusion in Federated Learning"
          (FedDF, arXiv 2006.07242): the mean of the logits, on unlabelled images. Once, and from a
          student of its own instead of the mean of the owners' weights, in which FedDF starts.
Expected: owners of 96.1 and 91.4 %, the mean of their logits 97.8 %, their student 94.7 %.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import ObjectiveConfig, SplitConfig, TeacherConfig

digits = load_experiment(pathlib.Path(__file__).with_name("digits.py"))

config = dataclasses.replace(
    digits,
    name="owners",
    data=dataclasses.replace(digits.data, train=SplitConfig(name="train[82%:]")),
    teacher=TeacherConfig(experiment="owner_a.py"),
    more_teachers=(TeacherConfig(experiment="owner_b.py"),),
    objective=ObjectiveConfig(temperature=2.0, ensemble="mean_logits"),
)
