"""What all commands share: options over a config, exit codes, and quiet libraries."""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Annotated, TypeVar

import tyro

from fm_distill.config import Config
from fm_distill.errors import (
    EXIT_INTERRUPTED_TWICE,
    EXIT_OUR_FAULT,
    EXIT_TRAINING_FAILED,
    EXIT_WRONG_INPUT,
    TrainingFailed,
    UserError,
)

Options = TypeVar("Options")
# The config's fields are options without a prefix.
Settings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


def guarded(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """The exit code of a command; says what went wrong."""
    try:
        return command(arguments)
    except UserError as error:
        print(f"fm-distill: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except TrainingFailed as error:
        print(f"fm-distill: the training failed: {error}", file=sys.stderr)
        return EXIT_TRAINING_FAILED
    except KeyboardInterrupt:
        print("fm-distill: interrupted", file=sys.stderr, flush=True)
        # At once: a write in the background must not hold up the person who asked twice.
        os._exit(EXIT_INTERRUPTED_TWICE)
    except BrokenPipeError:
        os._exit(EXIT_OUR_FAULT)
    except Exception:
        print("fm-distill: a fault of ours; please report it with the lines below", file=sys.stderr)
        raise


def quiet() -> None:
    """Keeps libraries' remarks, which nobody here can act on, out of the user's sight."""
    warnings.filterwarnings("ignore", module="(tensorflow_datasets|orbax|flax|tensorboardX).*")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for name in ("absl", "jax", "orbax", "grain", "tensorboardX", "huggingface_hub", "tensorflow"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threading.excepthook = _thread_failed


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Orbax raises again what its threads raise, where `checkpoint.py` makes a sentence of it."""
    if not type(failure.thread).__module__.startswith("orbax."):
        threading.__excepthook__(failure)


def first(arguments: list[str], usage: str) -> tuple[str, list[str]]:
    """The positional argument, which says what options there are, and the options."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"expected: fm-distill {usage}, with the options behind it")
    return arguments[0], arguments[1:]


def parse(
    kind: type[Options], default: Options | None, arguments: list[str], command: str
) -> Options:
    """Options, over `default`. A mistyped one prints the nearest names and exits with 2."""
    asked = tyro.cli(
        kind,
        default=default,
        args=arguments,
        prog=f"fm-distill {command}",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
    )
    assert asked is not None
    return asked
