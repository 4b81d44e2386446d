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
    hints = typing.get_type_hints(kind)
    refuse_unknown(config, hints)
    values = {
        name: (value,)
        if typing.get_origin(hints[name]) is tuple and not isinstance(value, tuple)
        else value
        for name, value in config.options.items()
    }
    try:
        options = msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        text = str(error).replace("$.", "")
        raise ValueError(f"an option of {config.model} has the wrong type: {text}") from None
    for sentence in out_of_bounds(options, "options."):
        raise ValueError(sentence)
    # msgspec leaves defaults to the class, where `vars` does not see them.
    return dataclasses.replace(options)


def refuse_unknown(config: NetworkConfig, known: Collection[str]) -> None:
    """Raises `ValueError` where `config` sets an option that is not among `known`."""
    unknown = [name for name in config.options if name not in known]
    if not unknown:
        return
    near = difflib.get_close_matches(unknown[0], known, 1)
    has = f"it has {', '.join(known)}" if known else "it has none: leave it out"
    raise ValueError(
        f"{config.model} has no option {', '.join(unknown)}; {has}"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def as_mapping(options: ModelOptions) -> dict[str, OptionValue]:
    """All of them by name."""
    return dict(vars(options))
