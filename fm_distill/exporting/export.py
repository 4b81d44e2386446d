"""A trained student as one file for others, and a card: its weights, or its whole function.

Weights are tensors under timm's or Keras's names (`.safetensors`). timm loads the file of a network
that it has; ours is loaded back by `weights.load` in every bit, without options. A function
(`.onnx`, `.stablehlo`, `.tflite`) needs nothing of this package; see `function.py`. Where the
run keeps an average of the student, that is exported.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fm_distill.config import QuantisationConfig
from fm_distill.config.bounds import out_of_bounds
from fm_distill.config.code import IMAGES
from fm_distill.errors import UserError
from fm_distill.exporting.calibration import INT8, calibrated
from fm_distill.exporting.formats import FORMATS
from fm_distill.exporting.function import BatchSize, Output, Quantise, function_of
from fm_distill.exporting.parity import compare, examples_of, images_of, runs
from fm_distill.models import model_of, ranges_of
from fm_distill.runs.open_run import Run, open_run
from fm_distill.runs.run_code import refuse_code_of_run
from fm_distill.system.console import log
from fm_distill.system.files import replacing
from fm_distill.views.rendering import InputSpec
from fm_distill.weights.card import CARD_KEY, Card, FunctionFacts, card_to_json, digest
from fm_distill.weights.names import in_naming, naming_of

WEIGHTS = ".safetensors"
SUFFIXES = (WEIGHTS, *FORMATS)


def export(
    workdir: str | os.PathLike[str],
    path: str | os.PathLike[str],
    overwrite: bool = False,
    step: int | None = None,
    *,
    batch: BatchSize = 1,
    output: Output = "probabilities",
    quantise: Quantise = "none",
    float_layers: tuple[str, ...] = (),
    range_percentile: float = 100.0,
    data_dir: str | None = None,
) -> Card:
    """Writes the student of the run in `workdir` to `path`, as the format that its suffix says.

    Weights have their card as JSON beside them, too, which is written last. A function takes
    batches of `batch` images, returns `output`, and computes in the numbers of `quantise` (int8:
    calibrated on training images; of an `.onnx`, `float_layers` stay as they are and ranges end at
    `range_percentile`). It is written only where its own runtime agrees with the run on
    images of the validation split. The data lie in `data_dir` if not where they were.
    Each file is written completely or not at all. Raises `UserError`, also where it is there
    already, unless `overwrite`.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        names = ", ".join(f"student{x}" for x in SUFFIXES)
        raise UserError(f"{path} is not a name for an export; expected one like {names}")
    if batch != "dynamic" and batch < 1:
        raise UserError(f"--batch is {batch}; expected 1 or more, or dynamic")
    if path.suffix == WEIGHTS and (batch != 1 or output != "probabilities" or data_dir):
        raise UserError(
            f"--batch, --output and --data-dir are for whole functions, and {path} holds weights "
            "only; leave them out"
        )
    supported = {suffix: file_format.quantisations for suffix, file_format in FORMATS.items()}
    if quantise != "none" and quantise not in supported.get(path.suffix, ()):
        suffixes = " or ".join(x for x, kinds in supported.items() if quantise in kinds)
        raise UserError(
            f"--quantise {quantise} is for {suffixes}, and {path} has another format; leave it out"
        )
    quantisation = dataclasses.replace(
        INT8, float_layers=float_layers, range_percentile=range_percentile
    )
    if quantisation != INT8 and not (quantise == "int8" and path.suffix == ".onnx"):
        raise UserError(
            "--float-layers and --range-percentile are for --quantise int8 of an .onnx; leave them "
            "out"
        )
    for problem in out_of_bounds(quantisation):
        raise UserError(problem)
    output_paths = (path, path.with_suffix(".json")) if path.suffix == WEIGHTS else (path,)
    existing = [str(x) for x in output_paths if x.exists()]
    if existing and not overwrite:
        raise UserError(
            f"{' and '.join(existing)} already exists; use another name, or --overwrite"
        )
    if not path.parent.is_dir():
        raise UserError(
            f"there is no folder {path.parent} to write {path.name} to; create it first"
        )
    run = open_run(workdir, step)
    if not run.complete:
        log(
            f"the run in {workdir} is not complete: its student is exported as it stood after "
            f"{run.step:,} of {run.resolved.total_steps:,} steps"
        )
    _check_ranges(run, path)
    naming = naming_of(run.network)
    tensors = in_naming(naming, run.network, run.student.variables)
    card = _card_of(run, naming, tensors)
    if path.suffix == WEIGHTS:
        return _write_weights(path, tensors, card)
    return _write_function(
        path, run, card, tensors, batch, output, quantise, quantisation, data_dir
    )


