"""What all commands share: their first argument, exit codes, and quiet libraries."""

import errno
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable

from fm_distill.config import Config
from fm_distill.config.options import empty
from fm_distill.errors import (
    EXIT_INTERRUPTED_TWICE,
    EXIT_OUR_FAULT,
    EXIT_TRAINING_FAILED,
    EXIT_WRONG_INPUT,
    TrainingFailed,
    UserError,
)
from fm_distill.preparation.parse_options import HELP
from fm_distill.system.foreign_code import FLAG, trusted_code

VERBOSE = "--verbose"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def guarded(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """The exit code of a command; prints what went wrong."""
    try:
        with trusted_code(FLAG in arguments):
            exit_code = command(arguments)
        print(end="", flush=True)  # a full disk is noticed here, and not when Python exits
        return exit_code
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
            target = "" if error.filename is None else f" for {error.filename}"
            print(
                f"fm-distill: the disk or its quota is full{target}; free some space, and run the "
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
    return sorted(arguments, key=lambda argument: argument in (VERBOSE, FLAG))


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
    arguments = [argument for argument in arguments if argument not in (VERBOSE, FLAG)]
    if arguments and arguments[0] in HELP:
        return usage.split()[1], arguments
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"expected fm-distill {usage}, followed by the options")
    return arguments[0], arguments[1:]


def first_experiment(arguments: list[str], usage: str) -> tuple[str, Config, list[str]]:
    """The experiment's path, its config, and the options over it."""
    experiment, remaining = first(arguments, usage)
    if arguments[0] in HELP:
        return experiment, empty(Config), remaining
    from fm_distill.preparation.experiment import load_experiment

    return experiment, load_experiment(experiment), remaining


def first_run(arguments: list[str], usage: str) -> tuple[str, Config, list[str]]:
    """The workdir of a run, its config, and the options over it."""
    workdir, remaining = first(arguments, usage)
    if arguments[0] in HELP:
        return workdir, empty(Config), remaining
    from fm_distill.runs.workdir import Workdir

    return workdir, Workdir(workdir).stored().config, remaining
