"""Student and teacher on every example of a split exactly once.

On the central view, where their accuracies are compared; and on the training view, mixed images
included, since that is where one function is to match the other. Each network sees its own
resolution. Several teachers are measured as the one that they teach as.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from fm_distill.config import Config, ObjectiveConfig, ViewConfig
from fm_distill.data.batch import Batch
from fm_distill.evaluation.bootstrap import Right, gap_interval, retention_interval
from fm_distill.evaluation.class_groups import Groups, accuracies, groups_of
from fm_distill.evaluation.sums import Sums, sums_of
from fm_distill.models import Variables
from fm_distill.networks.branch import (
    Branch,
    Views,
    render_central_views,
    render_views,
    teacher_outputs,
)
from fm_distill.objectives.ensemble import as_one
from fm_distill.runs.cost_metrics import costs_text
from fm_distill.runs.metric_table import shown
from fm_distill.system.sharding import Layout
from fm_distill.views.draws import draw, mix
from fm_distill.views.rendering import CentralCrop

EvaluationProgram = Callable[[Variables, tuple[Variables, ...], Batch, Array, Array], Sums]
# Of the training view: its own, so that runs of other seeds and teachings are measured alike.
DRAW_SEED = 0


def student_logits(student: Branch, variables: Variables, views: Views) -> Array:
    """Its logits in evaluation mode, (batch, classes)."""
    return student.network.apply(variables, views[student.input_spec], train=False).logits


def teacher_logits(
    teachers: tuple[Branch, ...],
    frozen: tuple[Variables, ...],
    views: Views,
    objective: ObjectiveConfig,
) -> Array:
    """The logits of all teachers as one, (batch, classes)."""
    logits = teacher_outputs(teachers, frozen, views)
    return as_one(logits, objective.ensemble, objective.temperature)


def make_evaluation_step(
    student: Branch,
    teachers: tuple[Branch, ...],
    views: ViewConfig,
    objective: ObjectiveConfig,
    groups: Groups | None = None,
) -> EvaluationProgram:
    """`(student, frozen teachers, batch, mask, index) -> sums over what the mask keeps`.

    `index` is the batch's number: the training view's draw is a function of it. Of a mixture, both
    images have to be kept. With the `groups` of the classes, also the sums of each group.
    """

    def evaluation_step(
        variables: Variables,
        teacher_variables: tuple[Variables, ...],
        batch: Batch,
        mask: Bool[Array, " batch"],
        index: Array,
    ) -> Sums:
        rendered = evaluation_views(student, teachers, views, batch, mask, index)
        student_outputs = tuple(student_logits(student, variables, x) for x in rendered.views)
        teacher_targets = tuple(teacher_logits(teachers, teacher_variables, x, objective)
                                for x in rendered.views) if teachers else ()  # fmt: skip
        return sums_of(
            student_outputs, teacher_targets, batch.labels, mask, rendered.both, objective, groups
        )

    return evaluation_step


class EvaluationViews(NamedTuple):
    """What networks see of a batch: the central view, and with teachers the training view."""

    views: tuple[Views, ...]
    # Of the training view: whether all that is in a mixture is kept.
    both: Bool[Array, " batch"]


def evaluation_views(
    student: Branch,
    teachers: tuple[Branch, ...],
    views: ViewConfig,
    batch: Batch,
    mask: Bool[Array, " batch"],
    index: Array,
) -> EvaluationViews:
    """The views of the batch with this `index`."""
    branches = (student, *teachers)
    central = render_central_views(batch, branches, CentralCrop.of(views))
    if not teachers:
        return EvaluationViews((central,), mask)
    training_draw = draw(jax.random.fold_in(jax.random.key(DRAW_SEED), index), batch.sizes, views)
    unmixed_mask = mask & (mix(training_draw, 1 - mask.astype(jnp.float32)) == 0)
    return EvaluationViews((central, render_views(training_draw, batch, branches)), unmixed_mask)


def evaluate_batches(
    program: EvaluationProgram,
    student: Variables,
    teachers: tuple[Variables, ...],
    batches: Iterable[tuple[Batch, np.ndarray]],
    layout: Layout,
) -> Sums:
    """Sums over all batches, accumulated in float64 on the host."""
    total: PyTree = None
    for index, (host_batch, mask) in enumerate(batches):
        batch, device_mask = layout.spread((host_batch, mask))
        sums = jax.tree.map(
            lambda x: np.asarray(x, np.float64),
            jax.device_get(program(student, teachers, batch, device_mask, jnp.int32(index))),
        )
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    return total


def summarise(sums: Sums, split: str, step: int) -> dict[str, Any]:
    """The figures of one evaluation; null where there are no labels, teacher or fifth class.

    Those of head, middle and tail classes are there where the training split has a long tail.
    """
    classes = int(sums["classes"])
    examples = int(sums["examples"])
    student = _figures(sums["student"], classes)
    teacher = _figures(sums["teacher"], classes) if "teacher" in sums else _figures(None, classes)
    central = _match(sums.get("match"), classes)
    student_top1, teacher_top1 = student["top1"], teacher["top1"]
    paired = _paired(sums) if student_top1 is not None and teacher_top1 is not None else None
    return {
        "split": split,
        "examples": examples,
        "step": step,
        "student": student,
        "teacher": teacher,
        **central,
        "training_view": _match(sums.get("training_view"), classes),
        "retention": student_top1 / teacher_top1
        if student_top1 is not None and teacher_top1
        else None,
        "retention_interval": retention_interval(paired) if paired else None,
        "gap": teacher_top1 - student_top1
        if student_top1 is not None and teacher_top1 is not None
        else None,
        "gap_interval": gap_interval(paired) if paired else None,
    }


def _paired(sums: Sums) -> Right:
    both, student, teacher, labelled = (
        round(float(x))
        for x in (
            sums["both_right"], sums["student"]["top1"], sums["teacher"]["top1"],
            sums["student"]["labelled"],
        )
    )  # fmt: skip
    return Right(both, student - both, teacher - both, labelled - student - teacher + both)


def _match(sums: Sums | None, classes: int) -> dict[str, dict[str, float | None]]:
    """Agreement as a fraction of 1, KL in nats."""

    def mean(name: str) -> float | None:
        return float(sums[name] / sums["examples"]) if sums and sums["examples"] else None

    return {
        "agreement": {"top1": mean("top1"), "top5": mean("top5") if classes >= 5 else None},
        "kl": {"train_temperature": mean("kl_train_temperature"), "one": mean("kl_one")},
    }


def _figures(sums: Sums | None, classes: int) -> dict[str, float | None]:
    if sums is None or sums["labelled"] == 0:
        return dict.fromkeys(("top1", "top5", "cross_entropy", "ece"))
    count = float(sums["labelled"])
    return {
        "top1": float(sums["top1"]) / count,
        "top5": float(sums["top5"]) / count if classes >= 5 else None,
        "cross_entropy": float(sums["cross_entropy"]) / count,
        "ece": float(np.abs(sums["bin_confidence"] - sums["bin_right"]).sum()) / count,
        **(accuracies(sums["groups"]) if "groups" in sums else {}),
    }


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """All that is needed to evaluate one student and its teachers on host batches."""

    program: EvaluationProgram
    layout: Layout
    classes: int

    @classmethod
    def make(
        cls,
        config: Config,
        student: Branch,
        teachers: tuple[Branch, ...],
        layout: Layout,
        class_counts: Sequence[int] | None = None,
    ) -> "Evaluator":
        """`class_counts`: training examples of each class, where they are known."""
        groups = groups_of(class_counts)
        step = make_evaluation_step(student, teachers, config.views, config.objective, groups)
        program = jax.jit(step, out_shardings=layout.replicated)
        return cls(program, layout, student.network.classes)

    def __call__(
        self,
        student: Variables,
        teachers: tuple[Variables, ...],
        batches: Iterable[tuple[Batch, np.ndarray]],
        split: str,
        step: int,
    ) -> dict[str, Any]:
        """The figures of `summarise`."""
        sums = evaluate_batches(self.program, student, teachers, batches, self.layout)
        return summarise(sums | {"classes": self.classes}, split, step)


def table(figures: dict[str, Any]) -> str:
    """The headline figures, and what student and teacher cost, as text."""
    title = f"{figures['split']}, {figures['examples']:,} examples, step {figures['step']:,}"
    shown_metrics = shown(figures, "table")
    lines = [
        f"  {x.label:<28}{x.text(value):>12}{x.interval_text(figures)}"
        for x, value in shown_metrics
    ]
    return "\n".join([title, *lines, *costs_text(figures)])
