"""What follows from options over an experiment: settings that give way to others."""

import dataclasses
from typing import Any, TypeVar

from fm_distill.config import Config, NetworkConfig, StudentConfig
from fm_distill.config.teachers import teachers_of, with_teachers

Network = TypeVar("Network", NetworkConfig, StudentConfig)

# The fields that describe a `bit`; named models fix them.
DESCRIPTION = ("depths", "width", "stem", "norm", "groups")


def settle(default: Config, asked: Config) -> Config:
    """`asked`, options over `default`, without those settings of `default` that they replace.

    Another model drops the description of the one before, steps replace epochs, and the other way
    round. What was asked for itself stays.
    """
    before = {option: teacher.network for option, teacher in teachers_of(default)}
    teachers = [
        dataclasses.replace(teacher, network=_settled_network(before.get(option), teacher.network))
        if teacher.network
        else teacher
        for option, teacher in teachers_of(asked)
    ]
    if asked.teacher is not None:
        asked = with_teachers(asked, teachers)
    student = _settled_network(default.student, asked.student)
    return _settled_length(default, dataclasses.replace(asked, student=student))


def _settled_network(default: NetworkConfig | None, asked: Network) -> Network:
    if default is None or asked.model in (default.model, "bit"):
        return asked
    fields: dict[str, Any] = {x.name: x.default for x in dataclasses.fields(NetworkConfig)}
    names = list(DESCRIPTION)
    if not asked.model.startswith("bit"):
        names.append("root_pool_padding")
    inherited = [name for name in names if vars(asked)[name] == vars(default)[name]]
    return dataclasses.replace(asked, **{name: fields[name] for name in inherited})


def _settled_length(default: Config, asked: Config) -> Config:
    a, b = default.schedule, asked.schedule
    if b.total_steps is not None and b.total_epochs is not None:
        if a.total_steps is None and b.total_epochs == a.total_epochs:
            b = dataclasses.replace(b, total_epochs=None)
        elif a.total_epochs is None and b.total_steps == a.total_steps:
            b = dataclasses.replace(b, total_steps=None)
    return dataclasses.replace(asked, schedule=b)
