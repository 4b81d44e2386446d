"""What all commands share: options over a config, exit codes, and quiet libraries."""

import dataclasses
import errno
import itertools
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import tyro

from fm_distill.config import Config
from fm_distill.config.options import (
    ALIASES,
    empty,
    is_model_option,
    nearest,
    option_names,
    optional_parts,
    with_parts,
    without_parts,
)
from fm_distill.config.overrides import settle
from fm_distill.config.serialization import changed, parse_value
from fm_distill.errors import (
    EXIT_INTERRUPTED_TWICE,
    EXIT_OUR_FAULT,
    EXIT_TRAINING_FAILED,
    EXIT_WRONG_INPUT,
    TrainingFailed,
    UserError,
)
from fm_distill.system.foreign_code import FLAG, trusted_code

VERBOSE = "--verbose"
HELP = ("-h", "--help")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverConfig:
    """Options over a config, which are named as its fields are."""

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


Options = TypeVar("Options")
Over = TypeVar("Over", bound=OverConfig)


def guarded(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """The exit code of a command; prints what went wrong."""
    try:
        with trusted_code(FLAG in arguments):
            code = command(arguments)
        print(end="", flush=True)  # a full disk is noticed here, and not when Python exits
        return code
    except UserError as error:
        print(f"fm-distill: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except TrainingFailed as error:
        print(f"fm-distill: the training failed: {error}", file=sys.stderr)
        return EXIT_TRAINING_FAILED
    except KeyboardInterrupt:
        print("fm-distill: interrupted", file=sys.stderr, flush=True)
        # At once: a write in the background must not delay the person who asked twice.
        os._exit(EXIT_INTERRUPTED_TWICE)
    except BrokenPipeError:
        os._exit(EXIT_OUR_FAULT)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            place = "" if error.filename is None else f" for {error.filename}"
            print(
                f"fm-distill: the disk or its quota is full{place}; free some space, and run the "
                "same command again",
                file=sys.stderr,
            )
            _drop_output()
            return EXIT_WRONG_INPUT
        print("fm-distill: internal error; please report it with the lines below", file=sys.stderr)
        raise


def _drop_output() -> None:
    """What could not be printed, so that Python does not try again when it ends."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def flags_last(arguments: list[str]) -> list[str]:
    """Moves the flags that every command has to the end: commands look at what comes first."""
    return sorted(arguments, key=lambda x: x in (VERBOSE, FLAG))


def quiet(arguments: list[str]) -> None:
    """Hides the libraries' own messages, which few can act on, unless `--verbose` is given."""
    if VERBOSE in arguments:
        return
    warnings.filterwarnings("ignore", module="(tensorflow_datasets|orbax|flax|tensorboardX).*")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")  # its import sets its logger's level
    for name in ("absl", "jax", "orbax", "grain", "tensorboardX", "huggingface_hub", "tensorflow"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.excepthook = _thread_failed


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Orbax raises again what its threads raise, and `checkpoint.py` turns it into a message."""
    if not type(failure.thread).__module__.startswith("orbax."):
        threading.__excepthook__(failure)


def first(arguments: list[str], usage: str) -> tuple[str, list[str]]:
    """The positional argument, which decides what options there are, and the options.

    Help is also there without it.
    """
    arguments = [x for x in arguments if x not in (VERBOSE, FLAG)]
    if arguments and arguments[0] in HELP:
        return usage.split()[1], arguments
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"expected fm-distill {usage}, followed by the options")
    return arguments[0], arguments[1:]


def first_experiment(arguments: list[str], usage: str) -> tuple[str, Config, list[str]]:
    """The experiment's path, its config, and the options over it."""
    experiment, rest = first(arguments, usage)
    if arguments[0] in HELP:
        return experiment, empty(Config), rest
    from fm_distill.training.experiment import load_experiment

    return experiment, load_experiment(experiment), rest


def first_run(arguments: list[str], usage: str) -> tuple[str, Config, list[str]]:
    """The workdir of a run, its config, and the options over it."""
    workdir, rest = first(arguments, usage)
    if arguments[0] in HELP:
        return workdir, empty(Config), rest
    from fm_distill.runs.workdir import Workdir

    return workdir, Workdir(workdir).stored().config, rest


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
    asked = tyro.cli(
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
    assert asked is not None
    return asked


def parse_over(kind: type[Over], default: Config, arguments: list[str], command: str) -> Over:
    """Options of a command and over the config `default`, which names them.

    `None` takes out a part that may be absent, and an option inside of such a part brings it in.
    What the options replace is settled; see `settle`. Raises `UserError` for an unknown option.
    """
    own = {x.name: "" for x in dataclasses.fields(kind) if x.name != "config"}
    nested = {f"{x}." for x in own}
    fields = {*option_names(default)}
    parts = {*optional_parts(default)}
    options, named, dropped = [], set(), set()
    of_models: dict[str, Any] = {}
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--") or argument in HELP:
            options.append(argument)
            continue
        written, equals, value = argument.partition("=")
        name = written.removeprefix("--").replace("-", "_")
        name = ALIASES.get(name, name) if name not in own else name
        if name in parts and (value or next(iter(waiting), "")) == "None":
            dropped.add(name)
            waiting = waiting if equals else waiting[1:]
            continue
        if is_model_option(name, fields):
            tokens = [value] if equals else _before_next(waiting)
            if not tokens:
                raise UserError(f"{written} has no value; give one after it")
            of_models[name] = option_value(tokens)
            waiting = waiting if equals else waiting[len(tokens) :]
            continue
        if name not in fields and name not in own and not name.startswith(tuple(nested)):
            near = ", ".join(_written(x) for x in nearest(name, [*own, *fields]))
            near = f"did you mean {near}?" if near else "--help lists all"
            section, _, leaf = name.rpartition(".")
            if f"{section}.options" in fields:
                near += (
                    " An option of one model alone is written "
                    f"{_written(f'{section}.options.{leaf}')}"
                )
            raise UserError(f"there is no option {written}; {near}")
        named.add(name)
        options.append(_written(name) + equals + value)
    if any(x in HELP for x in arguments):
        named |= {x for x in fields if not re.search(r"\.\d+\.", x)}
    config = with_parts(without_parts(default, dropped), {*named, *of_models})
    if of_models:
        config = changed(config, of_models)
    asked = parse(kind, kind(config=config), options, command)
    return dataclasses.replace(asked, config=settle(default, asked.config, of_models))


def _before_next(arguments: list[str]) -> list[str]:
    """The values in front of the next option."""
    return [*itertools.takewhile(lambda x: not x.startswith("--") and x not in HELP, arguments)]


def option_value(tokens: list[str]) -> Any:
    """The value of a model's own option."""
    values = [parse_value(x) for x in tokens]
    return values[0] if len(values) == 1 else values


def _written(name: str) -> str:
    return "--" + name.replace("_", "-")
