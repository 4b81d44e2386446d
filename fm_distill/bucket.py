"""A run in a bucket, brought to a folder of this machine: with `keep.py` all that knows fsspec."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from fm_distill.errors import UserError
from fm_distill.stopping import say


def in_bucket(place: str) -> bool:
    """Whether `place` is a URL, e.g. `gs://bucket/runs/digits`, and not a path."""
    return "://" in place


@contextlib.contextmanager
def opened(url: str) -> Iterator[tuple[Any, str]]:
    """Its file system and the path there. Raises `UserError` for whatever goes wrong with it."""
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


def newest_step_in(url: str) -> int:
    """The newest of the run's checkpoints, whole or not; 0 where there is none."""
    with opened(url) as (system, root):
        folder = f"{root}/checkpoints"
        if not system.isdir(folder):
            return 0
        names = (str(path).rstrip("/").rpartition("/")[2] for path in system.ls(folder, False))
        return max((int(name) for name in names if name.isdigit()), default=0)


@contextlib.contextmanager
def fetched(url: str, beside: pathlib.Path) -> Iterator[pathlib.Path]:
    """A copy of the folder, beside that of the run, for as long as it is needed."""
    place = beside.with_name(beside.name + ".fetched")
    shutil.rmtree(place, ignore_errors=True)
    try:
        with opened(url) as (system, root):
            say(f"fetching {url} ({system.du(root) / 1e6:,.1f} MB)")
            place.parent.mkdir(parents=True, exist_ok=True)
            system.get(root.rstrip("/") + "/", f"{place}/", recursive=True)
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
