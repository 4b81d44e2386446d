"""Where a run continues: the newest intact checkpoint, whether it may be used, and its state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from fm_distill.errors import UserError
from fm_distill.networks.loading import Networks
from fm_distill.runs.checkpoint import abstract, restore
from fm_distill.runs.integrity import NewestCheckpoint
from fm_distill.runs.state import TrainState
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import log
from fm_distill.system.sharding import Layout, on_devices
from fm_distill.train_step.pruning import masks_of_zeros
from fm_distill.training.build import Build
from fm_distill.training.rollback import ROLLBACKS, Rollback, as_json
from fm_distill.training.setup import Setup
from fm_distill.weights.load import start_from


def accept(
    newest: NewestCheckpoint,
    workdir: Workdir,
    metadata: dict[str, Any],
    rollbacks: tuple[Rollback, ...],
) -> None:
    """Names damaged checkpoints; raises `UserError` where the newest intact one cannot be used."""
    for step, problems in newest.damaged.items():
        suffix = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        checkpoint = f"checkpoint {step:,} in {workdir.checkpoints}"
        log(f"WARNING: {checkpoint} is damaged: {problems[0]}{suffix}")
    if newest.damaged and not newest.step:
        raise UserError(
            f"no checkpoint in {workdir.checkpoints} is valid ({len(newest.damaged)} damaged); "
            "restore a copy of one, or remove the folder to start again"
        )
    if not newest.step:
        return
    if newest.damaged:
        log(f"continuing from checkpoint {newest.step:,}, the newest intact one")
    stored_metadata = newest.metadata
    for name in ("data", "teacher"):
        if stored_metadata.get(name) != metadata[name]:
            raise UserError(
                f"checkpoint {newest.step:,} in {workdir.checkpoints} belongs to another {name}: "
                f"{stored_metadata.get(name)}, and now it is {metadata[name]}"
            )
    if stored_metadata.get("rollbacks", []) != as_json(
        rollbacks[: len(stored_metadata.get("rollbacks", []))]
    ):
        raise UserError(
            f"{workdir.path / ROLLBACKS} does not agree with checkpoint {newest.step:,}; restore it"
        )
    names = ("jax", "device_kind", "mesh", "memory", "processes")
    changes = [
        f"{x} {stored_metadata.get(x)} -> {metadata[x]}"
        for x in names
        if stored_metadata.get(x) != metadata[x]
    ]
    if changes:
        log(
            f"NOTICE: checkpoint {newest.step:,} was written with other {', '.join(changes)}: the "
            "run continues, but bit-for-bit equality is guaranteed only for the same"
        )


def first_state(setup: Setup, workdir: Workdir, start: int) -> TrainState:
    """The state of the newest checkpoint, or a new one, straight on its shards."""
    shapes = setup.built.abstract_state
    shardings = setup.layout.variables(shapes)
    if start:
        return restore(workdir.checkpoints / str(start), abstract(shapes, shardings))
    state, remark = new_state(setup.built, setup.networks, setup.layout, setup.keys.init)
    if remark:
        log(remark)
    return state


def new_state(
    built: Build, networks: Networks, layout: Layout, init_key: PRNGKeyArray
) -> tuple[TrainState, str | None]:
    """The state before the first step, and what became of the head of the student's weights."""
    shardings = layout.variables(built.abstract_state)
    state = jax.jit(built.init, out_shardings=shardings)(init_key)
    if networks.pretrained is None:
        return state, None
    student, remark = start_from(
        state.student, networks.pretrained, networks.classes, networks.class_names
    )
    student = on_devices(student, shardings.student)
    masks = state.masks
    if masks is not None:
        masks = jax.jit(masks_of_zeros, out_shardings=shardings.masks)(masks, student.params)
    # A copy: the same buffer cannot be donated twice.
    ema = None if state.ema is None else jax.tree.map(jnp.copy, student)
    return dataclasses.replace(state, student=student, ema=ema, masks=masks), remark
