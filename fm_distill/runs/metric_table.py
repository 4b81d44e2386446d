"""Every number that the project reports of a run: label, unit, direction and where it is shown.

Evaluation, progress lines, best checkpoint, curves, sweeps and reports read this table.
"""

from collections.abc import Mapping
from typing import Any

from fm_distill.runs.cost_metrics import COSTS
from fm_distill.runs.metric import Curve, Metric, Place

LOSS = "Training loss"
AGREEMENT = "Top-1 agreement with the teacher"
ACCURACY = "Top-1 accuracy on the validation split"
KL = "KL divergence to the teacher on the validation split, nats"
SHOWN: frozenset[Place] = frozenset({"table", "sweep", "report"})
EVERYWHERE: frozenset[Place] = SHOWN | {"log", "best"}
REPORT: frozenset[Place] = frozenset({"report"})

THIRDS = {
    "head": "the third of the classes with the most training examples",
    "middle": "the third of the classes between head and tail",
    "tail": "the third of the classes with the fewest training examples",
}


def _of_third(network: str, third: str) -> Metric:
    return Metric(
        f"{network}_{third}_top1", (network, f"{third}_top1"), f"{network} accuracy, {third}",
        "fraction", True,
        f"The {network}'s accuracy on the examples of {THIRDS[third]}.",
        frozenset({"log", "table", "report"}),
    )  # fmt: skip


METRICS = (
    Metric(
        "teacher_top1", ("teacher", "top1"), "teacher accuracy", "fraction", True,
        "Share of the examples whose label is the teacher's most likely class.",
        SHOWN | {"log"}, Curve(ACCURACY, "teacher", ":"),
    ),
    Metric(
        "student_top1", ("student", "top1"), "student accuracy", "fraction", True,
        "Share of the examples whose label is the student's most likely class.",
        EVERYWHERE | {"line"}, Curve(ACCURACY, "student", "-"),
    ),
    *(_of_third(network, third) for third in THIRDS for network in ("teacher", "student")),
    Metric(
        "retention", ("retention",), "accuracy kept", "fraction", True,
        "The student's accuracy over the teacher's.",
        SHOWN, interval_path=("retention_interval",),
    ),
    Metric(
        "agreement_top1", ("agreement", "top1"), "top-1 agreement", "fraction", True,
        "Share of the examples for which student and teacher have the same most likely class.",
        EVERYWHERE | {"line"}, Curve(AGREEMENT, "validation", "-"),
    ),
    Metric(
        "kl_train_temperature", ("kl", "train_temperature"), "KL at training temperature", "nats",
        False, "KL(teacher || student) of the probabilities at the temperature of the training.",
        frozenset({"log", "best", "table", "report"}),
    ),
    Metric(
        "kl_one", ("kl", "one"), "KL at temperature 1", "nats", False,
        "KL(teacher || student) of the probabilities at temperature 1.",
        EVERYWHERE | {"line"}, Curve(KL, "temperature 1", "-"),
    ),
    Metric(
        "training_view_agreement_top1", ("training_view", "agreement", "top1"),
        "agreement, training view", "fraction", True,
        "Top-1 agreement on images cropped, flipped and mixed as in training.",
        EVERYWHERE, Curve(AGREEMENT, "validation, training view", "--"),
    ),
    Metric(
        "training_view_kl", ("training_view", "kl", "train_temperature"),
        "KL, training view and temp.", "nats", False,
        "KL(teacher || student) as in training: its views and its temperature.",
        EVERYWHERE, Curve(KL, "training view and temperature", "--"),
    ),
    Metric(
        "student_cross_entropy", ("student", "cross_entropy"), "student cross-entropy", "nats",
        False, "Mean of -log of the probability that the student gives the label.",
        frozenset({"log", "best", "line", "report"}),
    ),
    Metric(
        "teacher_ece", ("teacher", "ece"), "teacher calibration error", "fraction", False,
        "Expected calibration error (15 bins): how far the teacher's confidence is from its "
        "accuracy.",
        REPORT,
    ),
    Metric(
        "student_ece", ("student", "ece"), "student calibration error", "fraction", False,
        "Expected calibration error (15 bins): how far the student's confidence is from its "
        "accuracy.",
        REPORT,
    ),
    Metric(
        "loss", (), "loss", "1", False, "What the training minimises.",
        frozenset({"line"}), Curve(LOSS, "training", "-"),
    ),
    Metric(
        "agreement", (), "agreement", "fraction", True,
        "Top-1 agreement with the teacher on the batch of the step.",
        frozenset(), Curve(AGREEMENT, "training", ":"),
    ),
    Metric(
        "images_per_second", (), "speed", "images/s", True, "Training images a second.",
        frozenset({"line"}),
    ),
    *(metric for pair in COSTS for metric in pair),
)  # fmt: skip
BY_NAME = {metric.name: metric for metric in METRICS}
# Progress lines show so many of the validation split; `metrics.jsonl` has the rest.
IN_A_LINE = 3
# What `checkpoint.keep_best` may name.
RANKED = {x.name: bool(x.higher_is_better) for x in METRICS if "best" in x.places}


def at(place: Place) -> tuple[Metric, ...]:
    """The metrics of an evaluation that are shown at `place`."""
    return tuple(x for x in METRICS if x.path and place in x.places)


def logged(figures: Mapping[str, Any]) -> dict[str, float]:
    """What `metrics.jsonl` gets of an evaluation: values by name, those that there are."""
    values = {metric.name: metric.of(figures) for metric in at("log")}
    return {name: value for name, value in values.items() if value is not None}


def shown(figures: Mapping[str, Any], place: Place) -> list[tuple[Metric, float]]:
    """Metrics of `place` with their values in the figures of an evaluation, if they have one."""
    values = [(metric, metric.of(figures)) for metric in at(place)]
    return [(metric, value) for metric, value in values if value is not None]


def line(values: Mapping[str, float]) -> str:
    """The first three of a validation line, for people; `values` by name."""
    texts = [f"{x.label} {x.text(values[x.name])}" for x in at("line") if x.name in values]
    return ", ".join(texts[:IN_A_LINE])


def panels() -> dict[str, tuple[Metric, ...]]:
    """Title -> metrics that are drawn there."""
    titles = (LOSS, AGREEMENT, ACCURACY, KL)
    return {
        title: tuple(x for x in METRICS if x.curve and x.curve.panel == title) for title in titles
    }
