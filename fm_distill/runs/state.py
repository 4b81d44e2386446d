"""The training state: arrays, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray, PyTree

from fm_distill.models import Network


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes in training, and nothing else: `step` batches have been consumed.

    A tree of arrays, so its fields may also hold what a tree is mapped to, e.g. shardings.
    """

    step: PyTree  # int32 ()
    student: PyTree  # Variables
    opt_state: PyTree
    ema: PyTree  # Variables: moving average of the student; or None


def init_state(
    key: PRNGKeyArray,
    student: Network,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
) -> TrainState:
    """The state before the first step."""
    variables = student.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=variables,
        opt_state=optimizer.init(variables.params),
        # A copy: the same buffer cannot be donated twice.
        ema=None if ema_decay is None else jax.tree.map(jnp.copy, variables),
    )
