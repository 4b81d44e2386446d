"""The command `fm-distill`: each sub-command is a thin layer over a public function.

Results go to standard output, everything else to standard error.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

import tyro

from fm_distill.cli.bench import bench_command
from fm_distill.cli.command import first, first_experiment, first_run, flags_last, guarded, quiet
from fm_distill.cli.compress import compress_command
from fm_distill.cli.demo import demo_command
from fm_distill.cli.diagnose import diagnose_command
from fm_distill.cli.export import export_command
from fm_distill.cli.plan import plan_command
from fm_distill.cli.profile import profile_command
from fm_distill.cli.record import record_command
from fm_distill.cli.train import sweep_command, train_command
from fm_distill.errors import EXIT_COMPLETE, EXIT_WRONG_INPUT, UserError
from fm_distill.preparation.parse_options import OverConfig, parse, parse_over
from fm_distill.system.console import COMPILING

USAGE = """usage: fm-distill COMMAND ...

  train EXPERIMENT.py [--workdir DIR] [--max-hours H] [--any.config.field VALUE ...]
      train the run of an experiment, or continue it; the workdir is runs/NAME
      --resume-from DIR  continue from a copy of this run, which is only read; gs://... too
      --extend           allow a longer schedule than the workdir was trained with
  record EXPERIMENT.py [--to DIR] [--steps A:B] [--max-hours H] [--any.config.field VALUE ...]
      record the teacher's outputs for the run's views, once, for any number of students:
      train EXPERIMENT.py --teacher.recording DIR
  status DIR [--json]
      progress, time left, and whether each checkpoint, or shard of a recording, is intact
  sweep EXPERIMENT.py --over OPTION=VALUE,VALUE,... [--workdir DIR] [--any.config.field VALUE ...]
      train every combination of the values; a table of means and spreads over the seeds; where the
      students differ in cost, which of them are Pareto-optimal; --cost also measures latency
  evaluate DIR|FILE.{onnx,stablehlo,tflite} [--split test] [--json] [--data.data-dir PATH]
      evaluate student and teacher on every example of a split
      --step N           evaluate the checkpoint of step N
      --teacher.weights FILE, --teacher.workdir DIR  where to find the teacher, if it has moved
      --cost             also measure latency and memory of both
  predict DIR|STUDENT.{safetensors,onnx,stablehlo,tflite} IMAGE [IMAGE ...] [--top 5] [--json]
      the student's classes and probabilities for image files, folders and .npy arrays
  export DIR OUT.safetensors [--step N] [--overwrite]
      the student as a weight file in timm's or Keras's names, with a card
  export DIR OUT.{onnx,stablehlo,tflite} [--batch N|dynamic] [--output logits] [--data-dir PATH]
      one function from uint8 pixels to probabilities, written only if it agrees with the run
      --quantise int8    calibrated on training images; for .tflite also float16 or dynamic
  demo DIR|FILE [--port 8765]
      a page on this machine: drop images, and see student and teacher side by side
  bench FILE|DIR [FILE|DIR ...] [--batch-size 1] [--threads N] [--seconds 2] [--json]
      latency, throughput and memory of exports, of runs and of their teachers, on this CPU
  compress DIR --steps prune:structured:0.5 quantise:int8 ... [--any.config.field VALUE ...]
      make the student smaller step by step, each step retrained by the teacher; what each costs
  report DIR [DIR ...] [--out report.html] [--data-dir PATH] [--teacher-weights FILE] [--overwrite]
      one HTML file: figures of the runs side by side, curves, views, disagreements
      --cost             also measure latency and memory of the networks
  diagnose DIR [--json] [--out page.html] [--examples 1024] [--data.data-dir PATH]
      what is wrong with a run, complete or not: named causes, evidence and what to change
  show EXPERIMENT.py [--any.config.field VALUE ...]
      the config, and what follows from it and from the data and weights on this machine
  profile EXPERIMENT.py|DIR [--measured-steps 20] [--trace DIR] [--json]
      where the time of a step and the memory go, and whether the device waits for its input
  plan EXPERIMENT.py --topology v3-8 [--max-hours 9] [--weekly-hours 20] [--num-examples N] [--json]
      whether the run compiles and fits there, and how long it would take; no TPU is needed

