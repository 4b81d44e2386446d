"""The teacher of `flowers102_small.py`: a small BiT on labels, from scratch, at 64 pixels.

Command:  fm-distill train experiments/flowers102_small_teacher.py --data.data-dir TFDS_DIR
Source:   as `flowers102.py`, shrunk to what two CPU cores do in minutes.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import (
    CanvasConfig,
    CheckpointConfig,
    LogConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    StudentConfig,
    ViewConfig,
)

flowers = load_experiment(pathlib.Path(__file__).with_name("flowers102.py"))

config = dataclasses.replace(
    flowers,
    name="flowers102_small_teacher",
    batch_size=60,
    data=dataclasses.replace(flowers.data, canvas=CanvasConfig(size=96)),
    views=ViewConfig(crop_area=(0.3, 1.0), mixup="none", central_fraction=0.8),
    student=StudentConfig(
        model="bit",
        resolution=64,
        options={"depths": (1, 1, 1, 1), "width": 0.5, "stem": "imagenet"},
    ),
    teacher=None,
    objective=ObjectiveConfig(target="labels"),
    optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=3e-4),
    schedule=ScheduleConfig(total_epochs=40.0, warmup_steps=60),
    checkpoint=CheckpointConfig(every_steps=100),
    log=LogConfig(every_steps=20, evaluate_every_steps=340),
)
