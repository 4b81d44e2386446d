"""A trained student as one file for others: tensors under timm's or Keras's names, and a card.

Where the run keeps an average of the student, that is exported. timm loads the file of a network
that it has; ours is loaded back by `weights.load` in every bit, with nothing else said.
"""

import json
import os
import pathlib
from collections.abc import Callable

from safetensors import SafetensorError
from safetensors.numpy import save_file

from fm_distill.errors import UserError
from fm_distill.models import model_of
from fm_distill.runs.open_run import open_run
from fm_distill.system.files import replacing
from fm_distill.views.rendering import INPUT_RANGES
from fm_distill.weights.card import CARD_KEY, Card, card_to_json, digest
from fm_distill.weights.names import in_naming, naming_of


def export(
    workdir: str | os.PathLike[str],
    path: str | os.PathLike[str],
    overwrite: bool = False,
    step: int | None = None,
) -> Card:
    """Writes the student of the run in `workdir` to `path`, and its card beside it as JSON.

    Both are written completely or not at all, the card last. Raises `UserError`, also where
    either is there already, unless `overwrite`.
    """
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no name for an export; expected one like student.safetensors")
    beside = path.with_suffix(".json")
    there = [str(x) for x in (path, beside) if x.exists()]
    if there and not overwrite:
        raise UserError(f"{' and '.join(there)} exists already; use another name, or --overwrite")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write {path.name} to; make it first")
    run = open_run(workdir, step)
    network, stored = run.network, run.workdir.read("config.json")
    naming = naming_of(network)
    tensors = in_naming(naming, network, run.student.variables)
    mean, std = INPUT_RANGES[network.input_range]
    card = Card(
        model=network.model,
        network=network,
        classes=run.classes,
        class_names=run.resolved.class_names,
        mean=tuple(x / 255 for x in mean),
        std=tuple(x / 255 for x in std),
        resolution=network.resolution,
        central_fraction=run.config.views.central_fraction,
        precision=run.resolved.precision,
        step=run.step,
        averaged=run.averaged,
        metrics=run.workdir.read_evaluation() if run.complete else None,
        config=stored["config"],
        versions=stored["versions"],
        commit=stored["commit"],
        naming=naming,
        sha256=digest(tensors),
    )
    text = card_to_json(card)
    metadata = {CARD_KEY: text, **_for_timm(card)}
    _write(path, lambda temporary: save_file(tensors, temporary, metadata))
    _write(beside, lambda temporary: temporary.write_text(text + "\n"))
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
        raise UserError(f"{path} cannot be written: {error}") from None


def _for_timm(card: Card) -> dict[str, str]:
    """What timm's own files say in their metadata."""
    said = {
        "num_classes": str(card.classes),
        "mean": json.dumps(card.mean),
        "std": json.dumps(card.std),
        "format": "pt",
    }
    architecture = model_of(card.model).timm
    return said | ({"architecture": architecture} if architecture else {})
