"""Compiles the step of a run for devices that are not here, in a process of its own.

    python -m fm_distill.planning.compile_step REQUEST.json ANSWER.json

`plan.py` starts it: the TPU compiler wants its environment before JAX begins, and prints a lot.
"""

import dataclasses
import json
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jaxtyping import Array, PyTree

from fm_distill.config import Config, NetworkConfig
from fm_distill.config.regime import regime_of
from fm_distill.config.resolved import ResolvedRun
from fm_distill.config.serialization import from_json
from fm_distill.config.teachers import recording_of
from fm_distill.data.batch import Batch
from fm_distill.data.resident import Resident, ResidentSteps, tiles_of
from fm_distill.errors import UserError
from fm_distill.models import build_network
from fm_distill.networks.branch import freeze_of, step_views, teacher_outputs
from fm_distill.networks.cost import count_flops
from fm_distill.objectives.terms import features_of
from fm_distill.planning.hlo import read
from fm_distill.planning.movers import largest_movers
from fm_distill.planning.topologies import Topology, topology
from fm_distill.preparation.check_features import feature_shape
from fm_distill.preparation.resolve import resolve_described
from fm_distill.recordings.rows import TargetRows
from fm_distill.runs.checkpoint import bytes_of
from fm_distill.system.sharding import check_batch_size, make_layout
from fm_distill.train_step.program import make_program
from fm_distill.training.build import build
from fm_distill.training.reporter import disk_use
from fm_distill.views.draws import ViewRoot, run_keys
from fm_distill.views.fourier import square_rows
from fm_distill.weights.card import network_from_json


@dataclasses.dataclass(frozen=True)
class Request:
    """A run as far as shapes describe it."""

    config: Config
    teachers: tuple[NetworkConfig, ...]
    classes: int
    examples: int
    topology: Topology


def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def batch_of(request: Request) -> Batch:
    """Shapes of one batch."""

    def zeros() -> Batch:
        zero_batch = _zeros(request, request.config.batch_size)
        return dataclasses.replace(zero_batch, recorded=_recorded(request))

    return jax.eval_shape(zeros)


def split_of(request: Request) -> Resident:
    """Shapes of the whole training split in device memory."""
    side, examples = request.config.data.canvas.side, request.examples

    def split() -> Resident:
        zero_batch = _zeros(request, examples)
        tiles = jnp.zeros((examples, *tiles_of(side)), jnp.uint8)
        return Resident(tiles, zero_batch.sizes, zero_batch.labels, zero_batch.targets, side)

    return jax.eval_shape(split)


def _zeros(request: Request, count: int) -> Batch:
    config, side = request.config, request.config.data.canvas.side
    targets = None
    if regime_of(config).targets == "table":
        per_teacher = config.objective.ensemble == "sum_of_distances"
        target_count = len(request.teachers) if per_teacher else 1
        targets = jnp.zeros((count, target_count, request.classes), jnp.float32)
    return Batch(
        jnp.zeros((count, side, side, 3), jnp.uint8),
        jnp.zeros((count, 2), jnp.int32),
        jnp.zeros((count,), jnp.int32),
        targets,
    )


def _recorded(request: Request) -> TargetRows | None:
    """What comes with each batch where a recording teaches: all in float16, and all classes."""
    if recording_of(request.config) is None:
        return None
    batch_shape = request.config.batch_size, len(request.teachers)
    features = {
        tap: jnp.zeros((batch_shape[0], shape[-1]), jnp.float16)
        for tap, shape in _taps(request).items()
    }
    logits = jnp.zeros((*batch_shape, request.classes), jnp.float16)
    return TargetRows(logits, jnp.zeros(batch_shape), features=features)


def _taps(request: Request) -> dict[str, tuple[int, ...]]:
    """Shapes, for an image, of the teacher's features that the terms read."""
    taps = features_of(request.config.objective)[1]
    if not taps:
        return {}
    teacher = build_network(request.teachers[0], request.classes, jnp.dtype("float32"))
    return {tap: feature_shape("teacher_tap", "teacher", teacher, tap) for tap in taps}


def recorded_taps(request: Request) -> dict[str, int] | None:
    """Channels of what `record --taps` would store; None where a term compares places."""
    shapes = _taps(request)
    unpooled_taps = {
        term.teacher_tap for term in request.config.objective.terms if term.pool == "none"
    }
    if any(len(shape) > 1 and tap in unpooled_taps for tap, shape in shapes.items()):
        return None
    return {tap: shape[-1] for tap, shape in shapes.items()}


def root_of(config: Config, resolved: ResolvedRun) -> ViewRoot:
    """Shapes of what the views come from; of target images, whose number is not known, one."""
    fourier = config.views.fourier
    sides = {network.resolution for network in (resolved.student, *resolved.teachers)}

    def root() -> ViewRoot:
        view_root = run_keys(config.seed).draws
        if fourier.folder is None:
            return view_root
        rows_by_side = {side: square_rows(fourier.beta, side) for side in sides}
        spectra = {
            side: jnp.zeros((1, rows, rows, 3), jnp.float32) for side, rows in rows_by_side.items()
        }
        return dataclasses.replace(view_root, spectra=spectra)

    return jax.eval_shape(root)


