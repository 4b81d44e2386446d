"""A ViT as the teacher of `own_network.py`: `vit_tiny` on patches of 16 pixels, on labels.

Command:  fm-distill train experiments/own_network_teacher.py
Source:   as `digits_teacher.py`, with timm's `vit_tiny_patch16_224` from scratch at 64 pixels.
Expected: 73.54 % (seed 0): a ViT from scratch on 1,259 images knows little.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import StudentConfig

digits = load_experiment(pathlib.Path(__file__).with_name("digits_teacher.py"))

config = dataclasses.replace(
    digits,
    name="own_network_teacher",
    student=StudentConfig(model="vit_tiny_patch16_224", resolution=64),
    optimizer=dataclasses.replace(digits.optimizer, learning_rate=5e-4, weight_decay=1e-2),
)
