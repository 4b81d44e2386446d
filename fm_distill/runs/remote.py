"""A run in a bucket, brought to a folder here; only this and `backup.py` know fsspec."""

import contextlib
import fnmatch
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from fm_distill.errors import UserError
from fm_distill.recordings.manifest import MANIFESTS
from fm_distill.system.console import log


def is_remote(place: str) -> bool:
    """Whether `place` is a URL, e.g. `gs://bucket/runs/digits`, and not a path."""
    return "://" in place


@contextlib.contextmanager
def opened(url: str) -> Iterator[tuple[Any, str]]:
    """Its file system and the path there. Raises `UserError` for any error with it."""
    try:
        import fsspec

        system, root = fsspec.core.url_to_fs(url)
        if not system.isdir(root):
            raise UserError(f"there is no folder {url}, or this account may not read it")
        yield system, root
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{url} cannot be read: {error}; for gs:// install the extra with "
            "`pip install 'fm-distill[bucket]'`, for others their fsspec package"
        ) from None
    except Exception as error:  # each kind of bucket has exceptions of its own
        raise UserError(f"{url} cannot be read: {type(error).__name__}: {error}") from error


def names_in(system: Any, folder: str) -> list[str]:
    """What lies in a folder of a file system, by name; empty where there is no folder."""
    paths = system.ls(folder, detail=False) if system.isdir(folder) else []
    return [str(path).rstrip("/").rpartition("/")[2] for path in paths]


def progress_in(url: str) -> tuple[int, int]:
    """Steps of the run's newest checkpoint, intact or not, and of its teachers' together."""
    with opened(url) as (system, root):

        def newest(run: str) -> int:
            names = names_in(system, f"{run}/checkpoints")
            return max((int(name) for name in names if name.isdigit()), default=0)

        teachers = [name for name in names_in(system, root) if name.startswith("teacher")]
        return newest(root), sum(newest(f"{root}/{name}") for name in teachers)


def recording_in(workdir: pathlib.Path) -> pathlib.Path:
    """Where a run keeps its copy of a recording that lies at a URL."""
    return workdir / "recording"


def fetch_recording(url: str, workdir: pathlib.Path, check: Callable[[pathlib.Path], None]) -> None:
    """Copies the recording at `url` into `workdir`, all of it or nothing.

    First its manifests alone, in a folder that `check` gets: it raises where the recording is of
    no use. A copy that has the same manifests already stays.
    """
    destination, incoming = recording_in(workdir), workdir / "recording.arriving"
    try:
        _get_manifests(url, incoming)
        check(incoming)
        if _manifests(destination) != _manifests(incoming):
            _get(url, incoming)
            shutil.rmtree(destination, ignore_errors=True)
            incoming.replace(destination)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _manifests(folder: pathlib.Path) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in folder.glob(MANIFESTS)}


def _get_manifests(url: str, place: pathlib.Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    with opened(url) as (system, root):
        manifests = [x for x in names_in(system, root) if fnmatch.fnmatch(x, MANIFESTS)]
        if not manifests:
            raise UserError(f"{url} is not a recording: it has no {MANIFESTS}")
        place.mkdir(parents=True)
        for name in manifests:
            system.get_file(f"{root.rstrip('/')}/{name}", str(place / name))


def _get(url: str, place: pathlib.Path) -> None:
    """Copies a folder; what was at `place` is gone."""
    shutil.rmtree(place, ignore_errors=True)
    with opened(url) as (system, root):
        log(f"fetching {url} ({system.du(root) / 1e6:,.1f} MB)")
        place.parent.mkdir(parents=True, exist_ok=True)
        system.get(root.rstrip("/") + "/", f"{place}/", recursive=True)


@contextlib.contextmanager
def fetched(url: str, beside: pathlib.Path) -> Iterator[pathlib.Path]:
    """A copy of the folder, beside that of the run, for as long as it is needed."""
    target = beside.with_name(beside.name + ".fetched")
    try:
        _get(url, target)
        yield target
    finally:
        shutil.rmtree(target, ignore_errors=True)
