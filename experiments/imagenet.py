"""The paper's ImageNet row: BiT-R152x2 to BiT-R50x1 at 224 pixels.

Command:  fm-distill train experiments/imagenet.py --data.data-dir TFDS_DIR \\
              --teacher.weights BiT-R152x2-imagenet224.npz
Source:   Beyer et al. 2021 (arXiv 2106.05237), Tables 1 and 5 and appendix F; big_vision,
          configs/proj/distill/bit_i1k.py, whose validation split is train[99%:].
Expected: validation accuracy (paper), by epochs: 300 80.30 %, 1,200 81.54 % (this file),
          4,800 82.18 %, 9,600 82.31 %. Teacher 83.0 %. Not measured here.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import (
    CanvasConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    SplitConfig,
    StudentConfig,
    TeacherConfig,
    ViewConfig,
)

flowers = load_experiment(pathlib.Path(__file__).with_name("flowers102.py"))

config = dataclasses.replace(
    flowers,
    name="imagenet",
    batch_size=4096,
    data=dataclasses.replace(
        flowers.data,
        name="imagenet2012",
        train=SplitConfig(name="train[:98%]", examples=1_255_544),
        validation=SplitConfig(name="train[98%:]", examples=25_623),
        test=SplitConfig(name="validation", examples=50_000),
        classes=1000,
        canvas=CanvasConfig(size=256),
        # 1.3 million canvases do not fit a device's memory.
        feeding="streaming",
        workers=16,
    ),
    # resize_small(256) | central_crop(224)
    views=ViewConfig(central_fraction=0.875),
    student=StudentConfig(model="bit_r50x1", resolution=224),
    teacher=TeacherConfig(network=NetworkConfig(model="bit_r152x2", resolution=224)),
    objective=ObjectiveConfig(temperature=1.0),
    optimizer=OptimizerConfig(learning_rate=0.03, weight_decay=3e-4, first_moment_dtype="bfloat16"),
    schedule=ScheduleConfig(total_epochs=1200.0, warmup_steps=5000),
)
