"""Experiment files: Python files that define `config`."""

import dataclasses
import os
import pathlib
import re
import runpy

from fm_distill.config import Config, TeacherConfig
from fm_distill.config.code import code_options
from fm_distill.config.serialization import changed, flatten, from_json, to_json
from fm_distill.config.steps import total_steps, transfer_examples
from fm_distill.config.teachers import teachers_of
from fm_distill.errors import UserError
from fm_distill.train_step.optim import decay_equivalent

# Python's words for a field that a dataclass needs, and for one that it does not have.
LEFT_OUT = re.compile(r"(\w+)\.__init__\(\) missing \d+ required keyword-only arguments?: (.*)")
UNKNOWN = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument ('\w+')")


def load_experiment(path: str | os.PathLike[str]) -> Config:
    """The `config` of an experiment file; `check` says whether it can be run.

    A relative `teacher.experiment` in the file is relative to the file. Raises `UserError` where
    the file is missing, fails, or defines no config.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"there is no experiment file {path}; give the path of a .py file")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        if omitted := LEFT_OUT.search(str(error)):
            raise UserError(
                f"{path} does not set what {omitted[1]} needs: {omitted[2]}; set it in the file"
            ) from error
        if unknown_field := UNKNOWN.search(str(error)):
            raise UserError(
                f"{path}: {unknown_field[1]} has no field {unknown_field[2]}; `fm-distill show` "
                "lists them"
            ) from error
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(
            f"{path} defines no `config = fm_distill.Config(...)`; got {type(config).__name__}"
        )
    try:
        config = from_json(to_json(config))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    references = code_options(config)
    local_references = {
        option: _code_from_here(reference, path) for option, reference in references.items()
    }
    config = changed(
        config,
        {
            option: reference
            for option, reference in local_references.items()
            if reference != references[option]
        },
    )
    return dataclasses.replace(
        config,
        teacher=config.teacher and _beside(config.teacher, path),
        more_teachers=tuple(_beside(teacher, path) for teacher in config.more_teachers),
    )


def check_chain(config: Config, above: tuple[str, ...] = ()) -> None:
    """Raises `UserError` where an experiment is, through its teachers, a teacher of its own."""
    for _, teacher in teachers_of(config):
        if not teacher.experiment:
            continue
        file = os.path.relpath(teacher.experiment)
        if file in above:
            raise UserError(
                f"teacher.experiment refers back to itself: {' -> '.join(above)} -> {file}; a "
                "chain of teachers must end in one that learns from labels, or in weights"
            )
        check_chain(load_experiment(file), (*above, file))


def _beside(teacher: TeacherConfig, file: pathlib.Path) -> TeacherConfig:
    """With the paths of its code from where we are, not from the file's folder."""
    if teacher.experiment:
        teacher = dataclasses.replace(teacher, experiment=_from_here(teacher.experiment, file))
    return teacher


def _code_from_here(reference: str, file: pathlib.Path) -> str:
    """`FILE.py:NAME` with the file's path from here; anything else as it is."""
    path, _, name = reference.rpartition(":")
    return f"{_from_here(path, file)}:{name}" if path.endswith(".py") else reference


def _from_here(path: str, file: pathlib.Path) -> str:
    candidate = file.parent / path
    if os.path.isabs(path) or (not candidate.is_file() and os.path.isfile(path)):
        return path  # of another file, from which this one derives
    return os.path.relpath(candidate)


def describe(config: Config) -> str:
    """The resolved config as text, one option a line, and what follows from it."""
    lines = [f"{name} = {value}" for name, value in flatten(config).items()]
    return "\n".join([*lines, "", *_notes(config)])


def _notes(config: Config) -> list[str]:
    examples = transfer_examples(config.data)
    notes = [f"# weight decay: {decay_equivalent(config.optimizer)}"]
    if examples:
        steps = total_steps(config, examples)
        epochs = steps * config.batch_size / examples
        notes.append(f"# length: {steps:,} steps, {epochs:,.1f} epochs of {examples:,} examples")
    return notes
