"""What is known of a run, as plain numbers: from its config, its log, and a few of its batches.

Each part may be missing; `causes.py` judges what is there.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int

PerExample = Float[np.ndarray, " examples"]
PerLine = Float[np.ndarray, " lines"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the run was asked for, and how far it is."""

    teaching: str
    step: int
    total_steps: int
    warmup_steps: int
    temperature: float  # at this step
    complete: bool
    failure: str = ""  # why it failed; empty where it did not
    # Whether BatchNorm is trained with the moments that it keeps.
    keeps_statistics: bool = False
    # Whether BatchNorm ends with the moments of central crops.
    ends_with_central_statistics: bool = False
    rollbacks: int = 0  # how often it diverged and went back
    # Whether the loss means the same all along: no temperature, weight or view has a schedule.
    comparable: bool = True


@dataclasses.dataclass(frozen=True)
class Log:
    """The lines of `train` in `metrics.jsonl`, an array a quantity, NaN where a line has none."""

    step: PerLine
    loss: PerLine
    learning_rate: PerLine
    update_norm: PerLine
    gradient_norm: PerLine
    seconds: PerLine  # since the line before
    data_wait: PerLine  # share of the time in which the step waited for its batch
    # Of a loss with several terms: each value times its weight.
    terms: Mapping[str, PerLine]
    # The norm of the gradient of each adapter's kernel, by the name of its term.
    adapter_gradients: Mapping[str, PerLine] = dataclasses.field(default_factory=dict)
    # With `log.term_gradients`: the norm of each term's gradient, and the cosine of two of them,
    # by `TERM` and `TERM_and_TERM`.
    term_gradients: Mapping[str, PerLine] = dataclasses.field(default_factory=dict)
    term_cosines: Mapping[str, PerLine] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class InRanges:
    """How well a network does on the central crop, were its input normalised in another way."""

    network: str  # `student`, `teacher`, `teacher 2`, ...
    option: str  # of its input range
    configured: str
    aim: str  # what its top-1 class is compared with: `label`, or `teacher`
    right: Mapping[str, Bool[np.ndarray, " examples"]]  # by input range
    distance_nats: Mapping[str, PerExample]  # cross-entropy to the label, or KL to the teacher


@dataclasses.dataclass(frozen=True)
class CentralView:
    """Both networks on the central crop of training examples."""

    example: Int[np.ndarray, " examples"]  # its place in the training data
    label: Int[np.ndarray, " examples"]  # -1 where there is none
    classes: int
    teacher_class: tuple[Int[np.ndarray, " examples"], ...]  # the first one, of each teacher
    target_class: Int[np.ndarray, " examples"]  # of the (first) target that they make together
    kl_nats: PerExample  # KL(target || student) at the training's temperature
    ranges: tuple[InRanges, ...]
    # `kl_nats` were BatchNorm to have the moments of central crops; None where there is none.
    central_statistics_kl_nats: PerExample | None = None


@dataclasses.dataclass(frozen=True)
class TrainingView:
    """Both networks on the views of the newest steps, an entry an example of each."""

    same_class: Bool[np.ndarray, " examples"]  # whether both find the same class most likely
    kl_nats: PerExample  # KL(target || student) at the training's temperature
    # KL(target || teacher on the student's view) at temperature 1; None where the teacher is not
    # here.
    views_kl_nats: PerExample | None
    label: Int[np.ndarray, " examples"]  # of the larger part of a mixture
    teacher_class: Int[np.ndarray, " examples"]
    teacher_entropy: PerExample  # at the training's temperature, over its largest value: 0 to 1
    teacher_entropy_one: PerExample  # the same at temperature 1
    # Mutual information of view and teacher's class: 0 where all outputs are the same.
    information_nats: float
    classes: int


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """BatchNorm's running moments compared with those of the batches."""

    # Of each layer, the mean over its channels: |difference of means| in standard deviations, and
    # |log of the ratio of variances|.
    shift: Mapping[str, float]
    spread: Mapping[str, float]
    kl_kept_nats: float  # KL(target || student) with the moments that are kept, as evaluated
    kl_batch_nats: float  # with those of the batch, as in training


@dataclasses.dataclass(frozen=True)
class Gradients:
    """The gradient of each weighted term on the student's parameters."""

    terms: tuple[str, ...]
    norms: Float[np.ndarray, "batches terms"]
    cosines: Float[np.ndarray, "terms terms"]  # of the mean products over the batches
    parameter_norm: float
    initial_norm: float | None  # before the first step; None where that was pretrained

    @property
    def shares(self) -> Float[np.ndarray, " terms"]:
        """Of the sum of the mean norms."""
        mean = self.norms.mean(axis=0)
        return mean / max(mean.sum(), np.finfo(np.float64).tiny)

    @property
    def deviation(self) -> Float[np.ndarray, " terms"] | None:
        """Of the norms over the batches; None of a single batch."""
        return self.norms.std(axis=0, ddof=1) if len(self.norms) > 1 else None


@dataclasses.dataclass(frozen=True)
class Cka:
    """Unbiased CKA of each of the student's taps with each of the first teacher's."""

    student: tuple[str, ...]
    teacher: tuple[str, ...]
    values: Float[np.ndarray, "student teacher"]
    examples: int


@dataclasses.dataclass(frozen=True)
class NotExamined:
    """What was left out, and why."""

    what: str
    why: str


@dataclasses.dataclass(frozen=True)
class Evidence:
    """All that is known; None where it is not."""

    setting: Setting
    log: Log
    central: CentralView | None = None
    training: TrainingView | None = None
    batch_norm: BatchNorm | None = None
    gradients: Gradients | None = None
    cka: Cka | None = None
    not_examined: tuple[NotExamined, ...] = ()
