"""`config.json` of a workdir: the config of a run, what it resolved to, and where it comes from."""

import dataclasses
import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

import jax
import msgspec

from fm_distill.config import Config
from fm_distill.config.resolved import ResolvedRun
from fm_distill.config.serialization import before_options, converted
from fm_distill.errors import UserError

LIBRARIES = ("fm-distill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredRun:
    """The contents of `config.json`."""

    config: Config
    resolved: ResolvedRun
    versions: dict[str, str | None]
    devices: tuple[str, ...]
    commit: str | None
    # Ends of schedules that were lengthened: those students are kept.
    lengthened_after: tuple[int, ...] = ()


def describe_run(config: Config, resolved: ResolvedRun, lengthened_after: tuple[int, ...]) -> Any:
    """`StoredRun` as JSON, with the versions, devices and commit of this process."""
    return msgspec.to_builtins(
        StoredRun(
            config=config,
            resolved=resolved,
            versions=versions(),
            devices=tuple(f"{device.platform}:{device.device_kind}" for device in jax.devices()),
            commit=_commit(),
            lengthened_after=lengthened_after,
        )
    )


def versions() -> dict[str, str | None]:
    """Of the libraries that the numbers of a run depend on."""
    return {name: _version(name) for name in LIBRARIES} | {"python": platform.python_version()}


def stored_run(tree: Any, path: pathlib.Path) -> StoredRun:
    """The inverse of `describe_run`, for the JSON in `path`. Raises `UserError`."""
    if not isinstance(tree, dict) or "config" not in tree:
        raise UserError(f"{path} is not the config of a run")
    if "resolved" not in tree:
        raise UserError(
            f"{path} was written by an older version of fm-distill (commit {tree.get('commit')}), "
            "whose runs this version cannot read: use that version, or train again in another "
            "workdir"
        )
    if any(before_options(x) for x in _networks(tree["resolved"])):
        raise UserError(
            f"{path} was written by an older version of fm-distill (commit {tree.get('commit')}), "
            "which stored the settings of a BiT elsewhere: use that version, or train again in "
            "another workdir"
        )
    try:
        stored = converted(tree, StoredRun)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is not the config of a run of this version: {error}") from None
    classes, names = stored.resolved.classes, stored.resolved.class_names
    if classes < 1 or (names is not None and len(names) != classes):
        names_text = "no names" if names is None else f"{len(names)} names of classes"
        raise UserError(f"{path} is damaged: it has {classes} classes and {names_text}")
    return stored


def _networks(resolved: Any) -> list[Any]:
    """Of the JSON of a resolved run, as far as it has any."""
    if not isinstance(resolved, dict):
        return []
    teachers = resolved.get("teachers")
    return [resolved.get("student"), *(teachers if isinstance(teachers, list) else [])]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, where the package runs from one."""
    try:
        completed = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.strip() if completed.returncode == 0 else None