`fm-distill train --help` lists every field; with an EXPERIMENT.py, with its values.
--lr, --steps and --epochs are short for --optimizer.learning-rate, --schedule.total-steps and
--schedule.total-epochs; --verbose, with any command, shows the libraries' own messages;
--trust-code runs code that somebody else's run refers to (docs/own-parts.md)."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs one command and exits with its code."""
    sys.exit(guarded(_dispatch, sys.argv[1:] if arguments is None else arguments))


def _dispatch(arguments: list[str]) -> int:
    arguments = flags_last(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return EXIT_COMPLETE if arguments else EXIT_WRONG_INPUT
    command, *rest = arguments
    if command not in COMMANDS:
        raise UserError(f"there is no command {command!r}; expected {', '.join(COMMANDS)}")
    quiet(rest)
    return COMMANDS[command](rest)


@dataclasses.dataclass(frozen=True)
class _Evaluate(OverConfig):
    """Evaluates student and teacher on every example of a split."""

    split: str = "test"
    """The split: train, validation or test."""
    step: int | None = None
    """The checkpoint of this step; None: the newest."""
    cost: bool = False
    """Also measure latency and activation memory of student and teacher."""
    json: bool = False
    """Print one JSON object."""


def _evaluate(arguments: list[str]) -> int:
    from fm_distill.evaluation.evaluate import table
    from fm_distill.evaluation.evaluate_file import config_in, evaluate_file
    from fm_distill.evaluation.inference import evaluate
    from fm_distill.exporting.formats import FORMATS

    if arguments and pathlib.Path(arguments[0]).suffix in FORMATS:
        path, remaining = first(arguments, "evaluate FILE")
        options = parse_over(_Evaluate, config_in(path), remaining, f"evaluate {path}")
        if options.step is not None or options.cost:
            raise UserError(
                f"--step and --cost are for runs, and {path} is a file; leave them out "
                f"(fm-distill bench {path} measures its cost)"
            )
        figures = evaluate_file(path, options.split, options.config)
        print(json.dumps(figures) if options.json else table(figures))
        return EXIT_COMPLETE
    workdir, stored, remaining = first_run(arguments, "evaluate DIR")
    options = parse_over(_Evaluate, stored, remaining, f"evaluate {workdir}")
    print(COMPILING, file=sys.stderr)
    if stored.ema_decay is not None:
        print("evaluating the moving average (EMA) of the student", file=sys.stderr)
    figures = evaluate(workdir, options.split, options.config, options.step, cost=options.cost)
    print(json.dumps(figures) if options.json else table(figures))
    return EXIT_COMPLETE


@dataclasses.dataclass(frozen=True)
class _Predict:
    """The student's classes and probabilities for images."""

    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders of images, and .npy arrays: uint8, (batch, height, width, 3)."""
    top: int = 5
    """Number of classes shown for each image."""
    json: bool = False
    """Print one JSON list, with an object for each image."""


def _predict(arguments: list[str]) -> int:
    from fm_distill.evaluation.inference import predict

    student, remaining = first(arguments, "predict DIR IMAGE...")
    options = parse(_Predict, None, remaining, f"predict {student}")
    if not options.images:
        raise UserError("predict needs at least one image: fm-distill predict DIR IMAGE...")
    if options.top < 1:
        raise UserError(f"--top is {options.top}; expected 1 or more")
    predictions = predict(student, options.images, options.top)
    if options.json:
        print(json.dumps([dataclasses.asdict(prediction) for prediction in predictions]))
        return EXIT_COMPLETE
    for prediction in predictions:
        print(prediction.image)
        for name, probability in zip(prediction.classes, prediction.probabilities, strict=True):
            print(f"  {100 * probability:6.2f} %  {name}")
    return EXIT_COMPLETE


@dataclasses.dataclass(frozen=True)
class _Report:
    """One HTML file about runs, side by side."""

    more: tyro.conf.Positional[tuple[str, ...]] = ()
    """Further workdirs, side by side with the first."""
    out: str = "report.html"
    """The file to write."""
    data_dir: str | None = None
    """Where the data are now, if not where the runs had them."""
    teacher_weights: str | None = None
    """Where the teacher's weights are now."""
    cost: bool = False
    """Also measure latency and activation memory of students and teachers."""
    overwrite: bool = False
    """Replace what is there."""


def _report(arguments: list[str]) -> int:
    from fm_distill.reports.report import report

    workdir, remaining = first(arguments, "report DIR [DIR ...]")
    options = parse(_Report, None, remaining, f"report {workdir}")
    report_path = report(
        [workdir, *options.more],
        options.out,
        overwrite=options.overwrite,
        data_dir=options.data_dir,
        teacher_weights=options.teacher_weights,
        cost=options.cost,
    )
    print(report_path)
    return EXIT_COMPLETE


@dataclasses.dataclass(frozen=True)
class _Show(OverConfig):
    """The config, and what follows from it and from the data and weights on this machine."""

    taps: bool = False
    """List the features of the networks, which terms of the loss can read, instead."""
    modules: bool = False
    """With `--taps`: list the output of each module too, by its path."""


def _show(arguments: list[str]) -> int:
    experiment, experiment_config, remaining = first_experiment(arguments, "show EXPERIMENT.py")
    options = parse_over(_Show, experiment_config, remaining, f"show {experiment}")

    from fm_distill.preparation.check import check
    from fm_distill.preparation.experiment import describe
    from fm_distill.preparation.resolve import resolve_here

    check(options.config)
    if options.modules and not options.taps:
        raise UserError("--modules needs --taps; give both")
    if options.taps:
        from fm_distill.config.teachers import teachers_of
        from fm_distill.networks.taps import tap_table
        from fm_distill.planning.plan import described_teachers

        print(tap_table("student", options.config.student, options.modules))
        teachers = zip(teachers_of(options.config), described_teachers(options.config), strict=True)
        for (option, _), network in teachers:
            print(tap_table(option, network, options.modules))
        return EXIT_COMPLETE
    print(describe(options.config))
    try:
        resolved = resolve_here(options.config, pathlib.Path("runs", options.config.name))
    except UserError as error:
        print(f"\n# not resolved: {error}")
    else:
        print("\n# resolved with the data, weights and devices of this machine")
        print("\n".join(resolved.lines()))
    return EXIT_COMPLETE


@dataclasses.dataclass(frozen=True)
class _Status:
    """Progress, time left, and whether each checkpoint is intact."""

    json: bool = False
    """Print one JSON object."""


def _status(arguments: list[str]) -> int:
    from fm_distill.recordings import status as recordings
    from fm_distill.recordings.manifest import is_recording, open_recording
    from fm_distill.runs.status import status, status_text

    workdir, remaining = first(arguments, "status DIR")
    options = parse(_Status, None, remaining, f"status {workdir}")
    if is_recording(workdir):
        recording = open_recording(workdir)
        recording_status = recordings.status(recording)
        text = recordings.status_text(recording, recording_status)
        print(json.dumps(dataclasses.asdict(recording_status)) if options.json else text)
        return EXIT_COMPLETE
    run_status = status(workdir)
    print(json.dumps(dataclasses.asdict(run_status)) if options.json else status_text(run_status))
    return EXIT_COMPLETE


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "record": record_command,
    "sweep": sweep_command,
    "evaluate": _evaluate,
    "predict": _predict,
    "export": export_command,
    "bench": bench_command,
    "demo": demo_command,
    "compress": compress_command,
    "show": _show,
    "plan": plan_command,
    "profile": profile_command,
    "status": _status,
    "report": _report,
    "diagnose": diagnose_command,
}
