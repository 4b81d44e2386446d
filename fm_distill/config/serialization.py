"""A config as text and JSON, and what makes two configs the same run."""

import dataclasses
import json
import re
from typing import Any, TypeVar

import msgspec

from fm_distill.config import Config
from fm_distill.config.options import is_model_option, nearest, option_names, with_parts
from fm_distill.config.teachers import any_teacher
from fm_distill.errors import UserError

Part = TypeVar("Part")

# Fields about where things lie or what is written, not which student comes out. What holds for
# `teacher` holds for all teachers.
NOT_IDENTITY = (
    "name",
    "data.data_dir",
    "data.class_names",
    "data.transfer.data_dir",
    "data.transfer.examples",
    "data.resident_share",
    "data.workers",
    "data.train.examples",
    "data.validation",
    "data.test",
    # What lies in it is known by its contents.
    "views.fourier.folder",
    "student.weights",
    "teacher.weights",
    "teacher.experiment",
    "teacher.workdir",
    "teacher.recording",
    "teacher.function",
    # The weights that are left are the teacher's identity, by whatever names they were chosen.
    "teacher.classes",
    # Says which quantised teacher may teach, not what it teaches.
    "teacher.least_agreement",
    "mesh",
    # The same gradient, within float error.
    "memory",
    "checkpoint",
    # Says nothing of a run that did not diverge; and one that did may be continued with another.
    "divergence",
    "log",
)


def converted(tree: Any, kind: type[Part]) -> Part:
    """The JSON `tree` as a frozen dataclass. Raises `msgspec.ValidationError`."""
    return _completed(msgspec.convert(tree, kind))


def _completed(value: Part) -> Part:
    """With all fields of dataclasses in `vars`.

    msgspec leaves out those that the JSON of an older version does not have: they are defaults of
    the class, and two equal configs would differ.
    """
    if isinstance(value, tuple):
        return type(value)(map(_completed, value))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    completed_copy = dataclasses.replace(value)
    return dataclasses.replace(
        completed_copy,
        **{name: _completed(field_value) for name, field_value in vars(completed_copy).items()},
    )


def before_options(network: Any) -> bool:
    """Whether this is the JSON of a BiT from before its options.

    Read as it is, it would be another network.
    """
    if not isinstance(network, dict) or "options" in network:
        return False
    model = str(network.get("model"))
    return model.startswith("bit") and ":" not in model


def to_json(config: Config) -> dict[str, Any]:
    """The config as nested dicts and lists."""
    return msgspec.to_builtins(config)


def from_json(tree: Any) -> Config:
    """The inverse of `to_json`; raises `UserError` where `tree` is not a config of this version."""
    try:
        return converted(tree, Config)
    except msgspec.ValidationError as error:
        raise UserError(f"this is not a config of this version: {error}") from None


def flatten(config: Config) -> dict[str, Any]:
    """`{"data.canvas.size": 160, ...}`: each leaf of the config by its option's name."""

    def leaves(prefix: str, value: Any) -> dict[str, Any]:
        if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
            value = {str(i): x for i, x in enumerate(value)}
        if not isinstance(value, dict):
            return {prefix: value}
        parts = [
            leaves(f"{prefix}.{name}" if prefix else name, child) for name, child in value.items()
        ]
        return {name: leaf for part in parts for name, leaf in part.items()}

    return leaves("", to_json(config))


def changed(config: Config, values: dict[str, Any]) -> Config:
    """`config` with fields replaced by their dotted names. Raises `UserError`.

    A model's own option that is None is left to its default.
    """
    known_options = {*option_names(config)}
    for name in values:
        if name not in known_options and not is_model_option(name, known_options):
            suggestion = ", ".join(nearest(name, [*known_options]))
            suggestion = f"did you mean {suggestion}?" if suggestion else "`show` lists them all"
            raise UserError(f"there is no option {name!r}; {suggestion}")
    tree = to_json(with_parts(config, values))
    for name, value in values.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node[int(parent) if isinstance(node, list | tuple) else parent]
        node[leaf] = value
        if value is None and name not in known_options:
            del node[leaf]
    try:
        return converted(tree, Config)
    except msgspec.ValidationError as error:
        assignments = ", ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(f"{assignments}: a value has the wrong type: {error}") from None


def parse_value(text: str) -> Any:
    """A value as people type it: JSON, one of Python's constants, or else the text."""
    constants = {"None": None, "True": True, "False": False}
    if text in constants:
        return constants[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def refuse_other_config(stored: Config, asked: Config, run: str) -> None:
    """Raises `UserError` where `asked` would train another student than `run` did."""
    if mismatches := differences(stored, asked):
        raise UserError(f"{run} was trained with another config:\n  " + "\n  ".join(mismatches))


def differences(stored: Config, asked: Config) -> list[str]:
    """One line for each field that changes the student and is not the same in both."""
    old, new = flatten(stored), flatten(asked)

    def counts(name: str) -> bool:
        name = re.sub(r"\.\d+", "", any_teacher(name))
        return not any(
            name == excluded or name.startswith(excluded + ".") for excluded in NOT_IDENTITY
        )

    def same(one: Any, other: Any) -> bool:
        # Of a file of code, the resolved run knows the contents; here is only its place.
        if isinstance(one, str) and isinstance(other, str) and ".py:" in one:
            one, other = (re.sub(r"^.*/", "", reference) for reference in (one, other))
        return bool(one == other)

    missing = "(not set)"
    return [
        f"{name}: {old.get(name, missing)} in the workdir, {new.get(name, missing)} now"
        for name in sorted({*old, *new})
        if counts(name) and not same(old.get(name, missing), new.get(name, missing))
    ]
