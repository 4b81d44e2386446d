"""What terms of the loss have of their own, adapters and banks: how it begins, how it changes."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from fm_distill.config import ObjectiveConfig
from fm_distill.objectives.adapters import AdapterShape, init_adapters
from fm_distill.objectives.bank import init_bank, replaced
from fm_distill.objectives.terms import Targets, named_terms, teacher_feature
from fm_distill.runs.state import TermState

NOTHING = TermState({}, (), {})

# `(state, gradients of the adapters, targets, step) -> state`.
TermUpdate = Callable[[TermState, PyTree, Targets, Int[Array, ""]], TermState]


@dataclasses.dataclass(frozen=True)
class TermShapes:
    """By the names of the terms."""

    adapters: Mapping[str, AdapterShape]
    banks: Mapping[str, tuple[int, int]]  # rows, channels


def init_terms(
    key: PRNGKeyArray, shapes: TermShapes, optimizer: optax.GradientTransformation
) -> TermState | None:
    """None where no term has anything. The student begins with the same numbers as without."""
    if not shapes.adapters and not shapes.banks:
        return None
    params = init_adapters(jax.random.fold_in(key, 1), shapes.adapters)
    bank_key = jax.random.fold_in(key, 2)
    banks = {
        name: init_bank(jax.random.fold_in(bank_key, i), *shapes.banks[name])
        for i, name in enumerate(sorted(shapes.banks))
    }
    return TermState(params, optimizer.init(params), banks)


def make_term_update(
    objective: ObjectiveConfig, optimizer: optax.GradientTransformation
) -> TermUpdate:
    """Adapters move by `optimizer`; banks take in the teacher's features of the batch."""
    terms = dict(named_terms(objective))

    def update(
        state: TermState, gradients: PyTree, targets: Targets, step: Int[Array, ""]
    ) -> TermState:
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        features = targets.teacher_features
        banks = {
            name: replaced(bank, teacher_feature(terms[name], features), step)
            for name, bank in state.banks.items()
        }
        return TermState(params, opt_state, banks)

    return update
