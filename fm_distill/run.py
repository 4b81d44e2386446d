"""A run that lies in a workdir, opened for reading; and whatever may teach or start a student."""

import dataclasses
import itertools
import os
import pathlib

import jax
import jax.numpy as jnp

from fm_distill.checkpoint import abstract, restore_student
from fm_distill.config import Config, NetworkConfig, TeacherConfig
from fm_distill.digests import Found, faults, newest_whole, steps_in
from fm_distill.errors import UserError
from fm_distill.models import Variables, build_network, resolve
from fm_distill.stopping import say
from fm_distill.weights.card import network_from_json, only_network
from fm_distill.weights.description import differing
from fm_distill.weights.hub import WEIGHTS_FILE
from fm_distill.weights.load import Pretrained, fingerprint, load_weights
from fm_distill.workdir import Workdir


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
    status = workdir.glance("status.json") or {}
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
        found = newest_whole(workdir.checkpoints)
    else:
        wrong = faults(workdir.checkpoints / str(asked))
        found = Found(0 if wrong else asked, {}, {asked: wrong} if wrong else {})
    for damaged, wrong in found.damaged.items():
        text = f"checkpoint {damaged:,} of {workdir.path} is damaged: {'; '.join(wrong[:3])}"
        if not found.step:
            raise UserError(text)
        say(f"WARNING: {text}")
    return found.step


def pretrained(path: str, network: NetworkConfig | None, option: str) -> Pretrained:
    """The weights at `path`, which may be the workdir of a run; see `load_weights`.

    A teacher's run has to be complete.
    """
    folder = pathlib.Path(path)
    if not (folder / "config.json").is_file() or (folder / WEIGHTS_FILE).is_file():
        return load_weights(path, network, option)
    run = open_run(path)
    if option != "student" and not run.complete:
        raise UserError(
            f"the {option}'s run in {path} is not complete, or its last checkpoint is not whole "
            f"(step {run.step:,} is); train it first"
        )
    chosen = run.network
    if network is not None:
        if differ := differing(run.network, network):
            raise UserError(
                f"the run in {path} trained another network than the {option}'s: {differ}"
            )
        asked = only_network(network)
        chosen = dataclasses.replace(chosen, resolution=asked.resolution)
        for given, own, field in (
            (asked.input_range, run.network.input_range, "input_range"),
            (asked.root_pool_padding, run.network.root_pool_padding, "root_pool_padding"),
        ):
            if given not in ("auto", own):
                raise UserError(
                    f"the run in {path} was trained with {field}={own}, but the {option}'s is "
                    f"{given}; use auto"
                )
    remark = f"{path}: the run's student after {run.step:,} steps, {chosen.model}"
    return Pretrained(chosen, run.classes, run.class_names, run.student, (remark,))


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network with its weights."""

    network: NetworkConfig  # nothing in it is `auto`
    classes: int
    class_names: tuple[str, ...] | None
    variables: Variables
    fingerprint: str  # SHA-256 of the weights, wherever they lie
    remarks: tuple[str, ...]  # what was recognised and what was chosen


def load_teachers(config: Config, workdir: Workdir) -> tuple[Teacher, ...]:
    """The teachers of `config`, each from its weights or its run; empty where there is none.

    Raises `UserError`, also where a teacher's run is not complete.
    """
    return tuple(
        _load_teacher(teacher, option, where)
        for option, teacher, where in teachers_of(config, workdir)
    )


def teachers_of(config: Config, workdir: Workdir) -> list[tuple[str, TeacherConfig, str]]:
    """Of each teacher: its option, its config, and where its run lies.

    The run lies as given, else inside the student's workdir, in `teacher`, `teacher_2`, ...
    """
    given = [("teacher", config.teacher)] if config.teacher else []
    given += [(f"more_teachers.{i}", x) for i, x in enumerate(config.more_teachers)]
    return [
        (option, x, x.workdir or str(workdir.path / (f"teacher_{i}" if i > 1 else "teacher")))
        for i, (option, x) in enumerate(given, 1)
    ]


def _load_teacher(teacher: TeacherConfig, option: str, where: str) -> Teacher:
    if not (teacher.weights or teacher.experiment or teacher.workdir):
        raise UserError(
            f"the teacher has no weights: give --{option}.weights FILE (.npz, .safetensors, a "
            f"SavedModel, hf://OWNER/REPO), --{option}.experiment FILE or --{option}.workdir DIR"
        )
    path = teacher.weights or where
    if not teacher.weights and not (pathlib.Path(path) / "config.json").is_file():
        raise UserError(f"{path} is not the workdir of a run: it has no config.json")
    found = pretrained(path, teacher.network, option)
    return Teacher(
        network=found.network,
        classes=found.classes,
        class_names=found.class_names,
        variables=found.variables,
        fingerprint=fingerprint(found.variables),
        remarks=found.remarks,
    )


def agreed_classes(
    asked: int | None,
    data_classes: int | None,
    data_names: tuple[str, ...] | None,
    teachers: tuple[Teacher, ...],
) -> int:
    """Number of classes of the student. Raises `UserError` where its sources do not agree."""
    given: dict[str, int | None] = {"data.classes": asked, "the data's labels": data_classes}
    names = {"the data": data_names}
    for i, teacher in enumerate(teachers, 1):
        who = "the teacher" if i == 1 else f"teacher {i}"
        given[f"{who}'s head"] = teacher.classes
        names[who] = teacher.class_names
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
    named = [(who, x) for who, x in names.items() if x]
    for (one, a), (other, b) in itertools.pairwise(named):
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            if left != right:
                raise UserError(
                    f"class {i} is {left!r} in {one} and {right!r} in {other}: both must have the "
                    "same classes in the same order; use a teacher that was trained on these"
                )
    return next(iter(known.values()))
