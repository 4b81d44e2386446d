"""What can be set about a run: frozen dataclasses, without JAX. Imports `errors`.

A batch's path starts here: an experiment file builds one `Config`, `experiment.py` checks it. Its
parts: `data.py`, `networks.py`, `training.py`.
"""

import dataclasses
from typing import Literal

from fm_distill.config.data import (
    CanvasConfig,
    DataConfig,
    SplitConfig,
    TransferConfig,
    ViewConfig,
)
from fm_distill.config.networks import (
    InputRange,
    NetworkConfig,
    StudentConfig,
    TeacherConfig,
)
from fm_distill.config.training import (
    CheckpointConfig,
    DivergenceConfig,
    LogConfig,
    MemoryConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
)

__all__ = [
    "CanvasConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DivergenceConfig",
    "InputRange",
    "LogConfig",
    "MemoryConfig",
    "MeshConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "SplitConfig",
    "StudentConfig",
    "TeacherConfig",
    "TransferConfig",
    "ViewConfig",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run: one student, one workdir."""

    # The default workdir is `runs/NAME`.
    name: str
    # Of init, order and draws.
    seed: int = 0
    # Examples a step, over all devices.
    batch_size: int
    # Compute type; parameters, losses and metrics are float32. `auto`: bfloat16 on TPU and GPU.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # Decay of the moving average of the student a step; None for no average.
    ema_decay: float | None = None
    # Steps that the device does for one call; `auto` is 1 on a CPU and in streaming.
    steps_per_dispatch: int | Literal["auto"] = "auto"
    data: DataConfig
    views: ViewConfig = ViewConfig()
    student: StudentConfig
    teacher: TeacherConfig | None = None
    # Further teachers; `objective.ensemble` says how they teach together.
    more_teachers: tuple[TeacherConfig, ...] = ()
    # Figure 2 of the paper: both see the same mixed view, the same without mixup (`consistent`),
    # each its own (`independent`), or the teacher's answer to the central crop is `fixed`.
    teaching: Literal["function_matching", "consistent", "independent", "fixed"] = (
        "function_matching"
    )
    # Of `fixed`: the mean over this many random crops instead of the central one.
    fixed_crops: int = 0
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    mesh: MeshConfig = MeshConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    log: LogConfig = LogConfig()
