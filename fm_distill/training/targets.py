"""The fixed teachers' logits for each training image, computed once, before the training begins.

Only for `teaching="fixed"`: of the central crop, or the mean over many random crops (the paper's
`fix/cc` and `fix/ic_ens`). `setup.py` sends the result along with the examples.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Float

from fm_distill.config import Config
from fm_distill.config.resolved import ResolvedRun
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import Reader, evaluation_batches
from fm_distill.errors import UserError
from fm_distill.models import Variables
from fm_distill.networks.branch import Branch, render_central_views, render_views, teacher_outputs
from fm_distill.objectives.ensemble import combine
from fm_distill.system.console import progress
from fm_distill.system.files import DAMAGED_ARCHIVE, replacing
from fm_distill.system.processes import first_process
from fm_distill.system.sharding import Layout
from fm_distill.views.draws import draw
from fm_distill.views.rendering import CentralCrop

Targets = Float[np.ndarray, "examples targets classes"]


def fixed_targets(
    config: Config,
    resolved: ResolvedRun,
    teachers: tuple[Branch, ...],
    frozen: tuple[Variables, ...],
    reader: Reader,
    layout: Layout,
    kept: pathlib.Path,
) -> Targets:
    """The targets of each example of `reader`, in its order; read from `kept` if they are there.

    A damaged file is computed again. Raises `UserError` where the file was made by other teachers,
    from other images or other views of them.
    """
    identity = _identity(config, resolved)
    if (stored_targets := _read(kept, identity)) is not None:
        return stored_targets
    program = jax.jit(_program(config, teachers), out_shardings=layout.replicated)
    batches = evaluation_batches(reader, config.batch_size)
    count = -(-len(reader) // config.batch_size)
    rows = []
    ensemble = config.objective.ensemble, config.objective.temperature
    batches_with_progress = progress(batches, "computing fixed targets", "batches", count)
    for index, (host_batch, _) in enumerate(batches_with_progress):
        batch = layout.spread(host_batch)
        # A loop on the device would be many times slower on a CPU.
        crops = (
            np.asarray(program(frozen, batch, np.int32(index), np.int32(crop)))
            for crop in range(max(config.fixed_crops, 1))
        )
        logits = _mean(crops, config)
        rows.append(np.stack(combine(tuple(map(jnp.asarray, logits)), *ensemble), axis=1))
    targets = np.concatenate(rows)[: len(reader)]
    _write(kept, targets, identity)
    return targets


def _identity(config: Config, resolved: ResolvedRun) -> dict[str, Any]:
    """All that the targets depend on, as JSON."""
    objective, views = config.objective, config.views
    identity: dict[str, Any] = {
        "data": resolved.data,
        "examples": resolved.examples,
        "classes": resolved.classes,
        "canvas": config.data.canvas,
        "teachers": resolved.teachers,
        "teacher_weights": resolved.teacher_weights,
        "ensemble": objective.ensemble,
        "crops": config.fixed_crops,
    }
    if objective.ensemble == "mean_probabilities":
        identity["temperature"] = objective.temperature
    if config.fixed_crops:
        # Crops are drawn from the seed, a batch at a time.
        identity |= {"seed": config.seed, "batch_size": config.batch_size}
        identity |= {"crop": views.crop, "area": views.crop_area, "aspect": views.crop_aspect}
        identity["flip_probability"] = views.flip_probability
    else:
        identity["central_fraction"] = views.central_fraction
        identity["central_resize"] = views.central_resize
    return msgspec.json.decode(msgspec.json.encode(identity))


def _program(
    config: Config, teachers: tuple[Branch, ...]
) -> Callable[[tuple[Variables, ...], Batch, Array, Array], Array]:
    """`(frozen, batch, its index, crop) -> logits (teachers, batch, classes)`."""
    unmixed_views = dataclasses.replace(config.views, mixup="none")

    def program(frozen: tuple[Variables, ...], batch: Batch, index: Array, crop: Array) -> Array:
        if config.fixed_crops:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), index), crop)
            views = render_views(draw(key, batch.sizes, unmixed_views), batch, teachers)
        else:
            views = render_central_views(batch, teachers, CentralCrop.of(unmixed_views))
        return jnp.stack(teacher_outputs(teachers, frozen, views))

    return program


def _mean(crops: Iterator[np.ndarray], config: Config) -> np.ndarray:
    """Over crops as over teachers: of logits, or of probabilities at the training's temperature."""
    temperature, count = config.objective.temperature, max(config.fixed_crops, 1)
    if config.objective.ensemble != "mean_probabilities" or count == 1:
        return np.asarray(functools.reduce(np.add, crops) / np.float32(count))
    logs = (np.asarray(jax.nn.log_softmax(x / temperature)) for x in crops)
    return temperature * (functools.reduce(np.logaddexp, logs) - np.float32(math.log(count)))


def _read(kept: pathlib.Path, identity: dict[str, Any]) -> Targets | None:
    try:
        with np.load(kept, allow_pickle=False) as archive:
            targets = archive["targets"]
            stored_identity = json.loads(str(archive["identity"])) if "identity" in archive else {}
    except (OSError, *DAMAGED_ARCHIVE):
        return None
    if stored_identity != identity:
        different_fields = [
            name for name in identity if stored_identity.get(name) != identity[name]
        ]
        lines = [
            f"{x}: {stored_identity.get(x, '(missing)')} there, {identity[x]} now"
            for x in different_fields
        ]
        raise UserError(
            f"{kept} holds the targets of another run ({'; '.join(lines)}); remove it, so that it "
            "is computed again, or choose another --workdir"
        )
    return targets if targets.shape[0] == identity["examples"] else None


def _write(kept: pathlib.Path, targets: Targets, identity: dict[str, Any]) -> None:
    if not first_process():
        return
    with replacing(kept) as temporary, temporary.open("wb") as file:
        np.savez(file, targets=targets, identity=np.array(json.dumps(identity)))
