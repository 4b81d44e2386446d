"""What can be said about a run: frozen dataclasses, without JAX.

A batch's path starts here: an experiment file builds one `Config`, `train.py` builds everything
from it. `experiment.py` loads, overrides and checks it.
"""

import dataclasses
from typing import Any, Literal

import msgspec

from fm_distill.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """One of the splits `train`, `validation` and `test`, as the data set itself names it."""

    # The data set's own name, e.g. `train[:90%]`; for folders, the sub-folder.
    name: str
    # Number of examples, for what is computed before the data are there; checked against them.
    examples: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CanvasConfig:
    """The fixed uint8 square on which each image lies, in its own aspect ratio."""

    # Pixels of the side that `fit` names. Images are shrunk to it, never enlarged.
    size: int
    # Which side of an image becomes `size`: `short` keeps more pixels, `long` needs less memory.
    fit: Literal["short", "long"] = "short"
    # With `short`, the canvas is `size * max_aspect` wide and high; longer images shrink to fit.
    max_aspect: float = 1.5

    @property
    def side(self) -> int:
        """Height and width of the canvas in pixels."""
        return self.size if self.fit == "long" else round(self.size * self.max_aspect)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The transfer set, and how it reaches the devices."""

    # A key of `data.sources.SOURCES`: `tfds`, `class_folders`, `images` or `digits`.
    source: str
    # Name of the TFDS data set, e.g. `oxford_flowers102`; unused by the other sources.
    name: str = ""
    # Where the data lie: TFDS's `data_dir`, or the folder of images.
    data_dir: str = ""
    train: SplitConfig
    validation: SplitConfig | None = None
    test: SplitConfig | None = None
    # Number of classes of the labels; None takes it from the data, or from the teacher.
    classes: int | None = None
    canvas: CanvasConfig
    # `resident`: decoded canvases in device memory; `streaming`: read as they are needed.
    feeding: Literal["auto", "resident", "streaming"] = "auto"
    # `auto` takes `resident` where the canvases need at most this share of the memory.
    resident_share: float = 0.25
    # Reader processes of `streaming`; 0 reads in threads of this process.
    workers: int = 0
    # A corrupt image stops the run, or is skipped and counted.
    corrupt: Literal["stop", "skip"] = "stop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What is drawn for each image of each step, and the central view of evaluation."""

    # Law of the crop: see `views.CROPS`.
    crop: str = "tensorflow"
    # Smallest and largest share of the image's area that a crop covers.
    crop_area: tuple[float, float] = (0.05, 1.0)
    # Smallest and largest width / height of a crop.
    crop_aspect: tuple[float, float] = (0.75, 1.33)
    flip_probability: float = 0.5
    # One mixup coefficient a batch (the recipe), one an example, or no mixup.
    mixup: Literal["batch", "example", "none"] = "batch"
    # The coefficient is Beta(alpha, alpha), folded to max(a, 1 - a) unless `mixup_fold` is off.
    mixup_alpha: float = 1.0
    mixup_fold: bool = True
    # Example i is mixed with example i - 1 (the recipe), or with a random partner.
    mixup_partner: Literal["roll", "permutation"] = "roll"
    # Evaluation: side of the central crop over the image's short side (0.8 is 128 of 160).
    central_fraction: float = 0.875


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A network and the picture that it wants to see."""

    # A key of `models.MODELS`.
    model: str
    # Height and width of its input in pixels.
    resolution: int
    # Values of its input: uint8 mapped to [-1, 1], to [0, 1], or by ImageNet's mean and deviation.
    input_range: Literal["minus_one_one", "zero_one", "imagenet"] = "minus_one_one"
    # The rest describes the model `bit`; the named members of its family fix depths, width, stem.
    depths: tuple[int, ...] = ()
    width: float = 1.0
    stem: Literal["imagenet", "small"] = "imagenet"
    norm: Literal["group", "batch"] = "group"
    groups: int = 32
    root_pool_padding: Literal["zero", "minus_infinity"] = "zero"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Where the frozen teacher comes from: a weight file, or a run."""

    # A BiT `.npz` in the original naming.
    weights: str | None = None
    # The network in `weights`; a run knows its own.
    network: NetworkConfig | None = None
    # An experiment file: the teacher is trained if it is not there yet.
    experiment: str | None = None
    # The teacher's run; None is `WORKDIR/teacher`. Alone, it names a complete run to be used as is.
    workdir: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the student minimises."""

    # The teacher's output (function matching), or the labels (a teacher, or a baseline).
    target: Literal["teacher", "labels"] = "teacher"
    # A key of `distances.DISTANCES`; with `labels` it is the cross-entropy.
    distance: str = "kl"
    temperature: float = 1.0
    # Multiply the KL by T^2, as the released code does and the paper's equation 1 does not.
    temperature_squared: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Clipping, Adam and decoupled decay; see `optim.make_optimizer`."""

    # A key of `optim.OPTIMIZERS`.
    name: str = "adam"
    learning_rate: float
    weight_decay: float = 0.0
    # `released`: follows the schedule, not multiplied by the learning rate; `adamw`: multiplied.
    decay: Literal["released", "adamw"] = "released"
    # Largest global norm of the gradient.
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Length of the run: exactly one of steps and epochs; linear warm-up, then cosine to zero."""

    total_steps: int | None = None
    total_epochs: float | None = None
    warmup_steps: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged: batches over both axes, large arrays over `fsdp`."""

    data: int | Literal["auto"] = "auto"
    fsdp: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often the state is written, and how many are kept."""

    every_steps: int = 1000
    keep: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How often is written what; nothing here changes the student."""

    every_steps: int = 50
    # Student against teacher on the validation split; 0 for never.
    evaluate_every_steps: int = 1000
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run: one student, one workdir."""

    name: str
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
    student: NetworkConfig
    teacher: TeacherConfig | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()


# Fields that say where things lie or what is written, not which student comes out.
NOT_IDENTITY = (
    "name",
    "data.data_dir",
    "data.resident_share",
    "data.workers",
    "data.train.examples",
    "data.validation",
    "data.test",
    "teacher.weights",
    "teacher.experiment",
    "teacher.workdir",
    "mesh",
    "checkpoint",
    "log",
)


def to_json(config: Config) -> dict[str, Any]:
    """The config as nested dicts and lists."""
    return msgspec.to_builtins(config)


def from_json(tree: Any) -> Config:
    """The inverse of `to_json`; raises `UserError` where `tree` is not a config of this version."""
    try:
        return msgspec.convert(tree, Config, strict=True)
    except msgspec.ValidationError as error:
        raise UserError(f"the stored config does not fit this version: {error}") from None


def flatten(config: Config) -> dict[str, Any]:
    """`{"data.canvas.size": 160, ...}`: each leaf of the config by its option's name."""

    def leaves(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        parts = [leaves(f"{prefix}.{name}" if prefix else name, v) for name, v in value.items()]
        return {name: leaf for part in parts for name, leaf in part.items()}

    return leaves("", to_json(config))


def differences(stored: Config, asked: Config) -> list[str]:
    """One line for each field that changes the student and is not the same in both."""
    a, b = flatten(stored), flatten(asked)

    def counts(name: str) -> bool:
        return not any(name == x or name.startswith(x + ".") for x in NOT_IDENTITY)

    missing = "(not set)"
    return [
        f"{name}: {a.get(name, missing)} in the workdir, {b.get(name, missing)} now"
        for name in sorted({*a, *b})
        if counts(name) and a.get(name, missing) != b.get(name, missing)
    ]


def total_steps(config: Config, examples: int) -> int:
    """Steps of the whole run: given, or round(examples x epochs / batch size)."""
    schedule = config.schedule
    if schedule.total_steps is not None:
        return schedule.total_steps
    assert schedule.total_epochs is not None
    steps = round(examples * schedule.total_epochs / config.batch_size)
    if steps < 1:
        raise UserError(
            f"schedule.total_epochs={schedule.total_epochs:g} of {examples} examples is less than "
            f"one batch of {config.batch_size}: raise it, or lower batch_size"
        )
    return steps
