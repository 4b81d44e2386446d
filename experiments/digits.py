"""Function matching on embedded data, in minutes on a laptop.

Command:  fm-distill train experiments/digits.py
Source:   the recipe of Beyer et al. 2021 (arXiv 2106.05237) on scikit-learn's handwritten digits.
Expected: at least 98 % of the teacher's accuracy kept, 95 % agreement on test.
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
    TeacherConfig,
    ViewConfig,
)

config = Config(
    name="digits",
    batch_size=128,
    data=DataConfig(
        source="digits",
        train=SplitConfig(name="train", examples=1259),
        validation=SplitConfig(name="validation", examples=179),
        test=SplitConfig(name="test", examples=359),
        classes=10,
        canvas=CanvasConfig(size=32, fit="long"),
    ),
    views=ViewConfig(flip_probability=0.0, central_fraction=1.0),
    student=NetworkConfig(
        model="bit", resolution=16, depths=(1, 1, 1), width=0.125, groups=4, stem="small"
    ),
    teacher=TeacherConfig(experiment="digits_teacher.py"),
    objective=ObjectiveConfig(temperature=2.0),
    optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=1e-4),
    schedule=ScheduleConfig(total_steps=2500, warmup_steps=250),
    checkpoint=CheckpointConfig(every_steps=500),
    log=LogConfig(every_steps=50, evaluate_every_steps=500),
)
