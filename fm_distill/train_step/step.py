"""The arithmetic of one batch: views, targets, loss, gradient, update.

A step has two halves: `teach` (in `teach.py`) makes the targets of a batch, and `update` moves the
student towards them, down the gradient of its loss (in `loss.py`). Nothing here reads a file or
knows a device.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from fm_distill.config import ViewConfig
from fm_distill.config.regime import ViewLaw
from fm_distill.data.batch import Batch
from fm_distill.errors import UserError
from fm_distill.models import Variables
from fm_distill.networks.branch import Branch, step_views
from fm_distill.objectives.example_weights import effective_share
from fm_distill.objectives.terms import Targets, first_choice
from fm_distill.runs.state import TrainState
from fm_distill.train_step.loss import Loss
from fm_distill.train_step.memory import accumulated
from fm_distill.train_step.pruning import SPARSITY, Prune, masked, sparsity_of
from fm_distill.train_step.teach import Teach
from fm_distill.train_step.term_state import NOTHING, TermUpdate
from fm_distill.views.draws import ViewRoot

Metrics = dict[str, Float[Array, ""]]
# The metric of a term's adapter: the norm of the gradient of its kernel.
ADAPTER_GRADIENT = "adapter_gradient_"
# The metrics of a term's gradient, and of two terms.
TERM_GRADIENT, TERM_COSINE = "gradient_norm_of_", "gradient_cosine_of_"

TrainStep = Callable[
    [TrainState, tuple[Variables, ...], Batch, ViewRoot], tuple[TrainState, Metrics]
]
# `(state, student view, targets) -> (state, metrics)`.
Update = Callable[[TrainState, Array, Targets], tuple[TrainState, Metrics]]


def make_update(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | None = None,
    accumulate: int = 1,
    term_update: TermUpdate | None = None,
    prune: Prune | None = None,
    term_gradients: bool = False,
) -> Update:
    """`(state, student view, targets) -> (state, metrics)`, pure: one step of the student.

    `accumulate` parts of a batch, one after another, give the same gradient in less memory. What
    the terms have of their own, where the state has it, changes by `term_update`, and the masks of
    pruned weights by `prune`. With `term_gradients` the metrics of several terms have their
    gradients' norms and cosines.
    Raises `UserError` where the state has an average and there is no `ema_decay`.
    """

    def update(state: TrainState, view: Array, targets: Targets) -> tuple[TrainState, Metrics]:
        if state.ema is not None and ema_decay is None:
            raise UserError("the state has an average that would never move; give ema_decay")
        term_state = state.terms or NOTHING

        def gradients_of(which: slice = slice(None)) -> tuple[tuple[Array, Any], Any]:
            """The loss of these terms with what else is measured, and its gradients."""

            def loss_of(
                learned: tuple[PyTree, PyTree], part: tuple[Array, Targets]
            ) -> tuple[Array, tuple[Any, Any]]:
                params, adapters = learned
                variables = dataclasses.replace(state.student, params=params)
                evaluation = loss.evaluate(variables, adapters, term_state.banks, *part, state.step)
                observed = evaluation.statistics, evaluation.ranges
                per_example = evaluation.logits, evaluation.values, evaluation.example_weights
                return loss.mean(evaluation.values, state.step, which), (observed, per_example)

            gradient = jax.value_and_grad(loss_of, has_aux=True)
            learned = state.student.params, term_state.params
            return accumulated(gradient, accumulate, learned, (view, targets))

        (value, (observed, per_example)), (gradients, adapter_gradients) = gradients_of()
        logits, values, weights = per_example
        masks = state.masks
        with jax.named_scope("update"):
            if masks is not None:
                gradients = masked(gradients, masks)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.student.params)
            new_student = Variables(optax.apply_updates(state.student.params, updates), *observed)
            if prune is not None and masks is not None:
                masks = prune(masks, new_student.params, state.step)
                new_student = dataclasses.replace(
                    new_student, params=masked(new_student.params, masks)
                )
            ema = state.ema
            if ema is not None and ema_decay is not None:
                ema = _averaged(ema, new_student, ema_decay, state.step)
                if masks is not None:
                    ema = dataclasses.replace(ema, params=masked(ema.params, masks))
            new_terms = state.terms
            if term_update is not None and new_terms is not None:
                new_terms = term_update(new_terms, adapter_gradients, targets, state.step)
        metrics = {
            "loss": value,
            "gradient_norm": optax.global_norm(gradients),
            "update_norm": optax.global_norm(updates),
        }
        if len(loss.terms) > 1:
            for term, term_values in zip(loss.terms, values, strict=True):
                metrics[f"term_{term.name}"] = term_values.mean()
                metrics[f"weight_{term.name}"] = term.weight_at(loss.progress(state.step))
            if term_gradients:
                gradients_by_term = [
                    gradients_of(slice(i, i + 1))[1][0] for i in range(len(loss.terms))
                ]
                if masks is not None:
                    gradients_by_term = [masked(x, masks) for x in gradients_by_term]
                metrics |= compared([x.name for x in loss.terms], gradients_by_term)
        for name, gradient in adapter_gradients.items():
            metrics[f"{ADAPTER_GRADIENT}{name}"] = jnp.linalg.norm(gradient["kernel"])
        if masks is not None:
            metrics[SPARSITY] = sparsity_of(masks)
        if weights is not None:
            metrics["effective_sample_share"] = effective_share(weights)
        if targets.teacher_logits:
            agrees = jnp.argmax(logits, -1) == first_choice(targets)
            metrics["agreement"] = agrees.mean(dtype=jnp.float32)
        return TrainState(state.step + 1, new_student, opt_state, ema, new_terms, masks), metrics

    return update


def _averaged(ema: Variables, new: Variables, decay: float, step: Int[Array, ""]) -> Variables:
    """Parameters, statistics and ranges, each averaged over the steps."""
    averaged = jax.tree.map(lambda e, x: decay * e + (1 - decay) * x, ema, new)
    # Before the first step no range was observed that could be averaged.
    ranges = jax.tree.map(lambda e, x: jnp.where(step == 0, x, e), averaged.ranges, new.ranges)
    return dataclasses.replace(averaged, ranges=ranges)


def compared(names: Sequence[str], gradients: Sequence[PyTree]) -> Metrics:
    """The norm of each gradient, and the cosine of each pair; 0 where one of them is zero."""
    norms = [optax.global_norm(x) for x in gradients]
    metrics = {f"{TERM_GRADIENT}{x}": norm for x, norm in zip(names, norms, strict=True)}
    for i, j in itertools.combinations(range(len(names)), 2):
        product, size = optax.tree.vdot(gradients[i], gradients[j]), norms[i] * norms[j]
        cosine = jnp.where(size > 0, product / jnp.where(size > 0, size, 1), 0)
        metrics[f"{TERM_COSINE}{names[i]}_and_{names[j]}"] = cosine
    return metrics


def make_train_step(
    student: Branch,
    teachers: tuple[Branch, ...],
    teach: Teach,
    update: Update,
    views: ViewConfig,
    law: ViewLaw,
    period_steps: int | None = None,
) -> TrainStep:
    """`(state, frozen teachers, batch, root of views) -> (state, metrics)`, pure.

    Views, targets and update of one step. Everything random comes from `root` and
    `state.step`, modulo `period_steps`. `teachers` are those that the step runs: none where
    the targets are labels, a table or a recording.
    """

    def train_step(
        state: TrainState, frozen: tuple[Variables, ...], batch: Batch, root: ViewRoot
    ) -> tuple[TrainState, Metrics]:
        view_step = state.step if period_steps is None else state.step % period_steps
        with jax.named_scope("views"):
            rendered = step_views(law, views, student, teachers, batch, root, view_step)
        return update(state, rendered.student, teach(frozen, batch, rendered))

    return train_step
