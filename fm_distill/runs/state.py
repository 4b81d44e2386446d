"""The training state: arrays, and nothing else."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int32, PRNGKeyArray, PyTree

from fm_distill.array_tree import AnyArray, array_tree
from fm_distill.models import Network, Variables


@array_tree
@dataclasses.dataclass(frozen=True)
class TermState:
    """What terms of the loss have of their own, by the names of the terms."""

    params: PyTree  # of their adapters
    opt_state: PyTree  # of these
    banks: PyTree  # of the teacher's earlier features; {} where no term has one


@array_tree
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes in training, and nothing else: `step` batches have been consumed."""

    step: Int32[AnyArray, ""]
    student: Variables
    opt_state: PyTree
    ema: Variables | None  # moving average of the student
    terms: TermState | None = None
    # False for weights that are removed, as `params`; a single True for arrays that are never
    # pruned. None where nothing is.
    masks: PyTree | None = None


def init_state(
    key: PRNGKeyArray,
    student: Network,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
    terms: TermState | None = None,
    init_masks: Callable[[PyTree], PyTree] | None = None,
) -> TrainState:
    """The state before the first step; `init_masks` are those of the weights, if any are pruned."""
    variables = student.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=variables,
        opt_state=optimizer.init(variables.params),
        # A copy: the same buffer cannot be donated twice.
        ema=None if ema_decay is None else jax.tree.map(jnp.copy, variables),
        terms=terms,
        masks=None if init_masks is None else init_masks(variables.params),
    )
