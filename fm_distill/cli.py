"""The command `fm-distill`: each sub-command is a thin layer over a public function.

Results go to standard output, everything else to standard error.
"""

import dataclasses
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Annotated, NoReturn, TypeVar

import tyro

from fm_distill.config import Config
from fm_distill.errors import (
    EXIT_COMPLETE,
    EXIT_INTERRUPTED_TWICE,
    EXIT_OUR_FAULT,
    EXIT_PAUSED,
    EXIT_TRAINING_FAILED,
    EXIT_WRONG_INPUT,
    TrainingFailed,
    UserError,
)

USAGE = """usage: fm-distill COMMAND ...

  train EXPERIMENT.py [--workdir DIR] [--any.config.field VALUE ...]
      train the run of an experiment, or continue it; the workdir is runs/NAME
  sweep EXPERIMENT.py --over OPTION=VALUE,VALUE,... [--workdir DIR] [--any.config.field VALUE ...]
      every combination of the values, and a table of means and spreads over the seeds
  evaluate DIR [--split test] [--json] [--data.data-dir PATH] [--teacher.weights FILE]
      student and teacher on every example of a split
  predict DIR IMAGE [IMAGE ...] [--top 5]
      the student's classes and probabilities for own images
  export DIR OUT.safetensors [--overwrite]
      the student as a weight file in timm's or Keras's names, with a card
  show EXPERIMENT.py [--any.config.field VALUE ...]
      the resolved config, and what follows from it

`fm-distill train EXPERIMENT.py --help` lists every field."""

Options = TypeVar("Options")
# The config's fields are options without a prefix.
Settings = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs one command and exits with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = _dispatch(arguments)
    except UserError as error:
        print(f"fm-distill: {error}", file=sys.stderr)
        code = EXIT_WRONG_INPUT
    except TrainingFailed as error:
        print(f"fm-distill: the training failed: {error}", file=sys.stderr)
        code = EXIT_TRAINING_FAILED
    except KeyboardInterrupt:
        print("fm-distill: interrupted", file=sys.stderr, flush=True)
        # At once: a write in the background must not hold up the person who asked twice.
        os._exit(EXIT_INTERRUPTED_TWICE)
    except BrokenPipeError:
        os._exit(EXIT_OUR_FAULT)
    except Exception:
        print("fm-distill: a fault of ours; please report it with the lines below", file=sys.stderr)
        raise
    sys.exit(code)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return EXIT_COMPLETE if arguments else EXIT_WRONG_INPUT
    command, *rest = arguments
    if command not in COMMANDS:
        raise UserError(f"there is no command {command!r}; expected {', '.join(COMMANDS)}")
    _quiet()
    return COMMANDS[command](rest)


def _quiet() -> None:
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


@dataclasses.dataclass(frozen=True)
class _Train:
    config: Settings
    # Where the run lies.
    workdir: str


def _train(arguments: list[str]) -> int:
    from fm_distill.evaluate import table
    from fm_distill.experiment import load_experiment, resolve_length
    from fm_distill.train import train

    experiment, rest = _first(arguments, "train EXPERIMENT.py")
    default = load_experiment(experiment)
    asked = _parse(
        _Train, _Train(config=default, workdir=""), rest, f"fm-distill train {experiment}"
    )
    config = resolve_length(default, asked.config)
    workdir = asked.workdir or os.path.join("runs", config.name)
    result = train(config, workdir)
    if result.complete:
        assert result.evaluation is not None
        print(table(result.evaluation))
        return EXIT_COMPLETE
    line = " ".join(["fm-distill train", *arguments])
    print(
        f"paused after {result.step:,} of {result.total_steps:,} steps; run again to continue:\n"
        f"  {line}",
        file=sys.stderr,
    )
    return EXIT_PAUSED


@dataclasses.dataclass(frozen=True)
class _Sweep:
    config: Settings
    # Options and their values, e.g. `seed=0,1,2 objective.temperature=1,2`.
    over: tuple[str, ...]
    # Where the runs lie, each in a folder of its own.
    workdir: str