def compile_step(request: Request) -> dict[str, Any]:
    """The figures of `plan.Plan` that the compiler knows."""
    config, devices = request.config, _devices(request.topology)
    layout = make_layout(config.mesh, devices)
    check_batch_size(config, layout)
    chip = request.topology.chip
    capacity = chip.memory_bytes if chip else None
    resolved = resolve_described(
        config, request.teachers, request.classes, request.examples, layout, capacity
    )
    resident, total_steps = resolved.feeding == "resident", resolved.total_steps
    steps_per_dispatch = resolved.steps_per_dispatch
    built = build(config, resolved)
    state, root = built.abstract_state, root_of(config, resolved)
    frozen = tuple(
        jax.eval_shape(freeze_of(branch.network), jax.eval_shape(branch.network.init, root.key))
        for branch in built.live_teachers
    )
    batch = batch_of(request)
    data = split_of(request) if resident else None
    step_input: Batch | ResidentSteps = batch
    if resident:
        ids = abstract((steps_per_dispatch, config.batch_size), jnp.int32)
        recorded = jax.tree.map(
            lambda leaf: abstract((steps_per_dispatch, *leaf.shape), leaf.dtype), batch.recorded
        )
        step_input = ResidentSteps(ids, recorded)
    program = make_program(built.train_step, state, frozen, data, layout)
    analysis: dict[str, Any] = {
        "devices": layout.mesh.size,
        "feeding": resolved.feeding,
        "steps_per_dispatch": steps_per_dispatch,
        "total_steps": total_steps,
        "disk": disk_use(config, total_steps, bytes_of(state)),
        "flops": flops(config, resolved, (state, frozen, batch, root)),
        "recorded_taps": recorded_taps(request),
        "resident_data": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(data)),
    }
    platform = "tpu" if request.topology.compiler else "cpu"
    lowered = program.trace(state, frozen, data, step_input, root).lower(
        lowering_platforms=(platform,)
    )
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return analysis | {"compiles": False, "compiler_said": _first_line(str(error))}
    memory, compiled_text = compiled.memory_analysis(), compiled.as_text()
    hlo_program = read(compiled_text)
    # The loop over the steps of a dispatch is one that the compiler counts once.
    hbm_bytes = (
        compiled.cost_analysis()["bytes accessed"] * hlo_program.loops_factor() / steps_per_dispatch
    )
    return analysis | {
        "compiles": True,
        "arguments": memory.argument_size_in_bytes - analysis["resident_data"],
        "temporaries": memory.temp_size_in_bytes,
        "donated": memory.alias_size_in_bytes,
        "hbm_bytes": hbm_bytes,
        "collectives": {
            name: count / steps_per_dispatch for name, count in hlo_program.collectives().items()
        },
        "host_transfers": hlo_program.host_transfers(),
        "movers": [
            dataclasses.asdict(mover)
            for mover in largest_movers(compiled_text, hlo_program, steps_per_dispatch)
        ],
    }


def flops(config: Config, resolved: ResolvedRun, arguments: tuple[PyTree, ...]) -> dict[str, float]:
    """Of one step, over all devices: in all, and by the part that needs them.

    `arguments` are shapes of state, frozen teachers, batch and root of views. Of the mathematics
    before it is compiled, in one part where a memory option makes several: loops would be counted
    once. What is rematerialised counts twice.
    """
    undivided_memory = dataclasses.replace(config.memory, accumulate=1, teacher_parts=1)
    config = dataclasses.replace(config, memory=undivided_memory)
    built = build(config, resolved)
    state, frozen, batch, root = arguments
    teachers = built.live_teachers
    view_distribution = regime_of(config).views

    def views(root: ViewRoot, batch: Batch) -> PyTree:
        drawn_views = step_views(
            view_distribution, config.views, built.student, teachers, batch, root, 0
        )
        return drawn_views.student, list(drawn_views.teachers.values())

    def teacher(frozen: PyTree, images: list[Array]) -> PyTree:
        images_by_spec = {
            branch.input_spec: view_images
            for branch, view_images in zip(teachers, images, strict=True)
        }
        return teacher_outputs(teachers, frozen, images_by_spec)

    images = [
        abstract((config.batch_size, *(branch.input_spec.resolution,) * 2, 3), jnp.float32)
        for branch in teachers
    ]
    view_flops = count_flops(views, root, batch)
    teacher_flops = count_flops(teacher, frozen, images) if frozen else 0.0
    total_flops = count_flops(built.train_step, state, frozen, batch, root)
    return {
        "total": total_flops,
        "teacher": teacher_flops,
        # What is neither: distance and update are thousandths of it.
        "student": total_flops - teacher_flops - view_flops,
        "views": view_flops,
    }


def _devices(requested: Topology) -> list[Any]:
    if requested.compiler is None:
        return list(jax.devices("cpu"))
    description = topologies.get_topology_desc(**requested.compiler)
    return list(np.asarray(description.devices).flat)


def _first_line(text: str) -> str:
    return re.sub(r"^[A-Z_]+: ", "", text).partition("\n")[0][:400]


def main(request_path: str, analysis_path: str) -> None:
    request_fields = json.loads(pathlib.Path(request_path).read_text())
    request = Request(
        config=from_json(request_fields["config"]),
        teachers=tuple(network_from_json(network) for network in request_fields["teachers"]),
        classes=request_fields["classes"],
        examples=request_fields["examples"],
        topology=topology(request_fields["topology"]),
    )
    try:
        analysis = compile_step(request)
    except UserError as error:
        analysis = {"error": str(error)}
    pathlib.Path(analysis_path).write_text(json.dumps(analysis))


if __name__ == "__main__":
    main(*sys.argv[1:])
