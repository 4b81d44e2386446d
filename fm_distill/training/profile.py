"""What a step's time and a run's memory go to: the public function `profile`.

The run is set up as for training, in memory: nothing is written but a trace, if one is wanted.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
from jaxtyping import Array, Int32, PyTree

from fm_distill.config import Config
from fm_distill.config.regime import regime_of
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import StreamingFeed
from fm_distill.data.resident import Resident
from fm_distill.data.splits import open_data
from fm_distill.errors import UserError
from fm_distill.networks.branch import StepViews, step_views
from fm_distill.preparation.check import check
from fm_distill.preparation.open_networks import open_networks
from fm_distill.preparation.resolve import resolve, with_any_moments
from fm_distill.runs.metrics import MetricsWriter
from fm_distill.runs.state import TrainState
from fm_distill.system.console import COMPILING, log
from fm_distill.system.device import device_name
from fm_distill.system.sharding import check_batch_size, make_layout
from fm_distill.train_step.step import Metrics
from fm_distill.training.channels import decided_networks
from fm_distill.training.reporter import MOST_WAIT
from fm_distill.training.setup import Setup, prepare

IMAGES = 64  # that are read and decoded to see how long it takes


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where time and memory go. Times are medians, in milliseconds for one step."""

    name: str
    device: str
    devices: int
    feeding: Literal["resident", "streaming"]
    steps: int
    compile_s: float
    step_ms: float  # with the wait for its batch and for its end
    wait_ms: float  # for the batch
    images_per_second: float
    bound: Literal["input", "compute"]
    # What the threads or workers that read ahead need for a batch, together.
    feeding_ms: float
    # On the host, by one thread, for a batch; 0 where the split lies in device memory.
    reading_ms: float
    decoding_ms: float
    logging_ms: float  # of a line of metrics, spread over the steps between two
    # Each a program of its own: the step, which is one program, may take less than their sum.
    views_ms: float
    targets_ms: float
    student_ms: float
    update_ms: float
    # What lies in the memory of all devices together, and what the step needs beside on one.
    memory_bytes: dict[str, int]
    temporary_bytes: int | None


def profile(
    config: Config,
    workdir: str | os.PathLike[str],
    steps: int = 20,
    trace: str | os.PathLike[str] | None = None,
) -> Profile:
    """Runs `steps` steps of `config` from its start, and its parts one by one.

    `workdir` is where a teacher's run is looked for, as in training. With `trace`, the steps are
    recorded into this folder, for Perfetto and for TensorBoard's profiler. Raises `UserError`.
    """
    if steps < 1:
        raise UserError(f"--measured-steps is {steps}; expected 1 or more")
    check(config)
    try:
        if trace is not None:
            pathlib.Path(trace).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"no trace can be written to {trace}: {error}; give a folder") from None
    with tempfile.TemporaryDirectory() as folder:
        setup = _open(config, pathlib.Path(workdir), pathlib.Path(folder))
        log(f"{COMPILING}; then {steps} steps are measured")
        state = jax.jit(
            setup.built.init, out_shardings=setup.layout.variables(setup.built.abstract_state)
        )(setup.keys.init)
        memory = _memory(setup, state)
        part_times = _parts(setup, state, steps)
        run = _run(setup, state, steps, None if trace is None else os.fspath(trace))
        reading_ms, decoding_ms = _host(setup)
        logging_ms = _logging(setup, run.metrics, pathlib.Path(folder))
    step_ms, wait_ms = run.step_ms, run.wait_ms
    feeding_ms = (reading_ms + decoding_ms) / (config.data.workers or os.cpu_count() or 1)
    # What was read ahead while it compiled may last for all steps that are measured.
    input_bound = wait_ms > MOST_WAIT * step_ms or feeding_ms > step_ms
    return Profile(
        name=config.name,
        device=device_name(),
        devices=setup.layout.mesh.size,
        feeding=setup.resolved.feeding,
        steps=steps,
        compile_s=run.compile_s,
        step_ms=step_ms,
        wait_ms=wait_ms,
        images_per_second=1e3 * config.batch_size / step_ms,
        bound="input" if input_bound else "compute",
        feeding_ms=feeding_ms,
        reading_ms=reading_ms,
        decoding_ms=decoding_ms,
        logging_ms=logging_ms,
        **part_times,
        memory_bytes=memory,
        temporary_bytes=run.temporary_bytes,
    )


def _open(config: Config, workdir: pathlib.Path, folder: pathlib.Path) -> Setup:
    layout = make_layout(config.mesh)
    check_batch_size(config, layout)
    config = dataclasses.replace(config, steps_per_dispatch=1)  # so that each step can be timed
    data, _ = open_data(config)
    networks = open_networks(config, workdir, data)
    networks = dataclasses.replace(networks, student=with_any_moments(networks.facts).student)
    networks = decided_networks(config, networks, data, layout, folder)
    resolved = resolve(config, data.facts, networks.facts, layout)
    return prepare(config, resolved, data, networks, layout, folder)[0]


@dataclasses.dataclass(frozen=True)
class _Run:
    compile_s: float
    step_ms: float
    wait_ms: float
    metrics: Metrics
    temporary_bytes: int | None


