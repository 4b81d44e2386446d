"""The loss of one batch: the student on its view, and the terms between its output and the targets.

The step differentiates it, and a diagnosis takes it apart: both call this one function.
"""

import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int, PyTree

from fm_distill.config import Config
from fm_distill.models import Output, Variables
from fm_distill.networks.branch import Branch
from fm_distill.objectives.bank import Bank
from fm_distill.objectives.curves import Progress, progress_of
from fm_distill.objectives.distances import Logits, PerExample
from fm_distill.objectives.example_weights import ExampleWeights, make_example_weights
from fm_distill.objectives.terms import (
    Outputs,
    Targets,
    Term,
    features_of,
    make_terms,
    values_of,
    weighted_sum,
)
from fm_distill.train_step.memory import rematerialised


class Evaluated(NamedTuple):
    """What the loss is made of, on one batch."""

    # Of each term, without its weight; each example's is multiplied by the weight of the example.
    values: tuple[PerExample, ...]
    logits: Logits
    example_weights: PerExample | None
    # BatchNorm's statistics and the ranges of quantised activations after this batch.
    statistics: PyTree
    ranges: PyTree


@dataclasses.dataclass(frozen=True)
class Loss:
    """A mean over the batch of the weighted sum of `terms`, in float32.

    With `keep_statistics` BatchNorm uses the statistics that it has, as in evaluation; the ranges
    of quantised activations follow all the same. `rematerialise` is a key of `REMATERIALISE`.
    """

    student: Branch
    terms: tuple[Term, ...]
    total_steps: int  # of the schedules of weights and temperature
    features: tuple[str, ...] = ()  # of the student, that the terms read
    example_weights: ExampleWeights | None = None
    keep_statistics: bool = False
    rematerialise: str = "nothing"

    def progress(self, step: Int[Array, ""]) -> Progress:
        return progress_of(step, self.total_steps)

    def evaluate(
        self,
        variables: Variables,
        adapters: PyTree,
        banks: dict[str, Bank],
        images: Float[Array, "batch height width 3"],
        targets: Targets,
        step: Int[Array, ""],
    ) -> Evaluated:
        """The student in training on `images`, its view, and the value of each term."""

        def apply(variables: Variables, images: Array) -> Output:
            network = self.student.network
            run = network.apply_observing or network.apply
            return run(variables, images, train=not self.keep_statistics, features=self.features)

        with jax.named_scope("student"):
            output = rematerialised(apply, self.rematerialise)(variables, images)
        outputs = Outputs(output.logits, output.features, adapters, banks)
        progress, weights = self.progress(step), None
        values = values_of(self.terms, outputs, targets, progress)
        if self.example_weights is not None:
            weights = jax.lax.stop_gradient(self.example_weights(outputs, targets, progress))
            values = tuple(weights * x for x in values)
        return Evaluated(values, output.logits, weights, output.statistics, output.ranges or {})

    def mean(
        self, values: tuple[PerExample, ...], step: Int[Array, ""], which: slice = slice(None)
    ) -> Float[Array, ""]:
        """The loss, or the part of it that some of the terms are."""
        return weighted_sum(self.terms[which], values[which], self.progress(step)).mean()


def make_loss(config: Config, student: Branch, total_steps: int) -> Loss:
    """The loss of a run of `config`."""
    objective = config.objective
    return Loss(
        student,
        make_terms(objective),
        total_steps,
        features=features_of(objective)[0],
        example_weights=make_example_weights(objective),
        keep_statistics=config.student.keep_statistics,
        rematerialise=config.memory.rematerialise,
    )
