"""Times one training step of an experiment, and its parts, as ratios within one process.

    python tools/bench_step.py experiments/digits.py [--rounds 10]

Prints one JSON line: the median over rounds of seconds a step, and of views, teacher forward and
student forward and backward as shares of it. Networks start at random: the time does not depend
on the weights. Compare two versions on one machine, one after the other, not with other machines.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from fm_distill.cli.command import guarded
from fm_distill.config import Config
from fm_distill.config.regime import regime_of
from fm_distill.data.batch import Batch
from fm_distill.errors import EXIT_COMPLETE
from fm_distill.models import Variables
from fm_distill.networks.branch import Views, frozen_teachers, step_views, teacher_outputs
from fm_distill.planning.plan import described_teachers
from fm_distill.preparation.experiment import load_experiment
from fm_distill.preparation.resolve import resolve_described
from fm_distill.system.sharding import make_layout
from fm_distill.train_step.program import make_program
from fm_distill.training.build import build
from fm_distill.views.draws import ViewRoot

# Of the training split, as the step does not know it.
EXAMPLES = 1000


def random_batch(config: Config) -> Batch:
    rng = np.random.default_rng(0)
    side, count = config.data.canvas.side, config.batch_size
    return Batch(
        rng.integers(0, 256, (count, side, side, 3), np.uint8),
        np.full((count, 2), side, np.int32),
        np.zeros(count, np.int32),
    )


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def main(own: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args(own)
    config = load_experiment(arguments.experiment)
    layout = make_layout(config.mesh)
    resolved = resolve_described(
        config, described_teachers(config), config.data.classes or 10, EXAMPLES, layout
    )
    built = build(config, resolved)
    student, teachers = built.student, built.live_teachers
    batch = jax.device_put(random_batch(config), layout.batch)
    key = jax.random.key(0)
    state = jax.jit(built.init, out_shardings=layout.variables(built.abstract_state))(key)
    frozen = frozen_teachers(teachers, tuple(x.network.init(key) for x in teachers), layout)
    program = make_program(built.train_step, built.abstract_state, frozen, None, layout)
    law = regime_of(config).views

    # What is timed is an argument, or XLA computes it once, when it compiles.
    @jax.jit
    def views(batch: Batch) -> tuple[Array, Views]:
        seen = step_views(law, config.views, student, teachers, batch, ViewRoot(key), 0)
        return seen.student, seen.teachers

    @jax.jit
    def student_gradient(variables: Variables, images: Array) -> Any:
        def loss(params: Any) -> Array:
            trained = Variables(params, variables.statistics)
            logits = student.network.apply(trained, images, train=True).logits
            return (logits**2).sum() + logits.sum()

        return jax.grad(loss)(variables.params)

    student_view, teacher_views = views(batch)
    parts: dict[str, Callable[[], Any]] = {
        "views": lambda: views(batch),
        "student": lambda: student_gradient(state.student, student_view),
    }
    if teachers:
        outputs = jax.jit(functools.partial(teacher_outputs, teachers))
        parts["teacher"] = lambda: outputs(frozen, teacher_views)

    start = time.perf_counter()
    donated = jax.tree.map(lambda x: x.copy(), state)
    donated, _ = jax.block_until_ready(program(donated, frozen, None, batch, ViewRoot(key)))
    compile_s = time.perf_counter() - start
    for part in parts.values():
        jax.block_until_ready(part())
    times: dict[str, list[float]] = {name: [] for name in ("step", *parts)}
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        donated, metrics = program(donated, frozen, None, batch, ViewRoot(key))
        jax.block_until_ready(metrics)
        times["step"].append(time.perf_counter() - start)
        for name, part in parts.items():
            times[name].append(seconds(part))
    step = statistics.median(times["step"])
    shares = {
        f"{name}_share": round(
            statistics.median(t / s for t, s in zip(times[name], times["step"], strict=True)), 3
        )
        for name in parts
    }
    print(
        json.dumps(
            {
                "experiment": config.name,
                "device": jax.devices()[0].device_kind,
                "devices": layout.mesh.size,
                "rounds": arguments.rounds,
                "compile_and_first_step_s": round(compile_s, 2),
                "step_s_median": round(step, 5),
                "step_s_min_max": [round(min(times["step"]), 5), round(max(times["step"]), 5)],
                **shares,
            }
        )
    )
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