def _check_ranges(run: Run, path: pathlib.Path) -> None:
    """Raises `UserError` where quantised activations have no ranges, or `path` no room for them."""
    if not (ranges := ranges_of(run.student.variables)):
        return
    if path.suffix == WEIGHTS:
        raise UserError(
            f"{path} would hold weights only, and the quantised student in {run.workdir.path} "
            f"also needs the ranges of its activations; export to {' or '.join(FORMATS)}"
        )
    for activation, (low, high, batches) in ranges.items():
        if not (batches > 0 and -np.inf < low <= high < np.inf):
            raise UserError(
                f"the student in {run.workdir.path} has an invalid range for {activation}, "
                f"{low:g} to {high:g} after {batches:g} batches; export another step (--step), or "
                "train again"
            )


def _card_of(run: Run, naming: str, tensors: dict[str, np.ndarray]) -> Card:
    network, stored_config = run.network, run.workdir.read("config.json")
    mean, std = InputSpec.of(network).moments
    return Card(
        model=network.model,
        network=network,
        classes=run.classes,
        class_names=run.resolved.class_names,
        mean=tuple(x / 255 for x in mean),
        std=tuple(x / 255 for x in std),
        resolution=network.resolution,
        central_fraction=run.config.views.central_fraction,
        central_resize=run.config.views.central_resize,
        precision=run.resolved.precision,
        step=run.step,
        averaged=run.averaged,
        metrics=run.workdir.read_evaluation() if run.complete else None,
        config=stored_config["config"],
        versions=stored_config["versions"],
        commit=stored_config["commit"],
        naming=naming,
        sha256=digest(tensors),
        teacher_weights=run.resolved.teacher_weights,
        code_files=run.resolved.code_files,
    )


def _write_weights(path: pathlib.Path, tensors: dict[str, np.ndarray], card: Card) -> Card:
    text = card_to_json(card)
    metadata = {CARD_KEY: text, **_for_timm(card)}
    _write(path, lambda temporary: save_file(tensors, temporary, metadata))
    _write(path.with_suffix(".json"), lambda temporary: temporary.write_text(text + "\n"))
    return card


def _write_function(
    path: pathlib.Path,
    run: Run,
    card: Card,
    tensors: dict[str, np.ndarray],
    batch: BatchSize,
    output: Output,
    quantise: Quantise,
    quantisation: QuantisationConfig,
    data_dir: str | None,
) -> Card:
    file_format, config = FORMATS[path.suffix], run.config
    if data_dir is not None:
        data_config = dataclasses.replace(config.data, data_dir=data_dir)
        config = dataclasses.replace(config, data=data_config)
    refuse_code_of_run(run.stored, run.workdir.path, IMAGES)
    examples = examples_of(config, run.student)
    student, calibration = run.student, None
    calibration_pixels = (
        images_of(config, run.student, "train").pixels if quantise == "int8" else None
    )
    if calibration_pixels is not None and file_format.quantise is None:
        log("measuring the quantisation error of each layer")
        calibration = calibrated(student, calibration_pixels, quantisation)
        student = calibration.student
    function = function_of(student, output)
    if quantise == "none" or file_format.quantise is None:
        serialised = file_format.convert(function, card.resolution, batch, card.model)
    else:
        serialised = file_format.quantise(
            function, card.resolution, batch, card.model, quantise, calibration_pixels
        )
    with runs(f"the runtime of {path.suffix}"):
        runtime = file_format.load(serialised, None)
    if student is not run.student:  # what the file is to compute, to within a step of the outputs
        compare(runtime, file_format.name, student, output, batch, examples)
    kind = file_format.name if quantise == "none" else f"{file_format.name} {quantise}"
    parity = compare(runtime, kind, run.student, output, batch, examples)
    facts = FunctionFacts(
        format=file_format.name,
        batch=batch,
        output=output,
        parity=parity,
        bytes=len(serialised),
        float32_bytes=sum(x.nbytes for x in tensors.values()),
        quantise=quantise,
        layer_errors=calibration.errors if calibration else None,
        layer_effects=calibration.effects if calibration else None,
        mixed_precision=calibration.mixed_precision if calibration else None,
        quantisation=quantisation if calibration else None,
        operations=runtime.operations,
    )
    card = dataclasses.replace(card, function=facts)
    _write(path, lambda temporary: file_format.write(temporary, serialised, card_to_json(card)))
    return card


def _write(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Writes a file completely or not at all."""
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(b"")
            mode = temporary.stat().st_mode  # of any new file; safetensors' own are the owner's
            write(temporary)
            temporary.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def _for_timm(card: Card) -> dict[str, str]:
    """The metadata that timm's own files have."""
    metadata = {
        "num_classes": str(card.classes),
        "mean": json.dumps(card.mean),
        "std": json.dumps(card.std),
        "format": "pt",
    }
    # timm knows the published widths alone.
    architecture = None if card.network.block_widths else model_of(card.model).timm
    return metadata | ({"architecture": architecture} if architecture else {})
