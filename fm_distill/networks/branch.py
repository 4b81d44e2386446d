"""A network together with the input that it expects, and the views that it sees of a batch."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fm_distill.config import NetworkConfig, ViewConfig
from fm_distill.config.regime import ViewLaw
from fm_distill.data.batch import Batch
from fm_distill.models import Freeze, Network, Variables, build_network, resolve
from fm_distill.system.sharding import Layout, on_devices
from fm_distill.views.draws import Draw, ViewRoot, step_draws
from fm_distill.views.fourier import Spectra
from fm_distill.views.rendering import CentralCrop, InputSpec, render, render_central

# Network inputs by what they were rendered for, (batch, resolution, resolution, 3).
Views = dict[InputSpec, Array]


@dataclasses.dataclass(frozen=True)
class Branch:
    """A network and the input that it expects."""

    network: Network
    input_spec: InputSpec

    @property
    def has_head(self) -> bool:
        """Whether it has logits."""
        return self.network.classes > 0

    def on_whole_grey_levels(self) -> "Branch":
        """The same for images that are rounded to uint8."""
        rounded_spec = dataclasses.replace(self.input_spec, input_rounding="uint8")
        return dataclasses.replace(self, input_spec=rounded_spec)


def make_branch(config: NetworkConfig, classes: int, dtype: jnp.dtype) -> Branch:
    """The network of `config`, computing in `dtype`, with its input; of no `classes` no head."""
    return Branch(build_network(config, classes, dtype), InputSpec.of(resolve(config)))


@dataclasses.dataclass(frozen=True)
class StepViews:
    """What the networks see in one step."""

    draw: Draw  # of the student's view
    student: Array
    teachers: Views


def step_views(
    law: ViewLaw,
    views: ViewConfig,
    student: Branch,
    teachers: tuple[Branch, ...],
    batch: Batch,
    root: ViewRoot,
    step: Int[Array, ""] | int,
) -> StepViews:
    """The views of `step`, a function of the run's root of views, the step and the batch.

    The step itself, its plan and the diagnosis get them here.
    """
    draws = step_draws(law, root, step, batch.sizes, views)
    if draws.shared:
        # Networks that expect the same input share one rendering.
        shared_views = render_views(draws.student, batch, (student, *teachers), root.spectra)
        rendered_for_teachers = {
            branch.input_spec: shared_views[branch.input_spec] for branch in teachers
        }
        return StepViews(draws.student, shared_views[student.input_spec], rendered_for_teachers)
    student_views = render_views(draws.student, batch, (student,), root.spectra)
    teacher_views = render_views(draws.teacher, batch, teachers, root.spectra)
    return StepViews(draws.student, student_views[student.input_spec], teacher_views)


def render_views(
    draw: Draw, batch: Batch, branches: tuple[Branch, ...], spectra: Spectra | None = None
) -> Views:
    """What `branches` see of a draw, rendered once for all that expect the same input."""
    specs = sorted({branch.input_spec for branch in branches})
    return {spec: render(draw, batch.canvases, spec, spectra) for spec in specs}


def render_central_views(batch: Batch, branches: tuple[Branch, ...], crop: CentralCrop) -> Views:
    """What `branches` see in evaluation: the central crop."""
    specs = sorted({branch.input_spec for branch in branches})
    return {spec: render_central(batch.canvases, batch.sizes, crop, spec) for spec in specs}


def teacher_outputs(
    teachers: tuple[Branch, ...], frozen: tuple[Variables, ...], views: Views
) -> tuple[Array, ...]:
    """The logits of each teacher that has a head, float32 (batch, classes)."""
    return teacher_outputs_with_features(teachers, frozen, views, ())[0]


def teacher_outputs_with_features(
    teachers: tuple[Branch, ...],
    frozen: tuple[Variables, ...],
    views: Views,
    features: tuple[str, ...],
) -> tuple[tuple[Array, ...], dict[str, Array]]:
    """The logits of each teacher that has a head, and the named features of the first one."""
    outputs = [
        branch.network.apply_frozen(
            variables, views[branch.input_spec], features=() if i else features
        )
        for i, (branch, variables) in enumerate(zip(teachers, frozen, strict=True))
    ]
    pairs = zip(teachers, outputs, strict=True)
    logits = tuple(output.logits for branch, output in pairs if branch.has_head)
    return logits, outputs[0].features if outputs else {}


def freeze_of(network: Network) -> Freeze:
    """How a teacher is frozen: in integers, where its activations are quantised."""
    return network.freeze_integer or network.freeze


def freeze_on_devices(network: Network, variables: Variables, layout: Layout) -> Variables:
    """The frozen form of a teacher's `variables`, computed once, where the step wants it."""
    variables = on_devices(variables, layout.variables(variables))
    freeze = freeze_of(network)
    shapes = jax.eval_shape(freeze, variables)
    return jax.jit(freeze, out_shardings=layout.variables(shapes))(variables)


def frozen_teachers(
    teachers: tuple[Branch, ...], variables: tuple[Variables, ...], layout: Layout
) -> tuple[Variables, ...]:
    """The frozen form of the variables of each teacher."""
    return tuple(
        freeze_on_devices(branch.network, x, layout)
        for branch, x in zip(teachers, variables, strict=True)
    )
