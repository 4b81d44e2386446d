"""What recorded outputs depend on: the first line of each manifest."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from fm_distill.config import CanvasConfig, Config, NetworkConfig, ViewConfig
from fm_distill.config.regime import ViewLaw, regime_of
from fm_distill.config.resolved import CodeFile
from fm_distill.config.serialization import before_options, converted
from fm_distill.errors import UserError
from fm_distill.recordings.rows import RowType

FORMAT = 1
# The version of how views are drawn and rendered from a config; `golden` notices what this misses.
VIEW_VERSION = 1
# What a difference of these is called for people: the option that sets it.
OPTIONS = {
    "data": "the training data",
    "examples": "the number of training examples",
    "classes": "the number of classes",
    "canvas": "data.canvas",
    "view_law": "the views of `teaching`",
    "teacher_weights": "the teachers' weights",
    "taps": "--taps",
    "target_images": "the target images of views.fourier",
}


@dataclasses.dataclass(frozen=True)
class RecordedTap:
    """A feature of the teacher of which a recording holds the mean over the positions."""

    name: str
    channels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordingHeader:
    """All that the outputs of a recording depend on."""

    # What is rendered.
    seed: int
    batch_size: int
    view_law: ViewLaw
    views: ViewConfig  # without what changes no training view
    view_version: int
    golden: tuple[str, ...]  # digests of the draws of fixed keys
    data: str
    examples: int
    canvas: CanvasConfig
    target_images: str | None = None  # SHA-256 of those of `views.fourier`
    # The teachers.
    teachers: tuple[NetworkConfig, ...]
    teacher_weights: tuple[str, ...]
    classes: int
    class_names: tuple[str, ...] | None
    precision: str
    # How their outputs are stored.
    dtype: RowType
    top_k: int | None = None
    temperature: float | None = None  # at which the classes outside the top K are summed
    # The teacher's features that are stored too, by name.
    taps: tuple[RecordedTap, ...] = ()
    # By their references, where the files of teachers' networks lay that are code.
    code_files: Mapping[str, CodeFile] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    @property
    def tap_names(self) -> tuple[str, ...]:
        return tuple(x.name for x in self.taps)

    @property
    def identity(self) -> str:
        """SHA-256 of all of it but `golden`, whose last bits a device may round otherwise, and
        `code_files`, which may lie elsewhere.

        Fields that have their default are left out, so that a field that a later version adds
        makes no other recording of an old one.
        """
        contents = _without_defaults(dataclasses.replace(self, golden=()))
        del contents["code_files"]
        text = json.dumps(contents, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _without_defaults(value: Any) -> Any:
    """As JSON, without the fields that have their default."""
    if isinstance(value, tuple):
        return [_without_defaults(x) for x in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = dataclasses.fields(value)
    return {
        x.name: _without_defaults(vars(value)[x.name])
        for x in fields
        if vars(value)[x.name] != x.default
    }


def drawn_views(views: ViewConfig) -> ViewConfig:
    """The same training views, without what changes none."""
    defaults = ViewConfig()
    return dataclasses.replace(
        views,
        central_fraction=defaults.central_fraction,
        central_resize=defaults.central_resize,
        period_steps=defaults.period_steps,
        # What lies in it is `target_images`.
        fourier=dataclasses.replace(views.fourier, folder=None),
    )


def rendered(config: Config) -> dict[str, Any]:
    """The fields of the header that a config alone decides, all of which a student has to share."""
    return {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "view_law": regime_of(config).views,
        "views": drawn_views(config.views),
        "canvas": config.data.canvas,
    }


def header_differences(recorded: RecordingHeader, now: dict[str, Any]) -> list[str]:
    """A line for each field of `now` that is not as it was recorded, with both values."""
    recorded_values = vars(recorded)
    lines = []
    for name, value in now.items():
        if recorded_values[name] == value:
            continue
        label = OPTIONS.get(name, name)
        pairs = zip(_leaves(label, recorded_values[name]), _leaves(label, value), strict=True)
        lines += [
            f"{option}: {_shown(old)} in the recording, {_shown(new)} in this run"
            for (option, old), (_, new) in pairs
            if old != new
        ]
    return lines


def _leaves(called: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass, and of those inside of it, by their names."""
    if not dataclasses.is_dataclass(value):
        yield called, value
        return
    for name, part in vars(value).items():
        yield from _leaves(f"{called}.{name}", part)


def _shown(value: Any) -> Any:
    """Taps by their names."""
    if isinstance(value, tuple) and all(isinstance(x, RecordedTap) for x in value):
        return " ".join(x.name for x in value) or "none"
    return value


def parse_header(tree: Any, where: str) -> RecordingHeader:
    """The header in the JSON `tree`. Raises `UserError`, also for a format of the future."""
    if not isinstance(tree, dict) or not isinstance(tree.get("format"), int):
        raise UserError(f"{where} does not begin with the header of a recording")
    if tree["format"] > FORMAT:
        raise UserError(
            f"{where} has format {tree['format']}, and this version reads up to {FORMAT}; install "
            "the version of fm-distill that recorded it"
        )
    teachers = tree.get("teachers")
    if isinstance(teachers, list) and any(map(before_options, teachers)):
        raise UserError(
            f"{where} was written by an older version of fm-distill, which stored the settings of "
            "a BiT elsewhere: use that version, or record again"
        )
    try:
        return converted(tree, RecordingHeader)
    except msgspec.ValidationError as error:
        raise UserError(f"{where} does not begin with the header of a recording: {error}") from None
