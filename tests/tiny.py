"""The smallest config that exercises everything; experiment files of the tests import it."""

import dataclasses
import re

import jax
import optax

from fm_distill.config import (
    CanvasConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    MemoryConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    SplitConfig,
    StudentConfig,
    ViewConfig,
)
from fm_distill.config.regime import regime_of
from fm_distill.config.resolved import ResolvedRun
from fm_distill.models import Network, Variables
from fm_distill.networks.branch import Branch
from fm_distill.preparation.resolve import resolve_described
from fm_distill.system.sharding import make_layout
from fm_distill.train_step.loss import make_loss
from fm_distill.train_step.step import TrainStep, make_train_step, make_update
from fm_distill.train_step.teach import make_teach

NETWORK = StudentConfig(
    model="bit",
    resolution=16,
    options={"depths": (1,), "width": 0.125, "groups": 4, "stem": "small"},
)


def smallest(model: str) -> int:
    """A small resolution that the model takes."""
    return 28 if "patch14" in model else 32


# These differ from a smaller model of their family in nothing but sizes.
LARGER = re.compile(
    r"(vit|deit)_(?!small_patch14_|large_patch14_224)(small|medium|betwixt|base|large)_"
    r"|vit_\w+_384|resnet(34|101)$|convnext(v2)?_(femto|pico|nano|small|base|large)$"
    r"|bit_r(101x[13]|152x4)$|efficientnet_lite[123]$"
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


def logits_of(network: Network, variables: Variables, images, train: bool = False) -> jax.Array:
    """In one program: layer by layer, each operation of each shape is compiled by itself."""
    return jax.jit(lambda x, y: network.apply(x, y, train=train).logits)(variables, images)


def train_step_of(
    student: Branch,
    teachers: tuple[Branch, ...],
    optimizer: optax.GradientTransformation,
    views: ViewConfig,
    objective: ObjectiveConfig,
    total_steps: int,
    teaching: str = "function_matching",
    memory: MemoryConfig = MemoryConfig(),
    keep_statistics: bool = False,
    class_counts: tuple[int, ...] | None = None,
) -> TrainStep:
    """A step of its halves, without a run."""
    own = dataclasses.replace(NETWORK, keep_statistics=keep_statistics)
    config = tiny_config(objective=objective, teaching=teaching, memory=memory, student=own)
    regime = regime_of(config)
    classes = student.network.classes
    teach = make_teach(regime.targets, teachers, classes, objective, memory, class_counts)
    loss = make_loss(config, student, total_steps)
    update = make_update(loss, optimizer, accumulate=memory.accumulate)
    return make_train_step(student, teachers, teach, update, views, regime.views)


def resolved_run(config: Config, teachers=(), layout=None, classes=10, examples=160) -> ResolvedRun:
    """The run of `config` where neither its data nor its weights are there."""
    layout = layout or make_layout(MeshConfig(data=1))
    return resolve_described(config, tuple(teachers), classes, examples, layout)
