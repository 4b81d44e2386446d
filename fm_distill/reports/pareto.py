"""Which students of a sweep are Pareto-optimal in accuracy and cost, as a table and a picture."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fm_distill.reports import plots
from fm_distill.runs.cost_metrics import COSTS
from fm_distill.runs.metric import Metric
from fm_distill.runs.metric_table import BY_NAME

QUALITIES = (BY_NAME["student_top1"], BY_NAME["agreement_top1"])
TEACHER = BY_NAME["teacher_top1"]
FLOPS = BY_NAME["student_flops"]
# A 95th percentile or a memory is no second axis beside its median.
TRADED = tuple(
    student for student, _ in COSTS if student.unit != "bytes" and "p95" not in student.name
)
OPTIMAL = "Pareto-optimal in"


@dataclasses.dataclass(frozen=True)
class Pareto:
    """The groups of a sweep by rising FLOPs; values in the units of the columns."""

    groups: tuple[str, ...]
    quality: Metric
    accuracy: tuple[float, ...]  # means over the seeds
    spread: tuple[float, ...]  # sample standard deviations, 0 of a single seed
    costs: dict[Metric, tuple[float, ...]]  # those that differ between the groups
    teacher: float | None  # its accuracy

    @property
    def heads(self) -> list[str]:
        return ["runs", self.quality.column, *(cost.column for cost in self.costs), OPTIMAL]

    def rows(self) -> list[tuple[str, list[float], str]]:
        """Group, accuracy and costs, and the costs against which it is on the front."""
        optimal_by_cost = {
            cost: front(self.accuracy, values) for cost, values in self.costs.items()
        }
        return [
            (
                group,
                [self.accuracy[i], *(values[i] for values in self.costs.values())],
                ", ".join(
                    _short(cost) for cost, on_front in optimal_by_cost.items() if on_front[i]
                ),
            )
            for i, group in enumerate(self.groups)
        ]

    def picture(self) -> bytes:
        """SVG: accuracy against each cost."""
        panels = {
            cost.column: plots.Tradeoff(values, tuple(front(self.accuracy, values)))
            for cost, values in self.costs.items()
        }
        return plots.tradeoffs(
            self.groups, self.accuracy, self.spread, panels, self.quality.column, self.teacher
        )


def front(accuracy: Sequence[float], cost: Sequence[float]) -> list[bool]:
    """Whether no other is at least as accurate and as cheap, and better in one of the two."""
    pairs = list(zip(accuracy, cost, strict=True))
    return [
        not any(
            other_accuracy >= own_accuracy
            and other_cost <= own_cost
            and (other_accuracy, other_cost) != (own_accuracy, own_cost)
            for other_accuracy, other_cost in pairs
        )
        for own_accuracy, own_cost in pairs
    ]


def pareto(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> Pareto | None:
    """Of the figures of each group's runs; None where all students have the same FLOPs.

    Accuracy, or where there are no labels agreement with the teacher.
    """

    def values(metric: Metric, figures: Sequence[Mapping[str, Any]]) -> list[float]:
        raw_values = [metric.of(run_figures) for run_figures in figures]
        return [metric.number(value) for value in raw_values if value is not None]

    def means(metric: Metric) -> list[float] | None:
        values_by_group = [values(metric, figures) for figures in groups.values()]
        return (
            [statistics.mean(group_values) for group_values in values_by_group]
            if all(values_by_group)
            else None
        )

    qualities = [
        (metric, group_means) for metric in QUALITIES if (group_means := means(metric)) is not None
    ]
    costs = {
        metric: group_means
        for metric in TRADED
        if (group_means := means(metric)) and len(set(group_means)) > 1
    }
    if not qualities or FLOPS not in costs:
        return None
    quality, accuracy = qualities[0]
    flops = costs[FLOPS]
    order = sorted(range(len(groups)), key=lambda i: (flops[i], -accuracy[i]))
    spreads = [
        statistics.stdev(seed_values) if len(seed_values) > 1 else 0.0
        for seed_values in (values(quality, figures) for figures in groups.values())
    ]
    teacher_accuracies = [
        value for figures in groups.values() for value in values(TEACHER, figures)
    ]
    group_names = list(groups)
    return Pareto(
        groups=tuple(group_names[i] for i in order),
        quality=quality,
        accuracy=tuple(accuracy[i] for i in order),
        spread=tuple(spreads[i] for i in order),
        costs={
            metric: tuple(cost_values[i] for i in order) for metric, cost_values in costs.items()
        },
        # One line for all students: not where their teachers differ.
        teacher=teacher_accuracies[0]
        if len({*teacher_accuracies}) == 1 and quality is QUALITIES[0]
        else None,
    )


def _short(cost: Metric) -> str:
    return cost.label.removeprefix("student ")
