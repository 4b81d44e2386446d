"""Patience on real images, on two CPU cores: a narrow ResNet learns from a recorded teacher.

Command:  fm-distill train experiments/flowers102_teacher.py --data.data-dir TFDS_DIR
          fm-distill record experiments/flowers102_patience.py --data.data-dir TFDS_DIR \\
              --teacher.workdir runs/flowers102_teacher --to recordings/flowers102_patience
          fm-distill train experiments/flowers102_patience.py --data.data-dir TFDS_DIR \\
              --teacher.workdir runs/flowers102_teacher \\
              --teacher.recording recordings/flowers102_patience --epochs 100|300|1000|3000
Source:   Beyer et al. 2021 (arXiv 2106.05237), figures 1 and 3 and table 3, in small.
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
    name="flowers102_patience",
    batch_size=32,
    views=ViewConfig(),
    student=StudentConfig(
        model="bit",
        resolution=64,
        final_statistics="central",
        options={"depths": (1, 1, 1, 1), "width": 0.25, "norm": "batch"},
    ),
    teacher=TeacherConfig(workdir="runs/flowers102_teacher"),
    objective=ObjectiveConfig(temperature=2.0),
    optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=1e-4),
    schedule=ScheduleConfig(total_epochs=300.0, warmup_steps=200),
    checkpoint=CheckpointConfig(every_steps=1000),
    log=LogConfig(every_steps=200, evaluate_every_steps=3200, tensorboard=False),
)
