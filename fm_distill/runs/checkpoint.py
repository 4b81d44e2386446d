"""The state of a run on disk; the only file that imports Orbax.

Student, optimizer, average and step are all there is to save: order and randomness are functions
of the step. Orbax writes into a folder aside; when it is done, `integrity.write_manifest` lists
what was written and one rename makes the checkpoint visible.
"""

import contextlib
import pathlib
import shutil
import threading
import time
from typing import Any

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from fm_distill.config import CheckpointConfig
from fm_distill.errors import TrainingFailed, UserError
from fm_distill.models import Variables
from fm_distill.runs.integrity import (
    integrity_errors,
    read_metadata,
    steps_in,
    sync,
    write_manifest,
)
from fm_distill.runs.metric_table import RANKED
from fm_distill.runs.state import TermState, TrainState
from fm_distill.system.processes import broadcast_from_first, first_process

ASIDE = "unfinished"  # where Orbax writes
# Of a replicated array each device writes a part, by a program that takes it out. For small arrays
# hundreds of such programs are compiled while the first checkpoint blocks training.
SMALLEST_PART_BYTES = 2**24
DELETING = "deleting-"


class CheckpointWriter:
    """Writes the checkpoints of one run in the background, and deletes the superfluous ones.

    Only the holder of the workdir's lock may have one; of several processes each has one, and the
    first does everything but Orbax's writing. `keep` are steps that are never deleted.
    """

    def __init__(self, directory: pathlib.Path, config: CheckpointConfig, keep: tuple[int, ...]):
        self.directory = directory.absolute()
        self.config, self.keep = config, frozenset(keep)
        self.slowest_s = 0.0  # from the call of `save` until the checkpoint is on disk
        self.blocked_s = 0.0  # time that `save` and `wait` have taken from their caller, in all
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: int | None = None
        self._first = first_process()
        if self._first:
            self._clean()

    def save(self, state: TrainState, metadata: dict[str, Any]) -> None:
        """Starts to write `state`, unless its step is there. `metadata` can be read without Orbax.

        Raises `TrainingFailed` where this write or the one before fails.
        """
        start_time = time.monotonic()
        try:
            self._save(state, metadata, start_time)
        finally:
            self.blocked_s += time.monotonic() - start_time

    def _save(self, state: TrainState, metadata: dict[str, Any], began: float) -> None:
        step = int(state.step)
        self._join()
        if step == self._saved:
            return
        self._saved = step
        # Of several processes all have to do the same.
        if broadcast_from_first(int(self._first and self._is_there(step))):
            return
        try:
            (self.directory / ASIDE).mkdir(parents=True, exist_ok=True)
            with _saving():
                pending_save = ocp.save_checkpointables_async(
                    self.directory / ASIDE / str(step), _parts(state)
                )
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        self._thread = threading.Thread(
            target=self._finish, args=(pending_save, step, metadata, began)
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when what was started is on disk. Raises `TrainingFailed` where it failed."""
        start_time = time.monotonic()
        self._join()
        self.blocked_s += time.monotonic() - start_time

    def _is_there(self, step: int) -> bool:
        """Whether the checkpoint is there, intact; a damaged one makes room."""
        if not (self.directory / str(step)).exists():
            return False
        if not integrity_errors(self.directory / str(step)):
            return True
        self.move_aside(step)
        return False

    def move_aside(self, step: int) -> None:
        """Takes a damaged checkpoint out of the way; it is not deleted."""
        path = self.directory / str(step)
        names = (f"{step}.damaged{f'-{i}' if i else ''}" for i in range(1000))
        path.rename(self.directory / next(x for x in names if not (self.directory / x).exists()))

    def best(self) -> tuple[int, float] | None:
        """Step and figure of the best checkpoint on disk, by `keep_best`."""
        name = self.config.keep_best
        if name is None:
            return None
        candidates = []
        for step in steps_in(self.directory):
            with contextlib.suppress(OSError, ValueError, KeyError):
                if (
                    value := read_metadata(self.directory / str(step))["validation"].get(name)
                ) is not None:
                    candidates.append((step, float(value)))
        sign = 1 if RANKED[name] else -1
        return max(candidates, key=lambda x: (sign * x[1], x[0]), default=None)

    def is_best(self, figures: dict[str, float]) -> bool:
        """Whether `figures` of the validation split are better than those of all checkpoints."""
        name = self.config.keep_best
        if name is None or name not in figures:
            return False
        best = self.best()
        better = best is None or (
            figures[name] > best[1] if RANKED[name] else figures[name] < best[1]
        )
        return bool(broadcast_from_first(int(better)))

    def close(self) -> None:
        """Waits without raising."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _join(self) -> None:
        self.close()
        if self._error is not None:
            error, self._error = self._error, None
            raise self._failed(error) from error

    def _finish(self, writing: Any, step: int, metadata: dict[str, Any], began: float) -> None:
        """Runs in a thread of its own."""
        try:
            writing.result()
            if self._first:
                written = self.directory / ASIDE / str(step)
                write_manifest(written, metadata)
                written.rename(self.directory / str(step))
                sync(self.directory)
                self._delete_old()
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        except BaseException as error:
            self._error = error

    def _delete_old(self) -> None:
        steps = steps_in(self.directory)
        keep_every, best = self.config.keep_every_steps, self.best()
        kept_steps = {*steps[: self.config.keep], *self.keep, *([best[0]] if best else [])}
        for step in steps:
            if step in kept_steps or (keep_every and step % keep_every == 0):
                continue
            # A kill while files go must not leave what seems a damaged checkpoint.
            deleting = self.directory / f"{DELETING}{step}"
            (self.directory / str(step)).rename(deleting)
            shutil.rmtree(deleting, ignore_errors=True)

    def _clean(self) -> None:
        """What a kill left: never a checkpoint."""
        if self.directory.is_dir():
            for path in [self.directory / ASIDE, *self.directory.glob(f"{DELETING}*")]:
                shutil.rmtree(path, ignore_errors=True)

    def _failed(self, error: BaseException) -> TrainingFailed:
        return TrainingFailed(f"a checkpoint could not be written in {self.directory}: {error}")


def restore(checkpoint: pathlib.Path, like: TrainState) -> TrainState:
    """The state in an intact `checkpoint`, straight on the shards that the shapes `like` name."""
    loaded = _load(checkpoint, _parts(like))
    return TrainState(
        step=loaded["progress"]["step"],
        student=_variables(loaded["student"]),
        opt_state=loaded["opt_state"],
        ema=_variables(loaded["ema"]) if "ema" in loaded else None,
        terms=_term_state(loaded["terms"]) if "terms" in loaded else None,
        masks=loaded.get("masks"),
    )


def restore_student(checkpoint: pathlib.Path, like: Variables, averaged: bool) -> Variables:
    """The student in an intact `checkpoint`, or its average, without the rest of the state."""
    name = "ema" if averaged else "student"
    return _variables(_load(checkpoint, {name: _tree(like)})[name])


def restore_terms(checkpoint: pathlib.Path, like: TermState) -> TermState:
    """What the terms of the loss have of their own in an intact `checkpoint`."""
    return _term_state(_load(checkpoint, {"terms": _terms_tree(like)})["terms"])


def abstract(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes of `tree` with the sharding of each array."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def bytes_of(state: TrainState) -> int:
    """What a checkpoint of `state` (or its shapes) needs on disk, nearly."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _saving() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = SMALLEST_PART_BYTES
    return context


def _load(checkpoint: pathlib.Path, parts: dict[str, PyTree]) -> dict[str, Any]:
    try:
        return ocp.load_checkpointables(checkpoint.absolute(), parts)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the checkpoint {checkpoint} cannot be read: {error}") from error


def _parts(state: TrainState) -> dict[str, PyTree]:
    parts = {
        "progress": {"step": state.step},
        "student": _tree(state.student),
        "opt_state": state.opt_state,
    }
    if state.ema is not None:
        parts["ema"] = _tree(state.ema)
    if state.terms is not None:
        parts["terms"] = _terms_tree(state.terms)
    if state.masks is not None:
        parts["masks"] = state.masks
    return parts


def _terms_tree(terms: TermState) -> PyTree:
    return {name: part for name, part in vars(terms).items() if part}


def _term_state(tree: PyTree) -> TermState:
    return TermState(tree.get("params", {}), tree["opt_state"], tree.get("banks", {}))


def _tree(variables: Variables) -> PyTree:
    tree = vars(variables)
    return {name: part for name, part in tree.items() if part}


def _variables(tree: PyTree) -> Variables:
    return Variables(tree["params"], tree.get("statistics", {}), tree.get("ranges", {}))
