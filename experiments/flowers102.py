"""The paper's Flowers-102 row: BiT-R152x2 to BiT-R50x1 at 128 pixels.

Command:  fm-distill train experiments/flowers102.py --data.data-dir TFDS_DIR \\
              --teacher.weights BiT-R152x2-flowers.npz
Source:   Beyer et al. 2021 (arXiv 2106.05237), Table 4; big_vision, configs/proj/distill.
Expected: test accuracy (paper), by epochs, with temperature, learning rate and weight decay:
              1,000      77.51 %   10   0.003    1e-3
              10,000     92.83 %   10   0.003    3e-4   (this file)
              100,000    95.54 %    1   0.001    1e-4
              1,000,000  96.93 %    1   0.0003   1e-5
          Teacher 97.82 %. Not measured here.
"""

from fm_distill.config import (
    CanvasConfig,
    Config,
    DataConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    SplitConfig,
    StudentConfig,
    TeacherConfig,
    ViewConfig,
)

config = Config(
    name="flowers102",
    batch_size=512,
    data=DataConfig(
        source="tfds",
        name="oxford_flowers102",
        train=SplitConfig(name="train", examples=1020),
        validation=SplitConfig(name="validation", examples=1020),
        test=SplitConfig(name="test", examples=6149),
        classes=102,
        canvas=CanvasConfig(size=160),
    ),
    # resize_small(160) | central_crop(128)
    views=ViewConfig(central_fraction=0.8),
    student=StudentConfig(model="bit_r50x1", resolution=128),
    teacher=TeacherConfig(network=NetworkConfig(model="bit_r152x2", resolution=128)),
    objective=ObjectiveConfig(temperature=10.0),
    optimizer=OptimizerConfig(
        learning_rate=0.003, weight_decay=3e-4, first_moment_dtype="bfloat16"
    ),
    schedule=ScheduleConfig(total_epochs=10_000.0, warmup_steps=1500),
)
