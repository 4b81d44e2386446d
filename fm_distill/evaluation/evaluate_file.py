"""A file of `export` evaluated as its run is: on every example of a split, with the run's teacher.

By its card: config, classes and step of the run. Its own runtime computes the file, on whole grey
levels; mixed images of the training view are rounded to them as well.
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Bool

from fm_distill.config import Config, MeshConfig
from fm_distill.config.code import IMAGES, STUDENT, TEACHERS, named_code
from fm_distill.config.serialization import converted, refuse_other_config
from fm_distill.config.teachers import teachers_of
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import Reader, evaluation_batches
from fm_distill.data.splits import open_named
from fm_distill.errors import UserError
from fm_distill.evaluation.evaluate import (
    Evaluator,
    evaluation_views,
    teacher_logits,
)
from fm_distill.evaluation.inference import teachers_if_here
from fm_distill.evaluation.sums import Sums, sums_of
from fm_distill.exporting.function import in_batches
from fm_distill.exporting.load_exported import ExportedStudent, card_of, load_exported
from fm_distill.models import Variables, is_own
from fm_distill.networks.branch import Branch, frozen_teachers, make_branch
from fm_distill.networks.teachers import (
    Teacher,
    load_teachers,
    only_recorded,
    refuse_other_teachers,
)
from fm_distill.system.foreign_code import refuse_foreign_code
from fm_distill.system.sharding import make_layout
from fm_distill.views.rendering import as_pixels
from fm_distill.weights.card import Card

# A file of probabilities may hold a 0 of which the logarithm is needed.
SMALLEST_PROBABILITY = 1e-7


def config_in(path: str | os.PathLike[str]) -> Config:
    """The config of the run that `path` was exported from. Raises `UserError`."""
    return config_of_card(card_of(path), path)


def evaluate_file(
    path: str | os.PathLike[str], split: str = "test", config: Config | None = None
) -> dict[str, Any]:
    """The student in `path`, and the teacher of its run, on every example of `split` exactly once.

    Returns the figures of `evaluate.summarise`. `config` may name new places of data and teacher.
    Where the teacher is not here, and no other place is named, only labels judge. Raises
    `UserError`.
    """
    exported = load_exported(path)
    card, stored = exported.card, config_of_card(exported.card, path)
    config = config or stored
    refuse_other_config(stored, config, f"the run of {path}")
    refuse_code_of_file(path, card, stored, config, (*STUDENT, *IMAGES))
    reader = Reader(open_named(config, split), config.data, card.classes)
    teachers = teachers_of_file(pathlib.Path(path), card, stored, config)
    layout = make_layout(MeshConfig(data=1), jax.local_devices()[:1])
    branches = tuple(
        make_branch(x.network, card.classes, jnp.dtype(card.precision)) for x in teachers
    )
    frozen = frozen_teachers(branches, tuple(x.variables for x in teachers if x.variables), layout)
    program = _program(exported, branches, config)
    evaluator = Evaluator(program, layout, card.classes)
    batches = evaluation_batches(reader, config.batch_size)
    figures = evaluator(Variables({}, {}), frozen, batches, split, card.step)
    return figures | {"runtime": exported.runtime.name}


def config_of_card(card: Card, path: str | os.PathLike[str]) -> Config:
    """The config of the run that `path` was exported from, on its `card`. Raises `UserError`."""
    try:
        return converted(card.config, Config)
    except msgspec.ValidationError as error:
        raise UserError(
            f"{path}: the config on its card does not fit this version ({error}); export it again "
            "with this one"
        ) from None


def teachers_of_file(
    path: pathlib.Path, card: Card, stored: Config, config: Config
) -> tuple[Teacher, ...]:
    """Those of the run of the file at `path`, checked to be its own; none where they are not here.

    Those without a head are left out. `config` may name new places of those in `stored`. Raises
    `UserError`.
    """
    if not teachers_of(config):
        return ()

    def load() -> tuple[Teacher, ...]:
        if only_recorded(config, stored, path.parent):
            raise UserError("only its recorded outputs are available")
        refuse_code_of_file(path, card, stored, config, TEACHERS)
        teachers = load_teachers(config, path.parent)
        if any(x.variables is None for x in teachers):
            raise UserError("it is a custom function")
        return teachers

    loaded = teachers_if_here(load, stored, config)
    if loaded and card.teacher_weights:  # older cards lack them
        refuse_other_teachers(loaded, card.teacher_weights, f"the run of {path}")
    return tuple(x for x in loaded if x.has_head)


def refuse_code_of_file(
    path: str | os.PathLike[str],
    card: Card,
    stored: Config,
    config: Config,
    sections: tuple[str, ...],
) -> None:
    """Raises `UserError` where code that the card of `path` names may not be run.

    `sections` of `config` are asked; what they name otherwise than `stored` is the user's own.
    """
    stored_code = named_code(stored)
    references = [x for x in named_code(config, sections) if x in stored_code]
    if "student" in sections and is_own(card.model):
        references.append(card.model)
    refuse_foreign_code(dict.fromkeys(references), card.code_files, str(path))


def _program(
    exported: ExportedStudent, teachers: tuple[Branch, ...], config: Config
) -> Callable[..., Sums]:
    """As `evaluate.make_evaluation_step`, with the file instead of the student."""
    card = exported.card
    student = make_branch(card.network, card.classes, jnp.dtype("float32"))
    student = student.on_whole_grey_levels()

    @jax.jit
    def seen(
        frozen: tuple[Variables, ...], batch: Batch, mask: Bool[Array, " batch"], index: Array
    ) -> tuple[tuple[Array, ...], tuple[Array, ...], Array]:
        rendered = evaluation_views(student, teachers, config.views, batch, mask, index)
        pixels = tuple(as_pixels(x[student.input_spec], student.input_spec) for x in rendered.views)
        teacher_outputs = tuple(
            teacher_logits(teachers, frozen, x, config.objective)
            for x in rendered.views
            if teachers
        )
        return pixels, teacher_outputs, rendered.both

    @jax.jit
    def sums(
        student_outputs: tuple[Array, ...],
        teacher_outputs: tuple[Array, ...],
        labels: Array,
        mask: Array,
        both: Array,
    ) -> Sums:
        return sums_of(student_outputs, teacher_outputs, labels, mask, both, config.objective, None)

    def program(
        _: Variables, frozen: tuple[Variables, ...], batch: Batch, mask: Array, index: Array
    ) -> Sums:
        pixels, teacher_outputs, both = seen(frozen, batch, mask, index)
        student_outputs = tuple(_logits(exported, np.asarray(x)) for x in pixels)
        return sums(student_outputs, teacher_outputs, batch.labels, mask, both)

    return program


def _logits(exported: ExportedStudent, pixels: np.ndarray) -> np.ndarray:
    """What the file returns, or the logarithm of it, which is as good as logits."""
    facts, classes = exported.facts, exported.card.classes
    outputs = in_batches(exported.runtime.call, pixels, facts.batch, classes)
    if facts.output == "logits":
        return outputs
    return np.log(np.maximum(outputs, SMALLEST_PROBABILITY))
