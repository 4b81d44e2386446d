"""The baseline of `digits.py`: the same student, steps and optimizer, on labels.

Command:  fm-distill train experiments/digits_labels.py
Source:   as `digits.py`, with the milder crops of `digits_teacher.py`, which suit labels better.
"""

from fm_distill.config import (
    CanvasConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    NetworkConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    SplitConfig,
    ViewConfig,
)

config = Config(
    name="digits_labels",
    batch_size=128,
    data=DataConfig(
        source="digits",
        train=SplitConfig(name="train", examples=1259),
        validation=SplitConfig(name="validation", examples=179),
        test=SplitConfig(name="test", examples=359),
        classes=10,
        canvas=CanvasConfig(size=32, fit="long"),
    ),
    views=ViewConfig(crop_area=(0.4, 1.0), flip_probability=0.0, central_fraction=1.0),
    student=NetworkConfig(
        model="bit", resolution=16, depths=(1, 1, 1), width=0.125, groups=4, stem="small"
    ),
    objective=ObjectiveConfig(target="labels"),
    optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=1e-4),
    schedule=ScheduleConfig(total_steps=2500, warmup_steps=250),
    checkpoint=CheckpointConfig(every_steps=500),
    log=LogConfig(every_steps=50, evaluate_every_steps=500),
)
