"""What is minimised, how, on which devices, and what is written."""

import dataclasses
from typing import Literal


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
class MemoryConfig:
    """The same step in less memory, for more time. `fm-distill plan` tries what fits."""

    # The student's batch is done in so many parts, one after another. Not with BatchNorm, whose
    # statistics would be those of the parts.
    accumulate: int = 1
    # The teachers' batch likewise; any network.
    teacher_parts: int = 1
    # Of the student's forward pass, computed again for the gradient instead of kept: `norms` (and
    # activations), or `units` (all inside of residual blocks). A key of `memory.REMATERIALISE`.
    rematerialise: str = "nothing"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often the state is written, and how many are kept."""

    # Steps between two checkpoints; as in the released configs of the small data sets.
    every_steps: int = 2500
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
