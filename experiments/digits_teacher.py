"""The teacher of `digits.py`: a GroupNorm ResNet-v2 trained on labels, on crops without flips.

Command:  fm-distill train experiments/digits_teacher.py
Source:   scikit-learn's handwritten digits, 1797 images; test has other writers than train.
"""

from fm_distill.config import (
    CanvasConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    SplitConfig,
    StudentConfig,
    ViewConfig,
)

config = Config(
    name="digits_teacher",
    batch_size=128,
    data=DataConfig(
        source="digits",
        train=SplitConfig(name="train", examples=1259),
        validation=SplitConfig(name="validation", examples=179),
        test=SplitConfig(name="test", examples=359),
        classes=10,
        canvas=CanvasConfig(size=32, fit="long"),
    ),
    # Milder crops than for matching: a label must still be right for what is left of the digit.
    views=ViewConfig(crop_area=(0.4, 1.0), flip_probability=0.0, central_fraction=1.0),
    student=StudentConfig(
        model="bit",
        resolution=16,
        options={"depths": (1, 1, 1), "width": 0.25, "groups": 4, "stem": "small"},
    ),
    objective=ObjectiveConfig(target="labels"),
    optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=1e-4),
    schedule=ScheduleConfig(total_steps=600, warmup_steps=60),
    checkpoint=CheckpointConfig(every_steps=200),
    log=LogConfig(every_steps=50, evaluate_every_steps=300),
)
