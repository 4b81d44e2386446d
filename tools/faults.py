"""Does to real runs what the world does to them, and prints what was tried and survived.

    python tools/faults.py                        # all of it
    python tools/faults.py killed polite --moments 25

Each run is the real command in a process of its own, on the CPU. A run that was disturbed has to
end with the very bits, figures and logged steps of one that was not; anything else raises. The
tests run short forms of these.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from disturb import (
    ROOT,
    TIMEOUT_S,
    Watched,
    arrays_of,
    command,
    differences,
    disturbed,
    environment,
    logged,
    tiny_experiment,
)

from fm_distill.errors import (
    EXIT_COMPLETE,
    EXIT_PAUSED,
    EXIT_TRAINING_FAILED,
    EXIT_WRONG_INPUT,
)
from fm_distill.runs.integrity import newest_step, newest_valid, steps_in
from fm_distill.runs.workdir import Workdir

CASES = (
    ("resident", "batch"),
    ("streaming", "group"),
    ("resident", "group"),
    ("streaming", "batch"),
)
MOUNT_REASON = "mounting a file system needs root"


@dataclasses.dataclass(frozen=True)
class Tried:
    """A line of the table; what was not survived raised before."""

    fault: str
    times: int
    outcome: str


def killed(folder: pathlib.Path, count: int) -> Iterator[Tried]:
    """SIGKILL at `count` moments, in both feedings, with both normalisations."""
    for feeding, norm in CASES:
        found = disturbed(folder / f"{feeding}_{norm}", feeding, norm, count)
        phases = ", ".join(f"{found.phases.count(x)} in {x}" for x in sorted(set(found.phases)))
        yield Tried(
            f"SIGKILL, {feeding} feeding, {norm} normalisation ({phases})",
            len(found.phases),
            "the same bits, figures and logged steps",
        )


def polite(folder: pathlib.Path, count: int) -> Iterator[Tried]:
    """SIGTERM at `count` moments."""
    for feeding, norm in CASES[:2]:
        found = disturbed(folder / f"{feeding}_{norm}", feeding, norm, count, signal.SIGTERM)
        yield Tried(
            f"SIGTERM, {feeding} feeding, {norm} normalisation",
            len(found.phases),
            f"no step lost, the same bits; at most {found.slowest_s:.1f} s until it was paused",
        )


def polite_digits(folder: pathlib.Path, count: int) -> Iterator[Tried]:
    """SIGTERM at moments spread over the first minutes of the quickstart, its teacher included."""
    folder.mkdir(parents=True)
    experiment = ROOT / "experiments" / "digits.py"
    slowest_s, lost = 0.0, 0
    for i in range(count):
        run = Watched(experiment, folder / "digits")
        run.until(_after(5.0 + 6.0 * i))
        code, seconds = run.end(signal.SIGTERM)
        assert code in (EXIT_PAUSED, EXIT_COMPLETE), run.text()
        slowest_s = max(slowest_s, seconds)
        for workdir in (folder / "digits", folder / "digits" / "teacher"):
            steps = [x["step"] for x in logged(workdir)]
            lost += max(steps, default=0) > newest_step(workdir / "checkpoints")
    assert not lost
    yield Tried("SIGTERM, experiments/digits.py", count, f"no step lost; at most {slowest_s:.1f} s")


def spoilt(workdir: pathlib.Path) -> Tried:
    """Each file of the newest checkpoint truncated, flipped, removed: the one before is chosen."""
    folder = workdir / "checkpoints"
    newest, before = steps_in(folder)[:2]
    tried = 0
    for path in sorted(x for x in (folder / str(newest)).rglob("*") if x.is_file()):
        whole = path.read_bytes()
        flipped = bytearray(whole or b"0")  # an empty file gets a byte
        flipped[len(flipped) // 2] ^= 1
        for damage in (whole[:-1] if whole else None, bytes(flipped), None):
            path.unlink() if damage is None else path.write_bytes(damage)
            found = newest_valid(folder)
            assert found.step == before and newest in found.damaged, f"{path}: {found}"
            path.write_bytes(whole)
            tried += 1
    assert newest_valid(folder).step == newest
    return Tried(
        "each file of a checkpoint truncated, one bit flipped, or removed",
        tried,
        "named, and the newest intact checkpoint is used",
    )


def broken_disk(folder: pathlib.Path, count: int) -> Iterator[Tried]:
    """Spoilt checkpoints, a full disk, a read-only folder, a second process."""
    folder.mkdir(parents=True)
    experiment = tiny_experiment(folder / "tiny.py", "resident", "group", steps=240)
    whole = folder / "whole"
    run = Watched(experiment, whole)
    assert run.finish() == EXIT_COMPLETE, run.text()
    # One that is still there when the second process has started.
    long = tiny_experiment(folder / "long.py", "resident", "group", steps=1_000_000)
    first = Watched(long, folder / "long")
    assert first.until(lambda x: x.step() > 0)
    second = Watched(long, folder / "long")
    assert second.finish() == EXIT_WRONG_INPUT, second.text()
    assert "in use by another" in second.text(), second.text()
    first.end(signal.SIGKILL)
    yield Tried("a second process on the same workdir", 1, "refused with exit code 2")
    yield spoilt(whole)
    yield resumed_from_the_one_before(folder, whole, experiment)
    mounted = folder / "small"
    mounted.mkdir()
    if not _mount(mounted, "size=4m"):
        yield Tried("a full disk, a read-only workdir", 0, f"not tried: {MOUNT_REASON}")
        return
    try:
        (mounted / "fill").write_bytes(bytes(2_000_000))
        options = ("--checkpoint.every-steps", "5", "--checkpoint.keep", "50")
        full = Watched(experiment, mounted / "run", *options)
        code = full.finish()
        assert code == EXIT_TRAINING_FAILED and "fault of ours" not in full.text(), full.text()
        assert newest_valid(mounted / "run" / "checkpoints").step > 0
        (mounted / "fill").unlink()
        again = Watched(experiment, mounted / "run", "--checkpoint.keep", "1")
        assert again.finish() == EXIT_COMPLETE, again.text()
        wrong = differences(whole, mounted / "run")
        assert not wrong, wrong
        yield Tried("a full disk", 1, "exit code 4; with room again it goes on, the same bits")
        subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
        read_only = Watched(experiment, mounted / "other", said=folder / "read_only.txt")
        assert read_only.finish() == EXIT_WRONG_INPUT, read_only.text()
        assert "cannot be written" in read_only.text()
        yield Tried("a read-only workdir", 1, "refused with exit code 2")
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def resumed_from_the_one_before(
    folder: pathlib.Path, whole: pathlib.Path, experiment: pathlib.Path
) -> Tried:
    """The real command on a run whose last checkpoint has a flipped bit."""
    spoiled = folder / "spoilt"
    shutil.copytree(whole, spoiled)
    (spoiled / "status.json").write_text("{")  # and a status that a broken disk left
    newest = spoiled / "checkpoints" / str(newest_step(spoiled / "checkpoints"))
    path = max((x for x in newest.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run = Watched(experiment, spoiled)
    assert run.finish() == EXIT_COMPLETE, run.text()
    assert "is damaged" in run.text() and "SHA-256" in run.text(), run.text()
    assert newest.with_name(newest.name + ".damaged").is_dir()
    wrong = differences(whole, spoiled)
    assert not wrong, wrong
    return Tried("continued past a flipped bit", 1, "the same bits; the damaged one is kept aside")


def _mount(where: pathlib.Path, options: str) -> bool:
    line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)]
    return subprocess.run(line, capture_output=True).returncode == 0


def meshes(
    folder: pathlib.Path, count: int, devices: tuple[int, ...] = (8, 4, 1, 8)
) -> Iterator[Tried]:
    """So many devices one after the other, against one device all the way."""
    folder.mkdir(parents=True)
    experiment = tiny_experiment(folder / "tiny.py", "resident", "group", steps=80)
    one = Watched(experiment, folder / "one")
    assert one.finish() == EXIT_COMPLETE, one.text()
    for i, number in enumerate(devices, 1):
        until = 80 * i // len(devices)
        run = Watched(experiment, folder / "changing", devices=number)
        if until < 80 and run.until(_at(until)):
            code, _ = run.end(signal.SIGTERM)
            assert code == EXIT_PAUSED, run.text()
        else:
            assert run.finish() == EXIT_COMPLETE, run.text()
    assert "equality in every bit is promised only for the same" in run.text(), run.text()
    apart = furthest(folder / "one", folder / "changing")
    # Differences of rounding grow with each step; Adam's steps are of 3e-3 here.
    assert apart < 5e-3, apart
    what = f"{', then '.join(map(str, devices))} devices"
    yield Tried(what, len(devices) - 1, f"parameters at most {apart:.1e} apart")


def _at(step: int) -> Callable[[Watched], bool]:
    return lambda run: run.step() >= step


def _after(seconds: float) -> Callable[[Watched], bool]:
    return lambda run: time.monotonic() - run.started > seconds


def furthest(a: pathlib.Path, b: pathlib.Path) -> float:
    """The largest difference of two runs' parameters."""
    left, right = arrays_of(a), arrays_of(b)
    names = [x for x in left if ".student" in x]
    assert names and left.keys() == right.keys()
    return max(float(np.abs(left[x] - right[x]).max()) for x in names)


