"""The networks of a run with the weights that they come with, agreed on their classes."""

import dataclasses
import itertools
import pathlib

from fm_distill.config import Config, NetworkConfig, PruningConfig
from fm_distill.config.resolved import RecordingFacts, WeightFacts
from fm_distill.config.teachers import recording_of, teachers_of
from fm_distill.data.class_names import named_classes
from fm_distill.errors import UserError
from fm_distill.models import build_network, resolve
from fm_distill.networks.channel_scores import FLOAT32, read_scores
from fm_distill.networks.shrinking import shrunk
from fm_distill.networks.teachers import (
    Teacher,
    load_pretrained,
    load_teachers,
    recorded_teachers,
)
from fm_distill.recordings.manifest import Recording, open_recording
from fm_distill.runs.workdir import Workdir
from fm_distill.weights.card import only_network
from fm_distill.weights.files import EXPECTED
from fm_distill.weights.hub import PREFIX
from fm_distill.weights.load import Pretrained, fingerprint


@dataclasses.dataclass(frozen=True)
class Networks:
    """Student and teachers; their configs no longer have an `auto`."""

    student: NetworkConfig
    pretrained: Pretrained | None  # what the student starts from
    teachers: tuple[Teacher, ...]
    classes: int
    class_names: tuple[str, ...] | None
    recording: Recording | None = None  # of the teachers' outputs
    # Whether the run has yet to choose, by its gradient, which channels of the student stay.
    undecided: bool = False

    @property
    def facts(self) -> WeightFacts:
        """What the run depends on of its networks."""
        teaching_networks = tuple(teacher.teaching_network for teacher in self.teachers)
        return WeightFacts(
            student=self.student,
            # Those that were recorded, whether they are here or not.
            teachers=self.recording.header.teachers if self.recording else teaching_networks,
            classes=self.classes,
            class_names=self.class_names,
            student_weights=fingerprint(self.pretrained.variables) if self.pretrained else None,
            teacher_weights=tuple(teacher.fingerprint for teacher in self.teachers),
            recording=RecordingFacts(
                str(self.recording.path),
                self.recording.header.identity,
                self.recording.steps,
                self.recording.ranges,
            )
            if self.recording
            else None,
            headless=any(not teacher.has_head for teacher in self.teachers),
        )

    @property
    def notes(self) -> list[str]:
        """What was recognised in weight files and chosen for them."""
        teacher_notes = [note for teacher in self.teachers for note in teacher.notes]
        return [*teacher_notes, *(self.pretrained.notes if self.pretrained else ())]


def load_networks(
    config: Config,
    workdir: pathlib.Path,
    data_classes: int | None,
    data_names: tuple[str, ...] | None,
) -> Networks:
    """All weights of the run, read and checked. Raises `UserError`.

    The student has the channels that stay, but where these are chosen by gradient and the run in
    `workdir` has not chosen yet.
    """
    recording = None
    if path := recording_of(config):
        recording = open_recording(path)
        teachers = recorded_teachers(config, workdir, recording)
    else:
        teachers = load_teachers(config, workdir)
    # Where some of the teacher's classes are chosen, `data.class_names` named all of them.
    if not any(teacher.classes for _, teacher in teachers_of(config)):
        config_names = named_classes(config.data)
        recorded_names = recording.header.class_names if recording else None
        only_some = config_names and recorded_names and len(recorded_names) < len(config_names)
        data_names = data_names or (None if only_some else config_names)
    pretrained, undecided = None, False
    if config.student.weights:
        pretrained = load_pretrained(config.student.weights, config.student, "student")
        pretrained, undecided = _with_channels(pretrained, config.student.pruning, Workdir(workdir))
    classes = agreed_classes(config.data.classes, data_classes, data_names, teachers)
    if data_names and len(data_names) != classes:
        raise UserError(
            f"data.class_names={config.data.class_names} has {len(data_names):,} names, and the "
            f"run has {classes:,} classes; give a name for each class"
        )
    return Networks(
        student=pretrained.network if pretrained else resolve(only_network(config.student)),
        pretrained=pretrained,
        teachers=teachers,
        classes=classes,
        class_names=data_names or next((t.class_names for t in teachers if t.class_names), None),
        recording=recording,
        undecided=undecided,
    )


def check_student_weights(config: Config) -> None:
    """Raises `UserError` where they are not there, before a teacher is trained for hours."""
    path = config.student.weights
    if path and not path.startswith(PREFIX) and not pathlib.Path(path).exists():
        raise UserError(f"student.weights is {path}, which does not exist; {EXPECTED}")


def agreed_classes(
    requested: int | None,
    data_classes: int | None,
    data_names: tuple[str, ...] | None,
    teachers: tuple[Teacher, ...],
) -> int:
    """Number of classes of the student. Raises `UserError` where its sources do not agree."""
    counts_by_source: dict[str, int | None] = {
        "data.classes": requested,
        "the data's labels": data_classes,
    }
    names_by_source = {"the data": data_names}
    for i, teacher in enumerate(teachers, 1):
        source = "the teacher" if i == 1 else f"teacher {i}"
        counts_by_source[f"{source}'s head"] = teacher.classes or None
        names_by_source[source] = teacher.class_names
    known_counts = {name: count for name, count in counts_by_source.items() if count is not None}
    if not known_counts:
        headless = " and the teacher no head" if teachers else ""
        raise UserError(
            f"the number of classes is unknown: the data have no labels{headless}; set data.classes"
        )
    if len(set(known_counts.values())) > 1:
        listing = ", ".join(f"{name}: {count}" for name, count in known_counts.items())
        raise UserError(
            f"the number of classes differs ({listing}); use a teacher that was trained on these "
            "classes, choose some of its classes with teacher.classes, or set data.classes"
        )
    known_names = [(source, x) for source, x in names_by_source.items() if x]
    for (first_source, first_names), (second_source, second_names) in itertools.pairwise(
        known_names
    ):
        for i, (left, right) in enumerate(zip(first_names, second_names, strict=True)):
            if left != right:
                raise UserError(
                    f"class {i} is {left!r} in {first_source} and {right!r} in {second_source}: "
                    "both must have the same classes in the same order; use a teacher that "
                    "was trained on these"
                )
    return next(iter(known_counts.values()))


def _with_channels(
    start: Pretrained, pruning: PruningConfig, workdir: Workdir
) -> tuple[Pretrained, bool]:
    """`start` with the channels that stay, and whether they have yet to be chosen."""
    if pruning.pattern != "channels":
        return start, False
    if not pruning.by_gradient:
        return shrunk(start, pruning), False
    # Without a config it is unknown which run these scores belong to.
    scores = None
    if workdir.has_config():
        blocks = build_network(start.network, 2, FLOAT32).inner_channels
        scores = read_scores(workdir.channel_scores, blocks)
    return (start, True) if scores is None else (shrunk(start, pruning, scores), False)
