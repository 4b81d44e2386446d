"""A run opened for reading: its config, and the student of a checkpoint."""

import dataclasses
import os

import jax
import jax.numpy as jnp

from fm_distill.config import Config, NetworkConfig
from fm_distill.config.code import STUDENT
from fm_distill.config.resolved import ResolvedRun
from fm_distill.errors import UserError
from fm_distill.models import build_network, is_own, own_code
from fm_distill.runs.checkpoint import abstract, restore_student
from fm_distill.runs.integrity import NewestCheckpoint, integrity_errors, newest_valid, steps_in
from fm_distill.runs.run_code import refuse_code_of_run
from fm_distill.runs.stored_run import StoredRun
from fm_distill.runs.student import Student
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import log
from fm_distill.views.rendering import CentralCrop


@dataclasses.dataclass(frozen=True)
class Run:
    """A student as it stands in a workdir. Where the run keeps an average, that is the student."""

    stored: StoredRun
    workdir: Workdir
    step: int
    complete: bool
    averaged: bool
    student: Student

    @property
    def config(self) -> Config:
        return self.stored.config

    @property
    def resolved(self) -> ResolvedRun:
        return self.stored.resolved

    @property
    def network(self) -> NetworkConfig:
        """Of the student; nothing in it is `auto`."""
        return self.resolved.student

    @property
    def classes(self) -> int:
        return self.resolved.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """`class 0`, `class 1`, ... where the run does not know them."""
        return names_of(self.resolved.class_names, self.classes)


def names_of(names: tuple[str, ...] | None, classes: int) -> tuple[str, ...]:
    """`names`; or `class 0`, `class 1`, ... where they are not known."""
    return names or tuple(f"class {i}" for i in range(classes))


def open_run(path: str | os.PathLike[str], step: int | None = None) -> Run:
    """The student of the newest intact checkpoint in the workdir `path`, or of the one at `step`.

    Raises `UserError`, also where the checkpoint at `step` is not intact.
    """
    workdir = Workdir(path)
    stored = workdir.stored()
    resolved = stored.resolved
    step = _step_to_read(workdir, step)
    refuse_code_of_run(stored, workdir.path, STUDENT)
    _refuse_absent_code(workdir, resolved)
    network = build_network(resolved.student, resolved.classes, jnp.dtype("float32"))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract_variables = abstract(shapes, jax.tree.map(lambda _: sharding, shapes))
    averaged = stored.config.ema_decay is not None
    variables = restore_student(workdir.checkpoints / str(step), abstract_variables, averaged)
    status = workdir.read_status()
    return Run(
        stored=stored,
        workdir=workdir,
        step=step,
        complete=status is not None and status.state == "complete" and status.step == step,
        averaged=averaged,
        student=Student(
            network=resolved.student,
            classes=resolved.classes,
            class_names=names_of(resolved.class_names, resolved.classes),
            canvas=stored.config.data.canvas,
            central_crop=CentralCrop.of(stored.config.views),
            precision=resolved.precision,
            variables=variables,
        ),
    )


def _refuse_absent_code(workdir: Workdir, resolved: ResolvedRun) -> None:
    """Raises `UserError` where the student's network is code that cannot be run here."""
    model = resolved.student.model
    if not is_own(model):
        return
    try:
        own_code(model)
    except UserError as error:
        raise UserError(
            f"the run in {workdir.path} trained a custom network, {model} (SHA-256 "
            f"{resolved.code[0]}), which cannot be run here: {error}; put that file back"
        ) from None


def _step_to_read(workdir: Workdir, requested: int | None) -> int:
    available = steps_in(workdir.checkpoints)
    if not available:
        raise UserError(f"the run in {workdir.path} has no checkpoint yet; train it first")
    if requested is not None and requested not in available:
        raise UserError(
            f"the run in {workdir.path} has no checkpoint of step {requested}; it has "
            f"{', '.join(map(str, sorted(available)))}"
        )
    if requested is None:
        newest = newest_valid(workdir.checkpoints)
    else:
        errors = integrity_errors(workdir.checkpoints / str(requested))
        newest = NewestCheckpoint(
            0 if errors else requested, {}, {requested: errors} if errors else {}
        )
    for damaged, errors in newest.damaged.items():
        text = f"checkpoint {damaged:,} of {workdir.path} is damaged: {'; '.join(errors[:3])}"
        if not newest.step:
            raise UserError(text)
        log(f"WARNING: {text}")
    return newest.step
