"""Optimizer, schedule, devices, memory, checkpoints and logs."""

import dataclasses
from typing import Annotated, Literal

from fm_distill.config.bounds import Bounds, Count, Decay, Positive, PositiveInt, Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Clipping, Adam or SGD, and decoupled weight decay."""

    name: str = "adam"
    """The optimizer: `adam` or `sgd`, or a custom one as FILE.py:NAME."""
    learning_rate: Positive
    """The learning rate at its peak, after the warm-up; `--lr` for short."""
    head_learning_rate: Positive | None = None
    (
        "The learning rate of the head alone, for a new head on a pretrained backbone; None: "
        "that of the backbone."
    )
    adapter_learning_rate: Positive | None = None
    """The learning rate of the adapters between features; None: `learning_rate`."""
    weight_decay: Share = 0.0
    """Weight decay, of kernels only; `decay` says how it is scaled."""
    decay: Literal["released", "adamw"] = "released"
    (
        "How weight decay is scaled: `released` by the schedule but not by the learning rate, "
        "`adamw` by both."
    )
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient; None: the gradient is not clipped."""
    momentum: Decay = 0.9
    """Momentum of `sgd`."""
    beta1: Decay = 0.9
    """Adam's decay of the first moment."""
    beta2: Decay = 0.999
    """Adam's decay of the second moment."""
    epsilon: Positive = 1e-8
    """Adam's epsilon, added to the root of the second moment."""
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of Adam's first moment; the released recipe keeps it in bfloat16."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Length of the run and shape of its learning rate, which begins with a linear warm-up."""

    shape: Literal["cosine", "bit_hyper_rule"] = "cosine"
    (
        "Shape of the learning rate: `cosine` to zero, with exactly one of steps and epochs; or "
        "BiT's hyper-rule, where the number of examples sets everything: steps, warm-up and "
        "three drops by ten."
    )
    total_steps: PositiveInt | None = None
    """Length of the run in steps, a batch each; replaces epochs; `--steps` for short."""
    total_epochs: Positive | None = None
    (
        "Length of the run in passes over the training split, which is round(examples x epochs / "
        "batch size) steps; replaces steps; `--epochs` for short."
    )
    warmup_steps: Count = 0
    """Steps of the linear warm-up of `cosine`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged: batches over both axes, large arrays over `fsdp`."""

    data: PositiveInt | Literal["auto"] = "auto"
    """Devices along the batch; `auto`: all devices over `fsdp`."""
    fsdp: PositiveInt = 1
    """Devices over which large arrays are split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The same step in less memory, for more time. `fm-distill plan` tries what fits."""

    accumulate: PositiveInt = 1
    (
        "Gradient accumulation: parts in which the student's batch is computed, one after "
        "another. Not with BatchNorm, whose statistics would be those of the parts."
    )
    teacher_parts: PositiveInt = 1
    """Parts in which the teachers' batch is computed, one after another; any network."""
    rematerialise: str = "nothing"
    (
        "What of the student's forward pass is recomputed in the backward pass, not stored: "
        "`nothing`, `norms` (and activations), or `units` (everything inside residual blocks)."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often the state is written, and which checkpoints are kept."""

    every_steps: PositiveInt = 2500
    (
        "Steps between two checkpoints; the default is that of the released configs of the small "
        "data sets."
    )
    keep: PositiveInt = 2
    """How many of the newest checkpoints are kept."""
    keep_every_steps: Count = 0
    """Checkpoints whose step is a multiple of this are kept forever; 0 for none."""
    keep_best: str | None = None
    (
        "The figure of the validation split by which the best checkpoint is kept too: "
        "`student_top1`, `agreement_top1`, `training_view_agreement_top1`, "
        "`student_cross_entropy`, `kl_one`, `kl_train_temperature` or `training_view_kl`; None for "
        "no such checkpoint."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """What happens where the loss is not finite any more."""

    action: Literal["stop", "skip", "slow"] = "stop"
    (
        "What a diverged run does: `stop`; or go back to the newest checkpoint, then skip the "
        "examples seen since (`skip`), or with lower learning rates (`slow`)."
    )
    most: Annotated[int, Bounds(least=0, most=1000)] = 3
    """How often a diverged run may go back."""
    factor: Share = 0.5
    """Multiplies the learning rates each time that `slow` goes back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is logged, and how often; nothing here changes the student."""

    every_steps: PositiveInt = 50
    """Steps between two lines of `metrics.jsonl`."""
    evaluate_every_steps: Count = 1000
    """Steps between two comparisons of student and teacher on the validation split; 0 for never."""
    tensorboard: bool = True
    """Whether TensorBoard files are written too."""
    term_gradients: bool = False
    (
        "Of a loss of several terms: whether each line has the norm of each term's gradient and "
        "the cosine of each pair; every step then takes one more backward pass per term."
    )
    final_evaluation: bool = True
    """Evaluate the finished student on the test split; `fm-distill evaluate` does it later."""