def _run(setup: Setup, state: TrainState, steps: int, trace: str | None) -> _Run:
    """The step itself, fed as in training."""
    fed_batches = setup.feed.feed(
        0, itertools.repeat(1, min(steps + 1, setup.resolved.total_steps))
    )
    arguments = setup.live_teachers, setup.feed.data
    compile_start = time.perf_counter()
    batch = next(fed_batches)
    compiled = setup.program.lower(state, *arguments, batch, setup.keys.draws).compile()
    compile_s = time.perf_counter() - compile_start
    state, metrics = jax.block_until_ready(compiled(state, *arguments, batch, setup.keys.draws))
    step_times, wait_times = [], []
    with _traced(trace):
        start = time.perf_counter()
        for number, batch in enumerate(fed_batches):
            wait_times.append(time.perf_counter() - start)
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = compiled(state, *arguments, batch, setup.keys.draws)
                jax.block_until_ready(metrics)
            step_times.append(time.perf_counter() - start)
            start = time.perf_counter()
    if not step_times:
        raise UserError(
            f"the run has {setup.resolved.total_steps} step, and the first one includes "
            "compiling; give a longer schedule"
        )
    memory = compiled.memory_analysis()
    return _Run(
        compile_s,
        1e3 * statistics.median(step_times),
        1e3 * statistics.median(wait_times),
        metrics,
        None if memory is None else int(memory.temp_size_in_bytes),
    )


@contextlib.contextmanager
def _traced(folder: str | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    jax.profiler.start_trace(folder, create_perfetto_trace=True)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def _parts(setup: Setup, state: TrainState, steps: int) -> dict[str, float]:
    """Views, targets, student and update as programs of their own, on the first batch."""
    config, built, layout = setup.config, setup.built, setup.layout
    view_sampling = regime_of(config).views
    batch, key = _first_batch(setup), setup.keys.draws

    # What is timed is an argument, or XLA computes it once, when it compiles.
    @jax.jit
    def views(batch: Batch) -> tuple[Any, ...]:
        rendered = step_views(
            view_sampling, config.views, built.student, built.live_teachers, batch, key, state.step
        )
        return rendered.draw, rendered.student, rendered.teachers

    @jax.jit
    def targets(frozen: PyTree, batch: Batch, rendered_views: tuple[Any, ...]) -> Any:
        return built.teach(frozen, batch, StepViews(*rendered_views))

    @jax.jit
    def optimizer(gradients: PyTree, state: TrainState) -> Any:
        return built.optimizer.update(gradients, state.opt_state, state.student.params)

    update = jax.jit(built.update, out_shardings=(layout.variables(state), layout.replicated))
    rendered_views = views(batch)
    expected = targets(setup.live_teachers, batch, rendered_views)
    gradients = state.student.params  # of their shapes; the time does not depend on values
    measured = {
        "views_ms": lambda: views(batch),
        "targets_ms": lambda: targets(setup.live_teachers, batch, rendered_views),
        "update_ms": lambda: optimizer(gradients, state),
        "student_ms": lambda: update(state, rendered_views[1], expected),
    }
    times = {name: _median_ms(part, steps) for name, part in measured.items()}
    # `built.update` is both.
    times["student_ms"] = max(times["student_ms"] - times["update_ms"], 0.0)
    return times


def _first_batch(setup: Setup) -> Batch:
    feed = setup.feed
    if isinstance(feed, StreamingFeed):
        return next(feed.feed(0, iter([1])))
    step = next(feed.feed(0, iter([1]))).step(0)
    assert feed.data is not None

    def gather(data: Resident, ids: Int32[Array, " batch"]) -> Batch:
        return data.at(ids)

    batch = jax.jit(gather, out_shardings=setup.layout.batch)(feed.data, step.ids)
    return dataclasses.replace(batch, recorded=step.recorded)


def _median_ms(part: Callable[[], Any], times: int) -> float:
    jax.block_until_ready(part())
    times_ms = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(part())
        times_ms.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times_ms)


def _host(setup: Setup) -> tuple[float, float]:
    """Reading and decoding of a batch, by one thread; nothing where the split is resident."""
    if setup.feed.data is not None:
        return 0.0, 0.0
    reading, combined = [], []
    for i in range(min(IMAGES, len(setup.reader))):
        start = time.perf_counter()
        _ = setup.reader.source[i]
        read_end = time.perf_counter()
        _ = setup.reader[i]
        reading.append(read_end - start)
        combined.append(time.perf_counter() - read_end)
    batch_ms = [1e3 * setup.config.batch_size * statistics.median(x) for x in (reading, combined)]
    return batch_ms[0], max(batch_ms[1] - batch_ms[0], 0.0)


def _logging(setup: Setup, metrics: Metrics, folder: pathlib.Path) -> float:
    every_steps = setup.config.log.every_steps
    start = time.perf_counter()
    with MetricsWriter(folder / "metrics.jsonl", 0, setup.config.log.tensorboard) as writer:
        for step in range(10):
            values = {name: float(x) for name, x in jax.device_get(metrics).items()}
            writer.write(step, 0.0, "train", values)
    return 1e3 * (time.perf_counter() - start) / 10 / every_steps


def _memory(setup: Setup, state: TrainState) -> dict[str, int]:
    """By owner, as it lies on the devices: what is replicated counts on each."""
    owners = {
        "student": state.student,
        "optimizer": state.opt_state,
        "moving average": state.ema,
        "adapters and banks": state.terms,
        "teachers": setup.live_teachers,
        "data": (setup.feed.data, setup.keys.draws.spectra),
    }

    def count(tree: PyTree) -> int:
        return sum(x.data.nbytes for leaf in jax.tree.leaves(tree) for x in leaf.addressable_shards)

    return {name: size for name, tree in owners.items() if (size := count(tree))}
