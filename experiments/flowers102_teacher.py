"""A teacher for Flowers-102: EfficientNet-Lite0 from ImageNet, fine-tuned at 128 pixels.

Command:  fm-distill train experiments/flowers102_teacher.py --data.data-dir TFDS_DIR
          (`--student.weights FILE.safetensors` takes a copy of the weights instead of the hub's)
Source:   timm's weights `tf_efficientnet_lite0.in1k`; 15 epochs of Adam with a head ten times as
          fast as the body.
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
    ViewConfig,
)

flowers = load_experiment(pathlib.Path(__file__).with_name("flowers102.py"))

config = dataclasses.replace(
    flowers,
    name="flowers102_teacher",
    batch_size=32,
    views=ViewConfig(crop="torchvision", crop_area=(0.2, 1.0), mixup="none"),
    student=StudentConfig(
        model="efficientnet_lite0",
        resolution=128,
        weights="hf://timm/tf_efficientnet_lite0.in1k",
        keep_statistics=True,
    ),
    teacher=None,
    objective=ObjectiveConfig(target="labels", label_smoothing=0.1),
    optimizer=OptimizerConfig(learning_rate=3e-4, head_learning_rate=3e-3, clip_norm=None),
    schedule=ScheduleConfig(total_epochs=15.0, warmup_steps=30),
    checkpoint=CheckpointConfig(every_steps=100),
    log=LogConfig(every_steps=10, evaluate_every_steps=160),
)
