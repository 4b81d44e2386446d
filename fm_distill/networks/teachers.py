"""Frozen teachers and pretrained students, loaded from weights or from runs."""

import dataclasses
import pathlib

from fm_distill.config import Config, DataConfig, NetworkConfig, QuantisationConfig, TeacherConfig
from fm_distill.config.code import named_code
from fm_distill.config.networks import with_quantisation
from fm_distill.config.teachers import moved, recording_of, teachers_of
from fm_distill.data.class_names import named_classes
from fm_distill.errors import UserError
from fm_distill.models import Variables, check_network, is_own
from fm_distill.networks.class_choice import (
    chosen,
    fingerprint_of,
    function_of,
    names_asked,
    refuse_other_recording,
    variables_of,
)
from fm_distill.networks.functions import TeacherFunction, load_function
from fm_distill.recordings.manifest import Recording
from fm_distill.runs.open_run import open_run
from fm_distill.system.foreign_code import refuse_foreign_code
from fm_distill.weights.card import only_network
from fm_distill.weights.description import FREE_OPTIONS, differing
from fm_distill.weights.hub import PREFIX, WEIGHTS_FILE
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
            f"(the newest intact one is of step {run.step:,}); train it first"
        )
    network_config = run.network
    if network is not None:
        if differences := differing(run.network, network):
            raise UserError(
                f"the run in {path} trained a different network from the {option}'s: {differences}"
            )
        requested = only_network(network)
        network_config = dataclasses.replace(
            network_config, resolution=requested.resolution, input_rounding=requested.input_rounding
        )
        if option == "student":
            network_config = dataclasses.replace(
                network_config, quantisation=requested.quantisation
            )
        run_options = run.network.options
        free_options = {
            name: value for name, value in requested.options.items() if name in FREE_OPTIONS
        }
        for requested_value, run_value, field in (
            (requested.input_range, run.network.input_range, "input_range"),
            *((value, run_options.get(name), name) for name, value in free_options.items()),
        ):
            if requested_value not in ("auto", run_value):
                raise UserError(
                    f"the run in {path} was trained with {field}={run_value}, but the "
                    f"{option}'s is {requested_value}; use auto"
                )
    note = f"{path}: the run's student after {run.step:,} steps, {network_config.model}"
    return Pretrained(
        network_config, run.classes, run.resolved.class_names, run.student.variables, (note,)
    )


