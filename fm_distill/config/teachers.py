"""The teachers of a run as one list: the only place that knows `teacher` and `more_teachers`."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from fm_distill.config import Config, TeacherConfig


class NamedTeacher(NamedTuple):
    """A teacher's config, and the option that sets it."""

    option: str  # `teacher`, `more_teachers.0`, ...
    config: TeacherConfig


def teachers_of(config: Config) -> tuple[NamedTeacher, ...]:
    """All teachers of `config`, the first one first."""
    first = (NamedTeacher("teacher", config.teacher),) if config.teacher else ()
    others = (
        NamedTeacher(f"more_teachers.{i}", teacher)
        for i, teacher in enumerate(config.more_teachers)
    )
    return (*first, *others)


def recording_of(config: Config) -> str | None:
    """Where the recorded outputs of all teachers lie, if they teach by them."""
    return config.teacher.recording if config.teacher else None


def moved(config: Config, stored: Config) -> bool:
    """Whether `config` names other teachers than `stored`, or other places, recordings aside."""

    def places(run_config: Config) -> list[NamedTeacher]:
        return [
            NamedTeacher(option, dataclasses.replace(teacher, recording=None))
            for option, teacher in teachers_of(run_config)
        ]

    return places(config) != places(stored)


def with_teachers(config: Config, teachers: Sequence[TeacherConfig]) -> Config:
    """`config` with these teachers instead of its own."""
    return dataclasses.replace(
        config, teacher=teachers[0] if teachers else None, more_teachers=tuple(teachers[1:])
    )


def any_teacher(option: str) -> str:
    """`more_teachers.2.weights` as `teacher.weights`: what holds for one teacher holds for all."""
    parts = option.split(".")
    return ".".join(["teacher", *parts[2:]]) if parts[0] == "more_teachers" else option
