"""Everything random about a batch, drawn once a step and shared by all networks."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from fm_distill.config import ViewConfig
from fm_distill.views.crops import CROPS, Sizes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """Everything random about a batch of one step."""

    # float32 (batch, 4): top, left, height, width in canvas pixels.
    boxes: PyTree
    # bool (batch,)
    flips: PyTree
    # float32 (batch,): weight of the example itself in its mixture; None: no mixup.
    coefficients: PyTree
    # int32 (batch,): the example that each is mixed with; None: the one before it.
    partners: PyTree


def draw(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig) -> Draw:
    """Draws boxes, flips, coefficients and partners for images of `sizes` (height, width)."""
    batch = sizes.shape[0]
    box_key, flip_key, coefficient_key, partner_key = jax.random.split(key, 4)
    flips = jax.random.uniform(flip_key, (batch,)) < config.flip_probability
    permuted = config.mixup != "none" and config.mixup_partner == "permutation"
    partners = jax.random.permutation(partner_key, batch) if permuted else None
    return Draw(
        boxes=CROPS[config.crop](box_key, sizes, config),
        flips=flips,
        coefficients=_coefficients(coefficient_key, batch, config),
        partners=partners,
    )


def _same(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig) -> tuple[Draw, Draw | None]:
    both = draw(key, sizes, config)
    return both, both


def _unmixed(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig) -> tuple[Draw, Draw | None]:
    return _same(key, sizes, dataclasses.replace(config, mixup="none"))


def _independent(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig) -> tuple[Draw, Draw | None]:
    own, teachers = jax.random.split(key)
    config = dataclasses.replace(config, mixup="none")
    return draw(own, sizes, config), draw(teachers, sizes, config)


def _fixed(key: PRNGKeyArray, sizes: Sizes, config: ViewConfig) -> tuple[Draw, Draw | None]:
    return _unmixed(key, sizes, config)[0], None


# What the student sees and what its teachers see; None: they answered before the training began.
# Source: Beyer et al. 2021, figure 2; only function matching mixes images.
TEACHINGS: dict[str, Callable[[PRNGKeyArray, Sizes, ViewConfig], tuple[Draw, Draw | None]]] = {
    "function_matching": _same,
    "consistent": _unmixed,
    "independent": _independent,
    "fixed": _fixed,
}


def draws_of(
    target: str, teaching: str
) -> Callable[[PRNGKeyArray, Sizes, ViewConfig], tuple[Draw, Draw | None]]:
    """The line of `TEACHINGS` of a run; labels are mixed with what the student sees."""
    return TEACHINGS["function_matching" if target == "labels" else teaching]


def mix(draw: Draw, values: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """The mixture of each example's values with its partner's: pictures, or class probabilities.

    Source: big_vision's get_mixup rolls the batch by one, so example i is mixed with i - 1. A roll
    moves one example between neighbouring devices; a permutation gathers the whole batch.
    """
    if draw.coefficients is None:
        return values
    others = jnp.roll(values, 1, axis=0) if draw.partners is None else values[draw.partners]
    a = jnp.expand_dims(draw.coefficients, tuple(range(1, values.ndim)))
    return a * values + (1 - a) * others


def _coefficients(
    key: PRNGKeyArray, batch: int, config: ViewConfig
) -> Float[Array, " batch"] | None:
    if config.mixup == "none":
        return None
    count = 1 if config.mixup == "batch" else batch
    alpha = config.mixup_alpha
    a = jax.random.beta(key, alpha, alpha, (count,), jnp.float32)
    if config.mixup_fold:
        a = jnp.maximum(a, 1 - a)
    return jnp.broadcast_to(a, (batch,))
