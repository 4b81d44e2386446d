"""The real command at work, disturbed by signals, and whether it ends as if it had not been.

Used by `faults.py` and by the tests.
"""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fm_distill.config import MeshConfig
from fm_distill.errors import EXIT_COMPLETE, EXIT_PAUSED
from fm_distill.runs.checkpoint import abstract, restore
from fm_distill.runs.integrity import newest_step, newest_valid
from fm_distill.runs.workdir import Workdir
from fm_distill.system.sharding import make_layout
from fm_distill.training.build import build

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT_S = 600.0
EVALUATE_EVERY, CHECKPOINT_EVERY = 60, 20

TINY = """
import dataclasses, pathlib
from fm_distill import load_experiment
from fm_distill.config import *
digits = load_experiment({digits!r})
config = dataclasses.replace(
    digits, name="tiny", batch_size=16, ema_decay=0.9, seed=0,
    student=StudentConfig(
        model="bit",
        resolution=16,
        input_range={input_range!r},
        options=dict(depths=(1,), width=0.125, groups=4, stem="small", norm={norm!r}),
    ),
    objective=ObjectiveConfig(target="labels"),
    data=dataclasses.replace(digits.data, feeding={feeding!r}),
    schedule=ScheduleConfig(total_steps={steps}, warmup_steps=5),
    checkpoint=CheckpointConfig(every_steps={every}, keep=2),
    log=LogConfig(every_steps=10, evaluate_every_steps={evaluate}, tensorboard=False),
)
"""


def tiny_experiment(
    path: pathlib.Path, feeding: str, norm: str, steps: int = 600, input_range: str = "auto"
) -> pathlib.Path:
    """A labels run on the digits with a small student, its average, and two evaluations a while."""
    path.write_text(
        TINY.format(
            digits=str(ROOT / "experiments" / "digits_teacher.py"),
            feeding=feeding,
            norm=norm,
            input_range=input_range,
            steps=steps,
            every=CHECKPOINT_EVERY,
            evaluate=EVALUATE_EVERY,
        )
    )
    return path


def environment(devices: int = 1) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }


def command(experiment: pathlib.Path, workdir: pathlib.Path, *options: str) -> list[str]:
    """The line that trains."""
    program = [sys.executable, "-m", "fm_distill", "train", str(experiment)]
    return [*program, "--workdir", str(workdir), *options]


class Watched:
    """The real command at work in `workdir`."""

    def __init__(
        self,
        experiment: pathlib.Path,
        workdir: pathlib.Path,
        *options: str,
        devices: int = 1,
        output: pathlib.Path | None = None,
    ):
        self.workdir = workdir
        self.output = output or workdir.with_name(workdir.name + f".{time.monotonic_ns()}.txt")
        self.started = time.monotonic()
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                command(experiment, workdir, *options),
                cwd=ROOT,
                env=environment(devices),
                stdout=file,
                stderr=file,
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def step(self) -> int:
        """The last step that was logged."""
        return max((x["step"] for x in logged(self.workdir)), default=0)

    def until(self, ready: Callable[["Watched"], bool]) -> bool:
        """Waits for `ready`; False where the process ended before."""
        while not ready(self):
            if self.process.poll() is not None:
                return False
            if time.monotonic() - self.started > TIMEOUT_S:
                self.process.kill()
                raise TimeoutError(self.text())
            time.sleep(0.002)
        return True

    def end(self, number: int) -> tuple[int, float]:
        """Sends a signal; the exit code and the seconds until it came."""
        sent = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(timeout=TIMEOUT_S)
        return code, time.monotonic() - sent

    def finish(self) -> int:
        return self.process.wait(timeout=TIMEOUT_S)


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a signal is sent."""

    phase: str
    ready: Callable[[Watched], bool]
    delay_s: float


def moments(count: int, steps: int, seed: int) -> Iterator[Moment]:
    """`count` moments over all phases, those of the steps ever later in the run."""
    draw = random.Random(seed)
    phases = ["start-up", "steps", "writing", "compile", "evaluation"]
    for i in range(count):
        aim = int(steps * (i + 1) / (count + 1)) // EVALUATE_EVERY * EVALUATE_EVERY
        phase = "end" if i >= count - max(1, count // 8) else phases[i % len(phases)]
        yield Moment(phase, _ready(phase, aim, steps), draw.random() * _LONGEST_S[phase])


# How long the phases last, nearly.
_LONGEST_S = {
    "start-up": 4.0,
    "compile": 2.0,
    "steps": 0.2,
    "writing": 0.03,
    "evaluation": 0.1,
    "end": 0.8,
}


def _ready(phase: str, aim: int, steps: int) -> Callable[[Watched], bool]:
    def writing(run: Watched) -> bool:
        aside = run.workdir / "checkpoints" / "unfinished"
        return run.step() >= aim and aside.is_dir() and any(aside.iterdir())

    def evaluating(run: Watched) -> bool:
        lines = logged(run.workdir)
        last: dict[str, Any] = lines[-1] if lines else {"step": 0, "split": ""}
        due = last["split"] == "train" and last["step"] % EVALUATE_EVERY == 0
        return due and last["step"] >= aim

    ready: dict[str, Callable[[Watched], bool]] = {
        "start-up": lambda run: True,
        "compile": lambda run: "metrics.jsonl grows" in run.text(),
        "steps": lambda run: run.step() >= aim,
        "writing": writing,
        "evaluation": evaluating,
        "end": lambda run: (run.workdir / "checkpoints" / str(steps)).is_dir(),
    }
    return ready[phase]


def logged(workdir: pathlib.Path) -> list[dict]:
    """The whole lines of `metrics.jsonl`, without what depends on the clock."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    clock = {"data_wait", "images_per_second"}
    return [{k: v for k, v in x.items() if k not in clock} for x in found]


