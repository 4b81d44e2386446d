"""The command `fm-distill export`."""

import dataclasses
from typing import TYPE_CHECKING, Literal

import tyro

from fm_distill.cli.command import first
from fm_distill.errors import EXIT_COMPLETE
from fm_distill.preparation.parse_options import parse

if TYPE_CHECKING:
    from fm_distill.weights.card import Card


# Layers whose errors are printed; the card has all.
WORST = 5


@dataclasses.dataclass(frozen=True)
class _Export:
    """The student as a weight file or as a whole function, with a card."""

    out: tyro.conf.Positional[str]
    """The file to write; the card of a .safetensors comes beside it as .json, too."""
    step: int | None = None
    """The checkpoint of this step; None: the newest."""
    batch: int | Literal["dynamic"] = 1
    """Images that a function takes at once; dynamic: any number."""
    output: Literal["probabilities", "logits"] = "probabilities"
    """What a function returns."""
    quantise: Literal["none", "float16", "dynamic", "int8"] = "none"
    (
        "For .tflite: float16 weights, int8 weights (dynamic), or int8 weights and activations; "
        "int8 also for .onnx."
    )
    float_layers: tuple[str, ...] = ()
    """With int8 and .onnx: paths of layers that stay in floats (mixed precision)."""
    range_percentile: float = 100.0
    (
        "With int8 and .onnx: where the ranges of activations end, as a percentile of what the "
        "images show."
    )
    data_dir: str | None = None
    """Where to find the data on which a function is compared with its run, if they have moved."""
    overwrite: bool = False
    """Replace what is there."""


def export_command(arguments: list[str]) -> int:
    from fm_distill.exporting.export import export

    workdir, remaining = first(arguments, "export DIR OUT")
    options = parse(_Export, None, remaining, f"export {workdir}")
    card = export(
        workdir,
        options.out,
        options.overwrite,
        options.step,
        batch=options.batch,
        output=options.output,
        quantise=options.quantise,
        float_layers=options.float_layers,
        range_percentile=options.range_percentile,
        data_dir=options.data_dir,
    )
    print("\n".join(_lines(options.out, card)))
    return EXIT_COMPLETE


def _lines(out: str, card: "Card") -> list[str]:
    subject = "the moving average (EMA) of the student" if card.averaged else "the student"
    headline = f"{out}: {subject} after {card.step:,} steps, {card.model}, {card.classes} classes"
    if card.function is None:
        return [f"{headline}, tensors named as in {card.naming}"]
    function, parity, resolution = card.function, card.function.parity, card.resolution
    lines = [
        headline,
        f"uint8 ({function.batch}, {resolution}, {resolution}, 3) to {function.output}",
        f"{parity.runtime}, on {parity.images:,} images of the {parity.split} split: largest "
        f"difference {parity.largest_difference:.2g} ({parity.bound:.2g} allowed), same top-1 "
        f"class for {100 * parity.agreement:.2f} %",
    ]
    if parity.within_bound < 1:
        lines.append(f"{100 * parity.within_bound:.2f} % of the values are within the tolerance")
    if parity.relative_error is not None and parity.relative_bound is not None:
        lines.append(
            f"root mean square difference {parity.relative_error:.2g} of the spread of the run's "
            f"outputs ({parity.relative_bound:g} allowed)"
        )
    if function.bytes and function.float32_bytes:
        size_ratio = (
            f"{function.bytes / function.float32_bytes:.2f} of the size of its float32 weights"
        )
        lines.append(f"{function.bytes:,} bytes without its card, {size_ratio}")
    if function.layer_errors:
        lines.append("layers with the largest errors, relative to their outputs:")
        lines += _worst(function.layer_errors)
    if function.layer_effects:
        lines.append(
            "layers whose quantisation alone changes the logits most, relative to the logits' "
            "spread:"
        )
        lines += _worst(function.layer_effects)
    if mixed_precision := function.mixed_precision:
        lines.append(
            f"error of the logits with all layers quantised: {100 * mixed_precision.error:.1f} %; "
            f"{100 * mixed_precision.error_with_them:.1f} % with --float-layers "
            f"{' '.join(mixed_precision.float_layers)}"
        )
    if function.operations is not None:
        lines.append(_parts(function.quantise, function.operations))
    if parity.file_top1 is not None and parity.run_top1 is not None:
        run_accuracy = f"of the run {100 * parity.run_top1:.2f} %"
        lines.append(f"top-1 of the file {100 * parity.file_top1:.2f} %, {run_accuracy}")
    return lines


def _worst(by_layer: dict[str, float]) -> list[str]:
    largest = sorted(by_layer.items(), key=lambda item: -item[1])[:WORST]
    return [f"  {100 * error:5.1f} %  {layer}" for layer, error in largest]


def _parts(quantise: str, operations: dict[str, int]) -> str:
    count = operations.get("DELEGATE", 0)
    line = f"XNNPACK runs it in {count} partition{'' if count == 1 else 's'}"
    if quantise == "int8" and (swishes := operations.get("HARD_SWISH", 0)):
        line += (
            f", split by {swishes} HARD_SWISH, which it lacks in int8: students with relu6 stay "
            "in one"
        )
    return line
