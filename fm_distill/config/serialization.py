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
    whole = dataclasses.replace(value)
    return dataclasses.replace(whole, **{name: _completed(x) for name, x in vars(whole).items()})


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
        if isinstance(value, list | tuple) and any(isinstance(x, dict) for x in value):
            value = {str(i): x for i, x in enumerate(value)}
        if not isinstance(value, dict):
            return {prefix: value}
        parts = [leaves(f"{prefix}.{name}" if prefix else name, v) for name, v in value.items()]
        return {name: leaf for part in parts for name, leaf in part.items()}

    return leaves("", to_json(config))


def changed(config: Config, values: dict[str, Any]) -> Config:
    """`config` with fields replaced by their dotted names. Raises `UserError`.

    A model's own option that is None is left to its default.
    """
    known = {*option_names(config)}
    for name in values:
        if name not in known and not is_model_option(name, known):
            near = ", ".join(nearest(name, [*known]))
            near = f"did you mean {near}?" if near else "`show` lists them all"
            raise UserError(f"there is no option {name!r}; {near}")
    tree = to_json(with_parts(config, values))
    for name, value in values.items():
        *parents, leaf = name.split(".")
        place = tree
        for parent in parents:
            place = place[int(parent) if isinstance(place, list | tuple) else parent]
        place[leaf] = value
        if value is None and name not in known:
            del place[leaf]
    try:
        return converted(tree, Config)
    except msgspec.ValidationError as error:
        given = ", ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(f"{given}: a value has the wrong type: {error}") from None


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
    if differ := differences(stored, asked):
        raise UserError(f"{run} was trained with another config:\n  " + "\n  ".join(differ))


def differences(stored: Config, asked: Config) -> list[str]:
    """One line for each field that changes the student and is not the same in both."""
    a, b = flatten(stored), flatten(asked)

    def counts(name: str) -> bool:
        name = re.sub(r"\.\d+", "", any_teacher(name))
        return not any(name == x or name.startswith(x + ".") for x in NOT_IDENTITY)

    def same(one: Any, other: Any) -> bool:
        # Of a file of code, the resolved run knows the contents; here is only its place.
        if isinstance(one, str) and isinstance(other, str) and ".py:" in one:
            one, other = (re.sub(r"^.*/", "", x) for x in (one, other))
        return bool(one == other)

    missing = "(not set)"
    return [
        f"{name}: {a.get(name, missing)} in the workdir, {b.get(name, missing)} now"
        for name in sorted({*a, *b})
        if counts(name) and not same(a.get(name, missing), b.get(name, missing))
    ]
