"""Options of a command and over the fields of a config, read from what was typed."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import tyro

from fm_distill.config import Config
from fm_distill.config.options import (
    ALIASES,
    is_model_option,
    nearest,
    option_names,
    optional_parts,
    with_parts,
    without_parts,
)
from fm_distill.config.overrides import settle
from fm_distill.config.serialization import changed, parse_value
from fm_distill.errors import UserError

HELP = ("-h", "--help")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverConfig:
    """Options over a config, which are named as its fields are."""

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


Options = TypeVar("Options")
Over = TypeVar("Over", bound=OverConfig)


REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _model_options(
    of: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """A model's own options appear in the help; `parse_over` reads them, each by its own name."""
    if of.type_origin is not Mapping:
        return None

    def refuse(tokens: list[str]) -> Any:
        raise ValueError("name the option: --student.options.NAME VALUE")

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=refuse,
        is_instance=lambda x: isinstance(x, Mapping),
        str_from_instance=lambda x: [f"{name}={value}" for name, value in x.items()],
    )


def parse(kind: type[Options], default: Options | None, given: list[str], command: str) -> Options:
    """Options, over `default`. A mistyped one prints the nearest names and exits with 2."""
    options = tyro.cli(
        kind,
        default=default,
        args=given,
        prog=f"fm-distill {command}",
        registry=REGISTRY,
        config=(
            tyro.conf.AvoidSubcommands,
            tyro.conf.FlagCreatePairsOff,
            # Else a field without a comment inherits that of the field before.
            tyro.conf.HelptextFromCommentsOff,
        ),
    )
    assert options is not None
    return options


def parse_over(kind: type[Over], default: Config, arguments: list[str], command: str) -> Over:
    """Options of a command and over the config `default`, which names them.

    `None` takes out a part that may be absent, and an option inside of such a part brings it in.
    What the options replace is settled; see `settle`. Raises `UserError` for an unknown option.
    """
    command_options = {x.name: "" for x in dataclasses.fields(kind) if x.name != "config"}
    nested = {f"{x}." for x in command_options}
    config_options = {*option_names(default)}
    parts = {*optional_parts(default)}
    parser_arguments, given_names, dropped = [], set(), set()
    model_options: dict[str, Any] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--") or argument in HELP:
            parser_arguments.append(argument)
            continue
        written, equals, value = argument.partition("=")
        name = written.removeprefix("--").replace("-", "_")
        name = ALIASES.get(name, name) if name not in command_options else name
        if name in parts and (value or next(iter(remaining), "")) == "None":
            dropped.add(name)
            remaining = remaining if equals else remaining[1:]
            continue
        if is_model_option(name, config_options):
            tokens = [value] if equals else _before_next(remaining)
            if not tokens:
                raise UserError(f"{written} has no value; give one after it")
            model_options[name] = option_value(tokens)
            remaining = remaining if equals else remaining[len(tokens) :]
            continue
        if (
            name not in config_options
            and name not in command_options
            and not name.startswith(tuple(nested))
        ):
            suggestion = ", ".join(
                _written(x) for x in nearest(name, [*command_options, *config_options])
            )
            suggestion = f"did you mean {suggestion}?" if suggestion else "--help lists all"
            section, _, leaf = name.rpartition(".")
            if f"{section}.options" in config_options:
                suggestion += (
                    " An option of one model alone is written "
                    f"{_written(f'{section}.options.{leaf}')}"
                )
            raise UserError(f"there is no option {written}; {suggestion}")
        given_names.add(name)
        parser_arguments.append(_written(name) + equals + value)
    if any(x in HELP for x in arguments):
        given_names |= {x for x in config_options if not re.search(r"\.\d+\.", x)}
    config = with_parts(without_parts(default, dropped), {*given_names, *model_options})
    if model_options:
        config = changed(config, model_options)
    options = parse(kind, kind(config=config), parser_arguments, command)
    return dataclasses.replace(options, config=settle(default, options.config, model_options))


def _before_next(arguments: list[str]) -> list[str]:
    """The values in front of the next option."""
    return [*itertools.takewhile(lambda x: not x.startswith("--") and x not in HELP, arguments)]


def option_value(tokens: list[str]) -> Any:
    """The value of a model's own option."""
    values = [parse_value(x) for x in tokens]
    return values[0] if len(values) == 1 else values


def _written(name: str) -> str:
    return "--" + name.replace("_", "-")
