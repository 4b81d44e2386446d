"""The outputs of a run's teachers on its own views, recorded: `fm-distill record`.

What was written stays: a session continues where the recording has a gap. The passes themselves are
in `recorder.py`.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from fm_distill.config import Config, NetworkConfig
from fm_distill.config.steps import total_steps
from fm_distill.config.teachers import recording_of, teachers_of
from fm_distill.data.feeding import Reader
from fm_distill.data.splits import open_data
from fm_distill.errors import UserError
from fm_distill.models import build_network
from fm_distill.models import resolve as resolve_network
from fm_distill.networks.loading import check_student_weights
from fm_distill.objectives.terms import temperature_of_rest
from fm_distill.preparation.check import check
from fm_distill.preparation.check_features import check_features_of_experiment, feature_shape
from fm_distill.preparation.experiment import load_experiment
from fm_distill.preparation.open_networks import open_networks
from fm_distill.preparation.resolve import resolve, with_any_moments
from fm_distill.recordings.header import (
    RecordedTap,
    RecordingHeader,
    header_differences,
    rendered,
)
from fm_distill.recordings.manifest import Recording, is_recording, open_recording, present
from fm_distill.recordings.rows import RowType
from fm_distill.recordings.writing import step_bytes
from fm_distill.system.compilation_cache import COMPILED
from fm_distill.system.console import log
from fm_distill.system.files import lock, refuse_foreign
from fm_distill.system.preemption import Stop
from fm_distill.system.sharding import check_batch_size, make_layout
from fm_distill.training.recorded import make_header
from fm_distill.training.recorder import Recorder
from fm_distill.training.train import train_teachers
from fm_distill.weights.card import only_network

# What is in the folder of a recording before its first shard.
BEFORE_THE_FIRST = re.compile(
    r"lock|arriving|(manifest|steps)-.*|teacher(_\d+)?|quantised_teachers\.json(\.tmp)?|" + COMPILED
)


@dataclasses.dataclass(frozen=True)
class RecordResult:
    """How far a recording got."""

    complete: bool
    recording: Recording | None  # None: its teachers come first, and are not complete
    reason: str = ""  # why it is not complete
    hours_left: float | None = None


def record(
    config: Config,
    to: str | os.PathLike[str],
    stop: Stop,
    *,
    steps: tuple[int, int | None] = (0, None),
    dtype: RowType = "float16",
    top_k: int | None = None,
    taps: tuple[str, ...] = (),
) -> RecordResult:
    """Records the outputs of the teachers of `config` in `steps` of its run, in the folder `to`.

    Of the features of the teacher that `taps` name, the means over the positions are recorded too.
    Steps that are there are not done again. Teachers that are experiments are trained first, in
    `to`. Raises `UserError`, also where the folder belongs to another recording.
    """
    _check(config, top_k, taps)
    folder = pathlib.Path(to)
    layout = make_layout(config.mesh)
    check_batch_size(config, layout)
    data, warnings = open_data(config)
    for warning in warnings:
        log(warning)
    # What is known without the teachers comes before the training of one.
    total = total_steps(config, len(data.train))
    first, last = _range(steps, min(config.views.period_steps or total, total))
    _check_top_k(top_k, data.train.classes or config.data.classes)
    check_features_of_experiment(config, len(data.train))
    check_student_weights(config)
    if is_recording(folder) and (
        mismatches := header_differences(open_recording(folder).header, rendered(config))
    ):
        raise _another(folder, mismatches)
    with _locked(folder):
        if not train_teachers(config, folder, stop):
            reason = stop.reason() or "its teacher is not complete"
            return RecordResult(False, None, reason)
        networks = open_networks(config, folder, data)
        if not all(teacher.has_head for teacher in networks.teachers):
            raise UserError(
                "a recording holds the teacher's logits, and the teacher has no head: train with "
                "the teacher itself, without a recording"
            )
        # The student's moments are those of no data: it sees nothing here.
        facts = with_any_moments(networks.facts)
        resolved = resolve(config, data.facts, facts, layout)
        for note in networks.notes:
            log(note)
        _check_top_k(top_k, resolved.classes)
        features = _taps(resolved.teachers[0], resolved.classes, taps)
        header = make_header(config, resolved, dtype, top_k, features)
        existing = _before(folder, header)
        missing = existing.missing(first, last)
        count = sum(b - a for a, b in missing)
        needed_bytes = count * step_bytes(header)
        _check_space(folder, needed_bytes)
        log(
            f"recording steps {first:,} to {last:,} of {resolved.total_steps:,} in {folder}: "
            f"{count:,} to do, {needed_bytes / 1e6:,.1f} MB"
        )
        if not missing:
            return RecordResult(True, existing)
        reader = Reader(data.train, config.data, resolved.classes)
        teachers = networks.teachers
        recorder = Recorder.make(config, resolved, teachers, reader, layout, header, folder)
        recorder.check(existing)
        reason, hours_left = recorder.run(folder, missing, stop)
    return RecordResult(not reason, open_recording(folder), reason, hours_left)


def _check(config: Config, top_k: int | None, taps: tuple[str, ...]) -> None:
    check(config)
    if taps:
        _check_taps(config, taps)
    if recording_of(config) is not None:
        raise UserError("teacher.recording is what `record` writes; leave it out and give --to")
    if config.objective.target == "labels" or config.teaching == "fixed":
        raise UserError(
            "there is nothing to record: objective.target=labels and teaching=fixed do not run "
            "the teacher in each step"
        )
    if top_k is not None:
        if top_k < 1:
            raise UserError(f"--top-k is {top_k}; expected 1 or more")
        temperature_of_rest(config.objective)
    if jax.process_count() > 1:
        raise UserError(
            "record runs in one process; give each its own --steps and --to, and move all files "
            "into one folder"
        )


def _check_taps(config: Config, taps: tuple[str, ...]) -> None:
    """Features are those of one teacher, which is a network. Of an experiment it is known here."""
    for option, teacher in teachers_of(config):
        if teacher.function:
            raise UserError(
                f"--taps names features of a network, and {option}.function returns only logits; "
                "leave out one of them"
            )
        if teacher.experiment:
            student = load_experiment(teacher.experiment).student
            # Names alone: classes are known with its data.
            _taps(resolve_network(only_network(student)), 2, taps)
    if config.more_teachers:
        raise UserError(
            "--taps names features of one teacher, and there are more_teachers; leave out one of "
            "them"
        )


def _taps(teacher: NetworkConfig, classes: int, taps: tuple[str, ...]) -> tuple[RecordedTap, ...]:
    """Those that are asked for, each once. Raises `UserError` where the teacher has not one."""
    if not taps:
        return ()
    network = build_network(teacher, classes, jnp.dtype("float32"))

    def channels(name: str) -> int:
        return feature_shape("--taps", "teacher", network, name)[-1]

    return tuple(RecordedTap(x, channels(x)) for x in sorted({*taps}))


def _check_top_k(top_k: int | None, classes: int | None) -> None:
    if top_k is not None and classes is not None and top_k >= classes:
        raise UserError(f"--top-k is {top_k}; expected less than the {classes} classes")


def _range(steps: tuple[int, int | None], most: int) -> tuple[int, int]:
    first, last = steps[0], most if steps[1] is None else steps[1]
    if not 0 <= first < last <= most:
        raise UserError(f"--steps is {first}:{last}; expected a range within 0:{most}")
    return first, last


def _before(folder: pathlib.Path, header: RecordingHeader) -> Recording:
    """What is recorded in `folder`. Raises `UserError` where it is another recording."""
    if not is_recording(folder):
        return Recording(folder, header, ())
    recording = open_recording(folder)
    if recording.header.identity != header.identity:
        current_fields = {
            name: value
            for name, value in vars(header).items()
            if name not in ("golden", "format", "code_files")
        }
        raise _another(folder, header_differences(recording.header, current_fields))
    return present(recording)


def _another(folder: pathlib.Path, differ: list[str]) -> UserError:
    return UserError(
        f"{folder} holds another recording:\n  "
        + "\n  ".join(differ)
        + "\nchoose another --to, or give these values"
    )


def _check_space(folder: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the recording needs {needed / 1e9:,.2f} GB and {folder} has {free / 1e9:,.2f} GB "
            "free; record fewer steps (--steps), fewer classes (--top-k), or on another disk"
        )


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; give --to a folder for the recording")
        if folder.is_dir() and not is_recording(folder):
            refuse_foreign(folder, BEFORE_THE_FIRST, "the folder of a recording", "--to")
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("w")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    with handle:
        if not lock(handle):
            raise UserError(
                f"{folder} is in use by another process; wait for it, or record another range "
                "(--steps) to another folder and move its files here"
            )
        yield
