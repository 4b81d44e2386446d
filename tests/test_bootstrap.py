"""Intervals of accuracy kept and gap: against resampled images, a formula, and exact cases."""

import numpy as np
import pytest

from fm_distill.evaluation.bootstrap import Right, gap_interval, retention_interval


def images(right: Right) -> tuple[np.ndarray, np.ndarray]:
    """Whether student and teacher are right, an entry an image."""
    student = np.repeat([1, 1, 0, 0], right.counts)
    return student, np.repeat([1, 0, 1, 0], right.counts)


def test_against_resampled_images():
    right = Right(both=180, student_alone=15, teacher_alone=40, neither=65)
    student, teacher = images(right)
    rng = np.random.default_rng(1)
    drawn = [rng.integers(0, 300, 300) for _ in range(20_000)]
    kept = [student[x].sum() / teacher[x].sum() for x in drawn]
    gap = [teacher[x].mean() - student[x].mean() for x in drawn]
    for found, expected in ((retention_interval(right), kept), (gap_interval(right), gap)):
        deviation = np.std(expected)
        np.testing.assert_allclose(
            found, np.quantile(expected, [0.025, 0.975]), atol=deviation / 20
        )
    assert retention_interval(right) == retention_interval(right)
    # Of two unpaired samples it would be half as wide again.
    apart = [student[x].sum() / teacher[y].sum() for x, y in zip(drawn, drawn[::-1], strict=True)]
    low, high = retention_interval(right)
    assert np.ptp(np.quantile(apart, [0.025, 0.975])) > 1.4 * (high - low)


def test_of_many_images_it_is_the_normal_interval():
    """By the delta method: the variance of log(student / teacher) of paired counts."""
    right = Right(both=80_000, student_alone=3_000, teacher_alone=9_000, neither=8_000)
    s, t = 83_000, 89_000
    deviation = s / t * (1 / s + 1 / t - 2 * 80_000 / (s * t)) ** 0.5
    low, high = retention_interval(right)
    assert (low + high) / 2 == pytest.approx(s / t, abs=0.05 * deviation)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.03)


def test_a_student_that_is_its_teacher_keeps_all():
    same = Right(both=70, student_alone=0, teacher_alone=0, neither=30)
    assert retention_interval(same) == [1, 1] and gap_interval(same) == [0, 0]


def test_where_there_is_no_interval():
    rare = Right(both=1, student_alone=5, teacher_alone=0, neither=94)  # right in 63 % of them
    seldom = Right(both=6, student_alone=4, teacher_alone=0, neither=40)  # in 99.8 %
    assert retention_interval(seldom) is not None
    assert retention_interval(rare) is None and gap_interval(rare) is not None
    none = Right(0, 0, 0, 0)
    assert retention_interval(none) is None and gap_interval(none) is None
