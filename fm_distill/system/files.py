"""Files that are written completely or not at all, damaged archives, and locks."""

import contextlib
import fcntl
import lzma
import pathlib
import re
import time
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

from fm_distill.errors import UserError

# What reading a damaged zip archive raises beside OSError. A bit in it says that a member is
# encrypted (RuntimeError) or stored in a way that is not known (NotImplementedError, one of them).
DAMAGED_ARCHIVE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    RuntimeError,
    ValueError,
    KeyError,
    EOFError,
)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A name beside `path` to write to; what was written takes the place of `path` at the end.

    Where the writing raises, `path` stays as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def refuse_foreign(folder: pathlib.Path, own: re.Pattern[str], what: str, option: str) -> None:
    """Raises `UserError` where `folder`, to become `what`, holds files that are not `own`."""
    foreign = sorted(x.name for x in folder.iterdir() if not own.fullmatch(x.name))
    if foreign:
        raise UserError(
            f"{folder} is not empty and not {what} (it has {', '.join(foreign[:3])}); choose "
            f"another {option}"
        )


def lock(handle: IO[str]) -> bool:
    """Tries for a second, since a check of the lock (`in_use`) holds it for a moment."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.1)
    return False