def start_two(
    experiment: pathlib.Path, workdir: pathlib.Path, folder: pathlib.Path
) -> list[tuple[subprocess.Popen, pathlib.Path]]:
    """Two processes of four devices each, over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for i in range(2):
        said = folder / f"process_{i}_{time.monotonic_ns()}.txt"
        options = {"coordinator-address": f"127.0.0.1:{port}", "process-id": i, "process-count": 2}
        words = [x for k, v in options.items() for x in (f"--distributed.{k}", str(v))]
        with said.open("w") as file:
            line = command(experiment, workdir, *words)
            process = subprocess.Popen(line, cwd=ROOT, env=environment(4), stdout=file, stderr=file)
        started.append((process, said))
    return started


def processes(folder: pathlib.Path, count: int) -> Iterator[Tried]:
    """Two processes against one of as many devices; then one of the two dies."""
    folder.mkdir(parents=True)
    # Short: small differences grow with each step, in any training.
    experiment = tiny_experiment(folder / "short.py", "streaming", "batch", 20, "adapt")
    one = Watched(experiment, folder / "one", devices=8)
    assert one.finish() == EXIT_COMPLETE, one.text()
    two = start_two(experiment, folder / "two", folder)
    for process, said in two:
        assert process.wait(timeout=TIMEOUT_S) == EXIT_COMPLETE, said.read_text()
    apart = furthest(folder / "one", folder / "two")
    assert apart < 1e-3, apart
    # Each counted half of the images, or one all of them: the moments are the same in every bit.
    students = [Workdir(folder / x).stored().resolved.student for x in ("one", "two")]
    assert students[0] == students[1] and students[0].input_mean, students
    steps = [x["step"] for x in logged(folder / "two") if x["split"] == "train"]
    assert steps == sorted(set(steps))
    yield Tried("two processes instead of one", 1, f"parameters at most {apart:.1e} apart")
    yield lost_peer(folder, tiny_experiment(folder / "long.py", "streaming", "batch", steps=120))


def lost_peer(folder: pathlib.Path, experiment: pathlib.Path) -> Tried:
    """One of two processes dies, and the other says so; started again, one is asked to stop, and
    both do; started again, they finish."""
    workdir = folder / "lost"
    (first, said), (second, _) = start_two(experiment, workdir, folder)
    _wait_for_checkpoint(workdir, 1, first)
    second.send_signal(signal.SIGKILL)
    died = time.monotonic()
    code = first.wait(timeout=TIMEOUT_S)
    seconds = time.monotonic() - died
    assert code == EXIT_TRAINING_FAILED, (code, said.read_text())
    assert "another process of the run" in said.read_text(), said.read_text()
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


FAULTS: dict[str, Callable[[pathlib.Path, int], Iterator[Tried]]] = {
    "killed": killed,
    "polite": polite,
    "polite_digits": polite_digits,
    "broken_disk": broken_disk,
    "meshes": meshes,
    "processes": processes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], help="all, if none is named")
    parser.add_argument("--moments", type=int, default=25)
    asked = parser.parse_args()
    print("| fault | times | outcome |\n|---|---|---|")
    for name in asked.integrity_errors or FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            for tried in FAULTS[name](pathlib.Path(folder) / name, asked.moments):
                print(f"| {tried.fault} | {tried.times} | {tried.outcome} |", flush=True)


if __name__ == "__main__":
    main()
