"""The folder of one run: its lock, `config.json`, `status.json` and `evaluation.json`."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

from fm_distill.config import Config
from fm_distill.config.resolved import ResolvedRun
from fm_distill.config.serialization import differences
from fm_distill.errors import UserError
from fm_distill.runs.stored_progress import Status, StoredStatus, as_evaluation, as_status
from fm_distill.runs.stored_run import StoredRun, describe_run, stored_run
from fm_distill.system.compilation_cache import COMPILED
from fm_distill.system.console import log
from fm_distill.system.files import lock, refuse_foreign, replacing
from fm_distill.system.processes import first_process

Contents = TypeVar("Contents")

# What a run may compute before it writes its config.
COMPUTED_FIRST = ("fixed_targets.npz", "channel_scores.npz", "quantised_teachers.json")
# Its files; each of them a run may have or not have yet.
FILES = (
    "config.json",
    "status.json",
    "evaluation.json",
    "rollbacks.json",
    "metrics.jsonl",
    *COMPUTED_FIRST,
)
LENGTH = ("schedule.total_steps:", "schedule.total_epochs:")


class Workdir:
    """The files of a run that are not arrays. Of several processes, the first one writes them."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)

    def has_config(self) -> bool:
        """Whether there is a `config.json`, damaged or not."""
        return (self.path / "config.json").exists()

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        return self.path / "metrics.jsonl"

    @property
    def fixed_targets(self) -> pathlib.Path:
        return self.path / "fixed_targets.npz"

    @property
    def channel_scores(self) -> pathlib.Path:
        return self.path / "channel_scores.npz"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process, the first of several.

        A crash frees it, since the kernel holds the lock.
        """
        if not first_process():
            yield
            return
        allowed_names = re.compile(
            r"(config|status|quantised_teachers)\.json(\.tmp)?|lock|teacher(_\d+)?|"
            r"recording(\.arriving)?|(fixed_targets|channel_scores)\.npz.*|" + COMPILED
        )
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"{self.path} is a file; give a folder as --workdir")
            self._refuse_folders()
            missing = [x for x in (self.path, *self.path.parents) if not x.exists()]
            if self.path.is_dir() and not self.has_config():
                refuse_foreign(self.path, allowed_names, "a workdir of a run", "--workdir")
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / "lock").open("w")
        except OSError as error:
            raise UserError(f"the workdir {self.path} cannot be written: {error}") from None
        with handle:
            if not lock(handle):
                raise UserError(
                    f"the workdir {self.path} is in use by another process; wait for it, or "
                    "choose another --workdir"
                )
            try:
                yield
            except UserError:
                self._remove_if_new(missing)
                raise

    def _refuse_folders(self) -> None:
        for name in FILES:
            if (self.path / name).is_dir():
                raise UserError(
                    f"{self.path / name} is a folder and must be a file; move it away, or choose "
                    "another --workdir"
                )
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise UserError(
                f"{self.checkpoints} is a file and must be a folder; move it away, or choose "
                "another --workdir"
            )

    def _remove_if_new(self, missing: list[pathlib.Path]) -> None:
        """Leaves nothing behind of a run that was refused before it wrote anything.

        `missing`: folders that it made, the innermost first.
        """
        with contextlib.suppress(OSError):
            first = {"lock", *COMPUTED_FIRST}
            if missing and {x.name for x in self.path.iterdir()} <= {*first, COMPILED}:
                for name in first:
                    (self.path / name).unlink(missing_ok=True)
                shutil.rmtree(self.path / COMPILED, ignore_errors=True)
                for folder in missing:
                    folder.rmdir()

    def in_use(self) -> bool:
        """Whether a process holds the folder now; a crash frees it."""
        try:
            with (self.path / "lock").open() as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def read_status(self) -> StoredStatus | None:
        """None where `status.json` is damaged or missing: it can be written again."""
        return self._read_or_none("status.json", as_status)

    def read_evaluation(self) -> dict[str, Any] | None:
        """None where `evaluation.json` is damaged or missing: it can be written again."""
        return self._read_or_none("evaluation.json", as_evaluation)

    def _read_or_none(self, name: str, checked: Callable[[Any], Contents]) -> Contents | None:
        if not (self.path / name).exists():
            return None
        try:
            return checked(self.read(name))
        except (UserError, msgspec.ValidationError) as error:
            log(f"WARNING: {self.path / name} is damaged and is ignored ({error})")
            return None

    def read(self, name: str) -> Any:
        """The contents of a JSON file here, or None where it is not there."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None

    def write_from_first(self, name: str, value: Any) -> None:
        """Writes a JSON file completely or not at all; of several processes the first does."""
        if not first_process():
            return
        with replacing(self.path / name) as temporary, temporary.open("w") as file:
            file.write(json.dumps(value, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def stored(self) -> StoredRun:
        """The run that lies here. Raises `UserError` where there is none of this version."""
        if not self.has_config():
            raise UserError(f"{self.path} is not the workdir of a run: it has no config.json")
        return stored_run(self.read("config.json"), self.path / "config.json")

    def refuse_another_config(self, config: Config, extend: bool = False) -> bool:
        """Raises `UserError` that lists what differs where this is the workdir of another config.

        Returns whether only the length differs, which `extend` allows.
        """
        if not self.has_config():
            return False
        mismatches = differences(self.stored().config, config)
        length_lines = [line for line in mismatches if line.startswith(LENGTH)]
        if extend:
            mismatches = [line for line in mismatches if line not in length_lines]
        advice = ", or allow a longer schedule with --extend" if length_lines else ""
        if not self.checkpoints.exists():
            advice = f"; no step was done here, so you can also remove {self.path}/config.json"
        self._refuse(mismatches, advice)
        return bool(length_lines)

    def refuse_other_contents(self, resolved: ResolvedRun) -> None:
        """Raises `UserError` that lists what differs where the run that lies here was made from
        other data or weights. Their paths may change, their contents may not."""
        if self.has_config():
            self._refuse(self.stored().resolved.differences(resolved), "")

    def refuse_lost_checkpoints(self, newest: int) -> None:
        """Raises `UserError` where a run was complete and no longer has a checkpoint."""
        status = self.read_status()
        if status and status.state == "complete" and not newest:
            raise UserError(
                f"the run in {self.path} was complete after {status.step:,} steps and no longer "
                "has a checkpoint; restore one from a copy, or choose another --workdir"
            )

    def _refuse(self, differ: list[str], more: str) -> None:
        if differ:
            raise UserError(
                f"the workdir {self.path} belongs to another run:\n  "
                + "\n  ".join(differ)
                + "\nchoose another --workdir, or give the old values"
                + more
            )

    def claim(self, config: Config, resolved: ResolvedRun, lengthened: bool) -> tuple[int, ...]:
        """Makes this the workdir of `config`; call it when nothing is left to be refused.

        `lengthened`: its schedule is longer than the one before. Returns the ends of the schedules
        that were lengthened: those students are kept.
        """
        lengthened_after = self.stored().lengthened_after if self.has_config() else ()
        status = self.read_status()
        if lengthened and status and status.state == "complete":
            lengthened_after += (status.step,)
            figures = self.path / "evaluation.json"
            if figures.exists() and first_process():
                figures.rename(self.path / f"evaluation_{status.step}.json")
        self.write_from_first("config.json", describe_run(config, resolved, lengthened_after))
        return lengthened_after

    def set_status(
        self,
        status: Status,
        step: int,
        total_steps: int,
        reason: str = "",
        hours_left: float | None = None,
        images_per_second: float | None = None,
    ) -> None:
        updated = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        stored = StoredStatus(
            status, step, total_steps, reason, hours_left, images_per_second, updated
        )
        self.write_from_first("status.json", msgspec.to_builtins(stored))
