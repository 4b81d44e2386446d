"""Own distances, crops and optimizers of a config, tried on shapes before anything is trained."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from fm_distill.config import Config, OptimizerConfig, ViewConfig
from fm_distill.config.objective import terms_of
from fm_distill.errors import UserError
from fm_distill.objectives.distances import DISTANCES
from fm_distill.system.references import entry, is_reference
from fm_distill.train_step.optim import OPTIMIZERS
from fm_distill.views.crops import CROPS

EXAMPLES, CLASSES = 3, 5
Part = TypeVar("Part")


def wrong_own_parts(config: Config) -> Iterator[str]:
    """A sentence for each part that fails, or returns something else than its place needs.

    A reference that names no function has its sentence elsewhere.
    """
    kinds = dict.fromkeys(x.kind for x in terms_of(config.objective))
    for kind in filter(is_reference, kinds):
        yield from _wrong(f"the distance {kind}", _try_distance, kind)
    if is_reference(config.views.crop):
        yield from _wrong(f"views.crop={config.views.crop}", _try_crop, config.views)
    if is_reference(config.optimizer.name):
        name = f"optimizer.name={config.optimizer.name}"
        yield from _wrong(name, _try_optimizer, config.optimizer)


def _wrong(part: str, attempt: Callable[[Part], str | None], given: Part) -> Iterator[str]:
    try:
        problem = attempt(given)
    except UserError:
        return
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        problem = f"fails with {type(error).__name__}: {first}"
    if problem:
        yield f"{part} {problem}"


def _try_distance(name: str) -> str | None:
    logits = jax.ShapeDtypeStruct((EXAMPLES, CLASSES), jnp.float32)
    temperature = jax.ShapeDtypeStruct((), jnp.float32)
    output = jax.eval_shape(entry(DISTANCES, name, name), logits, logits, temperature)
    return _not_of_shape(output, (EXAMPLES,), f"logits of shape {logits.shape}")


def _try_crop(views: ViewConfig) -> str | None:
    crop = entry(CROPS, views.crop, "views.crop")
    output = jax.eval_shape(
        lambda seed, sizes, area: crop(jax.random.key(seed), sizes, views, area),
        0,
        jax.ShapeDtypeStruct((EXAMPLES, 2), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    return _not_of_shape(output, (EXAMPLES, 4), f"{EXAMPLES} sizes")


def _try_optimizer(config: OptimizerConfig) -> str | None:
    optimizer = entry(OPTIMIZERS, config.name, "optimizer.name")(config)
    if isinstance(optimizer, optax.GradientTransformation):
        return None
    return f"returns a {type(optimizer).__name__}; expected an optax.GradientTransformation"


def _not_of_shape(found: Any, shape: tuple[int, ...], given: str) -> str | None:
    if isinstance(found, jax.ShapeDtypeStruct) and found.shape == shape:
        return None
    returned = found.shape if isinstance(found, jax.ShapeDtypeStruct) else type(found).__name__
    return f"returns {returned} for {given}; expected an array of shape {shape}"
