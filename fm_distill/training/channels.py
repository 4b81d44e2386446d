"""The student's channels, chosen by the gradient of the run before its first step.

The batches, views, targets and loss are those of the run's own first steps: its very step is
called, with an optimizer that does not move the student but sums gradient times weight over the
weights of each channel. What the formula is: `networks/channel_scores.py`.
"""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from fm_distill.config import Config
from fm_distill.config.regime import regime_of
from fm_distill.config.resolved import ResolvedRun
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import StreamingFeed
from fm_distill.data.splits import Data
from fm_distill.data.target_images import spectra_on_devices
from fm_distill.errors import UserError
from fm_distill.models import HEAD, InnerChannels, Variables
from fm_distill.networks.channel_scores import (
    Scores,
    TaylorSums,
    taylor_scores,
    taylor_sums,
    write_scores,
)
from fm_distill.networks.loading import Networks
from fm_distill.networks.shrinking import shrunk
from fm_distill.objectives.terms import needs_labels
from fm_distill.preparation.resolve import resolve
from fm_distill.runs.state import TrainState
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import log
from fm_distill.system.processes import first_process
from fm_distill.system.sharding import Layout
from fm_distill.training.build import build
from fm_distill.training.resume import new_state
from fm_distill.training.setup import keys_on_devices, open_inputs
from fm_distill.views.draws import ViewRoot
from fm_distill.weights.load import fingerprint

INSTEAD = "use student.pruning.criterion=magnitude"


def decided_networks(
    config: Config, networks: Networks, data: Data, layout: Layout, folder: pathlib.Path
) -> Networks:
    """`networks` with the channels of the student that stay.

    Where they are chosen by gradient, and the run has not done so yet, they are chosen now, and
    their scores are written to `folder`. Raises `UserError`.
    """
    start = networks.pretrained
    if not networks.undecided or start is None:
        return networks
    _refuse_own_teacher(config, networks)
    resolved = resolve(config, data.facts, networks.facts, layout)
    blocks, scores = gradient_scores(config, resolved, data, networks, layout, folder)
    pretrained = shrunk(start, config.student.pruning, scores)
    workdir = Workdir(folder)
    # Other scores of a run that has begun are refused, and would be read by the next try.
    unchanged = not workdir.has_config() or (
        workdir.stored().resolved.student_weights == fingerprint(pretrained.variables)
    )
    if first_process() and unchanged:
        path = workdir.channel_scores
        try:
            write_scores(path, scores, blocks)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error}; free some space, or choose another --workdir"
            ) from None
    widths = pretrained.network.block_widths
    student = dataclasses.replace(networks.student, block_widths=widths)
    return dataclasses.replace(networks, student=student, pretrained=pretrained, undecided=False)


def _refuse_own_teacher(config: Config, networks: Networks) -> None:
    """Raises `UserError` where the student equals its only teacher: nothing is left to learn."""
    regime = regime_of(config)
    if regime.targets not in ("teachers", "recording") or regime.views == "independent":
        return
    assert networks.pretrained is not None
    student_fingerprint = fingerprint(networks.pretrained.variables)
    if {x.fingerprint for x in networks.teachers} == {student_fingerprint} and not needs_labels(
        config.objective
    ):
        raise UserError(
            "student.pruning.criterion=taylor needs a loss that is not zero, and the student's "
            f"weights are its teacher's own: {INSTEAD}, or the teacher that taught them"
        )


def gradient_scores(
    config: Config,
    resolved: ResolvedRun,
    data: Data,
    networks: Networks,
    layout: Layout,
    folder: pathlib.Path,
) -> tuple[tuple[InnerChannels, ...], Scores]:
    """The blocks of the student as it starts, and what their channels are worth to its loss.

    The mean over the first batches of the run, without a step between them; see `taylor_scores`.
    What is computed of the teachers is kept in `folder`. Raises `UserError` where the gradient
    ranks nothing.
    """
    config = dataclasses.replace(config, ema_decay=None)
    blocks = build(config, resolved).student.network.inner_channels

    def instead_of_a_step(
        gradients: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        return jax.tree.map(jnp.zeros_like, gradients), taylor_sums(params, gradients, blocks)

    summing = optax.GradientTransformation(lambda params: (), instead_of_a_step)
    built = build(config, resolved, summing)
    keys = keys_on_devices(config, layout, spectra_on_devices(config, resolved, layout))
    state, _ = new_state(built, networks, layout, keys.init)
    head = state.student.params.get(HEAD)
    if head and not jax.jit(optax.global_norm, out_shardings=layout.replicated)(head):
        raise UserError(
            "student.pruning.criterion=taylor needs a trained head: this one is new and zero, "
            f"and no gradient passes through it; {INSTEAD}, or train the student first"
        )
    inputs = open_inputs(config, resolved, built, data, networks, layout, folder, keys.draws)

    def of_batch(
        state: TrainState, frozen: tuple[Variables, ...], batch: Batch, root: ViewRoot
    ) -> TaylorSums:
        batch_sums: TaylorSums = built.train_step(state, frozen, batch, root)[0].opt_state
        return batch_sums

    program = jax.jit(of_batch, out_shardings=layout.replicated)
    count = min(
        config.student.pruning.taylor_batches, resolved.period_steps or resolved.total_steps
    )
    feed = StreamingFeed(
        inputs.reader, config.seed, config.batch_size, count, layout.batch, inputs.targets,
        inputs.recording, resolved.period_steps,
    )  # fmt: skip
    frozen = inputs.teachers.live(built)
    log(f"channels are chosen by the gradient over the first {count:,} batches")
    sums: list[TaylorSums] = []
    for step, batch in enumerate(feed.feed(0, itertools.repeat(1, count))):
        device_step: Array = jax.device_put(np.int32(step), layout.replicated)
        state = dataclasses.replace(state, step=device_step)
        sums.append(jax.device_get(program(state, frozen, batch, keys.draws)))
    scores = taylor_scores(sums)
    values = np.concatenate([x for block_scores in scores for x in block_scores])
    if not np.isfinite(values).all():
        raise UserError(
            "student.pruning.criterion=taylor: the gradient of the student's loss is not finite; "
            f"check the weights and input ranges, try --precision float32, or {INSTEAD}"
        )
    if not values.any():
        raise UserError(
            "student.pruning.criterion=taylor: the gradient of the student's loss is zero, so it "
            f"has nothing to learn; {INSTEAD}, or another teacher"
        )
    return blocks, scores
