"""The features that terms read: that the networks have them, and which adapters they need."""

import difflib

import jax.numpy as jnp

from fm_distill.config import Config, TermConfig
from fm_distill.config.objective import BANK_SIMILARITY
from fm_distill.config.teachers import recording_of
from fm_distill.errors import UserError
from fm_distill.models import Network, build_network
from fm_distill.objectives.adapters import AdapterShape
from fm_distill.objectives.features import ADAPTED, OF_FEATURES, OF_MAPS
from fm_distill.objectives.terms import features_of, named_terms
from fm_distill.preparation.check import check
from fm_distill.preparation.experiment import load_experiment
from fm_distill.preparation.resolve import described_student
from fm_distill.train_step.term_state import TermShapes

FLOAT32 = jnp.dtype("float32")
Shape = tuple[int, ...]


def check_features(
    config: Config, examples: int, student: Network, teachers: tuple[Network, ...]
) -> TermShapes:
    """The adapters and banks of the terms; `examples` are those of the training split.

    Raises `UserError` where a term reads a feature that is not there, or two that cannot be
    compared, or where a bank does not fit the data.
    """
    adapters, banks = {}, {}
    for i, (name, term) in enumerate(named_terms(config.objective)):
        if term.kind not in OF_FEATURES:
            continue
        option = f"objective.terms.{i}"
        if not teachers:
            raise UserError(
                f"{option}.teacher_tap is {term.teacher_tap!r}, and the teacher is a function, "
                "which returns only logits; leave the term out"
            )
        student_shape = _shape(f"{option}.student_tap", "student", student, term, term.student_tap)
        teacher_shape = _shape(
            f"{option}.teacher_tap", "teacher", teachers[0], term, term.teacher_tap
        )
        if recording_of(config) is not None and len(teacher_shape) > 1:
            raise UserError(
                f"{option}: {term.teacher_tap} has shape {teacher_shape} per image, and "
                f"teacher.recording holds its mean over the positions; give {option}.pool=mean"
            )
        if term.kind in ADAPTED:
            _check_pair(option, term, student_shape, teacher_shape)
            if term.adapter != "none":
                batch_norm = term.adapter == "batch_norm"
                adapters[name] = AdapterShape(student_shape[-1], teacher_shape[-1], batch_norm)
        if term.kind == BANK_SIMILARITY:
            _check_bank(f"{option}.bank.rows", term.bank.rows, config.batch_size, examples)
            banks[name] = term.bank.rows, teacher_shape[-1]
    return TermShapes(adapters, banks)


def check_features_of_experiment(config: Config, examples: int) -> None:
    """`check_features` where the teacher is an experiment that may yet have to be trained.

    Raises `UserError`, before that takes its time. Which channels are pruned is known later.
    """
    path = config.teacher and config.teacher.experiment
    if not path or recording_of(config) is not None or not any(features_of(config.objective)):
        return
    configs = config, load_experiment(path)
    check(configs[1])
    if any(x.student.pruning.pattern == "channels" for x in configs):
        return
    # Classes are known with the data; they change no feature.
    student, teacher = (build_network(described_student(x), 2, FLOAT32) for x in configs)
    check_features(config, examples, student, (teacher,))


def _shape(option: str, side: str, network: Network, term: TermConfig, name: str | None) -> Shape:
    """That of what `term` reads of the feature called `name`, without the batch."""
    assert name is not None
    shape = feature_shape(option, side, network, name)
    if term.pool == "mean":
        return shape[-1:]
    if term.kind == BANK_SIMILARITY and len(shape) != 1:
        shapes = network.feature_shapes()
        vectors = [x for x, shape in shapes.items() if len(shape) == 2]
        raise UserError(
            f"{option}: {term.kind} compares vectors, and {name} has shape {shape} per image; use "
            f"one of {', '.join(vectors)}, or the term's pool=mean"
        )
    if term.kind in OF_MAPS and len(shape) != 3:
        shapes = network.feature_shapes()
        maps = [x for x, shape in shapes.items() if len(shape) == 4]
        raise UserError(
            f"{option}: {term.kind} compares maps, and {name} has shape {shape} per image; use "
            f"one of {', '.join(maps)}"
        )
    return shape


def feature_shape(option: str, side: str, network: Network, name: str) -> Shape:
    """That of the feature called `name`, without the batch. Raises `UserError` where it is not."""
    named_shapes = network.feature_shapes()
    shapes = named_shapes if name in named_shapes else network.feature_shapes(modules=True)
    if name in shapes:
        return shapes[name][1:]
    if not shapes:
        raise UserError(f"{option} is {name!r}, and the {side} has no named features")
    matches = difflib.get_close_matches(name, shapes, 1) or [*shapes][-1:]
    raise UserError(
        f"{option} is {name!r}, which the {side} does not have; did you mean {matches[0]!r}? It "
        f"has {', '.join(named_shapes)}, and its modules (`fm-distill show --taps --modules`)"
    )


def _check_bank(option: str, rows: int, batch_size: int, examples: int) -> None:
    most_rows = examples // batch_size * batch_size
    if rows > examples:
        raise UserError(
            f"{option}={rows} are more than the {examples:,} examples that there are, so that each "
            f"image would be compared with itself; use {most_rows} or less"
        )
    if rows % batch_size:
        raise UserError(
            f"{option}={rows} is not divisible by batch_size={batch_size}; use "
            f"{rows // batch_size * batch_size or batch_size}"
        )


def _check_pair(option: str, term: TermConfig, of_student: Shape, of_teacher: Shape) -> None:
    if len(of_student) != len(of_teacher):
        raise UserError(
            f"{option}: no adapter joins {term.student_tap} of shape {of_student} and "
            f"{term.teacher_tap} of shape {of_teacher}; use two maps, two vectors, or "
            f"{option}.pool=mean"
        )
    if term.adapter == "none" and of_student[-1] != of_teacher[-1]:
        raise UserError(
            f"{option}.adapter=none needs the same number of channels on both sides, and "
            f"{term.student_tap} has {of_student[-1]}, {term.teacher_tap} {of_teacher[-1]}; use "
            "convolution or batch_norm"
        )
