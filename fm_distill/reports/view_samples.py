"""What the networks saw: training examples as a step of the run drew and rendered them.

The same keys, order, draw and rendering as in `step.py`, for a few examples of the batch.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from fm_distill.config import Config, MeshConfig
from fm_distill.config.regime import regime_of
from fm_distill.data.feeding import Reader, TrainingStream
from fm_distill.data.target_images import view_root
from fm_distill.data.transfer import open_training
from fm_distill.runs.workdir import Workdir
from fm_distill.system.sharding import make_layout
from fm_distill.views.draws import Draw, ViewRoot, step_draws
from fm_distill.views.rendering import CentralCrop, InputSpec, as_pixels, render, render_central

STEPS = 4  # the first ones: a mixup coefficient belongs to a batch, so one step shows only one
EXAMPLES = 2  # of each


@dataclasses.dataclass(frozen=True)
class NetworkView:
    """What one network saw of the shown examples."""

    name: str
    pictures: UInt8[np.ndarray, "examples resolution resolution 3"]


@dataclasses.dataclass(frozen=True)
class ViewSamples:
    """Some training examples of a run, as each network saw them."""

    titles: tuple[str, ...]  # one an example: its step and its mixture
    seen: tuple[NetworkView, ...]  # the student first
    note: str  # what the pictures do not show


def sample_views(config: Config, workdir: Workdir) -> ViewSamples:
    """The first `EXAMPLES` of the batches of the first `STEPS` steps of the run in `workdir`.

    `config` is the run's, perhaps with another place of the data. Raises `UserError` where the
    data are not there.
    """
    resolved = workdir.stored().resolved
    regime = regime_of(config)  # of a recording, the same views
    networks = [("student", resolved.student)]
    if regime.targets != "labels":
        names = ["teacher", *(f"teacher {i}" for i in range(2, len(resolved.teachers) + 1))]
        networks += list(zip(names, resolved.teachers, strict=True))
    note = ""
    if regime.targets == "table" and config.fixed_crops:
        networks = networks[:1]
        note = (
            f"The teacher's targets are the mean over {config.fixed_crops} random crops, "
            "computed before the training."
        )
    elif regime.targets == "table":
        note = "The teacher saw the central crop, once, before the training."
    branches = [(name, InputSpec.of(network)) for name, network in networks]
    source = open_training(config.data)
    reader = Reader(source, config.data, resolved.classes)
    stream = TrainingStream(reader, config.seed, STEPS, config.batch_size, 0, config.batch_size)
    root = view_root(config, resolved, make_layout(MeshConfig(data=1)))
    titles: list[str] = []
    pictures: list[list[np.ndarray]] = [[] for _ in branches]
    for step in range(STEPS):
        rows = min(EXAMPLES, config.batch_size)
        draw, rendered = views_of_step(
            config, stream, root, step, rows, [input_spec for _, input_spec in branches]
        )
        titles += [f"step {step}{_mixture(draw, row)}" for row in range(rows)]
        for collected, step_images in zip(pictures, rendered, strict=True):
            collected.append(step_images)
    network_views = tuple(
        NetworkView(f"{name}, {input_spec.resolution} px", np.concatenate(collected))
        for (name, input_spec), collected in zip(branches, pictures, strict=True)
    )
    return ViewSamples(tuple(titles), network_views, note)


def views_of_step(
    config: Config,
    stream: TrainingStream,
    root: ViewRoot,
    step: int,
    rows: int,
    branches: list[InputSpec],
) -> tuple[Draw, list[np.ndarray]]:
    """The student's draw for the first `rows` of a step, and what each network saw of them.

    `branches` begins with the student's. Images are uint8 (rows, resolution, resolution, 3).
    """
    batch_size = config.batch_size
    regime = regime_of(config)
    # Partners do not depend on sizes, and a box only on that of its image: no other is read.
    placeholder_sizes = jnp.ones((batch_size, 2), jnp.int32)
    student_draw = step_draws(regime.views, root, step, placeholder_sizes, config.views).student
    partners = (
        jnp.roll(jnp.arange(batch_size), 1)
        if student_draw.partners is None
        else student_draw.partners
    )
    indices = np.concatenate([np.arange(rows), np.asarray(partners)[:rows]])
    examples = [stream[step * batch_size + int(index)] for index in indices]
    sizes = np.ones((batch_size, 2), np.int32)
    for index, example in zip(indices, examples, strict=True):
        sizes[index] = example["size"]
    draws = step_draws(regime.views, root, step, jnp.asarray(sizes), config.views)
    teacher_draw = None if regime.targets == "table" else draws.teacher
    canvases = jnp.stack([example["canvas"] for example in examples])
    shown_sizes = jnp.asarray(sizes[indices])

    def view(input_spec: InputSpec, draw: Draw | None) -> np.ndarray:
        if draw is None:
            images = render_central(canvases, shown_sizes, CentralCrop.of(config.views), input_spec)
        else:
            images = render(_part(draw, indices, rows), canvases, input_spec, root.spectra)
        return np.asarray(as_pixels(images[:rows], input_spec))

    student_spec, *teacher_specs = branches
    views = (
        view(student_spec, draws.student),
        *(view(input_spec, teacher_draw) for input_spec in teacher_specs),
    )
    return draws.student, list(views)


def _part(drawn: Draw, shown: np.ndarray, rows: int) -> Draw:
    """The draw of `shown`: `rows` examples, and then the partner of each."""
    partner_indices = jnp.arange(rows, 2 * rows)
    boxes, flips = drawn.boxes[shown], drawn.flips[shown]
    targets = None if drawn.target_images is None else drawn.target_images[shown]
    if drawn.coefficients is None:
        return Draw(boxes, flips, None, None, drawn.resolution, targets)
    partners = jnp.concatenate([partner_indices, partner_indices])
    return Draw(boxes, flips, drawn.coefficients[shown], partners, drawn.resolution, targets)


def _mixture(drawn: Draw, row: int) -> str:
    if drawn.coefficients is None:
        return ""
    share = float(drawn.coefficients[row])
    return f": {share:.2f} and {1 - share:.2f}"
