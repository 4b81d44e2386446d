"""A run that lies in a workdir, opened for reading: its student, as a teacher or to be used."""

import dataclasses
import os

import jax
import jax.numpy as jnp

from fm_distill.checkpoint import Checkpoints, abstract
from fm_distill.config import Config, NetworkConfig
from fm_distill.errors import UserError
from fm_distill.models import Variables, build_network
from fm_distill.weights.load import fingerprint, load_bit
from fm_distill.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """A student as it stands in a workdir. Where the run keeps an average, that is the student."""

    config: Config
    workdir: Workdir
    step: int
    complete: bool
    averaged: bool
    class_names: tuple[str, ...] | None
    classes: int
    student: Variables


def open_run(path: str | os.PathLike[str]) -> Run:
    """The student of the newest checkpoint in the workdir `path`. Raises `UserError`."""
    workdir = Workdir(path)
    config = workdir.stored_config()
    contents = workdir.read("config.json")["contents"]
    classes = int(contents["classes"])
    names = contents.get("class_names")
    if not workdir.checkpoints.is_dir():
        raise UserError(f"the run in {path} has no checkpoint yet; train it first")
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint.keep, writing=False)
    try:
        step = checkpoints.latest()
        if step is None:
            raise UserError(f"the run in {path} has no checkpoint yet; train it first")
        network = build_network(config.student, classes, jnp.dtype("float32"))
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = abstract(shapes, jax.tree.map(lambda _: here, shapes))
        averaged = config.ema_decay is not None
        student = checkpoints.restore_student(step, like, averaged)
    finally:
        checkpoints.close()
    status = workdir.read("status.json") or {}
    return Run(
        config=config,
        workdir=workdir,
        step=step,
        complete=status.get("state") == "complete",
        averaged=averaged,
        class_names=tuple(names) if names else None,
        classes=classes,
        student=student,
    )


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network with its weights."""

    network: NetworkConfig
    classes: int
    class_names: tuple[str, ...] | None
    variables: Variables
    fingerprint: str  # SHA-256 of the weights, wherever they lie


def load_teacher(config: Config, workdir: Workdir) -> Teacher | None:
    """The teacher of `config`, from its weight file or its run; None where there is none.

    Raises `UserError`, also where the teacher's run is not complete.
    """
    teacher = config.teacher
    if teacher is None:
        return None
    if not (teacher.weights or teacher.experiment or teacher.workdir):
        raise UserError(
            "the teacher has no weights: give --teacher.weights FILE (a BiT .npz), "
            "--teacher.experiment FILE or --teacher.workdir DIR"
        )
    if teacher.weights:
        assert teacher.network is not None  # `experiment.check`
        variables, classes = load_bit(teacher.weights, teacher.network)
        return Teacher(teacher.network, classes, None, variables, fingerprint(variables))
    run = open_run(teacher_workdir(config, workdir))
    if not run.complete:
        raise UserError(f"the teacher's run in {run.workdir.path} is not complete; train it first")
    return Teacher(
        run.config.student, run.classes, run.class_names, run.student, fingerprint(run.student)
    )


def teacher_workdir(config: Config, workdir: Workdir) -> str:
    """Where the teacher's run lies: as given, else inside the student's workdir."""
    assert config.teacher is not None
    return config.teacher.workdir or str(workdir.path / "teacher")


def agreed_classes(asked: int | None, data: int | None, teacher: Teacher | None) -> int:
    """Number of classes of the student. Raises `UserError` where its sources do not agree."""
    given = {
        "data.classes": asked,
        "the data's labels": data,
        "the teacher's head": teacher.classes if teacher else None,
    }
    known = {name: count for name, count in given.items() if count is not None}
    if not known:
        raise UserError(
            "the number of classes is unknown: the data have no labels; set data.classes"
        )
    if len(set(known.values())) > 1:
        said = ", ".join(f"{name}: {count}" for name, count in known.items())
        raise UserError(
            f"the number of classes differs ({said}); use a teacher that was trained on these "
            "classes, or set data.classes"
        )
    return next(iter(known.values()))
