"""A run without open questions: every `auto` of its config turned into its value, once.

`preparation.resolve` makes it before anything is compiled. It is stored in the workdir and passed
on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from fm_distill.config.networks import NetworkConfig

# What the run is made from, wherever the files lie: another value is another run.
# The others may differ between the machines on which a run goes on.
IDENTITY = (
    "data",
    "classes",
    "class_names",
    "student",
    "student_weights",
    "teachers",
    "teacher_weights",
    "recording",
    "code",
    "target_images",
)


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What a run depends on of its training data."""

    identity: str
    examples: int
    # Of each class; None where nothing asks for them and they would have to be read.
    class_counts: tuple[int, ...] | None = None
    # SHA-256 of the target images of Fourier domain adaptation; None: views are not adapted.
    target_images: str | None = None


@dataclasses.dataclass(frozen=True)
class CodeFile:
    """A file of code that a run found, where it was made."""

    path: str  # absolute
    sha256: str


@dataclasses.dataclass(frozen=True)
class RecordingFacts:
    """What a run depends on of the recording that it learns from."""

    path: str
    # SHA-256 of all that the recorded outputs depend on.
    identity: str
    # From the first one on, without a hole.
    steps: int
    # Maximal ranges of steps, in order.
    ranges: tuple[tuple[int, int], ...]


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
    recording: RecordingFacts | None = None
    # Whether the teacher has no head, so that its features alone teach.
    headless: bool = False


def _same(mine: Any, other: Any) -> bool:
    """Equal wherever the file of a custom network is: `code` has the digest of its contents."""
    if isinstance(mine, dict) and isinstance(other, dict) and "model" in mine:
        mine, other = (
            {**network, "model": network["model"].rpartition("/")[2]} for network in (mine, other)
        )
    if isinstance(mine, list | tuple) and isinstance(other, list | tuple):
        return len(mine) == len(other) and all(map(_same, mine, other))
    return bool(mine == other)


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
    # SHA-256 of what the recorded outputs depend on; None where the teachers themselves teach.
    recording: str | None = None
    # Steps after which order and views repeat; None: not in this run.
    period_steps: int | None = None
    # SHA-256 of the files of custom code, the student's network first.
    code: tuple[str, ...] = ()
    # By their references, where the run found those files.
    code_files: Mapping[str, CodeFile] = dataclasses.field(default_factory=dict)
    # Training examples of each class; None where they are not known.
    class_counts: tuple[int, ...] | None = None
    # SHA-256 of the target images of `views.fourier`; None: views are not adapted.
    target_images: str | None = None
    # Whether the teacher has no head, so that its features alone teach.
    headless: bool = False

    def differences(self, other: "ResolvedRun") -> list[str]:
        """One line for each field of `IDENTITY` in which `other` is not the same run."""
        stored, current = msgspec.to_builtins(self), msgspec.to_builtins(other)
        lines = [
            f"{name}: {stored[name]} in the workdir, {current[name]} now (its contents, not its "
            "path)"
            for name in IDENTITY
            if not _same(stored[name], current[name])
        ]
        shared_steps = min(self.total_steps, other.total_steps)
        stored_period, current_period = (
            run.period_steps or run.total_steps for run in (self, other)
        )
        # A longer schedule may begin to repeat behind the end of the shorter one.
        if (
            self.period_steps != other.period_steps
            and min(stored_period, current_period) < shared_steps
        ):
            lines.append(
                f"the views repeat after {stored_period:,} steps in the workdir, after "
                f"{current_period:,} now, because the length of the recording changed; set "
                f"views.period_steps={stored_period}"
            )
        return lines

    @property
    def teacher_classes(self) -> int:
        """Of the teachers' heads; 0 where there is none."""
        return 0 if self.headless else self.classes

    @property
    def teacher_fingerprint(self) -> str | None:
        """Of all teachers' weights together; None where there is no teacher."""
        return " + ".join(self.teacher_weights) or None

    def lines(self) -> list[str]:
        """One line a field, for people; of many classes the first ones."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        for name, values in (
            ("class_names", self.class_names), ("class_counts", self.class_counts),
        ):  # fmt: skip
            if values and len(values) > 10:
                fields[name] = ", ".join([*map(str, values[:3]), "..."])
        return [f"{name} = {value}" for name, value in fields.items()]
