"""Python objects that a config names: `FILE.py:NAME`, or `package.module:name`."""

import hashlib
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from fm_distill.config.choices import not_a_choice
from fm_distill.errors import UserError

Entry = TypeVar("Entry")


class Referenced(NamedTuple):
    """What a reference names, and the code that it comes from."""

    value: Any
    path: str  # of its file
    sha256: str  # of the file


def load_reference(reference: str, option: str) -> Referenced:
    """The object that `reference` names; its file is run. `option` stands in messages.

    Raises `UserError` where the file, the module or the name is not there, or the code fails.
    """
    location, colon, name = reference.rpartition(":")
    if not colon or not location or not name:
        raise UserError(f"{option} is {reference!r}; expected FILE.py:NAME or package.module:name")
    try:
        module = _file(location) if location.endswith(".py") else importlib.import_module(location)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(
            f"{option}: {location} cannot be imported: {error}; install it, or give FILE.py:NAME"
        ) from None
    except Exception as error:
        raise UserError(
            f"{option}: {location} cannot be run: {type(error).__name__}: {error}"
        ) from error
    names = vars(module)
    if name not in names:
        available = ", ".join(x for x in names if not x.startswith("_") and callable(names[x]))
        raise UserError(
            f"{option}: {location} has no {name!r}; it has {available or 'no functions'}"
        )
    path = vars(module).get("__file__")
    if path is None:
        raise UserError(f"{option}: {location} is not a Python file; give FILE.py:NAME")
    sha256 = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    return Referenced(names[name], str(path), sha256)


def is_reference(name: str) -> bool:
    """Whether this names code rather than a line of a table."""
    return ":" in name


def entry(table: Mapping[str, Entry], name: str, option: str) -> Entry:
    """The line `name` of a table, or the function that it refers to. Raises `UserError`."""
    if not is_reference(name):
        return table[name]
    value: Entry = load_reference(name, option).value
    if not callable(value):
        raise UserError(f"{option}={name} is a {type(value).__name__}; expected a function")
    return value


def not_an_entry(table: Mapping[str, Any], name: str, option: str) -> Iterator[str]:
    """A sentence where `name` is neither a line of the table nor a function."""
    if not is_reference(name):
        yield from not_a_choice(option, name, table)
        return
    try:
        entry(table, name, option)
    except UserError as error:
        yield str(error)


def _file(place: str) -> Any:
    path = pathlib.Path(place)
    if not path.is_file():
        raise UserError(f"there is no file {place}; give the path of a .py file")
    # A file is run once, unless it was changed.
    contents = str(path.resolve()).encode() + path.read_bytes()
    name = f"fm_distill_reference_{hashlib.sha256(contents).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
