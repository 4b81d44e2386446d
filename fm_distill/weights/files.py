"""Weight files read: what kind a file is, by its content; its tensors; its own description.

Nothing that can run code is ever loaded: pickles in any form are refused. Damage is found where
the format lets it be found: an `.npz` has a checksum a tensor, our exports have one in the card,
files of the hub one in the cache. Of another safetensors file only a damaged header, tensors of a
wrong shape and values that are not finite can be found.
"""

import dataclasses
import json
import pathlib
import re
import zipfile
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from fm_distill.errors import UserError
from fm_distill.system.files import DAMAGED_ARCHIVE
from fm_distill.weights.card import CARD_KEY, Card, card_from_json, digest
from fm_distill.weights.hub import CONFIG_FILE, PREFIX, WEIGHTS_FILE, fetch
from fm_distill.weights.saved_model import read_saved_model

EXPECTED = (
    "expected a BiT .npz, a .safetensors with timm's or Keras's names, a TensorFlow SavedModel of "
    "BiT, hf://OWNER/REPO or the workdir of a run"
)
PICKLE = (
    "is a pickle, and a pickle can run any code when it is loaded, so it is never loaded here. "
    "Convert it once, with PyTorch:\n"
    "  tensors = torch.load({path!r}, weights_only=True)\n"
    "  safetensors.torch.save_file(tensors, 'weights.safetensors')\n"
    "For a model of timm: hf://timm/NAME, or save_file(model.state_dict(), 'weights.safetensors')"
)
# First bytes of files that are often given by mistake, and what to do with them.
KNOWN_OTHERS = (
    (b"\x89HDF", "is an HDF5 file. Convert it once, with Keras:\n  numpy.savez('weights.npz', "
     "**{v.path: v.numpy() for v in model.variables})\n"),
    (b"\x93NUMPY", "is one array, not an .npz of named arrays; "),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file: run `git lfs pull`; "),
    (b"<", "is a web page, not weights: the download failed; "),
)  # fmt: skip

Kind = Literal["npz", "safetensors", "saved_model"]


@dataclasses.dataclass(frozen=True)
class Facts:
    """A weight file's description of itself, where it has one."""

    # Of one of our exports.
    card: Card | None = None
    # timm's name of the network.
    architecture: str | None = None
    resolution: int | None = None
    # Of the input, on the scale where a pixel is 0 to 1.
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """Tensors by their names in the file, as float32; bookkeeping is left out."""

    path: str
    kind: Kind
    tensors: dict[str, np.ndarray]
    facts: Facts


def read(address: str) -> WeightFile:
    """The weight file at a path or `hf://OWNER/REPO`. Raises `UserError`."""
    path = fetch(address) if address.startswith(PREFIX) else pathlib.Path(address)
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return WeightFile(address, "saved_model", read_saved_model(path), Facts())
        if not (path / WEIGHTS_FILE).is_file():
            raise UserError(
                f"{path} is a folder without weights (saved_model.pb, {WEIGHTS_FILE}); {EXPECTED}"
            )
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"there is no weight file {path}; {EXPECTED}")
    try:
        with path.open("rb") as file:
            header = file.read(64)
    except OSError as error:
        raise UserError(f"the weight file {path} cannot be read: {error}") from None
    if header.startswith(b"PK"):
        return WeightFile(address, "npz", _floats(_read_npz(path)), Facts())
    if header[8:9] == b"{":
        tensors, metadata = _read_safetensors(path)
        facts = _facts(path, metadata)
        if facts.card and (sha256 := digest(tensors)) != facts.card.sha256:
            raise UserError(
                f"{path} is damaged or was changed: its tensors have SHA-256 {sha256}, its card "
                f"says {facts.card.sha256}; copy or export it again"
            )
        return WeightFile(address, "safetensors", _floats(tensors), facts)
    if header.startswith(b"\x80"):
        raise UserError(f"{path} {PICKLE.format(path=str(path))}")
    for magic, advice in KNOWN_OTHERS:
        if header.startswith(magic):
            raise UserError(f"{path} {advice}{EXPECTED}")
    raise UserError(f"{path} has an unknown format, or is damaged; {EXPECTED}")


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
        if any(member.endswith("data.pkl") for member in members):
            raise UserError(f"{path} {PICKLE.format(path=str(path))}")
        if not all(member.endswith(".npy") for member in members):
            raise UserError(f"{path} is a zip archive, but not of arrays; {EXPECTED}")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, *DAMAGED_ARCHIVE) as error:
        if "pickle" in str(error):
            raise UserError(
                f"{path} holds pickled objects; a pickle can run any code when it is loaded, so "
                "it is never loaded here: save it again with plain arrays only"
            ) from None
        raise UserError(
            f"{path} is not a complete .npz file ({error}): copy or download it again"
        ) from None


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not a complete .safetensors file ({error}): copy or download it again"
        ) from None


def _floats(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Any precision as float32; without PyTorch's counters. Other types are judged later."""

    def widened(tensor: np.ndarray) -> np.ndarray:
        other_floats = ("float16", "bfloat16", "float64")
        return tensor.astype(np.float32) if tensor.dtype.name in other_floats else tensor

    return {
        name: widened(tensor)
        for name, tensor in tensors.items()
        if not name.endswith("num_batches_tracked")
    }


def _facts(path: pathlib.Path, metadata: dict[str, str]) -> Facts:
    """From the file's own metadata, else from timm's `config.json` beside a `model.safetensors`."""
    if CARD_KEY in metadata:
        card = card_from_json(metadata[CARD_KEY], str(path))
        return Facts(card, None, card.resolution, card.mean, card.std)
    fields: dict[str, Any] = {}
    config_path = path.with_name(CONFIG_FILE)
    if path.name == WEIGHTS_FILE and config_path.is_file():
        try:
            config = json.loads(config_path.read_text())
            fields = (
                config | config.get("pretrained_cfg", {}) | {"architecture": config["architecture"]}
            )
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            fields = {}  # of something else than timm
    fields |= metadata
    size = fields.get("input_size")
    resolution = size[-1] if isinstance(size, list) and size and size[-1] == size[-2] else None
    architecture = fields.get("architecture")
    return Facts(
        architecture=architecture.split(".")[0] if isinstance(architecture, str) else None,
        resolution=resolution,
        mean=_numbers(path, "mean", fields.get("mean")),
        std=_numbers(path, "std", fields.get("std")),
    )


def _numbers(path: pathlib.Path, name: str, value: Any) -> tuple[float, ...] | None:
    """Three numbers from one, a list, or the text of either."""
    if value is None:
        return None
    parts = re.split(r"[\s,]+", value.strip("[]() ")) if isinstance(value, str) else value
    try:
        numbers = tuple(float(x) for x in (parts if isinstance(parts, list) else [parts]))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) == 1:
        return numbers * 3
    if len(numbers) != 3:
        raise UserError(f"{path}: its {name} is {value!r}; expected one number or three")
    return numbers
