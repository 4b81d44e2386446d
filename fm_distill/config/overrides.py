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
    default_networks = {option: teacher.network for option, teacher in teachers_of(default)}
    teachers = [
        dataclasses.replace(
            teacher,
            network=_settled_network(
                default_networks.get(option), teacher.network, _of(typed, f"{option}.network")
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
    default_options = default.options.items()
    kept_options = {
        name: value
        for name, value in asked.options.items()
        if name in typed or (name, value) not in default_options
    }
    return dataclasses.replace(asked, options=kept_options)


def _settled_length(default: Config, asked: Config) -> Config:
    default_schedule, schedule = default.schedule, asked.schedule
    if schedule.total_steps is not None and schedule.total_epochs is not None:
        if (
            default_schedule.total_steps is None
            and schedule.total_epochs == default_schedule.total_epochs
        ):
            schedule = dataclasses.replace(schedule, total_epochs=None)
        elif (
            default_schedule.total_epochs is None
            and schedule.total_steps == default_schedule.total_steps
        ):
            schedule = dataclasses.replace(schedule, total_steps=None)
    return dataclasses.replace(asked, schedule=schedule)
