"""What student and teacher say of each example of a split, and where they disagree most."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Int

from fm_distill.data.feeding import Batch, evaluation_batches
from fm_distill.distances import kl_divergence
from fm_distill.evaluate import student_says, teachers_say
from fm_distill.inference import Opened
from fm_distill.models import Variables
from fm_distill.step import look_centrally


@dataclasses.dataclass(frozen=True)
class Answers:
    """Of each whole example of a split, on the central view; arrays (examples,).

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
        """What the student's classes are held against: the labels, else the teacher's classes."""
        return ("label", self.label) if (self.label >= 0).any() else ("teacher", self.teacher)


def answers(opened: Opened) -> Answers:
    """Both networks on every example of the opened split."""
    built, config, layout = opened.built, opened.config, opened.layout

    def say(logits: Array) -> tuple[Array, Array]:
        return logits.argmax(-1), jax.nn.softmax(logits).max(-1)

    def program(student: Variables, frozen: tuple[Variables, ...], batch: Batch) -> list[Array]:
        seats = (built.student, *built.teachers)
        pictures = look_centrally(batch, seats, config.views.central_fraction)
        logits = student_says(built.student, student, pictures)
        if not frozen:
            return [*say(logits)]
        teacher = teachers_say(built.teachers, frozen, pictures, config.objective)
        return [*say(logits), *say(teacher), kl_divergence(logits, teacher)]

    compiled = jax.jit(program, out_shardings=layout.replicated)
    rows: list[list[np.ndarray]] = []
    for host_batch, mask in evaluation_batches(opened.reader, opened.batch_size):
        batch = layout.spread(host_batch)
        said = jax.device_get(compiled(opened.student, opened.frozen, batch))
        rows.append([host_batch.labels, mask, *map(np.asarray, said)])
    label, whole, *said = (np.concatenate(x) for x in zip(*rows, strict=True))
    student, student_probability, *teachers = (x[whole] for x in said)
    teacher, teacher_probability, kl = teachers or (None, None, None)
    return Answers(
        example=np.flatnonzero(whole),
        label=label[whole],
        student=student,
        student_probability=student_probability,
        teacher=teacher,
        teacher_probability=teacher_probability,
        kl=kl,
    )


def confusions(found: Answers, classes: int) -> Int[np.ndarray, "classes classes"]:
    """Counts: row by `Answers.expected`, column by the student's class."""
    counts = np.zeros((classes, classes), int)
    _, expected = found.expected
    if expected is not None:
        known = expected >= 0
        np.add.at(counts, (expected[known], found.student[known]), 1)
    return counts


def most_disagreeing(found: Answers, most: int) -> list[int]:
    """Rows of `found`, by falling KL; empty without a teacher."""
    if found.kl is None:
        return []
    return np.argsort(-found.kl, kind="stable")[:most].tolist()
