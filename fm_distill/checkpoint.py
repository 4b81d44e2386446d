"""The state of a run on disk; the only file that imports Orbax.

Student, optimizer, average and step are all there is to save: order and randomness are functions
of the step.
"""

import os
import pathlib

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from fm_distill.errors import TrainingFailed, UserError
from fm_distill.models import Variables
from fm_distill.step import TrainState


class Checkpoints:
    """The checkpoints of one run, numbered by steps done. Writes in the background."""

    def __init__(self, directory: str | os.PathLike[str], keep: int, writing: bool):
        self.directory = pathlib.Path(directory).absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            # A reader would delete what another process is writing.
            cleanup_tmp_directories=writing,
        )

    def latest(self) -> int | None:
        """The newest step, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState) -> None:
        """Starts to write `state`, unless its step is there already.

        Raises `TrainingFailed` where this write or the one before fails.
        """
        step = int(state.step)
        try:
            self._checkpointer.wait()
            if self.latest() != step:
                self._checkpointer.save_checkpointables_async(step, _parts(state))
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when what was started is on disk. Raises `TrainingFailed` where it failed."""
        try:
            self._checkpointer.wait()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state after `step` steps, with the shapes and shardings of `like`."""
        parts = _parts(like)
        try:
            found = self._checkpointer.load_checkpointables(step, parts)
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable(step, error) from error
        return TrainState(
            step=found["progress"]["step"],
            student=_variables(found["student"]),
            opt_state=found["opt_state"],
            ema=_variables(found["ema"]) if "ema" in found else None,
        )

    def restore_student(self, step: int, like: Variables, averaged: bool) -> Variables:
        """The student after `step` steps, or its average, without the rest of the state."""
        name = "ema" if averaged else "student"
        try:
            found = self._checkpointer.load_checkpointables(step, {name: _tree(like)})
        except (OSError, ValueError, KeyError) as error:
            raise self._unreadable(step, error) from error
        return _variables(found[name])

    def close(self) -> None:
        self._checkpointer.close()

    def _failed(self, error: Exception) -> TrainingFailed:
        return TrainingFailed(f"a checkpoint could not be written in {self.directory}: {error}")

    def _unreadable(self, step: int, error: Exception) -> UserError:
        return UserError(f"checkpoint {step} in {self.directory} cannot be read: {error}")


def abstract(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes of `tree` that say where each array is to lie."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _parts(state: TrainState) -> dict[str, PyTree]:
    parts = {
        "progress": {"step": state.step},
        "student": _tree(state.student),
        "opt_state": state.opt_state,
    }
    return parts if state.ema is None else parts | {"ema": _tree(state.ema)}


def _tree(variables: Variables) -> PyTree:
    tree = {"params": variables.params, "statistics": variables.statistics}
    return {name: part for name, part in tree.items() if part}


def _variables(tree: PyTree) -> Variables:
    return Variables(tree["params"], tree.get("statistics", {}))
