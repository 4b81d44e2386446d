"""The paper's Food-101 row: BiT-R152x2 to BiT-R50x1 at 128 pixels.

Command:  fm-distill train experiments/food101.py --data.data-dir TFDS_DIR \\
              --teacher.weights BiT-R152x2-food101.npz
Source:   Beyer et al. 2021 (arXiv 2106.05237), Tables 4 and 5; big_vision, configs/proj/distill.
Expected: test accuracy (paper), by epochs, with temperature, learning rate and weight decay:
              100        83.29 %   10   0.01     1e-3   (this file)
              1,000      86.64 %   10   0.001    3e-4
              3,000      87.20 %    5   0.01     1e-4
          Teacher 86.24 %. Not measured here.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import ObjectiveConfig, OptimizerConfig, ScheduleConfig, SplitConfig

flowers = load_experiment(pathlib.Path(__file__).with_name("flowers102.py"))

config = dataclasses.replace(
    flowers,
    name="food101",
    data=dataclasses.replace(
        flowers.data,
        name="food101",
        train=SplitConfig(name="train[:90%]", examples=68_175),
        validation=SplitConfig(name="train[90%:]", examples=7_575),
        test=SplitConfig(name="validation", examples=25_250),
        classes=101,
    ),
    objective=ObjectiveConfig(temperature=10.0),
    optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=1e-3, first_moment_dtype="bfloat16"),
    schedule=ScheduleConfig(total_epochs=100.0, warmup_steps=1500),
)
