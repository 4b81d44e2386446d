"""What a run would need on devices that are not here: `fm-distill plan`.

The very step that `train` runs is compiled by the devices' own compiler, in a child process;
only the time it takes is estimated. See `compile_step.py`, which is that child.
"""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from fm_distill.config import Config, NetworkConfig, with_quantisation
from fm_distill.config.code import STUDENT
from fm_distill.config.regime import regime_of
from fm_distill.config.serialization import changed, to_json
from fm_distill.config.steps import transfer_examples
from fm_distill.config.teachers import NamedTeacher, teachers_of
from fm_distill.errors import UserError
from fm_distill.models import resolve
from fm_distill.planning.movers import Mover
from fm_distill.planning.recording_plan import RecordingPlan, recording_plan
from fm_distill.planning.topologies import Topology, topology
from fm_distill.preparation.check import check
from fm_distill.preparation.experiment import load_experiment
from fm_distill.runs.run_code import refuse_code_of_run
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import COMPILING, log
from fm_distill.weights.card import only_network

# Expected time of a step over its lower bound. Calibrated on the one published v3-8 row: food101
# for 3,000 epochs in 14 hours, evaluations included (big_vision, configs/proj/distill), in that
# row's float32. `tools/plan_table.py published` prints it, and rows that it was not fitted to.
TIME_OVER_BOUND = 2.34


# The compiler's environment: it must neither look for a TPU nor fail where one is in use.
COMPILER_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v3-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


TIMEOUT_S = 3600


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one JAX device."""

    arguments: int | None  # state and teachers; None where the compiler gave up
    temporaries: int | None
    resident_data: int
    capacity: int | None  # None on a CPU


@dataclasses.dataclass(frozen=True)
class StepSeconds:
    """Of one step; None on a CPU, or where it does not compile."""

    lower_bound: float | None  # what peak FLOP/s and bandwidth allow
    expected: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `fm-distill plan --json` prints."""

    topology: str
    devices: int
    compiles: bool
    fits: bool
    memory_bytes: Memory
    flops: dict[str, float]  # total, teacher, student, views: a step, over all devices
    hbm_bytes: float | None  # a step, a device
    movers: tuple[Mover, ...]  # the lines whose operations move the most of it
    collectives: dict[str, float]  # name -> how often a step
    host_transfers: int | None
    step_seconds: StepSeconds
    images_per_second: float | None
    epochs_per_hour: float | None
    hours: float | None
    sessions: int | None  # of `max_hours` each
    weeks: float | None  # of `weekly_hours` each
    recording: RecordingPlan | None  # of a run whose teacher can be recorded
    feeding: str
    steps_per_dispatch: int
    total_steps: int
    donated_bytes: int | None  # of the state, updated in place: a device
    disk: str
    notes: tuple[str, ...]  # what the figures leave out
    compiler_said: str | None  # why it does not compile
    fits_with: dict[str, Any] | None  # options of the first variant that was tried and fits


def plan(
    config: Config,
    topology_name: str,
    *,
    max_hours: float = 9.0,
    weekly_hours: float = 20.0,
    num_examples: int | None = None,
    search: bool = True,
) -> Plan:
    """Compiles the step of `config` for devices that need not be here.

    Neither weights nor data are read: `num_examples`, or the counts in the config, stand for the
    data. Where it does not fit, `search` compiles variants until one does. Raises `UserError`.
    """
    check(config)
    target_topology = topology(topology_name)
    examples = num_examples or transfer_examples(config.data)
    if examples is None:
        raise UserError(
            "the number of training examples is not in the experiment; give --num-examples N"
        )
    if config.data.classes is None:
        raise UserError("the number of classes is not in the experiment; give --data.classes N")
    if target_topology.compiler and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for a TPU needs its compiler: pip install 'fm-distill[tpu]' (libtpu, Linux "
            "on x86-64)"
        )
    plan = _planned(config, target_topology, examples, max_hours, weekly_hours)
    if plan.fits or not search:
        return plan
    for options, variant in variants(config, target_topology.devices):
        log(f"does not fit; trying {' '.join(f'--{k} {v}' for k, v in options.items())}")
        try:
            if _planned(variant, target_topology, examples, max_hours, weekly_hours).fits:
                return dataclasses.replace(plan, fits_with=options)
        except UserError:  # this option does not suit this run: BatchNorm, or an odd batch
            continue
    return plan


def variants(config: Config, devices: int) -> list[tuple[dict[str, Any], Config]]:
    """What is tried when a run does not fit, the cheapest in time first, as options and config."""
    steps: list[dict[str, Any]] = [
        {"memory.teacher_parts": 4},
        {"memory.teacher_parts": 4, "memory.rematerialise": "units"},
        {"memory.teacher_parts": 4, "memory.accumulate": 4},
        {
            "memory.teacher_parts": 8,
            "memory.accumulate": 8,
            "memory.rematerialise": "units",
            "mesh.data": "auto",
            "mesh.fsdp": devices,
        },
    ]
    if config.data.feeding == "resident":
        streaming = {"data.feeding": "streaming"}
        steps = [streaming, *(options | streaming for options in steps)]
    return [(options, changed(config, options)) for options in steps]


