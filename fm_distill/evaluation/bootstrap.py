"""How far retention and gap would vary with other images: percentile bootstrap.

Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. Student and teacher are
resampled together. How often which of them is right is all that either number depends on, and those
four counts of a resample of the images are multinomial.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 10_000
SEED = 0
LEVEL = 0.95
Interval = list[float]  # its low and its high end


@dataclasses.dataclass(frozen=True)
class Right:
    """On how many of the labelled examples student and teacher gave the label."""

    both: int
    student_alone: int
    teacher_alone: int
    neither: int

    @property
    def counts(self) -> Int[np.ndarray, "4"]:
        return np.array([self.both, self.student_alone, self.teacher_alone, self.neither])


def retention_interval(right: Right) -> Interval | None:
    """95 % interval of the student's accuracy over the teacher's.

    Beyond all bounds in a resample in which the teacher is never right; None where an end is.
    """
    both_correct, student, teacher, _ = _resamples(right).T
    teacher_correct = both_correct + teacher
    return _interval(
        np.where(
            teacher_correct > 0, (both_correct + student) / np.maximum(teacher_correct, 1), np.inf
        )
    )


def gap_interval(right: Right) -> Interval | None:
    """95 % interval of the teacher's accuracy minus the student's; None without examples."""
    _, student, teacher, _ = _resamples(right).T
    count = right.counts.sum()
    return _interval((teacher - student) / count) if count else None


def _resamples(right: Right) -> Int[np.ndarray, "resamples 4"]:
    count = int(right.counts.sum())
    shares = right.counts / max(count, 1)
    return np.random.default_rng(SEED).multinomial(count, shares, RESAMPLES)


def _interval(values: Float[np.ndarray, " resamples"]) -> Interval | None:
    bounds = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return bounds.tolist() if np.isfinite(bounds).all() else None
