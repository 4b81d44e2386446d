"""Everything random about a batch, drawn once a step and shared by all networks."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fm_distill.array_tree import AnyArray, array_tree
from fm_distill.config import ViewConfig
from fm_distill.config.regime import ViewLaw
from fm_distill.system.references import entry
from fm_distill.views.crops import CROPS, Sizes
from fm_distill.views.fourier import Spectra

# Folded into a step's key for its target images; a small number would be a key of `draw`.
TARGETS = 0xFDA


@array_tree
@dataclasses.dataclass(frozen=True)
class Draw:
    """Everything random about a batch of one step."""

    # Top, left, height, width in canvas pixels.
    boxes: Float[AnyArray, "batch 4"]
    flips: Bool[AnyArray, " batch"]
    # Weight of the example itself in its mixture; None: no mixup.
    coefficients: Float[AnyArray, " batch"] | None
    # The example that each is mixed with; None: the one before it.
    partners: Int[AnyArray, " batch"] | None
    # Pixels a side to which each crop is reduced before it is enlarged; None: it is not reduced.
    resolution: Float[AnyArray, ""] | None = None
    # The target image whose low frequencies each example gets, modulo their number; below 0 it
    # keeps its own. None: all do.
    target_images: Int[AnyArray, " batch"] | None = None


class StepDraws(NamedTuple):
    """The draws of one step."""

    student: Draw
    teacher: Draw
    shared: bool  # whether both are the same


# Steps done before; None: the views have no step, as those of evaluation.
Step = Int[Array, ""] | int | None


def draw(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig, step: Step = None) -> Draw:
    """Draws boxes, flips, coefficients and partners for images of `sizes` (height, width)."""
    batch_size = sizes.shape[0]
    box_key, flip_key, coefficient_key, partner_key = jax.random.split(key, 4)
    flips = jax.random.uniform(flip_key, (batch_size,)) < config.flip_probability
    permuted = config.mixup != "none" and config.mixup_partner == "permutation"
    partners = jax.random.permutation(partner_key, batch_size) if permuted else None
    return Draw(
        boxes=entry(CROPS, config.crop, "views.crop")(
            box_key, sizes, config, _at(config.smallest_area_points, step, config.crop_area[0])
        ),
        flips=flips,
        coefficients=_coefficients(coefficient_key, batch_size, config, step),
        partners=partners,
        resolution=_resolution(config, step),
    )


def _at(points: tuple[tuple[int, float], ...], step: Step, usual: float) -> Array | float:
    """Straight lines through `points`, and their first and last values beyond them."""
    if not points or step is None:
        return usual
    steps, values = (jnp.asarray(x, jnp.float32) for x in zip(*points, strict=True))
    return jnp.interp(jnp.asarray(step, jnp.float32), steps, values)


def _resolution(config: ViewConfig, step: Step) -> Float[Array, ""] | None:
    if not config.resolution_points or step is None:
        return None
    return jnp.round(_at(config.resolution_points, step, 0.0))


def _mixed(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig, step: Step) -> StepDraws:
    common_draw = draw(key, sizes, config, step)
    return StepDraws(common_draw, common_draw, shared=True)


def _unmixed(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig, step: Step) -> StepDraws:
    return _mixed(key, sizes, dataclasses.replace(config, mixup="none"), step)


def _independent(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig, step: Step) -> StepDraws:
    config = dataclasses.replace(config, mixup="none")
    student, teacher = (draw(x, sizes, config, step) for x in jax.random.split(key))
    return StepDraws(student, teacher, shared=False)


# What the student sees and what its teachers see. Source: Beyer et al. 2021, figure 2; only
# function matching mixes images.
VIEW_LAWS: dict[ViewLaw, Callable[[PRNGKeyArray, Sizes, ViewConfig, Step], StepDraws]] = {
    "mixed": _mixed,
    "unmixed": _unmixed,
    "independent": _independent,
}


@array_tree
@dataclasses.dataclass(frozen=True)
class ViewRoot:
    """What the views of all steps come from, beside the images themselves."""

    key: PRNGKeyArray
    # Of the target images; None where views are not adapted.
    spectra: Spectra | None = None


class RunKeys(NamedTuple):
    """The two random keys of a run."""

    init: PRNGKeyArray  # of the student's parameters
    draws: ViewRoot  # the root of the draws of all steps


def run_keys(seed: int, init_seed: int | None = None) -> RunKeys:
    """All randomness of a run but its order, from its seed; that of the init may have its own."""
    init, draws = jax.random.split(jax.random.key(seed))
    if init_seed is not None:
        init, _ = jax.random.split(jax.random.key(init_seed))
    return RunKeys(init, ViewRoot(draws))


def step_draws(
    law: ViewLaw,
    root: ViewRoot,
    step: Int[Array, ""] | int,
    sizes: Sizes,
    config: ViewConfig,
) -> StepDraws:
    """The draws of `step` (steps done before it), a function of the run's key and the step.

    Whatever the law, both networks have the same target images.
    """
    key = jax.random.fold_in(root.key, step)
    student, teacher, shared = VIEW_LAWS[law](key, sizes, config, step)
    target_images = _target_images(jax.random.fold_in(key, TARGETS), sizes.shape[0], config)
    return StepDraws(
        dataclasses.replace(student, target_images=target_images),
        dataclasses.replace(teacher, target_images=target_images),
        shared,
    )


def _target_images(
    key: PRNGKeyArray, batch: int, config: ViewConfig
) -> Int[Array, " batch"] | None:
    if config.fourier.folder is None:
        return None
    target_key, adapted_key = jax.random.split(key)
    images = jax.random.randint(target_key, (batch,), 0, jnp.iinfo(jnp.int32).max)
    adapted = jax.random.uniform(adapted_key, (batch,)) < config.fourier.probability
    return jnp.where(adapted, images, -1)


def mix(draw: Draw, values: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """The mixture of each example's values with its partner's: images, or class probabilities.

    Source: big_vision's get_mixup rolls the batch by one, so example i is mixed with i - 1. A roll
    moves one example between neighbouring devices; a permutation gathers the whole batch.
    """
    if draw.coefficients is None:
        return values
    others = jnp.roll(values, 1, axis=0) if draw.partners is None else values[draw.partners]
    coefficients = jnp.expand_dims(draw.coefficients, tuple(range(1, values.ndim)))
    return coefficients * values + (1 - coefficients) * others


def _coefficients(
    key: PRNGKeyArray, batch: int, config: ViewConfig, step: Step
) -> Float[Array, " batch"] | None:
    if config.mixup == "none":
        return None
    count = 1 if config.mixup == "batch" else batch
    alpha = config.mixup_alpha
    coefficients = jax.random.beta(key, alpha, alpha, (count,), jnp.float32)
    if config.mixup_fold:
        coefficients = jnp.maximum(coefficients, 1 - coefficients)
    if config.mixup_strength_points:
        coefficients = 1 - _at(config.mixup_strength_points, step, 1.0) * (1 - coefficients)
    return jnp.broadcast_to(coefficients, (batch,))