def arrays_of(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint: student, optimizer, average and step."""
    place = Workdir(workdir)
    layout = make_layout(MeshConfig(data=1))
    stored = place.stored()
    shapes = build(stored.config, stored.resolved).abstract_state
    newest = newest_valid(place.checkpoints).step
    like = abstract(shapes, layout.variables(shapes))
    state = restore(place.checkpoints / str(newest), like)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def differences(a: pathlib.Path, b: pathlib.Path) -> list[str]:
    """What is not the same, in every bit, of two complete runs."""
    left, right = arrays_of(a), arrays_of(b)
    wrong = [f"array {x}" for x in left if left[x].tobytes() != right[x].tobytes()]
    if left.keys() != right.keys() or len(left) < 20:
        wrong.append("the set of arrays")
    figures = [json.loads((x / "evaluation.json").read_text()) for x in (a, b)]
    if figures[0] != figures[1]:
        wrong.append("evaluation.json")
    if logged(a) != logged(b):
        wrong.append("metrics.jsonl")
    return wrong


def furthest(a: pathlib.Path, b: pathlib.Path) -> float:
    """The largest difference of two runs' parameters."""
    left, right = arrays_of(a), arrays_of(b)
    names = [x for x in left if ".student" in x]
    assert names and left.keys() == right.keys()
    return max(float(np.abs(left[x] - right[x]).max()) for x in names)


@dataclasses.dataclass(frozen=True)
class Tried:
    """A line of the table; what was not survived raised before."""

    fault: str
    times: int
    outcome: str


@dataclasses.dataclass(frozen=True)
class Disturbed:
    """What was done to a run that ended as if nothing had been done."""

    phases: tuple[str, ...]  # of each signal
    slowest_s: float  # from a signal to the end of the process


def disturbed(
    folder: pathlib.Path,
    feeding: str,
    norm: str,
    count: int,
    number: int = signal.SIGKILL,
    steps: int = 600,
) -> Disturbed:
    """Sends a signal at `count` moments, restarts each time, and compares with an undisturbed run.

    Raises `AssertionError` where anything differs, or anything was lost after a polite signal.
    """
    folder.mkdir(parents=True)
    experiment = tiny_experiment(folder / "tiny.py", feeding, norm, steps)
    whole, pieces = folder / "whole", folder / "pieces"
    undisturbed = Watched(experiment, whole)
    assert undisturbed.finish() == EXIT_COMPLETE, undisturbed.text()
    if (whole / "compiled").is_dir():  # so that the pieces need not compile each time
        pieces.mkdir()
        shutil.copytree(whole / "compiled", pieces / "compiled")
    slowest_s, phases = 0.0, []
    for moment in moments(count, steps, seed=count):
        run = Watched(experiment, pieces)
        if not run.until(moment.ready):
            assert run.finish() == EXIT_COMPLETE, run.text()
            continue
        time.sleep(moment.delay_s)
        code, seconds = run.end(number)
        if code == EXIT_COMPLETE:
            continue
        slowest_s = max(slowest_s, seconds)
        phases.append(moment.phase)
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL, run.text()
        elif code != -signal.SIGTERM:  # Python itself was not there yet
            assert code == EXIT_PAUSED and "paused" in run.text(), run.text()
            newest = newest_step(pieces / "checkpoints")
            assert run.step() <= newest, f"logged {run.step()}, on disk {newest}"
            status = Workdir(pieces).read("status.json")
            assert newest == (status["step"] if status else 0), status
            if newest < steps and "the first new step ended" in run.text():
                assert " steps: stopped by SIGTERM; " in run.text(), run.text()
    last = Watched(experiment, pieces)
    assert last.finish() == EXIT_COMPLETE, last.text()
    wrong = differences(whole, pieces)
    assert not wrong, f"after {phases}: {wrong}"
    return Disturbed(tuple(phases), slowest_s)
