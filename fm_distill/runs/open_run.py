"""A run opened for reading: its config, and the student of a checkpoint."""

import dataclasses
import os

import jax
import jax.numpy as jnp

from fm_distill.config import Config, NetworkConfig
from fm_distill.errors import UserError
from fm_distill.models import Variables, build_network, resolve
from fm_distill.runs.checkpoint import abstract, restore_student
from fm_distill.runs.integrity import NewestCheckpoint, integrity_errors, newest_valid, steps_in
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import log
from fm_distill.weights.card import network_from_json, only_network


@dataclasses.dataclass(frozen=True)
class Run:
    """A student as it stands in a workdir. Where the run keeps an average, that is the student."""

    config: Config
    network: NetworkConfig  # of the student; nothing in it is `auto`
    workdir: Workdir
    step: int
    complete: bool
    averaged: bool
    class_names: tuple[str, ...] | None
    classes: int
    student: Variables


def open_run(path: str | os.PathLike[str], step: int | None = None) -> Run:
    """The student of the newest whole checkpoint in the workdir `path`, or of the one at `step`.

    Raises `UserError`, also where the checkpoint at `step` is not whole.
    """
    workdir = Workdir(path)
    config = workdir.stored_config()
    contents = workdir.read("config.json")["contents"]
    classes = int(contents["classes"])
    names = contents.get("class_names")
    # What the student's `auto` became, where its weights decided it.
    stored = contents.get("student_network")
    network = network_from_json(stored) if stored else resolve(only_network(config.student))
    step = _step_to_read(workdir, step)
    built = build_network(network, classes, jnp.dtype("float32"))
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = abstract(shapes, jax.tree.map(lambda _: here, shapes))
    averaged = config.ema_decay is not None
    student = restore_student(workdir.checkpoints / str(step), like, averaged)
    status = workdir.read_or_none("status.json") or {}
    return Run(
        config=config,
        network=network,
        workdir=workdir,
        step=step,
        complete=status.get("state") == "complete" and status.get("step") == step,
        averaged=averaged,
        class_names=tuple(names) if names else None,
        classes=classes,
        student=student,
    )


def _step_to_read(workdir: Workdir, asked: int | None) -> int:
    have = steps_in(workdir.checkpoints)
    if not have:
        raise UserError(f"the run in {workdir.path} has no checkpoint yet; train it first")
    if asked is not None and asked not in have:
        raise UserError(
            f"the run in {workdir.path} has no checkpoint of step {asked}; it has "
            f"{', '.join(map(str, sorted(have)))}"
        )
    if asked is None:
        found = newest_valid(workdir.checkpoints)
    else:
        wrong = integrity_errors(workdir.checkpoints / str(asked))
        found = NewestCheckpoint(0 if wrong else asked, {}, {asked: wrong} if wrong else {})
    for damaged, wrong in found.damaged.items():
        text = f"checkpoint {damaged:,} of {workdir.path} is damaged: {'; '.join(wrong[:3])}"
        if not found.step:
            raise UserError(text)
        log(f"WARNING: {text}")
    return found.step
