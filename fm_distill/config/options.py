"""Fields of a config by their dotted names, as options and sweeps set them.

A part is a dataclass inside of another one. Where it may be absent, its fields have names all the
same, and naming one of them brings the part in.
"""

import dataclasses
import difflib
import re
import typing
from collections.abc import Collection, Iterator
from typing import Any

from fm_distill.errors import UserError

# Other names of options that are typed often.
ALIASES = {
    "lr": "optimizer.learning_rate",
    "steps": "schedule.total_steps",
    "epochs": "schedule.total_epochs",
}
PLACEHOLDERS = {str: "", int: 0, float: 0.0}
# So many more teachers, terms or sources than an experiment has can be named as options.
MORE = 4
# Of a model's own options, which the model knows and the config does not, the names are free.
MODEL_OPTION = re.compile(r"(.+\.options)\.[a-zA-Z_]\w*")


def empty(kind: Any) -> Any:
    """The dataclass `kind` with placeholders where a field has no default."""
    hints = typing.get_type_hints(kind)
    required = [
        field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING
    ]
    return kind(
        **{
            name: empty(hints[name])
            if dataclasses.is_dataclass(hints[name])
            else PLACEHOLDERS[hints[name]]
            for name in required
        }
    )


def option_names(part: Any, prefix: str = "") -> Iterator[str]:
    """`data.canvas.size`, ...: of all fields, those of absent parts and of `MORE` teachers too."""
    for name, value, kind, _ in _fields(part):
        option = prefix + name
        if kind is None:
            yield option
        elif isinstance(value, tuple):
            for i, item in enumerate((*value, *[empty(kind)] * MORE)):
                yield from option_names(item, f"{option}.{i}.")
        else:
            yield from option_names(empty(kind) if value is None else value, f"{option}.")


def is_model_option(name: str, fields: Collection[str]) -> bool:
    """Whether this is `student.options.NAME` or that of a teacher, where `fields` has such."""
    match = MODEL_OPTION.fullmatch(name)
    return match is not None and match[1] in fields


def optional_parts(part: Any, prefix: str = "") -> Iterator[str]:
    """Names of the parts that may be absent."""
    for name, value, kind, optional in _fields(part):
        option = prefix + name
        if kind is None:
            continue
        if optional:
            yield option
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                yield from optional_parts(item, f"{option}.{i}.")
        else:
            yield from optional_parts(empty(kind) if value is None else value, f"{option}.")


def without_parts(part: Any, names: Collection[str], prefix: str = "") -> Any:
    """`part` without those of its parts that are named."""
    changes: dict[str, Any] = {}
    for name, value, kind, _ in _fields(part):
        option = prefix + name
        if option in names and kind is not None:
            changes[name] = () if isinstance(value, tuple) else None
        elif isinstance(value, tuple) and kind is not None:
            indexed_items = enumerate(value)
            changes[name] = tuple(
                without_parts(item, names, f"{option}.{i}.") for i, item in indexed_items
            )
        elif kind is not None and value is not None:
            changes[name] = without_parts(value, names, f"{option}.")
    return dataclasses.replace(part, **changes)


def with_parts(part: Any, names: Collection[str], prefix: str = "") -> Any:
    """`part` with those of its absent parts in which a named field lies.

    Their fields that have no default hold placeholders. Raises `UserError` where one of these is
    not among `names`, which leaves it open.
    """
    changes: dict[str, Any] = {}
    for name, value, kind, _ in _fields(part):
        option = prefix + name
        if kind is None:
            continue
        if isinstance(value, tuple):
            items = list(value)
            while _lies_in(f"{option}.{len(items)}", names):
                items.append(_brought_in(kind, f"{option}.{len(items)}", names))
            _refuse_gap(option, len(items), names)
            indexed_items = enumerate(items)
            changes[name] = tuple(
                with_parts(item, names, f"{option}.{i}.") for i, item in indexed_items
            )
            continue
        if value is None and _lies_in(option, names):
            value = _brought_in(kind, option, names)
        if value is not None:
            changes[name] = with_parts(value, names, f"{option}.")
    return dataclasses.replace(part, **changes)


def _lies_in(part: str, names: Collection[str]) -> bool:
    return any(name.startswith(f"{part}.") for name in names)


def _refuse_gap(option: str, count: int, names: Collection[str]) -> None:
    for name in names:
        index = name.removeprefix(f"{option}.").partition(".")[0]
        if name.startswith(f"{option}.") and index.isdecimal() and int(index) >= count:
            raise UserError(
                f"there is no {option}.{count} before {name}; give {option}.{count} first"
            )


def _brought_in(kind: Any, option: str, names: Collection[str]) -> Any:
    required = [
        field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING
    ]
    missing = [f"{option}.{name}" for name in required if f"{option}.{name}" not in names]
    if missing:
        raise UserError(f"{option} is not set yet: give {' and '.join(missing)} as well")
    return empty(kind)


def _fields(part: Any) -> Iterator[tuple[str, Any, Any, bool]]:
    """Name, value, dataclass if it is a part, and whether that may be absent, of each field."""
    hints = typing.get_type_hints(type(part))
    for name, value in vars(part).items():
        hint = hints[name]
        arguments = typing.get_args(hint)
        kind = next(
            (candidate for candidate in (hint, *arguments) if dataclasses.is_dataclass(candidate)),
            None,
        )
        yield name, value, kind, hint is not kind


def nearest(name: str, known: list[str]) -> list[str]:
    """Up to three of the options that may be meant by `name`, the likeliest first."""
    section, _, leaf = name.rpartition(".")

    def means(option: str) -> bool:
        option_leaf = option.rpartition(".")[2]
        return leaf == option_leaf or leaf == "".join(word[0] for word in option_leaf.split("_"))

    matching = [option for option in known if means(option) or option == ALIASES.get(leaf)]
    in_section = [option for option in matching if option.rpartition(".")[0] == section]
    return (in_section or matching or difflib.get_close_matches(name, known, 3, 0.6))[:3]
