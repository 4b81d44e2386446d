"""Does to real runs what the world does to them, and prints what was tried and survived.

    python tools/faults.py                        # all of it
    python tools/faults.py killed polite --moments 25

Each run is the real command in a process of its own, on the CPU. A run that was disturbed has to
end with the very bits, figures and logged steps of one that was not; anything else raises. The
tests run short forms of these.
"""

import argparse
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from disturb import (
    ROOT,
    Tried,
    Watched,
    differences,
    disturbed,
    furthest,
    logged,
    tiny_experiment,
)
from process_faults import processes, recorded_processes

from fm_distill.errors import (
    EXIT_COMPLETE,
    EXIT_PAUSED,
    EXIT_TRAINING_FAILED,
    EXIT_WRONG_INPUT,
)
from fm_distill.runs.integrity import newest_step, newest_valid, steps_in

CASES = (
    ("resident", "batch"),
    ("streaming", "group"),
    ("resident", "group"),
    ("streaming", "batch"),
)
MOUNT_REASON = "mounting a file system needs root"


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
        assert code == EXIT_TRAINING_FAILED and "internal error" not in full.text(), full.text()
        assert newest_valid(mounted / "run" / "checkpoints").step > 0
        (mounted / "fill").unlink()
        again = Watched(experiment, mounted / "run", "--checkpoint.keep", "1")
        assert again.finish() == EXIT_COMPLETE, again.text()
        wrong = differences(whole, mounted / "run")
        assert not wrong, wrong
        yield Tried("a full disk", 1, "exit code 4; with room again it goes on, the same bits")
        subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
        read_only = Watched(experiment, mounted / "other", output=folder / "read_only.txt")
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
    assert "bit-for-bit equality is guaranteed only for the same" in run.text(), run.text()
    apart = furthest(folder / "one", folder / "changing")
    # Differences of rounding grow with each step; Adam's steps are of 3e-3 here.
    assert apart < 5e-3, apart
    what = f"{', then '.join(map(str, devices))} devices"
    yield Tried(what, len(devices) - 1, f"parameters at most {apart:.1e} apart")


def _at(step: int) -> Callable[[Watched], bool]:
    return lambda run: run.step() >= step


def _after(seconds: float) -> Callable[[Watched], bool]:
    return lambda run: time.monotonic() - run.started > seconds


FAULTS: dict[str, Callable[[pathlib.Path, int], Iterator[Tried]]] = {
    "killed": killed,
    "polite": polite,
    "polite_digits": polite_digits,
    "broken_disk": broken_disk,
    "meshes": meshes,
    "processes": processes,
    "recorded_processes": recorded_processes,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], help="all, if none is named")
    parser.add_argument("--moments", type=int, default=25)
    asked = parser.parse_args(arguments)
    print("| fault | times | outcome |\n|---|---|---|")
    for name in asked.faults or FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            for tried in FAULTS[name](pathlib.Path(folder) / name, asked.moments):
                print(f"| {tried.fault} | {tried.times} | {tried.outcome} |", flush=True)


if __name__ == "__main__":
    main()
