"""What can be set about a run: frozen dataclasses, without JAX. Imports `errors`.

A batch's path starts here: an experiment file builds one `Config`, `experiment.py` checks it. Its
parts: `data.py`, `networks.py`, `quantisation.py`, `pruning.py`, `objective.py`, `training.py`.
"""

import dataclasses
from typing import Annotated, Literal

from fm_distill.config.bounds import Bounds, Decay, PositiveInt, Seed
from fm_distill.config.data import (
    CanvasConfig,
    DataConfig,
    FourierConfig,
    SplitConfig,
    TransferConfig,
    ViewConfig,
)
from fm_distill.config.networks import (
    InputRange,
    NetworkConfig,
    StudentConfig,
    TeacherConfig,
    with_options,
    with_quantisation,
)
from fm_distill.config.objective import (
    BankConfig,
    CurveConfig,
    ExampleWeightsConfig,
    ObjectiveConfig,
    TermConfig,
)
from fm_distill.config.pruning import PruningConfig
from fm_distill.config.quantisation import QuantisationConfig
from fm_distill.config.training import (
    CheckpointConfig,
    DivergenceConfig,
    LogConfig,
    MemoryConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
)

__all__ = [
    "BankConfig",
    "CanvasConfig",
    "CheckpointConfig",
    "Config",
    "CurveConfig",
    "DataConfig",
    "DivergenceConfig",
    "ExampleWeightsConfig",
    "FourierConfig",
    "InputRange",
    "LogConfig",
    "MemoryConfig",
    "MeshConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PruningConfig",
    "QuantisationConfig",
    "ScheduleConfig",
    "SplitConfig",
    "StudentConfig",
    "TeacherConfig",
    "TermConfig",
    "TransferConfig",
    "ViewConfig",
    "with_options",
    "with_quantisation",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run: one student, one workdir."""

    name: str
    """Name of the run: the default workdir is `runs/NAME`."""
    seed: Seed = 0
    """Seed of the initial weights, of the order of the examples and of all random draws."""
    batch_size: PositiveInt
    """Global batch size: examples of a step over all devices."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    (
        "Type in which networks compute; parameters, losses and metrics are float32. `auto`: "
        "bfloat16 on TPU and GPU."
    )
    ema_decay: Decay | None = None
    """Decay per step of the student's moving average (EMA); None for no average."""
    steps_per_dispatch: PositiveInt | Literal["auto"] = "auto"
    """Training steps per call of the device; `auto` is 1 on a CPU and in streaming."""
    data: DataConfig
    views: ViewConfig = ViewConfig()
    student: StudentConfig
    teacher: TeacherConfig | None = None
    more_teachers: tuple[TeacherConfig, ...] = ()
    """Further teachers beside `teacher`; `objective.ensemble` says how they teach together."""
    teaching: Literal["function_matching", "consistent", "independent", "fixed"] = (
        "function_matching"
    )
    (
        "Which views the networks see (figure 2 of the paper): both the same mixed view, both the "
        "same without mixup (`consistent`), each its own (`independent`), or the teacher's answer "
        "to the central crop is `fixed`."
    )
    fixed_crops: Annotated[int, Bounds(least=0, most=100_000)] = 0
    (
        "With `teaching=fixed`: the teacher's answer is the mean over this many random crops; 0 "
        "takes the central one."
    )
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    mesh: MeshConfig = MeshConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    log: LogConfig = LogConfig()