def _planned(
    config: Config, where: Topology, examples: int, max_hours: float, weekly_hours: float
) -> Plan:
    log(f"{COMPILING}, for {where.name}")
    analysis = _compiled(config, where, examples)
    chip = where.chip
    seconds, images_per_second, hours = StepSeconds(None, None), None, None
    if chip and analysis["compiles"]:
        flops = analysis["flops"]
        # Products of a teacher in eight bits, as if its other operations were as fast.
        quantised = all(teacher.config.quantisation.quantised for teacher in teachers_of(config))
        saved_flops = flops["teacher"] * (1 - 1 / chip.int8_speed) if quantised else 0.0
        compute_seconds = (flops["total"] - saved_flops) / analysis["devices"] / chip.peak_flops
        lower_bound = max(compute_seconds, analysis["hbm_bytes"] / chip.bandwidth)
        expected_seconds = lower_bound * TIME_OVER_BOUND
        seconds = StepSeconds(lower_bound, expected_seconds)
        images_per_second = config.batch_size / expected_seconds
        hours = analysis["total_steps"] * expected_seconds / 3600
    return Plan(
        topology=where.name,
        devices=analysis["devices"],
        compiles=analysis["compiles"],
        # The compiler itself refuses what needs more than a device has.
        fits=analysis["compiles"],
        memory_bytes=Memory(
            analysis.get("arguments"),
            analysis.get("temporaries"),
            analysis["resident_data"],
            chip.memory_bytes if chip else None,
        ),
        flops=analysis["flops"],
        hbm_bytes=analysis.get("hbm_bytes"),
        movers=tuple(Mover(**mover) for mover in analysis.get("movers", ())),
        collectives=analysis.get("collectives", {}),
        host_transfers=analysis.get("host_transfers"),
        step_seconds=seconds,
        images_per_second=images_per_second,
        epochs_per_hour=None if images_per_second is None else 3600 * images_per_second / examples,
        hours=hours,
        sessions=None if hours is None else math.ceil(hours / max_hours),
        weeks=None if hours is None else hours / weekly_hours,
        recording=recording_plan(config, analysis, hours),
        feeding=analysis["feeding"],
        steps_per_dispatch=analysis["steps_per_dispatch"],
        total_steps=analysis["total_steps"],
        donated_bytes=analysis.get("donated"),
        disk=analysis["disk"],
        notes=tuple(_notes(config, analysis["feeding"], images_per_second)),
        compiler_said=analysis.get("compiler_said"),
        fits_with=None,
    )


def _notes(config: Config, feeding: str, rate: float | None) -> Iterator[str]:
    if feeding == "streaming" and rate is not None:
        yield f"the host has to read and decode {rate:,.0f} images a second for that"
    for _, teacher in teachers_of(config):
        if teacher.experiment:
            yield f"excluding the teacher's training: plan {teacher.experiment} by itself"
    if regime_of(config).targets == "table":
        yield "excluding the teachers' targets, which are computed before the training"
    pruning = config.student.pruning
    if pruning.pattern == "channels" and pruning.ranking == "network":
        yield "assuming that each block loses the same share of its channels"
    if pruning.by_gradient:
        yield "excluding the gradients of the unpruned student, which choose its channels"


def _compiled(config: Config, where: Topology, examples: int) -> dict[str, Any]:
    """What the child process found."""
    request = {
        "config": to_json(config),
        "teachers": [dataclasses.asdict(network) for network in described_teachers(config)],
        "classes": config.data.classes,
        "examples": examples,
        "topology": where.name,
    }
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "LIBTPU", "XLA_"))
    }
    environment = inherited | COMPILER_ENVIRONMENT | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    if where.compiler is None:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={where.devices}"
    with tempfile.TemporaryDirectory(prefix="fm_distill_plan_") as folder:
        request_path, analysis_path = (
            pathlib.Path(folder, name) for name in ("request.json", "answer.json")
        )
        request_path.write_text(json.dumps(request))
        child = subprocess.run(
            [
                sys.executable,
                "-m",
                "fm_distill.planning.compile_step",
                str(request_path),
                str(analysis_path),
            ],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        if not analysis_path.exists():
            tail = "\n  ".join(child.stderr.strip().splitlines()[-8:])
            raise RuntimeError(f"the compiler's process ended with {child.returncode}:\n  {tail}")
        analysis: dict[str, Any] = json.loads(analysis_path.read_text())
    if "error" in analysis:
        raise UserError(analysis["error"])
    return analysis


def described_teachers(config: Config) -> tuple[NetworkConfig, ...]:
    """The teachers' networks as far as the config describes them; no weights are read.

    Raises `UserError` where it does not.
    """
    return tuple(
        with_quantisation(_described(teacher), teacher.config.quantisation)
        for teacher in teachers_of(config)
    )


def _described(teacher: NamedTeacher) -> NetworkConfig:
    option, config = teacher
    if config.network:
        return resolve(config.network)
    if config.experiment:
        return resolve(only_network(load_experiment(config.experiment).student))
    if config.workdir:
        stored = Workdir(config.workdir).stored()
        refuse_code_of_run(stored, pathlib.Path(config.workdir), STUDENT)
        return stored.resolved.student
    raise UserError(
        f"the network of {option} is not known without its weights; give --{option}.network.model "
        f"and --{option}.network.resolution"
    )
