"""The same step in less memory: a batch in parts one after another, and what is computed twice.

None of this changes what is computed, only what is kept at a time: see `MemoryConfig`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from fm_distill.models import CONVOLUTION, UNIT

# What of the student's forward pass is kept for the gradient; the rest is computed again.
# None keeps all.
REMATERIALISE: dict[str, Callable[..., Any] | None] = {
    "nothing": None,
    "norms": jax.checkpoint_policies.save_only_these_names(CONVOLUTION),
    "units": jax.checkpoint_policies.save_only_these_names(UNIT),
}


def rematerialised(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """`function`, of which `what`, a key of `REMATERIALISE`, is computed again for the gradient."""
    policy = REMATERIALISE[what]
    return function if policy is None else jax.checkpoint(function, policy=policy)


def split(batch: PyTree, parts: int) -> PyTree:
    """(batch, ...) to (parts, batch / parts, ...).

    Part i has every `parts`-th example from i on, so each device works on rows that it has.
    """
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
    )


def _join(parts: PyTree) -> PyTree:
    """The inverse of `split`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)


def in_parts(function: Callable[[PyTree], PyTree], parts: int, batch: PyTree) -> PyTree:
    """`function(batch)`, where each example's output depends on that example alone."""
    if parts == 1:
        return function(batch)
    return _join(jax.lax.map(function, split(batch, parts)))


def accumulated(
    gradient_of: Callable[[PyTree, PyTree], tuple[tuple[Array, tuple[PyTree, PyTree]], PyTree]],
    parts: int,
    params: PyTree,
    batch: PyTree,
) -> tuple[tuple[Array, tuple[PyTree, PyTree]], PyTree]:
    """`gradient_of(params, batch)` where the loss is a mean over the examples.

    It returns `((loss, (statistics, what each example has)), gradients)`. The statistics have to
    be the same for any part: those of a BatchNorm in training are not.
    """
    if parts == 1:
        return gradient_of(params, batch)

    def add(total: PyTree, part: PyTree) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        (loss, auxiliary), gradients = gradient_of(params, part)
        return jax.tree.map(jnp.add, total, (loss, gradients)), auxiliary

    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
    total, (statistics, per_example) = jax.lax.scan(add, zeros, split(batch, parts))
    loss, gradients = jax.tree.map(lambda x: x / parts, total)
    return (loss, (jax.tree.map(lambda x: x[-1], statistics), _join(per_example))), gradients
