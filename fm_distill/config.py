"""What can be said about a run: frozen dataclasses, without JAX.

A batch's path starts here: an experiment file builds one `Config`, `experiment.py` checks it.
"""

import dataclasses
from typing import Literal

InputRange = Literal["auto", "minus_one_one", "zero_one", "imagenet"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """One of the splits `train`, `validation` and `test`, as the data set itself names it."""

    # The data set's own name, e.g. `train[:90%]`; for folders, the sub-folder.
    name: str
    # For what is computed before the data are there; checked against them.
    examples: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Images to distil on that need not show the teacher's classes; their labels are not used."""

    # As in `DataConfig`; `examples` as in `SplitConfig`.
    source: str
    name: str = ""
    data_dir: str = ""
    split: str = "train"
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
    # What is trained on.
    train: SplitConfig
    # What is distilled on instead: other images, or a mixture with the own set named among them.
    transfer: tuple[TransferConfig, ...] = ()
    # What is evaluated while training.
    validation: SplitConfig | None = None
    # What a complete run is judged on.
    test: SplitConfig | None = None
    # Number of classes of the labels; None takes it from the data, or from the teacher.
    classes: int | None = None
    # On what the images lie in memory.
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
    # Probability of a mirrored view.
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
    # Of its input; `auto`: as its weights were trained, else as the model's published ones were.
    input_range: InputRange = "auto"
    # Units a block, of the model `bit`; the named members of the family fix this and the next four.
    depths: tuple[int, ...] = ()
    # Multiplies the 64 channels of the root.
    width: float = 1.0
    # `imagenet`: 7x7 and a pool, together stride 4; `small`: 3x3 with stride 1.
    stem: Literal["imagenet", "small"] = "imagenet"
    # GroupNorm with weight standardisation, or BatchNorm without.
    norm: Literal["group", "batch"] = "group"
    # Groups of the GroupNorm; has to divide the root's channels.
    groups: int = 32
    # Of BiT. Zero as in its files and timm, or minus infinity as in the released trainer; `auto`:
    # by the naming of the weights, zero without.
    root_pool_padding: Literal["auto", "zero", "minus_infinity"] = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig(NetworkConfig):
    """The network that is trained."""

    # What it starts from, as `teacher.weights`, with a new head for other classes; None: scratch.
    weights: str | None = None
    # BatchNorm keeps the statistics of its weights: for fine-tuning where a batch says little.
    keep_statistics: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Where the frozen teacher comes from: weights, or a run."""

    # A file, `hf://OWNER/REPO`, a SavedModel, or a run's workdir: see the README's table.
    weights: str | None = None
    # The network in `weights`, where they do not say it themselves.
    network: NetworkConfig | None = None
    # An experiment file: the teacher is trained first.
    experiment: str | None = None
    # The teacher's run; None is `WORKDIR/teacher`. Alone, it names a complete run.
    workdir: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the student minimises."""

    # The teacher's output (function matching), or the labels (a teacher, or a baseline).
    target: Literal["teacher", "labels"] = "teacher"
    # A key of `distances.DISTANCES`; with `labels` it is the cross-entropy.
    distance: str = "kl"
    # Divides the logits of both networks.
    temperature: float = 1.0
    # KL times T^2, as in the released code and not in the paper's equation 1.
    temperature_squared: bool = True
    # Of several teachers: their logits' mean (the paper), their probabilities' (at `temperature`),
    # or the sum of the distances to each (the released trainer).
    ensemble: Literal["mean_logits", "mean_probabilities", "sum_of_distances"] = "mean_logits"
    # With `labels`: the share of each label that is spread evenly over all classes.
    label_smoothing: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Clipping, Adam or SGD, and decoupled decay; see `optim.make_optimizer`."""

    # A key of `optim.OPTIMIZERS`: `adam` or `sgd`.
    name: str = "adam"
    # At its peak, after the warm-up.
    learning_rate: float
    # Of the head alone, where it starts anew on a pretrained body; None: as the body's.
    head_learning_rate: float | None = None
    # Of kernels only; see `decay`.
    weight_decay: float = 0.0
    # `released`: follows the schedule, not multiplied by the learning rate; `adamw`: multiplied.
    decay: Literal["released", "adamw"] = "released"
    # Largest global norm of the gradient; None: not clipped.
    clip_norm: float | None = 1.0
    # Of `sgd`.
    momentum: float = 0.9
    # Adam's decay of the first moment.
    beta1: float = 0.9
    # Adam's decay of the second moment.
    beta2: float = 0.999
    # Added to the root of the second moment.
    epsilon: float = 1e-8
    # The released recipe keeps it in bfloat16.
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Length of the run and shape of its learning rate, which begins with a linear warm-up."""

    # `cosine` to zero, with exactly one of steps and epochs; or BiT's hyper-rule, where the number
    # of examples says all: steps, warm-up and three drops by ten.
    shape: Literal["cosine", "bit_hyper_rule"] = "cosine"
    # Batches.
    total_steps: int | None = None
    # Passes over the training split; steps = round(examples x epochs / batch size).
    total_epochs: float | None = None
    # Steps of the linear warm-up, of `cosine`.
    warmup_steps: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged: batches over both axes, large arrays over `fsdp`."""

    # Devices along the batch; `auto` takes all that there are.
    data: int | Literal["auto"] = "auto"
    # Devices over which large arrays are split.
    fsdp: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often the state is written, and how many are kept."""

    # Steps between two checkpoints.
    every_steps: int = 1000
    # How many of the newest are kept.
    keep: int = 2
    # Those whose step is a multiple of this are kept too, for ever; 0 for none.
    keep_every_steps: int = 0
    # The best by this figure of the validation split is kept too: a key of `checkpoint.BEST`.
    keep_best: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """What happens where the loss is not finite any more."""

    # `stop`; or back to the newest checkpoint, then past the examples seen since, or slower.
    action: Literal["stop", "skip", "slow"] = "stop"
    # How often a run may go back.
    most: int = 3
    # Of `slow`: multiplies the learning rates, each time.
    factor: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How often is written what; nothing here changes the student."""

    # Steps between two lines of `metrics.jsonl`.
    every_steps: int = 50
    # Student against teacher on the validation split; 0 for never.
    evaluate_every_steps: int = 1000
    # Write TensorBoard files too.
    tensorboard: bool = True


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
    checkpoint: CheckpointConfig = CheckpointConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    log: LogConfig = LogConfig()
