"""The folder of one run: its lock, `config.json`, `status.json` and `evaluation.json`."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterator
from typing import Any, Literal

import jax

from fm_distill.config import Config
from fm_distill.errors import UserError
from fm_distill.identity import differences, from_json, to_json

Status = Literal["running", "paused", "complete", "failed"]
LIBRARIES = ("fm-distill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Workdir:
    """The files of a run that are not arrays."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        return self.path / "metrics.jsonl"

    @property
    def fixed_targets(self) -> pathlib.Path:
        return self.path / "fixed_targets.npz"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process. A crash frees it, since the kernel holds the lock."""
        known = re.compile(r"config\.json|lock|teacher(_\d+)?|fixed_targets\.npz.*")
        try:
            if self.path.is_dir() and not (self.path / "config.json").exists():
                others = sorted(x.name for x in self.path.iterdir() if not known.fullmatch(x.name))
                if others:
                    raise UserError(
                        f"{self.path} is not empty and not a workdir of a run (it has "
                        f"{', '.join(others[:3])}); choose another --workdir"
                    )
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / "lock").open("w")
        except OSError as error:
            raise UserError(f"the workdir {self.path} cannot be written: {error}") from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"the workdir {self.path} is in use by another process; wait for it, or "
                    "choose another --workdir"
                ) from None
            yield

    def read(self, name: str) -> Any:
        """The contents of a JSON file here, or None where it is not there."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None

    def write(self, name: str, value: Any) -> None:
        """Writes a JSON file whole or not at all."""
        path = self.path / name
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        temporary.replace(path)

    def stored_config(self) -> Config:
        """The config of the run that lies here."""
        stored = self.read("config.json")
        if stored is None:
            raise UserError(f"{self.path} is not the workdir of a run: it has no config.json")
        if not isinstance(stored, dict) or "config" not in stored:
            raise UserError(f"{self.path / 'config.json'} is not the config of a run")
        return from_json(stored["config"])

    def refuse_another(self, config: Config, contents: dict[str, Any]) -> None:
        """Raises `UserError` that lists what differs where this is another run's workdir.

        `contents` are fingerprints of what the run is made from (data, teacher): paths may
        change, contents may not.
        """
        stored = self.read("config.json")
        if stored is None:
            return
        differ = differences(self.stored_config(), config)
        before = stored.get("contents", {})
        differ += [
            f"{name}: {before[name]} in the workdir, {value} now (its contents, not its place)"
            for name, value in contents.items()
            if before.get(name, value) != value
        ]
        if differ:
            raise UserError(
                f"the workdir {self.path} belongs to another run:\n  "
                + "\n  ".join(differ)
                + "\nchoose another --workdir, or give the old values"
            )

    def claim(self, config: Config, contents: dict[str, Any]) -> None:
        """Makes this the workdir of `config`; call it when nothing is left to be refused."""
        self.refuse_another(config, contents)
        self.write(
            "config.json",
            {
                "config": to_json(config),
                "contents": contents,
                "versions": {name: _version(name) for name in LIBRARIES}
                | {"python": platform.python_version()},
                "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
                "commit": _commit(),
            },
        )

    def set_status(self, status: Status, step: int, total_steps: int, reason: str = "") -> None:
        self.write(
            "status.json",
            {"state": status, "step": step, "total_steps": total_steps, "reason": reason},
        )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, where the package runs from one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
