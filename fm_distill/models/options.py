"""The settings that only one model has: `NetworkConfig.options` as a dataclass of its own."""

import dataclasses
import difflib
import typing
from collections.abc import Collection
from typing import TypeVar

import msgspec

from fm_distill.config import NetworkConfig
from fm_distill.config.bounds import out_of_bounds
from fm_distill.config.networks import OptionValue


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Of a model that has none; the base of those that models have."""

    def resolved(self) -> "ModelOptions":
        """With the model's own values where an option is `auto`."""
        return self


Kind = TypeVar("Kind", bound=ModelOptions)


def read_options(config: NetworkConfig, kind: type[Kind]) -> Kind:
    """The options of `config` as `kind`, with its defaults. Raises `ValueError`, naming the option.

    One number stands for a tuple of one.
    """
    field_types = typing.get_type_hints(kind)
    refuse_unknown(config, field_types)
    values = {
        name: (value,)
        if typing.get_origin(field_types[name]) is tuple and not isinstance(value, tuple)
        else value
        for name, value in config.options.items()
    }
    try:
        options = msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        reason = str(error).replace("$.", "")
        raise ValueError(f"an option of {config.model} has the wrong type: {reason}") from None
    for problem in out_of_bounds(options, "options."):
        raise ValueError(problem)
    # msgspec leaves defaults to the class, where `vars` does not see them.
    return dataclasses.replace(options)


def refuse_unknown(config: NetworkConfig, known: Collection[str]) -> None:
    """Raises `ValueError` where `config` sets an option that is not among `known`."""
    unknown = [name for name in config.options if name not in known]
    if not unknown:
        return
    suggestions = difflib.get_close_matches(unknown[0], known, 1)
    available = f"it has {', '.join(known)}" if known else "it has none: leave it out"
    raise ValueError(
        f"{config.model} has no option {', '.join(unknown)}; {available}"
        + (f"; did you mean {suggestions[0]}?" if suggestions else "")
    )


def as_mapping(options: ModelOptions) -> dict[str, OptionValue]:
    """All of them by name."""
    return dict(vars(options))