FLOATS = QuantisationConfig()


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network with its weights."""

    network: NetworkConfig  # nothing in it is `auto`
    classes: int  # 0 where it has no head, and so no logits
    class_names: tuple[str, ...] | None
    variables: Variables | None  # None where only its recorded outputs are here
    fingerprint: str  # SHA-256 of the weights, wherever they lie
    notes: tuple[str, ...]  # what was recognised and what was chosen
    function: TeacherFunction | None = None  # of a teacher that is not a network of this package
    # As which it teaches; `network` and `variables` are in floats, as it is evaluated.
    quantisation: QuantisationConfig = FLOATS

    @property
    def has_head(self) -> bool:
        """Whether it has logits."""
        return self.classes > 0

    @property
    def teaching_network(self) -> NetworkConfig:
        """The network that teaches: rounded, where it is to be."""
        return with_quantisation(self.network, self.quantisation)


def load_teachers(config: Config, workdir: pathlib.Path) -> tuple[Teacher, ...]:
    """The teachers of `config`, each from its weights or its run; empty where there is none.

    Raises `UserError`, also where a teacher's run is not complete.
    """
    return tuple(
        _load_teacher(teacher.config, teacher.option, where, config.data)
        for teacher, where in zip(
            teachers_of(config), teacher_workdirs(config, workdir), strict=True
        )
    )


def refuse_other_teachers(
    teachers: tuple[Teacher, ...], expected: tuple[str, ...], whose: str
) -> None:
    """Raises `UserError` where the weights of `teachers` have other fingerprints than `expected`.

    `whose` they are to be, for the message.
    """
    fingerprints = tuple(x.fingerprint for x in teachers)
    if fingerprints != expected:
        raise UserError(
            f"this is not the teacher of {whose}: its weights have SHA-256 "
            f"{' + '.join(fingerprints)}, expected {' + '.join(expected)}"
        )


def teachers_here(config: Config, workdir: pathlib.Path) -> bool:
    """Whether all teachers of `config` lie on this machine."""

    def here(teacher: TeacherConfig, where: str) -> bool:
        if teacher.function:
            return False
        if teacher.weights:
            return not teacher.weights.startswith(PREFIX) and pathlib.Path(teacher.weights).exists()
        return (pathlib.Path(where) / "config.json").is_file()

    pairs = zip(teachers_of(config), teacher_workdirs(config, workdir), strict=True)
    return all(here(teacher.config, teacher_workdir) for teacher, teacher_workdir in pairs)


def only_recorded(config: Config, stored: Config, workdir: pathlib.Path) -> bool:
    """Whether there are no teachers to load, but what a recording holds of them.

    Where `config` names other places of theirs than `stored`, they have to be there.
    """
    has_recording = recording_of(config) is not None and not moved(config, stored)
    return has_recording and not teachers_here(config, workdir)


def recorded_teachers(
    config: Config, workdir: pathlib.Path, recording: Recording
) -> tuple[Teacher, ...]:
    """The teachers that were recorded, with their variables where they lie on this machine.

    Raises `UserError` where those that lie here are others.
    """
    header = recording.header
    if teachers_here(config, workdir):
        teachers = load_teachers(config, workdir)
        fingerprints = tuple(x.fingerprint for x in teachers)
        if any(x.classes > header.classes for x in teachers):
            names = ", ".join((header.class_names or ())[:5]) or f"{header.classes:,} of them"
            raise UserError(
                f"{recording.path} recorded some of the teacher's classes ({names}); give them as "
                "teacher.classes, in the same order"
            )
        if fingerprints != header.teacher_weights:
            raise UserError(
                f"{recording.path} was recorded from other teachers than the run's: their weights "
                f"have SHA-256 {' + '.join(header.teacher_weights)}, and those of the run "
                f"{' + '.join(fingerprints)}; record these, or leave out the teacher's own "
                "location (--teacher.weights None --teacher.workdir None)"
            )
        return teachers
    for option, teacher in teachers_of(config):
        if teacher.classes:
            requested_classes = names_asked(teacher.classes, option)
            refuse_other_recording(
                requested_classes, header.class_names, header.classes, str(recording.path)
            )
    config_code = named_code(config)
    refuse_foreign_code(
        [x.model for x in header.teachers if is_own(x.model) and x.model not in config_code],
        header.code_files,
        str(recording.path),
        recording.path,
    )
    note = f"the teachers are not loaded: their outputs are read from {recording.path}"
    return tuple(
        Teacher(network, header.classes, header.class_names, None, weights, () if i else (note,))
        for i, (network, weights) in enumerate(
            zip(header.teachers, header.teacher_weights, strict=True)
        )
    )


def teacher_workdirs(config: Config, workdir: pathlib.Path) -> tuple[str, ...]:
    """Where the run of each teacher lies, in the order of `teachers_of`.

    As given, else inside the student's workdir in `teacher`, `teacher_2`, ..., or inside of the
    recording, where `fm-distill record` trained them.
    """
    if recording_path := recording_of(config):
        workdir = pathlib.Path(recording_path)
    return tuple(
        x.config.workdir or str(workdir / (f"teacher_{i}" if i > 1 else "teacher"))
        for i, x in enumerate(teachers_of(config), 1)
    )


def _quantised(teacher: Teacher, config: TeacherConfig, option: str) -> Teacher:
    """`teacher`, to be quantised before it teaches. Raises `UserError` where it cannot be."""
    if teacher.network.quantisation.quantised:
        raise UserError(
            f"{option}.quantisation: the run of this teacher was quantised in training, and "
            "teaches with its own ranges; leave it out"
        )
    quantised_teacher = dataclasses.replace(teacher, quantisation=config.quantisation)
    try:
        check_network(quantised_teacher.teaching_network)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None
    return quantised_teacher


def _load_teacher(teacher: TeacherConfig, option: str, where: str, data: DataConfig) -> Teacher:
    """`data` may name its classes where neither its weights nor its run do."""
    loaded = _load_all_classes(teacher, option, where)
    if teacher.quantisation.quantised:
        loaded = _quantised(loaded, teacher, option)
    if not teacher.classes:
        return loaded
    requested_classes = names_asked(teacher.classes, option)
    data_names = named_classes(data)
    names = loaded.class_names or (data_names if len(data_names or ()) == loaded.classes else None)
    choice = chosen(requested_classes, names, loaded.classes, option)
    class_indices = choice.places
    note = (
        f"{option}.classes: {len(class_indices):,} of its {loaded.classes:,} classes, renormalised"
    )
    chosen_teacher = dataclasses.replace(
        loaded, classes=len(class_indices), class_names=choice.names, notes=(*loaded.notes, note)
    )
    if loaded.function is not None:
        return dataclasses.replace(
            chosen_teacher,
            function=function_of(loaded.function, class_indices),
            fingerprint=fingerprint_of(loaded.fingerprint, class_indices),
        )
    assert loaded.variables is not None
    variables = variables_of(loaded.network, loaded.variables, loaded.classes, class_indices)
    return dataclasses.replace(
        chosen_teacher, variables=variables, fingerprint=fingerprint(variables)
    )


def _load_all_classes(teacher: TeacherConfig, option: str, where: str) -> Teacher:
    if teacher.function:
        assert teacher.network is not None
        function, classes, code = load_function(teacher.function, teacher.network, option)
        note = f"{teacher.function}: {classes} classes, at {teacher.network.resolution} pixels"
        return Teacher(teacher.network, classes, None, None, code, (note,), function)
    if not (teacher.weights or teacher.experiment or teacher.workdir):
        raise UserError(
            f"the teacher has no weights: give --{option}.weights FILE (.npz, .safetensors, a "
            f"SavedModel, hf://OWNER/REPO), --{option}.experiment FILE, --{option}.workdir DIR, "
            "or a recording of its outputs with --teacher.recording DIR"
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
