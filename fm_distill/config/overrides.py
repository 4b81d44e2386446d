"""What follows from options over an experiment: settings that give way to others."""

import dataclasses
from collections.abc import Collection
from typing import TypeVar

from fm_distill.config import Config, NetworkConfig, StudentConfig
from fm_distill.config.teachers import teachers_of, with_teachers

Network = TypeVar("Network", NetworkConfig, StudentConfig)


def settle(default: Config, asked: Config, typed: Collection[str] = ()) -> Config:
    """`asked`, options over `default`, without those settings of `default` that they replace.

    `typed` are the options of models that were asked for, by their dotted names.

    Another model drops the options of the one before, steps replace epochs, and the other way
    round. What was asked for itself stays.
    """
    before = {option: teacher.network for option, teacher in teachers_of(default)}
    teachers = [
        dataclasses.replace(
            teacher,
            network=_settled_network(
                before.get(option), teacher.network, _of(typed, f"{option}.network")
            ),
        )
        if teacher.network
        else teacher
        for option, teacher in teachers_of(asked)
    ]
    if asked.teacher is not None:
        asked = with_teachers(asked, teachers)
    student = _settled_network(default.student, asked.student, _of(typed, "student"))
    return _settled_length(default, dataclasses.replace(asked, student=student))


def _of(typed: Collection[str], network: str) -> set[str]:
    prefix = f"{network}.options."
    return {name.removeprefix(prefix) for name in typed if name.startswith(prefix)}


def _settled_network(default: NetworkConfig | None, asked: Network, typed: set[str]) -> Network:
    if default is None or asked.model == default.model:
        return asked
    inherited = default.options.items()
    own = {
        name: value
        for name, value in asked.options.items()
        if name in typed or (name, value) not in inherited
    }
    return dataclasses.replace(asked, options=own)


def _settled_length(default: Config, asked: Config) -> Config:
    a, b = default.schedule, asked.schedule
    if b.total_steps is not None and b.total_epochs is not None:
        if a.total_steps is None and b.total_epochs == a.total_epochs:
            b = dataclasses.replace(b, total_epochs=None)
        elif a.total_epochs is None and b.total_steps == a.total_steps:
            b = dataclasses.replace(b, total_steps=None)
    return dataclasses.replace(asked, schedule=b)
