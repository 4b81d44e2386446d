"""A Hugging Face repository: its `model.safetensors` and `config.json`, kept by the hub's cache.

The only file that imports `huggingface_hub`, which is optional.
"""

import hashlib
import pathlib
import re

from fm_distill.errors import UserError

PREFIX = "hf://"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def fetch(address: str) -> pathlib.Path:
    """The weight file of `hf://OWNER/REPO[@revision]`, with its `config.json` beside it.

    Raises `UserError` where the package, the network or the repository is missing, and where the
    file is not the one whose SHA-256 the hub gave for it.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", address)
    if not match:
        raise UserError(f"{address} is not an address of the hub; expected hf://OWNER/REPO")
    repository, revision = match.groups()
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(
            f"{address} needs the package huggingface_hub: pip install -e '.[hub]', or download "
            f"{WEIGHTS_FILE} and {CONFIG_FILE} in another way and give their folder"
        ) from None
    try:
        hf_hub_download(repository, CONFIG_FILE, revision=revision)
        path = pathlib.Path(hf_hub_download(repository, WEIGHTS_FILE, revision=revision))
    # All errors of the hub are one of these two: no network, no such repository, a wrong name.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{address} cannot be downloaded ({type(error).__name__}: {reason}); check the name "
            f"and the network, or download its {WEIGHTS_FILE} and {CONFIG_FILE} elsewhere and "
            "give the folder that holds both"
        ) from None
    _verify(path)
    return path


def _verify(path: pathlib.Path) -> None:
    """Where the cache names a large file by its SHA-256, as it does with symbolic links."""
    expected = path.resolve().name
    if not re.fullmatch(r"[0-9a-f]{64}", expected):
        return
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise UserError(
            f"{path.resolve()} is damaged: its SHA-256 is {actual}, the hub says {expected}; "
            "delete it and run again"
        )