def _sweep(arguments: list[str]) -> int:
    from fm_distill.experiment import load_experiment, resolve_length
    from fm_distill.sweep import parse_over, sweep

    experiment, rest = _first(arguments, "sweep EXPERIMENT.py --over seed=0,1,2")
    default = load_experiment(experiment)
    asked = _parse(
        _Sweep, _Sweep(config=default, over=(), workdir=""), rest, f"fm-distill sweep {experiment}"
    )
    if not asked.over:
        raise UserError("sweep needs what to sweep over: --over seed=0,1,2 optimizer.name=adam,sgd")
    config = resolve_length(default, asked.config)
    workdir = asked.workdir or os.path.join("runs", f"{config.name}_sweep")
    table = sweep(config, dict(parse_over(x) for x in asked.over), workdir)
    if table is None:
        print(
            "paused; run again to continue:\n  " + " ".join(["fm-distill sweep", *arguments]),
            file=sys.stderr,
        )
        return EXIT_PAUSED
    print(table)
    return EXIT_COMPLETE


@dataclasses.dataclass(frozen=True)
class _Evaluate:
    config: Settings
    # train, validation or test.
    split: str = "test"
    # Print one JSON object.
    json: bool = False


def _evaluate(arguments: list[str]) -> int:
    from fm_distill.evaluate import table
    from fm_distill.inference import evaluate
    from fm_distill.workdir import Workdir

    workdir, rest = _first(arguments, "evaluate DIR")
    stored = Workdir(workdir).stored_config()
    asked = _parse(_Evaluate, _Evaluate(config=stored), rest, f"fm-distill evaluate {workdir}")
    if stored.ema_decay is not None:
        print("evaluating the moving average (EMA) of the student", file=sys.stderr)
    figures = evaluate(workdir, asked.split, asked.config)
    print(json.dumps(figures) if asked.json else table(figures))
    return EXIT_COMPLETE


@dataclasses.dataclass(frozen=True)
class _Predict:
    # Image files.
    images: tyro.conf.Positional[tuple[str, ...]]
    # How many classes are shown.
    top: int = 5


def _predict(arguments: list[str]) -> int:
    from fm_distill.inference import predict

    workdir, rest = _first(arguments, "predict DIR IMAGE...")
    asked = tyro.cli(_Predict, args=rest, prog=f"fm-distill predict {workdir}")
    if not asked.images:
        raise UserError("predict needs at least one image: fm-distill predict DIR IMAGE...")
    if asked.top < 1:
        raise UserError(f"--top is {asked.top}; expected 1 or more")
    for found in predict(workdir, list(asked.images), asked.top):
        print(found.image)
        for name, probability in zip(found.classes, found.probabilities, strict=True):
            print(f"  {100 * probability:6.2f} %  {name}")
    return EXIT_COMPLETE


@dataclasses.dataclass(frozen=True)
class _Export:
    # The file to write; its card comes beside it as .json.
    out: tyro.conf.Positional[str]
    # Replace what is there.
    overwrite: bool = False


def _export(arguments: list[str]) -> int:
    from fm_distill.export import export

    workdir, rest = _first(arguments, "export DIR OUT.safetensors")
    asked = tyro.cli(
        _Export,
        args=rest,
        prog=f"fm-distill export {workdir}",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    card = export(workdir, asked.out, asked.overwrite)
    what = "the moving average (EMA) of the student" if card.averaged else "the student"
    print(
        f"{asked.out}: {what} after {card.step:,} steps, {card.model}, {card.classes} classes, "
        f"with the names of {card.naming}"
    )
    return EXIT_COMPLETE


@dataclasses.dataclass(frozen=True)
class _Show:
    config: Settings


def _show(arguments: list[str]) -> int:
    from fm_distill.experiment import check, describe, load_experiment, resolve_length

    experiment, rest = _first(arguments, "show EXPERIMENT.py")
    default = load_experiment(experiment)
    asked = _parse(_Show, _Show(config=default), rest, f"fm-distill show {experiment}")
    config = resolve_length(default, asked.config)
    check(config)
    print(describe(config))
    return EXIT_COMPLETE


def _first(arguments: list[str], usage: str) -> tuple[str, list[str]]:
    """The positional argument, which says what options there are, and the options."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"expected: fm-distill {usage}, with the options behind it")
    return arguments[0], arguments[1:]


def _parse(kind: type[Options], default: Options, arguments: list[str], prog: str) -> Options:
    """Options over `default`. A mistyped one prints the nearest names and exits with 2."""
    return tyro.cli(
        kind,
        default=default,
        args=arguments,
        prog=prog,
        config=(tyro.conf.AvoidSubcommands,),
    )


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "sweep": _sweep,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": _export,
    "show": _show,
}
