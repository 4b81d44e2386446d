"""Matching without classes: to which of many earlier images an image is similar.

SEED (Fang et al. 2021, arXiv 2101.04731): a bank keeps the teacher's features of the last batches,
and the student matches the teacher's distribution of similarities to them. It needs features alone,
so that a teacher without a head can teach.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fm_distill.config.objective import BankConfig
from fm_distill.objectives.distances import LEAST_SQUARE, PerExample

Vectors = Float[Array, "batch channels"]
# One unit vector a row.
Bank = Float[Array, "rows channels"]


def bank_similarity(
    student: Vectors, teacher: Vectors, bank: Bank, config: BankConfig
) -> PerExample:
    """KL of the distributions of similarities, the teacher's own feature in front of the bank.

    Source: equations 3 to 6 of the paper and the authors' `builder.py`, which give the
    cross-entropy: larger by the entropy of the teacher's distribution, with the same gradient.
    """
    student, teacher = _unit(student), _unit(teacher)

    def log_probabilities(x: Vectors, temperature: float) -> Float[Array, "batch _"]:
        own_similarity = (x * teacher).sum(axis=-1, keepdims=True)
        bank_similarities = jnp.matmul(x, bank.T, precision=jax.lax.Precision.HIGHEST)
        return jax.nn.log_softmax(
            jnp.concatenate([own_similarity, bank_similarities], axis=-1) / temperature
        )

    teacher_log_probabilities = log_probabilities(teacher, config.teacher_temperature)
    student_log_probabilities = log_probabilities(student, config.student_temperature)
    return (
        jnp.exp(teacher_log_probabilities) * (teacher_log_probabilities - student_log_probabilities)
    ).sum(axis=-1)


def init_bank(key: PRNGKeyArray, rows: int, channels: int) -> Bank:
    """Random directions, as the authors begin."""
    return _unit(jax.random.normal(key, (rows, channels)))


def replaced(bank: Bank, teacher: Vectors, step: Int[Array, ""]) -> Bank:
    """`bank` after `step`: its oldest rows are the teacher's features of this batch.

    The batch has to divide the number of rows.
    """
    # The remainder first: the number of examples so far need not fit into 32 bits.
    row = step % (len(bank) // len(teacher)) * len(teacher)
    return jax.lax.dynamic_update_slice(bank, _unit(teacher), (row, jnp.zeros_like(row)))


def _unit(x: Vectors) -> Vectors:
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True) + LEAST_SQUARE**2)
