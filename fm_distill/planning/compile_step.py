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
from jaxtyping import PyTree

from fm_distill.config import Config, NetworkConfig
from fm_distill.config.serialization import from_json
from fm_distill.config.steps import total_steps
from fm_distill.data.batch import Batch
from fm_distill.data.resident import Resident, is_resident, tiles_of
from fm_distill.errors import UserError
from fm_distill.networks.branch import render_views
from fm_distill.planning.hlo import read
from fm_distill.planning.topologies import Topology, topology
from fm_distill.runs.checkpoint import bytes_of
from fm_distill.system.sharding import Layout, check_batch_size, make_layout
from fm_distill.training.build import Build, build
from fm_distill.training.dispatch import steps_per_dispatch
from fm_distill.training.program import make_program
from fm_distill.training.reporter import disk_use
from fm_distill.views.draws import draws_of
from fm_distill.weights.card import network_from_json


@dataclasses.dataclass(frozen=True)
class Request:
    """A run as far as its shapes say it."""

    config: Config
    teachers: tuple[NetworkConfig, ...]
    classes: int
    examples: int
    topology: Topology


def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def batch_of(request: Request, built: Build) -> Batch:
    """Shapes of one batch."""
    config, count = request.config, request.config.batch_size
    side = config.data.canvas.side
    targets = None
    if config.objective.target == "teacher" and not built.taught_by:
        sums = config.objective.ensemble == "sum_of_distances"
        asked = len(request.teachers) if sums else 1
        targets = abstract((count, asked, request.classes), jnp.float32)
    return Batch(
        abstract((count, side, side, 3), jnp.uint8),
        abstract((count, 2), jnp.int32),
        abstract((count,), jnp.int32),
        targets,
    )


def split_of(request: Request, batch: Batch) -> Resident:
    """Shapes of the whole training split in device memory."""
    n, side = request.examples, request.config.data.canvas.side
    targets = batch.targets and abstract((n, *batch.targets.shape[1:]), jnp.float32)
    return Resident(
        abstract((n, *tiles_of(side)), jnp.uint8),
        abstract((n, 2), jnp.int32),
        abstract((n,), jnp.int32),
        targets,
        side,
    )


def compile_step(request: Request) -> dict[str, Any]:
    """The figures of `plan.Plan` that the compiler knows."""
    config, devices = request.config, _devices(request.topology)
    layout = make_layout(config.mesh, devices)
    check_batch_size(config, layout)
    steps = total_steps(config, request.examples)
    built = build(config, request.classes, request.teachers, steps, layout)
    state, key = built.abstract_state(), jax.eval_shape(lambda: jax.random.key(0))
    frozen = tuple(
        jax.eval_shape(branch.network.freeze, jax.eval_shape(branch.network.init, key))
        for branch in built.taught_by
    )
    batch = batch_of(request, built)
    chip = request.topology.chip
    capacity = chip.memory_bytes if chip else None
    resident, _ = is_resident(config.data, request.examples, capacity)
    dispatch = steps_per_dispatch(config, resident, layout)
    data = split_of(request, batch) if resident else None
    fed = abstract((dispatch, config.batch_size), jnp.int32) if resident else batch
    program = make_program(built.train_step, state, frozen, data, layout)
    answer: dict[str, Any] = {
        "devices": layout.mesh.size,
        "feeding": "resident" if resident else "streaming",
        "steps_per_dispatch": dispatch,
        "total_steps": steps,
        "disk": disk_use(config, steps, bytes_of(state)),
        "flops": flops(request, layout, steps, (state, frozen, batch, key)),
        "resident_data": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(data)),
    }
    platform = "tpu" if request.topology.compiler else "cpu"
    lowered = program.trace(state, frozen, data, fed, key).lower(lowering_platforms=(platform,))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return answer | {"compiles": False, "compiler_said": _first_line(str(error))}
    memory, text = compiled.memory_analysis(), read(compiled.as_text())
    # The loop over the steps of a dispatch is one that the compiler counts once.
    moved = compiled.cost_analysis()["bytes accessed"] * text.loops_factor() / dispatch
    return answer | {
        "compiles": True,
        "arguments": memory.argument_size_in_bytes - answer["resident_data"],
        "temporaries": memory.temp_size_in_bytes,
        "donated": memory.alias_size_in_bytes,
        "hbm_bytes": moved,
        "collectives": {k: v / dispatch for k, v in text.collectives().items()},
        "host_transfers": text.host_transfers(),
    }


def flops(
    request: Request, layout: Layout, steps: int, arguments: tuple[PyTree, ...]
) -> dict[str, float]:
    """Of one step, over all devices: in all, and by who needs them.

    Of the mathematics before it is compiled, in one part where a lever makes several: loops would
    be counted once. What is rematerialised counts twice.
    """
    config = request.config
    whole = dataclasses.replace(config.memory, accumulate=1, teacher_parts=1)
    config = dataclasses.replace(config, memory=whole)
    built = build(config, request.classes, request.teachers, steps, layout)
    state, frozen, batch, key = arguments
    branches = (built.student, *built.taught_by)
    draws = draws_of(config.objective.target, config.teaching)

    def views(key: Any, batch: Batch) -> PyTree:
        drawn, seen = draws(key, batch.sizes, config.views)
        if seen is drawn or seen is None:
            return render_views(drawn, batch, branches)
        return render_views(drawn, batch, branches[:1]), render_views(seen, batch, branches[1:])

    def teacher(frozen: PyTree, pictures: PyTree) -> PyTree:
        return [
            branch.network.apply_frozen(x, input_spec).logits
            for branch, x, input_spec in zip(built.taught_by, frozen, pictures, strict=True)
        ]

    def input_spec(resolution: int) -> jax.ShapeDtypeStruct:
        return abstract((config.batch_size, resolution, resolution, 3), jnp.float32)

    pictures = [input_spec(branch.input_spec.resolution) for branch in built.taught_by]
    of_views = _counted(views, key, batch)
    of_teacher = _counted(teacher, frozen, pictures) if frozen else 0.0
    total = _counted(built.train_step, state, frozen, batch, key)
    return {
        "total": total,
        "teacher": of_teacher,
        # What is neither: distance and update are thousandths of it.
        "student": total - of_teacher - of_views,
        "views": of_views,
    }


def _counted(function: Any, *arguments: PyTree) -> float:
    found = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).cost_analysis()
    return float(found["flops"])


def _devices(asked: Topology) -> list[Any]:
    if asked.compiler is None:
        return list(jax.devices("cpu"))
    found = topologies.get_topology_desc(**asked.compiler)
    return list(np.asarray(found.devices).flat)


def _first_line(text: str) -> str:
    return re.sub(r"^[A-Z_]+: ", "", text).partition("\n")[0][:400]


def main(request_path: str, answer_path: str) -> None:
    asked = json.loads(pathlib.Path(request_path).read_text())
    request = Request(
        config=from_json(asked["config"]),
        teachers=tuple(network_from_json(x) for x in asked["teachers"]),
        classes=asked["classes"],
        examples=asked["examples"],
        topology=topology(asked["topology"]),
    )
    try:
        answer = compile_step(request)
    except UserError as error:
        answer = {"error": str(error)}
    pathlib.Path(answer_path).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
