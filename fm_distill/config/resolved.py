"""A run without open questions: every `auto` of its config turned into its value, once.

`training.resolve` makes it before anything is compiled; it is stored in the workdir and passed on.
"""

import dataclasses
from typing import Any, Literal

import msgspec

from fm_distill.config.networks import NetworkConfig

# Fields that say what the run is made from, wherever the files lie: another value is another run.
# The others may differ between the machines on which a run goes on.
IDENTITY = (
    "data",
    "classes",
    "class_names",
    "student",
    "student_weights",
    "teachers",
    "teacher_weights",
)


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What a run depends on of its training data."""

    identity: str
    examples: int


@dataclasses.dataclass(frozen=True)
class WeightFacts:
    """What a run depends on of its networks and their weights."""

    # Nothing in these is `auto`.
    student: NetworkConfig
    teachers: tuple[NetworkConfig, ...]
    classes: int
    class_names: tuple[str, ...] | None = None
    # SHA-256; None where the student starts from scratch.
    student_weights: str | None = None
    teacher_weights: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """What follows from a config, its data, its weights and the devices."""

    # Identity of the training data.
    data: str
    examples: int
    classes: int
    class_names: tuple[str, ...] | None
    # Nothing in these is `auto`.
    student: NetworkConfig
    teachers: tuple[NetworkConfig, ...]
    # SHA-256 of the weights; None where the student starts from scratch.
    student_weights: str | None
    teacher_weights: tuple[str, ...]
    total_steps: int
    precision: Literal["float32", "bfloat16"]
    feeding: Literal["resident", "streaming"]
    steps_per_dispatch: int
    # Devices along each axis of the mesh.
    mesh: dict[str, int]

    def differences(self, other: "ResolvedRun") -> list[str]:
        """One line for each field of `IDENTITY` in which `other` is not the same run."""
        mine, others = msgspec.to_builtins(self), msgspec.to_builtins(other)
        return [
            f"{name}: {mine[name]} in the workdir, {others[name]} now (its contents, not its place)"
            for name in IDENTITY
            if mine[name] != others[name]
        ]

    @property
    def teacher_fingerprint(self) -> str | None:
        """Of all teachers' weights together; None where there is no teacher."""
        return " + ".join(self.teacher_weights) or None

    def lines(self) -> list[str]:
        """One line a field, for people; of many class names the first ones."""
        tree: dict[str, Any] = msgspec.to_builtins(self)
        if self.class_names and len(self.class_names) > 10:
            tree["class_names"] = ", ".join([*self.class_names[:3], "..."])
        return [f"{name} = {value}" for name, value in tree.items()]
