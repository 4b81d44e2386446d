"""The arithmetic of one batch: views, targets, student, loss, gradient, update.

A step has two halves: `teach` (in `teach.py`) makes the targets of a batch, and `update` moves the
student towards them. Nothing in this file reads a file or knows a device.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from fm_distill.config import MemoryConfig, ViewConfig
from fm_distill.config.regime import ViewLaw
from fm_distill.data.batch import Batch
from fm_distill.errors import UserError
from fm_distill.models import Output, Variables
from fm_distill.networks.branch import Branch, step_views
from fm_distill.objectives.curves import progress_of
from fm_distill.objectives.example_weights import ExampleWeights, effective_share
from fm_distill.objectives.terms import (
    Outputs,
    Targets,
    Term,
    first_choice,
    values_of,
    weighted_sum,
)
from fm_distill.runs.state import TrainState
from fm_distill.training.memory import accumulated, rematerialised
from fm_distill.training.pruning import SPARSITY, Prune, masked, sparsity_of
from fm_distill.training.teach import Teach
from fm_distill.training.term_state import NOTHING, TermUpdate
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
    student: Branch,
    optimizer: optax.GradientTransformation,
    terms: tuple[Term, ...],
    total_steps: int,
    ema_decay: float | None = None,
    keep_statistics: bool = False,
    memory: MemoryConfig = MemoryConfig(),
    features: tuple[str, ...] = (),
    term_update: TermUpdate | None = None,
    example_weights: ExampleWeights | None = None,
    prune: Prune | None = None,
    term_gradients: bool = False,
) -> Update:
    """`(state, student view, targets) -> (state, metrics)`, pure: one step of the student.

    The loss is the mean over the batch of the weighted sum of `terms`, whose schedules are over
    `total_steps` and which read the student's `features`; each example's sum is multiplied by its
    weight, if there are `example_weights`. With `keep_statistics` BatchNorm stays as it is; the
    ranges of quantised activations follow all the same.
    `memory` changes what is kept at a time, not what comes out. What the terms have of their own,
    where the state has it, changes by `term_update`, and the masks of pruned weights by `prune`.
    With `term_gradients` the metrics of several terms have their gradients' norms and cosines.
    Raises `UserError` where the state has an average and there is no `ema_decay`.
    """

    def apply(variables: Variables, images: Array) -> Output:
        train = not keep_statistics
        run = student.network.apply_observing or student.network.apply
        return run(variables, images, train=train, features=features)

    def update(state: TrainState, view: Array, targets: Targets) -> tuple[TrainState, Metrics]:
        if state.ema is not None and ema_decay is None:
            raise UserError("the state has an average that would never move; give ema_decay")
        progress = progress_of(state.step, total_steps)
        own = state.terms or NOTHING

        def loss_of(
            learned: tuple[PyTree, PyTree],
            part: tuple[Array, Targets],
            counted: slice = slice(None),
        ) -> tuple[
            Array, tuple[tuple[PyTree, PyTree], tuple[Array, tuple[Array, ...], Array | None]]
        ]:
            params, adapters = learned
            images, expected = part
            with jax.named_scope("student"):
                variables = dataclasses.replace(state.student, params=params)
                output = rematerialised(apply, memory.rematerialise)(variables, images)
            outputs = Outputs(output.logits, output.features, adapters, own.banks)
            values = values_of(terms, outputs, expected, progress)
            weights = None
            if example_weights is not None:
                weights = jax.lax.stop_gradient(example_weights(outputs, expected, progress))
                values = tuple(weights * x for x in values)
            loss = weighted_sum(terms[counted], values[counted], progress).mean()
            observed = output.statistics, output.ranges or {}
            return loss, (observed, (output.logits, values, weights))

        def gradients_of(counted: slice = slice(None)) -> tuple[tuple[Array, Any], Any]:
            gradient = jax.value_and_grad(functools.partial(loss_of, counted=counted), has_aux=True)
            return accumulated(
                gradient, memory.accumulate, (state.student.params, own.params), (view, targets)
            )

        (loss, (observed, (logits, values, weights))), (gradients, of_adapters) = gradients_of()
        masks = state.masks
        with jax.named_scope("update"):
            if masks is not None:
                gradients = masked(gradients, masks)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.student.params)
            new = Variables(optax.apply_updates(state.student.params, updates), *observed)
            if prune is not None and masks is not None:
                masks = prune(masks, new.params, state.step)
                new = dataclasses.replace(new, params=masked(new.params, masks))
            ema = state.ema
            if ema is not None and ema_decay is not None:
                ema = jax.tree.map(lambda e, x: ema_decay * e + (1 - ema_decay) * x, ema, new)
                # Before the first step nothing was observed that could be averaged.
                ranges = jax.tree.map(
                    lambda e, x: jnp.where(state.step == 0, x, e), ema.ranges, new.ranges
                )
                ema = dataclasses.replace(ema, ranges=ranges)
                if masks is not None:
                    ema = dataclasses.replace(ema, params=masked(ema.params, masks))
            moved = state.terms
            if term_update is not None and moved is not None:
                moved = term_update(moved, of_adapters, targets, state.step)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.global_norm(gradients),
            "update_norm": optax.global_norm(updates),
        }
        if len(terms) > 1:
            for term, value in zip(terms, values, strict=True):
                metrics[f"term_{term.name}"] = value.mean()
                metrics[f"weight_{term.name}"] = term.weight_at(progress)
            if term_gradients:
                alone = [gradients_of(slice(i, i + 1))[1][0] for i in range(len(terms))]
                if masks is not None:
                    alone = [masked(x, masks) for x in alone]
                metrics |= compared([x.name for x in terms], alone)
        for name, gradient in of_adapters.items():
            metrics[f"{ADAPTER_GRADIENT}{name}"] = jnp.linalg.norm(gradient["kernel"])
        if masks is not None:
            metrics[SPARSITY] = sparsity_of(masks)
        if weights is not None:
            metrics["effective_sample_share"] = effective_share(weights)
        if targets.teacher_logits:
            same = jnp.argmax(logits, -1) == first_choice(targets)
            metrics["agreement"] = same.mean(dtype=jnp.float32)
        return TrainState(state.step + 1, new, opt_state, ema, moved, masks), metrics

    return update


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
        drawn = state.step if period_steps is None else state.step % period_steps
        with jax.named_scope("views"):
            seen = step_views(law, views, student, teachers, batch, root, drawn)
        return update(state, seen.student, teach(frozen, batch, seen))

    return train_step
