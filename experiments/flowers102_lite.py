"""Flowers-102 on two CPU cores: a fine-tuned EfficientNet-Lite0 teaches a sixth of it.

Command:  fm-distill train experiments/flowers102_lite.py --data.data-dir TFDS_DIR \\
              --teacher.workdir runs/flowers102_teacher
          The paper's figure 2, and its patience:
          fm-distill sweep experiments/flowers102_lite.py --data.data-dir TFDS_DIR \\
              --over teaching=function_matching,consistent,independent,fixed
          fm-distill sweep experiments/flowers102_lite.py --data.data-dir TFDS_DIR \\
              --over schedule.total_epochs=16,48,144
Source:   Beyer et al. 2021 (arXiv 2106.05237), figure 2 and table 3, in small.
Expected: see LOG.md.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import (
    CheckpointConfig,
    LogConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    StudentConfig,
    TeacherConfig,
    ViewConfig,
)

flowers = load_experiment(pathlib.Path(__file__).with_name("flowers102.py"))

config = dataclasses.replace(
    flowers,
    name="flowers102_lite",
    batch_size=16,
    views=ViewConfig(),
    # 556,790 parameters against 3,501,670.
    student=StudentConfig(
        model="bit",
        resolution=48,
        options={"depths": (1, 1, 1, 1), "width": 0.25, "norm": "batch", "stem": "imagenet"},
    ),
    teacher=TeacherConfig(workdir="runs/flowers102_teacher"),
    objective=ObjectiveConfig(temperature=2.0),
    optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=3e-4),
    schedule=ScheduleConfig(total_epochs=16.0, warmup_steps=100),
    checkpoint=CheckpointConfig(every_steps=255),
    log=LogConfig(every_steps=51, evaluate_every_steps=340),
)
