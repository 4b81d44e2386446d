"""The smallest config that exercises everything; experiment files of the tests import it."""

import dataclasses
import re

from fm_distill.config import (
    CanvasConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    SplitConfig,
    StudentConfig,
    ViewConfig,
)
from fm_distill.config.resolved import ResolvedRun
from fm_distill.system.sharding import make_layout
from fm_distill.training.resolve import resolve_described

NETWORK = StudentConfig(
    model="bit", resolution=16, depths=(1,), width=0.125, groups=4, stem="small"
)


def smallest(model: str) -> int:
    """A small resolution that the model takes."""
    return 28 if "patch14" in model else 32


# These differ from a smaller model of their family in nothing but sizes.
LARGER = re.compile(
    r"(vit|deit)_(?!small_patch14_|large_patch14_224)(small|medium|betwixt|base|large)_"
    r"|vit_\w+_384|resnet(34|101)$|convnext(v2)?_(femto|pico|nano|small|base|large)$"
)


def tiny_config(**changes) -> Config:
    """A labels run on the digits with a network of one unit; no teacher."""
    config = Config(
        name="tiny",
        batch_size=16,
        data=DataConfig(
            source="digits",
            train=SplitConfig(name="train", examples=1259),
            validation=SplitConfig(name="validation", examples=179),
            test=SplitConfig(name="test", examples=359),
            classes=10,
            canvas=CanvasConfig(size=32, fit="long"),
        ),
        views=ViewConfig(flip_probability=0.5, central_fraction=1.0),
        student=NETWORK,
        objective=ObjectiveConfig(target="labels"),
        optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=1e-4),
        schedule=ScheduleConfig(total_steps=6, warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=2),
        log=LogConfig(every_steps=1, evaluate_every_steps=3, tensorboard=False),
    )
    return dataclasses.replace(config, **changes)


def resolved_run(config: Config, teachers=(), layout=None, classes=10, examples=160) -> ResolvedRun:
    """The run of `config` where neither its data nor its weights are there."""
    layout = layout or make_layout(MeshConfig(data=1))
    return resolve_described(config, tuple(teachers), classes, examples, layout)
