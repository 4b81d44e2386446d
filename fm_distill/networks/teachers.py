"""Frozen teachers and pretrained students, loaded from weights or from runs."""

import dataclasses
import itertools
import pathlib

from fm_distill.config import Config, NetworkConfig, TeacherConfig
from fm_distill.config.teachers import teachers_of
from fm_distill.errors import UserError
from fm_distill.models import Variables
from fm_distill.runs.open_run import open_run
from fm_distill.weights.card import only_network
from fm_distill.weights.description import differing
from fm_distill.weights.hub import WEIGHTS_FILE
from fm_distill.weights.load import Pretrained, fingerprint, load_weights


def load_pretrained(path: str, network: NetworkConfig | None, option: str) -> Pretrained:
    """The weights at `path`, which may be the workdir of a run; see `load_weights`.

    A teacher's run has to be complete.
    """
    folder = pathlib.Path(path)
    if not (folder / "config.json").is_file() or (folder / WEIGHTS_FILE).is_file():
        return load_weights(path, network, option)
    run = open_run(path)
    if option != "student" and not run.complete:
        raise UserError(
            f"the {option}'s run in {path} is not complete, or its last checkpoint is damaged "
            f"(step {run.step:,} is); train it first"
        )
    chosen = run.network
    if network is not None:
        if differ := differing(run.network, network):
            raise UserError(
                f"the run in {path} trained another network than the {option}'s: {differ}"
            )
        requested = only_network(network)
        chosen = dataclasses.replace(chosen, resolution=requested.resolution)
        for given, own, field in (
            (requested.input_range, run.network.input_range, "input_range"),
            (requested.root_pool_padding, run.network.root_pool_padding, "root_pool_padding"),
        ):
            if given not in ("auto", own):
                raise UserError(
                    f"the run in {path} was trained with {field}={own}, but the {option}'s is "
                    f"{given}; use auto"
                )
    note = f"{path}: the run's student after {run.step:,} steps, {chosen.model}"
    return Pretrained(chosen, run.classes, run.resolved.class_names, run.student.variables, (note,))


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network with its weights."""

    network: NetworkConfig  # nothing in it is `auto`
    classes: int
    class_names: tuple[str, ...] | None
    variables: Variables
    fingerprint: str  # SHA-256 of the weights, wherever they lie
    notes: tuple[str, ...]  # what was recognised and what was chosen


def load_teachers(config: Config, workdir: pathlib.Path) -> tuple[Teacher, ...]:
    """The teachers of `config`, each from its weights or its run; empty where there is none.

    Raises `UserError`, also where a teacher's run is not complete.
    """
    return tuple(
        _load_teacher(teacher.config, teacher.option, where)
        for teacher, where in zip(
            teachers_of(config), teacher_workdirs(config, workdir), strict=True
        )
    )


def teacher_workdirs(config: Config, workdir: pathlib.Path) -> tuple[str, ...]:
    """Where the run of each teacher lies, in the order of `teachers_of`.

    As given, else inside the student's workdir in `teacher`, `teacher_2`, ...
    """
    return tuple(
        x.config.workdir or str(workdir / (f"teacher_{i}" if i > 1 else "teacher"))
        for i, x in enumerate(teachers_of(config), 1)
    )


def _load_teacher(teacher: TeacherConfig, option: str, where: str) -> Teacher:
    if not (teacher.weights or teacher.experiment or teacher.workdir):
        raise UserError(
            f"the teacher has no weights: give --{option}.weights FILE (.npz, .safetensors, a "
            f"SavedModel, hf://OWNER/REPO), --{option}.experiment FILE or --{option}.workdir DIR"
        )
    path = teacher.weights or where
    if not teacher.weights and not (pathlib.Path(path) / "config.json").is_file():
        raise UserError(f"{path} is not the workdir of a run: it has no config.json")
    loaded = load_pretrained(path, teacher.network, option)
    return Teacher(
        network=loaded.network,
        classes=loaded.classes,
        class_names=loaded.class_names,
        variables=loaded.variables,
        fingerprint=fingerprint(loaded.variables),
        notes=loaded.notes,
    )


def agreed_classes(
    requested: int | None,
    data_classes: int | None,
    data_names: tuple[str, ...] | None,
    teachers: tuple[Teacher, ...],
) -> int:
    """Number of classes of the student. Raises `UserError` where its sources do not agree."""
    given: dict[str, int | None] = {"data.classes": requested, "the data's labels": data_classes}
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
        counts = ", ".join(f"{name}: {count}" for name, count in known.items())
        raise UserError(
            f"the number of classes differs ({counts}); use a teacher that was trained on these "
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
