"""The paper's Oxford-IIIT Pet row: BiT-R152x2 to BiT-R50x1 at 128 pixels.

Command:  fm-distill train experiments/pets.py --data.data-dir TFDS_DIR \\
              --teacher.weights BiT-R152x2-pets.npz
Source:   Beyer et al. 2021 (arXiv 2106.05237), Tables 4 and 5; big_vision, configs/proj/distill.
Expected: test accuracy (paper), by epochs, with temperature, learning rate and weight decay:
              300        82.75 %    2   0.01     1e-5
              1,000      88.01 %    5   0.01     1e-3   (this file)
              3,000      90.08 %   10   0.003    3e-4
              10,000     90.98 %    2   0.001    1e-4
              30,000     91.06 %    2   0.003    1e-5
          Teacher 91.03 %. Not measured here.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import ObjectiveConfig, OptimizerConfig, ScheduleConfig, SplitConfig

flowers = load_experiment(pathlib.Path(__file__).with_name("flowers102.py"))

config = dataclasses.replace(
    flowers,
    name="pets",
    data=dataclasses.replace(
        flowers.data,
        name="oxford_iiit_pet",
        train=SplitConfig(name="train[:90%]", examples=3_312),
        validation=SplitConfig(name="train[90%:]", examples=368),
        test=SplitConfig(name="test", examples=3_669),
        classes=37,
    ),
    objective=ObjectiveConfig(temperature=5.0),
    optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=1e-3, first_moment_dtype="bfloat16"),
    schedule=ScheduleConfig(total_epochs=1_000.0, warmup_steps=1500),
)
