"""The paper's SUN397 row: BiT-R152x2 to BiT-R50x1 at 128 pixels.

Command:  fm-distill train experiments/sun397.py --data.data-dir TFDS_DIR \\
              --teacher.weights BiT-R152x2-sun397.npz
Source:   Beyer et al. 2021 (arXiv 2106.05237), Tables 4 and 5; big_vision, configs/proj/distill.
Expected: test accuracy (paper), by epochs, with temperature, learning rate and weight decay:
              100        68.28 %   10   0.01     1e-3   (this file)
              1,000      73.46 %   10   0.003    1e-4
              3,000      74.26 %   10   0.01     3e-5
          Teacher 74.22 %. The 1,000-epoch row has learning rate 0.001 in the
          released config. Not measured here.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import ObjectiveConfig, OptimizerConfig, ScheduleConfig, SplitConfig

flowers = load_experiment(pathlib.Path(__file__).with_name("flowers102.py"))

config = dataclasses.replace(
    flowers,
    name="sun397",
    data=dataclasses.replace(
        flowers.data,
        name="sun397",
        train=SplitConfig(name="train", examples=76_128),
        validation=SplitConfig(name="validation", examples=10_875),
        test=SplitConfig(name="test", examples=21_750),
        classes=397,
    ),
    objective=ObjectiveConfig(temperature=10.0),
    optimizer=OptimizerConfig(learning_rate=0.01, weight_decay=1e-3, first_moment_dtype="bfloat16"),
    schedule=ScheduleConfig(total_epochs=100.0, warmup_steps=1500),
)
