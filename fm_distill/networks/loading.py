"""The networks of a run with the weights that they come with, agreed on their classes."""

import dataclasses
from typing import Any

import msgspec

from fm_distill.config import Config, NetworkConfig
from fm_distill.models import resolve
from fm_distill.networks.teachers import Teacher, agreed_classes, load_teachers, pretrained
from fm_distill.runs.workdir import Workdir
from fm_distill.weights.card import only_network
from fm_distill.weights.load import Pretrained, fingerprint


@dataclasses.dataclass(frozen=True)
class Networks:
    """Student and teachers; nothing in their configs is `auto` any more."""

    student: NetworkConfig
    pretrained: Pretrained | None  # what the student starts from
    teachers: tuple[Teacher, ...]
    classes: int
    class_names: tuple[str, ...] | None

    @property
    def contents(self) -> dict[str, Any]:
        """What identifies the run beside its config, wherever the files lie."""
        return {
            "classes": self.classes,
            "class_names": list(self.class_names or ()),
            "student_network": _as_stored(self.student),
            "student_weights": fingerprint(self.pretrained.variables) if self.pretrained else None,
            "teacher": teachers_fingerprint(self.teachers),
            "teacher_networks": [_as_stored(teacher.network) for teacher in self.teachers],
        }

    @property
    def remarks(self) -> list[str]:
        """What was recognised in weight files and chosen for them."""
        of_teachers = [remark for teacher in self.teachers for remark in teacher.remarks]
        return [*of_teachers, *(self.pretrained.remarks if self.pretrained else ())]


def load_networks(
    config: Config,
    workdir: Workdir,
    data_classes: int | None,
    data_names: tuple[str, ...] | None,
) -> Networks:
    """All weights of the run, read and checked. Raises `UserError`."""
    teachers = load_teachers(config, workdir)
    start = None
    if config.student.weights:
        start = pretrained(config.student.weights, config.student, "student")
    return Networks(
        student=start.network if start else resolve(only_network(config.student)),
        pretrained=start,
        teachers=teachers,
        classes=agreed_classes(config.data.classes, data_classes, data_names, teachers),
        class_names=data_names or next((t.class_names for t in teachers if t.class_names), None),
    )


def with_student(config: Config, network: NetworkConfig) -> Config:
    """`config` with what the student's weights said, where it says `auto`."""
    student = dataclasses.replace(
        config.student,
        input_range=network.input_range,
        root_pool_padding=network.root_pool_padding,
    )
    return dataclasses.replace(config, student=student)


def _as_stored(network: NetworkConfig) -> dict[str, Any]:
    """As it is read back from JSON, where a tuple is a list."""
    return msgspec.json.decode(msgspec.json.encode(network))


def teachers_fingerprint(teachers: tuple[Teacher, ...]) -> str | None:
    """Of all weights together; None where there is no teacher."""
    return " + ".join(teacher.fingerprint for teacher in teachers) or None
