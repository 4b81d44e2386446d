"""The baseline of `flowers102_lite.py`: the same student, steps and optimizer, on labels.

Command:  fm-distill train experiments/flowers102_lite_labels.py --data.data-dir TFDS_DIR \\
              --teacher.workdir runs/flowers102_teacher
Source:   as `flowers102_lite.py`, with milder crops, which suit labels better, and no mixup;
          `flowers102_lite.py --objective.target labels` is the baseline on the very same views.
Expected: see LOG.md. The teacher is only compared with.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import ObjectiveConfig, ViewConfig

matching = load_experiment(pathlib.Path(__file__).with_name("flowers102_lite.py"))

config = dataclasses.replace(
    matching,
    name="flowers102_lite_labels",
    views=ViewConfig(crop_area=(0.3, 1.0), mixup="none"),
    objective=ObjectiveConfig(target="labels"),
)
