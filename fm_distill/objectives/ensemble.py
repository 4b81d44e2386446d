"""Several teachers as one target, or as one target each."""

import jax
import jax.numpy as jnp

from fm_distill.objectives.distances import Logits


def combine(teachers: tuple[Logits, ...], ensemble: str, temperature: float) -> tuple[Logits, ...]:
    """The targets of several teachers: one, or one for each distance of a sum; none of none.

    The mean of probabilities is that at `temperature`, given as logits: the softmax of the result
    at this temperature is the mean. Source: Beyer et al. 2021, section 3.6 (mean of logits);
    big_vision's trainer (sum of the distances).
    """
    if len(teachers) <= 1 or ensemble == "sum_of_distances":
        return teachers
    return (_mean(teachers, ensemble, temperature),)


def as_one(teachers: tuple[Logits, ...], ensemble: str, temperature: float) -> Logits:
    """`combine` as one network. A sum of KLs has the gradient of the KL to the mean probability."""
    return teachers[0] if len(teachers) == 1 else _mean(teachers, ensemble, temperature)


def _mean(teachers: tuple[Logits, ...], ensemble: str, temperature: float) -> Logits:
    logits = jnp.stack(teachers).astype(jnp.float32)
    if ensemble == "mean_logits":
        return logits.mean(axis=0)
    t = temperature
    return t * jax.nn.logsumexp(jax.nn.log_softmax(logits / t), axis=0, b=1 / len(teachers))
