"""Runs of several processes: against one, from a recording, and with one that dies.

Used by `faults.py` and by the tests.
"""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from disturb import (
    ROOT,
    TIMEOUT_S,
    Tried,
    Watched,
    command,
    environment,
    furthest,
    logged,
    tiny_experiment,
)

from fm_distill.errors import EXIT_COMPLETE, EXIT_PAUSED, EXIT_TRAINING_FAILED
from fm_distill.runs.integrity import newest_step
from fm_distill.runs.workdir import Workdir


def start_two(
    experiment: pathlib.Path, workdir: pathlib.Path, folder: pathlib.Path, *options: str
) -> list[tuple[subprocess.Popen, pathlib.Path]]:
    """Two processes of four devices each, over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for i in range(2):
        output = folder / f"process_{i}_{time.monotonic_ns()}.txt"
        place = {"coordinator-address": f"127.0.0.1:{port}", "process-id": i, "process-count": 2}
        words = [x for k, v in place.items() for x in (f"--distributed.{k}", str(v))]
        with output.open("w") as file:
            line = command(experiment, workdir, *options, *words)
            process = subprocess.Popen(line, cwd=ROOT, env=environment(4), stdout=file, stderr=file)
        started.append((process, output))
    return started


def processes(folder: pathlib.Path, count: int) -> Iterator[Tried]:
    """Two processes against one of as many devices; then one of the two dies."""
    folder.mkdir(parents=True)
    # Short: small differences grow with each step, in any training.
    experiment = tiny_experiment(folder / "short.py", "streaming", "batch", 20, "adapt")
    one = Watched(experiment, folder / "one", devices=8)
    assert one.finish() == EXIT_COMPLETE, one.text()
    two = start_two(experiment, folder / "two", folder)
    for process, output in two:
        assert process.wait(timeout=TIMEOUT_S) == EXIT_COMPLETE, output.read_text()
    apart = furthest(folder / "one", folder / "two")
    assert apart < 1e-3, apart
    # Each counted half of the images, or one all of them: the moments are the same in every bit.
    students = [Workdir(folder / x).stored().resolved.student for x in ("one", "two")]
    assert students[0] == students[1] and students[0].input_mean, students
    steps = [x["step"] for x in logged(folder / "two") if x["split"] == "train"]
    assert steps == sorted(set(steps))
    yield Tried("two processes instead of one", 1, f"parameters at most {apart:.1e} apart")
    yield lost_peer(folder, tiny_experiment(folder / "long.py", "streaming", "batch", steps=120))


def recorded_processes(folder: pathlib.Path, count: int) -> Iterator[Tried]:
    """Two processes against one of as many devices, from one recording, in both feedings."""
    folder.mkdir(parents=True)
    experiment = tiny_experiment(folder / "tiny.py", "streaming", "group", 20)
    teacher = Watched(experiment, folder / "teacher")
    assert teacher.finish() == EXIT_COMPLETE, teacher.text()
    learns = ["--objective.target", "teacher", "--teacher.workdir", str(folder / "teacher")]
    line = [sys.executable, "-m", "fm_distill", "record", str(experiment)]
    recorded = subprocess.run(
        [*line, "--to", str(folder / "recording"), "--dtype", "float32", *learns],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert recorded.returncode == EXIT_COMPLETE, recorded.stderr
    learns += ["--teacher.recording", str(folder / "recording")]
    for feeding in ("streaming", "resident"):
        options = [*learns, "--data.feeding", feeding]
        one = Watched(experiment, folder / f"one_{feeding}", *options, devices=8)
        assert one.finish() == EXIT_COMPLETE, one.text()
        for process, output in start_two(experiment, folder / f"two_{feeding}", folder, *options):
            assert process.wait(timeout=TIMEOUT_S) == EXIT_COMPLETE, output.read_text()
        apart = furthest(folder / f"one_{feeding}", folder / f"two_{feeding}")
        assert apart < 1e-3, apart
        yield Tried(
            f"two processes instead of one, from a recording, {feeding} feeding",
            1,
            f"parameters at most {apart:.1e} apart",
        )


def lost_peer(folder: pathlib.Path, experiment: pathlib.Path) -> Tried:
    """One of two processes dies, and the other says so; started again, one is asked to stop, and
    both do; started again, they finish."""
    workdir = folder / "lost"
    (first, output), (second, _) = start_two(experiment, workdir, folder)
    _wait_for_checkpoint(workdir, 1, first)
    second.send_signal(signal.SIGKILL)
    died = time.monotonic()
    code = first.wait(timeout=TIMEOUT_S)
    seconds = time.monotonic() - died
    assert code == EXIT_TRAINING_FAILED, (code, output.read_text())
    assert "another process of the run" in output.read_text(), output.read_text()
    stopped = start_two(experiment, workdir, folder)
    _wait_for_checkpoint(workdir, newest_step(workdir / "checkpoints") + 1, stopped[0][0])
    stopped[1][0].send_signal(signal.SIGTERM)
    for process, words in stopped:
        assert process.wait(timeout=TIMEOUT_S) == EXIT_PAUSED, words.read_text()
    for process, words in start_two(experiment, workdir, folder):
        assert process.wait(timeout=TIMEOUT_S) == EXIT_COMPLETE, words.read_text()
    assert json.loads((workdir / "evaluation.json").read_text())["step"] == 120
    return Tried(
        "one of two processes dies", 1, f"the other ends with exit code 4 after {seconds:.0f} s"
    )


def _wait_for_checkpoint(workdir: pathlib.Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while newest_step(workdir / "checkpoints") < step:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
