"""What is minimised: one distance, or a sum of terms with schedules."""

import dataclasses
from typing import Literal

from fm_distill.config.bounds import Decay, NotNegative, Positive, PositiveInt, Share

# The kind of term that is the cross-entropy to the labels.
LABELS = "labels"
# The one that compares with a bank of the teacher's features.
BANK_SIMILARITY = "bank_similarity"
# Kinds of example weights: by the class of the label, and by what the networks predict.
BY_CLASS = ("inverse_frequency", "effective_number")
BY_DIFFICULTY = ("teacher_entropy", "teacher_distance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """A factor over the run through points, constant before the first and after the last."""

    points: tuple[tuple[float, float], ...] = ()
    (
        "Pairs of the share of the run, 0 to 1 and rising, and the factor there, 0 or more: 0 0 "
        "0.5 1 rises from 0 to 1 in the first half; none: 1 throughout."
    )
    interpolation: Literal["linear", "cosine", "step"] = "linear"
    (
        "Between two points: a straight line, half a cosine, or the value of the point before "
        "(`step`)."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BankConfig:
    """For `bank_similarity`: the teacher's earlier features, and how similarities are compared."""

    rows: PositiveInt = 65_536
    """Features of the teacher that are kept, those of the last batches; SEED keeps 65,536."""
    student_temperature: Positive = 0.2
    """Temperature that divides the student's similarities; SEED's is 0.2."""
    teacher_temperature: Positive = 0.01
    """Temperature that divides the teacher's similarities; SEED's is 0.01."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TermConfig:
    """One term of the loss."""

    kind: str
    (
        "What is compared: a distance of the outputs (`kl`, `l2`, `euclidean`, `hard`, "
        "`standardised_kl`, `dist_rows`, `dist_columns`, or a custom one as FILE.py:NAME), one "
        "that needs labels too (`dkd_target`, `dkd_others`), the cross-entropy to the `labels`, "
        "a distance of features (`attention`, `attention_norm`, `similarity`, `rkd_distance`, "
        "`rkd_angle`), or one of features through an adapter (`hint`, `hint_normalised`, "
        "`cosine`, `bank_similarity`)."
    )
    weight: NotNegative = 1.0
    """What the term is multiplied by."""
    schedule: CurveConfig = CurveConfig()
    """What `weight` is multiplied by over the run."""
    temperature: Positive | None = None
    """Temperature of this term; None: the objective's."""
    student_tap: str | None = None
    """The student's feature that a distance of features reads; `show --taps` lists them."""
    teacher_tap: str | None = None
    """The teacher's feature that a distance of features reads."""
    pool: Literal["none", "mean"] = "none"
    (
        "What is read of both features: all of them, or their `mean` over the positions, in "
        "float32; of a recorded teacher there is only the mean."
    )
    adapter: Literal["convolution", "batch_norm", "none"] = "convolution"
    (
        "What `hint`, `hint_normalised`, `cosine` and `bank_similarity` put on the student's "
        "feature: a 1x1 `convolution` to the teacher's channels, one with `batch_norm`, or `none` "
        "where both have as many."
    )
    bank: BankConfig = BankConfig()
    """What `bank_similarity` compares with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleWeightsConfig:
    """Weights of the examples in the loss, normalised to a mean of one."""

    kind: Literal[
        "none", "inverse_frequency", "effective_number", "teacher_entropy", "teacher_distance"
    ] = "none"
    (
        "Weight of an example: by its class, `inverse_frequency` or `effective_number` of the "
        "class's training examples; by its difficulty, `teacher_entropy` or `teacher_distance` "
        "(the KL that is left); or `none`."
    )
    beta: Decay = 0.999
    (
        "With `effective_number`: 0 weights all classes alike, towards 1 it becomes the inverse "
        "frequency; the paper tries 0.9 to 0.9999."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the student minimises."""

    target: Literal["teacher", "labels"] = "teacher"
    (
        "What the student learns: the teacher's output (function matching), or the labels (a "
        "teacher, or a baseline)."
    )
    distance: str = "kl"
    (
        "Distance to the teacher's output: `kl`, `l2`, `euclidean`, `hard`, `standardised_kl` or "
        "`dist_rows`, or a custom one as FILE.py:NAME; with labels it is the cross-entropy."
    )
    terms: tuple[TermConfig, ...] = ()
    """A loss of several terms, instead of `distance` alone."""
    example_weights: ExampleWeightsConfig = ExampleWeightsConfig()
    """What the terms of each example are multiplied by."""
    temperature: Positive = 1.0
    """Temperature that divides the logits of both networks."""
    temperature_schedule: CurveConfig = CurveConfig()
    (
        "What `temperature` is multiplied by over the run; evaluation compares at `temperature` "
        "itself."
    )
    temperature_squared: bool = True
    (
        "Whether KL, and every term derived from it, is multiplied by T^2, as in the released "
        "code and not in the paper's equation 1."
    )
    ensemble: Literal["mean_logits", "mean_probabilities", "sum_of_distances"] = "mean_logits"
    (
        "How several teachers teach together: by the mean of their logits (the paper), of their "
        "probabilities at `temperature`, or by the sum of the distances to each (the released "
        "trainer)."
    )
    label_smoothing: Share = 0.0
    """With labels: the share of each label that is spread evenly over all classes."""


def terms_of(objective: ObjectiveConfig) -> tuple[TermConfig, ...]:
    """The terms of the loss: those that are given, or the one that `target` and `distance` are."""
    if objective.terms:
        return objective.terms
    kind = LABELS if objective.target == "labels" else objective.distance
    return (TermConfig(kind=kind),)
