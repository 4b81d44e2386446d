"""Whole copies of a run in a place that outlives the machine: a mounted drive, or a bucket.

A copy is a folder `copy-000001` with the mark `whole`, which is written last: neither a drive nor
a bucket renames a folder in one go, and a copy without its mark is no copy. The one before is
deleted when the new one has its mark.
"""

import os
import pathlib
import re
from typing import Any

from fm_distill.errors import UserError
from fm_distill.runs.remote import names_in

MARK = "whole"
COPY = re.compile(r"copy-(\d{6})")
# Of the process that trains here, not of the run.
LEFT_OUT = ("lock",)


def keep_copy(run: str | os.PathLike[str], place: str) -> str:
    """Copies the workdir `run`, which nobody is writing, to `place`; returns the copy's place.

    `place` is a folder, or a URL that fsspec knows. Raises `UserError`.
    """
    run = pathlib.Path(run)
    if not run.is_dir():
        raise UserError(f"there is no run in {run} to copy")
    filesystem, root = _open(place)
    try:
        existing_copies = _folders(filesystem, root)  # intact or not: what is not was given up
        number = max(existing_copies, default=0) + 1
        copy = f"{root}/copy-{number:06d}"
        for path in sorted(file for file in run.rglob("*") if file.is_file()):
            name = path.relative_to(run).as_posix()
            if path.name not in LEFT_OUT:
                target = f"{copy}/{name}"
                filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
                filesystem.put_file(str(path), target)
        filesystem.pipe_file(f"{copy}/{MARK}", b"")
        for older in existing_copies:
            filesystem.rm(f"{root}/copy-{older:06d}", recursive=True)
        return str(filesystem.unstrip_protocol(copy))
    except OSError as error:
        raise UserError(f"{run} cannot be copied to {place}: {error}") from None


def keep_file(path: str | os.PathLike[str], place: str) -> str:
    """Copies a file to the folder `place`; returns where it is. Raises `UserError`."""
    filesystem, root = _open(place)
    target = f"{root}/{pathlib.Path(path).name}"
    try:
        filesystem.makedirs(root, exist_ok=True)
        filesystem.put_file(str(path), target)
        return str(filesystem.unstrip_protocol(target))
    except OSError as error:
        raise UserError(f"{path} cannot be copied to {place}: {error}") from None


def fetch_copy(place: str, folder: str | os.PathLike[str]) -> pathlib.Path | None:
    """Copies the newest complete copy in `place` to `folder`; None where there is none.

    `folder` is for `--resume-from`, which checks each checkpoint. Raises `UserError`.
    """
    filesystem, root = _open(place)
    folder = pathlib.Path(folder)
    try:
        complete_copies = _copies(filesystem, root)
        if not complete_copies:
            return None
        copy = f"{root}/copy-{max(complete_copies):06d}"
        for path in filesystem.find(copy):
            name = str(path)[len(copy) :].lstrip("/")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(path, str(target))
    except OSError as error:
        raise UserError(f"the copy in {place} cannot be read: {error}") from None
    return folder


def _open(place: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise UserError("copies are made with fsspec: pip install fsspec") from None
    try:
        filesystem, root = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise UserError(f"{place} cannot be opened: {error}") from None
    return filesystem, root.rstrip("/")


def _folders(files: Any, root: str) -> list[int]:
    """Numbers of all copies, intact or not."""
    # What a bucket listed before may be older than what was written since.
    files.invalidate_cache()
    return [int(match[1]) for name in names_in(files, root) if (match := COPY.fullmatch(name))]


def _copies(files: Any, root: str) -> list[int]:
    """Numbers of the whole ones."""
    return [
        number
        for number in _folders(files, root)
        if files.exists(f"{root}/copy-{number:06d}/{MARK}")
    ]
