"""Which checkpoints lie in a folder and whether each is intact: SHA-256 of every file.

Orbax loads a flipped byte without a word. Here a checkpoint is a folder named by its step, and
`digests.json` in it lists its files; both become visible with one rename.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

DIGESTS = "digests.json"


@dataclasses.dataclass(frozen=True)
class NewestCheckpoint:
    """The newest intact checkpoint of a folder, and the newer ones that are not."""

    step: int  # 0 where there is none at all
    metadata: dict[str, Any]  # written with it
    damaged: dict[int, tuple[str, ...]]  # step -> what is wrong


def steps_in(directory: pathlib.Path) -> list[int]:
    """Steps of the checkpoints in `directory`, intact or not, newest first."""
    if not directory.is_dir():
        return []
    return sorted((int(x.name) for x in directory.iterdir() if x.name.isdigit()), reverse=True)


def newest_step(directory: pathlib.Path) -> int:
    """Step of the newest checkpoint, intact or not; 0 where there is none."""
    return next(iter(steps_in(directory)), 0)


def newest_valid(directory: pathlib.Path) -> NewestCheckpoint:
    """Checks from the newest on; reads every byte of what it checks."""
    damaged: dict[int, tuple[str, ...]] = {}
    for step in steps_in(directory):
        if errors := integrity_errors(directory / str(step)):
            damaged[step] = errors
        else:
            return NewestCheckpoint(step, read_metadata(directory / str(step)), damaged)
    return NewestCheckpoint(0, {}, damaged)


def write_manifest(checkpoint: pathlib.Path, metadata: dict[str, Any]) -> None:
    """Writes `digests.json` with metadata beside the digests; all of it is on disk afterwards."""
    files = sorted(x for x in checkpoint.rglob("*") if x.is_file() and x.name != DIGESTS)
    for path in files:
        sync(path)
    entries = {
        path.relative_to(checkpoint).as_posix(): [path.stat().st_size, digest]
        for path, digest in zip(files, _digests(files), strict=True)
    }
    contents = {"about": metadata, "files": entries}
    text = json.dumps(contents | {"sha256": _of_contents(contents)}, indent=1)
    (checkpoint / DIGESTS).write_text(text)
    for path in (checkpoint / DIGESTS, checkpoint):
        sync(path)


def read_metadata(checkpoint: pathlib.Path) -> dict[str, Any]:
    """The metadata of an intact checkpoint."""
    return json.loads((checkpoint / DIGESTS).read_text())["about"]


def integrity_errors(checkpoint: pathlib.Path) -> tuple[str, ...]:
    """What is wrong with a checkpoint, a line a file; empty where it is intact."""
    try:
        contents = json.loads((checkpoint / DIGESTS).read_bytes())
        stored_digest = contents.pop("sha256")
        entries = {str(name): (int(x[0]), str(x[1])) for name, x in contents["files"].items()}
    except FileNotFoundError:
        return (f"{DIGESTS} is missing",)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        return (f"{DIGESTS} cannot be read ({type(error).__name__})",)
    if stored_digest != _of_contents(contents):
        return (f"{DIGESTS} does not have the SHA-256 that it records",)
    errors: dict[str, str] = {}
    for name, (size, _) in entries.items():
        path = checkpoint / name
        if not path.is_file():
            errors[name] = "is missing"
        elif path.stat().st_size != size:
            errors[name] = f"has {path.stat().st_size:,} bytes of {size:,}"
    remaining = [name for name in entries if name not in errors]
    try:
        digests = _digests([checkpoint / name for name in remaining])
    except OSError as error:
        return (f"cannot be read: {error}",)
    for name, digest in zip(remaining, digests, strict=True):
        if digest != entries[name][1]:
            errors[name] = "has another SHA-256"
    return tuple(f"{name} {problem}" for name, problem in errors.items())


def _digests(paths: list[pathlib.Path]) -> list[str]:
    def digest(path: pathlib.Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:  # hashing frees the GIL
        return list(pool.map(digest, paths))


def _of_contents(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def sync(path: pathlib.Path) -> None:
    """Hands a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
