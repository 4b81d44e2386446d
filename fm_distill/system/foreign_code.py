"""Code that a run, an export or a recording names: whether it may be run here.

Opening what someone else wrote must not run their code unnoticed. So code runs where it
lies in the very place in which the run found it, outside of the run, and with the same contents;
anywhere else its user has to agree, by `--trust-code` or in `trusted_code`. Nothing is imported
to find this out. A config that the user wrote needs no consent.
"""

import contextlib
import contextvars
import functools
import hashlib
import importlib.machinery
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping

from fm_distill.config.resolved import CodeFile
from fm_distill.errors import UserError
from fm_distill.system.console import log

FLAG = "--trust-code"
_trusted = contextvars.ContextVar("trusted", default=False)


@contextlib.contextmanager
def trusted_code(trusted: bool = True) -> Iterator[None]:
    """Within this, code that runs, exports and recordings name is run wherever it lies.

    What was changed since is refused all the same.
    """
    token = _trusted.set(trusted)
    try:
        yield
    finally:
        _trusted.reset(token)


def is_trusted() -> bool:
    """Whether this is within `trusted_code`."""
    return _trusted.get()


def file_of(reference: str) -> pathlib.Path | None:
    """The file that `FILE.py:NAME` or `package.module:name` would run; None where there is none.

    No part of a package is imported.
    """
    location = reference.rpartition(":")[0]
    if location.endswith(".py"):
        path = pathlib.Path(location)
        return path.resolve() if path.is_file() else None
    spec, search_paths, name = None, None, ""
    for part in location.split("."):
        name = f"{name}.{part}" if name else part
        spec = _spec(name, search_paths)
        if spec is None:
            return None
        search_paths = spec.submodule_search_locations
    if spec is None or spec.origin is None or not pathlib.Path(spec.origin).is_file():
        return None
    return pathlib.Path(spec.origin).resolve()


def code_files(references: Iterable[str]) -> dict[str, CodeFile]:
    """Of each reference the file and its contents, where it is here."""
    files = {x: file_of(x) for x in references}
    return {x: CodeFile(str(file), _sha256(file)) for x, file in files.items() if file}


def refuse_foreign_code(
    references: Iterable[str],
    known: Mapping[str, CodeFile],
    whose: str,
    folder: pathlib.Path | None = None,
) -> None:
    """Raises `UserError` where one of `references` may not be run; logs which files will be.

    `known` is where `whose` found them, `folder` what may have come with code inside. A file that
    is not there is refused where it is loaded.
    """
    for reference in references:
        file = file_of(reference)
        if file is None:
            if reference.rpartition(":")[0].endswith(".py"):
                continue
            raise UserError(
                f"{whose} refers to custom code, {reference}, which cannot be run here: its "
                "module was not found; install it"
            )
        recorded = known.get(reference)
        if recorded is not None and (sha256 := _sha256(file)) != recorded.sha256:
            raise UserError(
                f"{whose} refers to custom code, {reference}, and that file was changed: its "
                f"SHA-256 was {recorded.sha256} and is {sha256} ({file}); restore the old one"
            )
        reason = _why_foreign(file, recorded, folder)
        if reason and not is_trusted():
            raise UserError(
                f"{whose} refers to custom code, {reference}, and would run {file}, {reason}: read "
                f"that file, and add {FLAG} to run it"
            )
        _say(f"{whose} runs custom code: {file}")


def _why_foreign(
    file: pathlib.Path, found: CodeFile | None, folder: pathlib.Path | None
) -> str | None:
    """Why the file needs the user's consent; None where it does not."""
    if folder is not None and file.is_relative_to(folder.resolve()):
        return f"which came with it in {folder}"
    if found is None:
        return "whose path and contents it did not record"
    if str(file) != found.path:
        return f"where it found {found.path}"
    return None


def _spec(name: str, where: Iterable[str] | None) -> importlib.machinery.ModuleSpec | None:
    """As an import would find the module, without an import of the packages around it."""
    path = None if where is None else list(where)
    specs = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((x for x in specs if x is not None), None)


def _sha256(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@functools.cache  # once in a process
def _say(line: str) -> None:
    log(line)
