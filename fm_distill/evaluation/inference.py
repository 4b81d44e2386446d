"""A run that lies in a workdir, put to use: evaluated on a split, or asked about own images."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_distill.config import Config, MeshConfig
from fm_distill.config.serialization import differences
from fm_distill.data.feeding import Reader, evaluation_batches
from fm_distill.data.images import CorruptImage, decode, on_canvas, shrink
from fm_distill.data.sources import open_source
from fm_distill.data.splits import split_of
from fm_distill.errors import UserError
from fm_distill.evaluation.evaluate import Evaluator
from fm_distill.models import Variables
from fm_distill.networks.branch import Branch, frozen_teachers, make_branch
from fm_distill.networks.teachers import load_teachers
from fm_distill.runs.open_run import Run, open_run
from fm_distill.system.sharding import Layout, make_layout, on_devices
from fm_distill.views.rendering import render_central


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run's networks on the devices, and the split that they are asked about."""

    run: Run
    config: Config
    student_branch: Branch
    teacher_branches: tuple[Branch, ...]
    layout: Layout
    student: Variables
    frozen: tuple[Variables, ...]  # of all teachers
    reader: Reader
    batch_size: int


def evaluate(
    workdir: str | os.PathLike[str],
    split: str = "test",
    config: Config | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Student and teacher of the run in `workdir` on every example of `split` exactly once.

    Returns the figures of `evaluate.summarise`: accuracies and agreement as fractions of 1, KL
    and cross-entropy in nats. `config` may name new places of data and teacher. Where the run
    keeps an average of the student, that is evaluated. `step` names a checkpoint; else it is the
    newest. Raises `UserError`.
    """
    opened = open_split(workdir, split, config, step)
    batches = evaluation_batches(opened.reader, opened.batch_size)
    evaluator = Evaluator.make(
        opened.config, opened.student_branch, opened.teacher_branches, opened.layout
    )
    return evaluator(opened.student, opened.frozen, batches, split, opened.run.step)


def open_split(
    workdir: str | os.PathLike[str],
    split: str,
    config: Config | None = None,
    step: int | None = None,
) -> Opened:
    """What `evaluate` needs, checked to be the run's own. Raises `UserError`."""
    run = open_run(workdir, step)
    config = config or run.config
    if differ := differences(run.config, config):
        raise UserError(f"the run in {workdir} was trained otherwise:\n  " + "\n  ".join(differ))
    source = open_source(config.data, split_of(config, split).name)
    teachers = load_teachers(config, run.workdir.path)
    weights, expected = tuple(x.fingerprint for x in teachers), run.resolved.teacher_weights
    if teachers and weights != expected:
        raise UserError(
            f"this is not the teacher of the run in {workdir}: its weights have SHA-256 "
            f"{' + '.join(weights)}, expected {' + '.join(expected)}"
        )
    layout = _evaluation_layout(config)
    dtype = jnp.dtype(run.resolved.precision)
    branches = tuple(make_branch(teacher.network, run.classes, dtype) for teacher in teachers)
    return Opened(
        run=run,
        config=config,
        student_branch=make_branch(run.network, run.classes, dtype),
        teacher_branches=branches,
        layout=layout,
        student=on_devices(run.student, layout.variables(run.student)),
        frozen=frozen_teachers(branches, tuple(x.variables for x in teachers), layout),
        reader=Reader(source, config.data, run.classes),
        # Whole batches for any number of devices; the mask takes care of the rest.
        batch_size=-(-config.batch_size // layout.mesh.size) * layout.mesh.size,
    )


def _evaluation_layout(config: Config) -> Layout:
    """All devices, whatever the run was trained on."""
    fsdp = config.mesh.fsdp
    return make_layout(MeshConfig(fsdp=fsdp if jax.device_count() % fsdp == 0 else 1))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a student says of one image: classes by falling probability."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    workdir: str | os.PathLike[str], images: list[str | os.PathLike[str]], top: int = 5
) -> list[Prediction]:
    """The `top` classes of each image file, by the student of the run in `workdir`.

    Each image gets the central view of evaluation. Raises `UserError` for a file that is no image.
    """
    run = open_run(workdir)
    config = run.config
    branch = make_branch(run.network, run.classes, jnp.dtype(run.resolved.precision))
    names = run.class_names

    @jax.jit
    def probabilities(canvas: jax.Array, size: jax.Array) -> jax.Array:
        view = render_central(canvas, size, config.views.central_fraction, branch.input_spec)
        return jax.nn.softmax(branch.network.apply(run.student, view, train=False).logits)[0]

    found = []
    for image in images:
        path = pathlib.Path(image)
        if not path.is_file():
            raise UserError(f"there is no image {path}")
        try:
            pixels = shrink(decode(path.read_bytes()), config.data.canvas)
        except CorruptImage as error:
            raise UserError(f"{path} is not a whole image ({error})") from None
        canvas = on_canvas(pixels, config.data.canvas.side)[None]
        p = np.asarray(probabilities(canvas, jnp.array([pixels.shape[:2]])))
        best = np.argsort(-p, kind="stable")[:top]
        found.append(
            Prediction(str(path), tuple(names[i] for i in best), tuple(float(p[i]) for i in best))
        )
    return found
