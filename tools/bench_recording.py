"""Times recording a teacher, and a student that learns from it, as ratios within one process.

    python tools/bench_recording.py experiments/flowers102_patience.py [--rounds 20] [OPTIONS]

OPTIONS are those of the config, e.g. --data.data-dir PATH --teacher.workdir DIR. Prints one JSON
line: the time of a step from the recording over one on labels and over one with the live teacher
(medians over interleaved rounds), the share of a step that waits for targets, and how fast
`record` runs over the teacher's bare forward pass in the best of several batch sizes.
"""

import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from fm_distill.cli.command import first_experiment, guarded
from fm_distill.config import Config, TeacherConfig
from fm_distill.data.feeding import Reader
from fm_distill.data.splits import open_data
from fm_distill.errors import EXIT_COMPLETE, EXIT_WRONG_INPUT
from fm_distill.networks.branch import teacher_outputs
from fm_distill.networks.loading import load_networks
from fm_distill.preparation.parse_options import OverConfig, parse_over
from fm_distill.preparation.resolve import resolve
from fm_distill.runs.workdir import Workdir
from fm_distill.system.preemption import Stop
from fm_distill.system.sharding import make_layout
from fm_distill.training.build import build
from fm_distill.training.record import record
from fm_distill.training.recorded import make_header
from fm_distill.training.recorder import Recorder
from fm_distill.training.resume import first_state
from fm_distill.training.setup import Setup, prepare

BATCHES = 1, 2, 4, 8  # of the bare forward pass, times the run's own
WARM_STEPS = 3


@dataclasses.dataclass(frozen=True)
class _Bench(OverConfig):
    """Times recording and replaying the teacher of an experiment."""

    rounds: int = 20
    """Steps of each kind that are timed."""


def prepared(config: Config, folder: pathlib.Path) -> Setup:
    """What `train` would run, without its checks."""
    layout = make_layout(config.mesh)
    data, _ = open_data(config)
    networks = load_networks(config, folder, data.train.classes, data.train.class_names)
    resolved = resolve(config, data.facts, networks.facts, layout)
    return prepare(config, resolved, data, networks, layout, folder)[0]


def stepping(setup: Setup) -> Iterator[tuple[float, float]]:
    """Seconds of each step, and of the wait for its batch, without end."""
    state = first_state(setup, Workdir("unused"), 0)
    fed = setup.feed.feed(0, itertools.repeat(1))
    while True:
        begun = time.perf_counter()
        batch = next(fed)
        waited = time.perf_counter() - begun
        state, metrics = setup.program(
            state, setup.live_teachers, setup.feed.data, batch, setup.keys.draws
        )
        jax.block_until_ready((state, metrics))
        yield time.perf_counter() - begun, waited


def recording_rate(config: Config, folder: pathlib.Path, steps: int) -> tuple[float, float]:
    """Images a second of `record`, and of the bare forward pass in its best batch size."""
    layout = make_layout(config.mesh)
    data, _ = open_data(config)
    networks = load_networks(config, folder, data.train.classes, data.train.class_names)
    resolved = resolve(config, data.facts, networks.facts, layout)
    header = make_header(config, resolved, "float16", None)
    folder.mkdir()
    reader = Reader(data.train, config.data, resolved.classes)
    recorder = Recorder.make(config, resolved, networks.teachers, reader, layout, header, folder)
    recorder.run(folder, ((0, WARM_STEPS),), Stop())  # compiles

    branches = build(config, resolved).teachers
    forward = jax.jit(lambda frozen, views: teacher_outputs(branches, frozen, views))

    def bare(count: int) -> float:
        views = {
            x.input_spec: jnp.zeros((count, *(x.input_spec.resolution,) * 2, 3)) for x in branches
        }
        jax.block_until_ready(forward(recorder.frozen, views))
        passes = max(1, steps * config.batch_size // count)
        begun = time.perf_counter()
        for _ in range(passes):
            jax.block_until_ready(forward(recorder.frozen, views))
        return passes * count / (time.perf_counter() - begun)

    own: list[float] = []
    rates: dict[int, list[float]] = {times: [] for times in BATCHES}
    for _ in range(3):
        begun = time.perf_counter()
        recorder.run(folder, ((WARM_STEPS, WARM_STEPS + steps),), Stop())
        own.append(steps * config.batch_size / (time.perf_counter() - begun))
        for times, found in rates.items():
            found.append(bare(config.batch_size * times))
    return statistics.median(own), max(statistics.median(x) for x in rates.values())


def main(own: list[str]) -> int:
    if not own or own[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return EXIT_WRONG_INPUT
    experiment, default, rest = first_experiment(own, "record EXPERIMENT.py")
    asked = parse_over(_Bench, default, rest, experiment)
    config, rounds = asked.config, asked.rounds
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        record(config, folder / "recording", Stop(), steps=(0, rounds + WARM_STEPS))
        replayed = TeacherConfig(recording=str(folder / "recording"))
        views = dataclasses.replace(config.views, period_steps=rounds + WARM_STEPS)
        labels = dataclasses.replace(config.objective, target="labels")
        kinds = {
            "live": config,
            "labels": dataclasses.replace(config, objective=labels),
            "recording": dataclasses.replace(config, teacher=replayed, views=views),
        }
        steps = {name: stepping(prepared(x, folder)) for name, x in kinds.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for i in range(rounds + WARM_STEPS):
            for name, iterator in steps.items():
                found = next(iterator)
                if i >= WARM_STEPS:
                    times[name].append(found)
        own_rate, bare_rate = recording_rate(config, folder / "second", rounds)
    medians = {name: statistics.median(x for x, _ in found) for name, found in times.items()}
    waits = statistics.median(wait / whole for whole, wait in times["recording"])

    def over(name: str) -> float:
        pairs = zip(times["recording"], times[name], strict=True)
        return round(statistics.median(a[0] / b[0] for a, b in pairs), 3)

    print(
        json.dumps(
            {
                "experiment": config.name,
                "device": jax.devices()[0].device_kind,
                "rounds": rounds,
                "step_s": {name: round(x, 5) for name, x in medians.items()},
                "recording_over_labels": over("labels"),
                "recording_over_live": over("live"),
                "waiting_for_targets_share": round(waits, 4),
                "record_images_per_s": round(own_rate, 1),
                "bare_teacher_images_per_s": round(bare_rate, 1),
                "record_over_bare": round(own_rate / bare_rate, 3),
            }
        )
    )
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
