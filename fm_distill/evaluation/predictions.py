"""Predictions of student and teacher for each example of a split, and where they disagree most."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Int

from fm_distill.data.batch import Batch
from fm_distill.data.feeding import evaluation_batches
from fm_distill.evaluation.evaluate import student_logits, teacher_logits
from fm_distill.evaluation.inference import Opened
from fm_distill.models import Variables
from fm_distill.networks.branch import render_central_views
from fm_distill.objectives.distances import kl_divergence
from fm_distill.views.rendering import CentralCrop


@dataclasses.dataclass(frozen=True)
class SplitPredictions:
    """Of each valid example of a split, on the central view; arrays (examples,).

    Without a teacher, what is the teacher's is None.
    """

    example: np.ndarray  # its place in the split
    label: np.ndarray  # -1 where there is none
    student: np.ndarray  # the most likely class
    student_probability: np.ndarray
    teacher: np.ndarray | None
    teacher_probability: np.ndarray | None
    kl: np.ndarray | None  # KL(teacher || student) at temperature 1, nats

    @property
    def expected(self) -> tuple[str, np.ndarray | None]:
        """What the student's classes are compared with: the labels, else the teacher's classes."""
        return ("label", self.label) if (self.label >= 0).any() else ("teacher", self.teacher)


def predict_split(opened: Opened) -> SplitPredictions:
    """Both networks on every example of the opened split."""
    config, layout = opened.config, opened.layout

    def top(logits: Array) -> tuple[Array, Array]:
        return logits.argmax(-1), jax.nn.softmax(logits).max(-1)

    def program(student: Variables, frozen: tuple[Variables, ...], batch: Batch) -> list[Array]:
        branches = (opened.student_branch, *opened.teacher_branches)
        views = render_central_views(batch, branches, CentralCrop.of(config.views))
        logits = student_logits(opened.student_branch, student, views)
        if not frozen:
            return [*top(logits)]
        teacher = teacher_logits(opened.teacher_branches, frozen, views, config.objective)
        return [*top(logits), *top(teacher), kl_divergence(logits, teacher)]

    compiled = jax.jit(program, out_shardings=layout.replicated)
    rows: list[list[np.ndarray]] = []
    for host_batch, mask in evaluation_batches(opened.reader, opened.batch_size):
        batch = layout.spread(host_batch)
        outputs = jax.device_get(compiled(opened.student, opened.frozen, batch))
        rows.append([np.asarray(host_batch.labels), mask, *map(np.asarray, outputs)])
    label, valid, *outputs = (np.concatenate(x) for x in zip(*rows, strict=True))
    student, student_probability, *teachers = (x[valid] for x in outputs)
    teacher, teacher_probability, kl = teachers or (None, None, None)
    return SplitPredictions(
        example=np.flatnonzero(valid),
        label=label[valid],
        student=student,
        student_probability=student_probability,
        teacher=teacher,
        teacher_probability=teacher_probability,
        kl=kl,
    )


def confusions(predictions: SplitPredictions, classes: int) -> Int[np.ndarray, "classes classes"]:
    """Counts: row by `SplitPredictions.expected`, column by the student's class."""
    counts = np.zeros((classes, classes), int)
    _, expected = predictions.expected
    if expected is not None:
        labelled = expected >= 0
        np.add.at(counts, (expected[labelled], predictions.student[labelled]), 1)
    return counts


def most_disagreeing(predictions: SplitPredictions, most: int) -> list[int]:
    """Rows of `predictions`, by falling KL; empty without a teacher."""
    if predictions.kl is None:
        return []
    return np.argsort(-predictions.kl, kind="stable")[:most].tolist()
