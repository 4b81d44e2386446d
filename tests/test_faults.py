"""What `tools/faults.py` does, in short: real runs are killed, stopped, spoilt and moved."""

import pathlib
import shutil
import signal

import bench_startup
import disturb
import faults
import long_run
import process_faults
import pytest
from conftest import command_environment

from fm_distill.runs.integrity import newest_valid, steps_in


@pytest.fixture(autouse=True)
def shared_compilations(monkeypatch):
    monkeypatch.setattr(disturb, "environment", lambda devices=1: command_environment(devices))
    monkeypatch.setattr(
        process_faults, "environment", lambda devices=1: command_environment(devices)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    """The workdir of a complete run."""
    folder = tmp_path_factory.mktemp("whole")
    experiment = disturb.tiny_experiment(folder / "tiny.py", "resident", "group", steps=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disturb, "environment", lambda devices=1: command_environment(devices))
        run = disturb.Watched(experiment, folder / "run")
    assert run.finish() == 0, run.text()
    return folder / "run"


def test_killed_anywhere_ends_with_the_same_bits(tmp_path):
    found = disturb.disturbed(tmp_path / "runs", "streaming", "batch", count=3, steps=180)
    assert len(found.phases) >= 2


@pytest.mark.slow
def test_stopped_politely_loses_nothing(tmp_path):
    found = disturb.disturbed(
        tmp_path / "runs", "resident", "group", count=3, number=signal.SIGTERM, steps=180
    )
    assert len(found.phases) >= 2


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "status.json").unlink()
    for step in steps_in(tmp_path / "run" / "checkpoints"):
        (tmp_path / "run" / "checkpoints" / str(step) / "digests.json").unlink()
    before = sorted(x for x in (tmp_path / "run").rglob("*"))
    experiment = disturb.tiny_experiment(tmp_path / "tiny.py", "resident", "group", steps=60)
    run = disturb.Watched(experiment, tmp_path / "run")
    assert run.finish() == 2
    assert "no checkpoint in" in run.text() and "digests.json is missing" in run.text()
    left = [x for x in before if not x.exists()]
    assert not left


def test_full_disk_and_read_only_folder(tmp_path):
    tried = list(faults.broken_disk(tmp_path / "disk", 0))
    if any(x.times == 0 for x in tried):
        pytest.skip(faults.MOUNT_REASON)
    assert len(tried) == 5


@pytest.mark.slow
def test_killed_anywhere_in_all_forms(tmp_path):
    assert len(list(faults.killed(tmp_path / "killed", 25))) == 4


def test_other_meshes(tmp_path):
    assert list(faults.meshes(tmp_path / "meshes", 0, (8, 1)))


@pytest.mark.slow
def test_more_meshes(tmp_path):
    assert list(faults.meshes(tmp_path / "meshes", 0))


def test_two_processes(tmp_path):
    assert next(faults.processes(tmp_path / "processes", 0)).times == 1


@pytest.mark.slow
def test_two_processes_from_a_recording(tmp_path):
    assert len(list(faults.recorded_processes(tmp_path / "processes", 0))) == 2


def test_the_faults_that_are_named_are_tried(tmp_path, monkeypatch, capsys):
    tried = {x: lambda folder, count, x=x: [faults.Tried(x, count, "survived")] for x in "ab"}
    monkeypatch.setattr(faults, "FAULTS", tried)
    faults.main(["a", "--moments", "3"])
    assert capsys.readouterr().out.splitlines()[2:] == ["| a | 3 | survived |"]
    faults.main([])
    assert capsys.readouterr().out.splitlines()[2:] == [f"| {x} | 25 | survived |" for x in "ab"]


@pytest.mark.slow
def test_a_lost_process(tmp_path):
    assert len(list(faults.processes(tmp_path / "processes", 0))) == 2


def test_compiled_programs_come_along(tmp_path, monkeypatch):
    own = {k: v for k, v in command_environment().items() if k != "JAX_COMPILATION_CACHE_DIR"}
    monkeypatch.setattr(disturb, "environment", lambda devices=1: own)
    experiment = disturb.tiny_experiment(tmp_path / "tiny.py", "resident", "group", steps=100_000)
    bench_startup.seconds_to_first_step(experiment, tmp_path / "run")
    before = {x.name for x in (tmp_path / "run" / "compiled").rglob("jit_program*-cache")}
    source = ("--resume-from", str(tmp_path / "run"))
    bench_startup.seconds_to_first_step(experiment, tmp_path / "copy", *source)
    after = {x.name for x in (tmp_path / "copy" / "compiled").rglob("jit_program*-cache")}
    assert len(before) == 1 and after == before


@pytest.mark.slow
def test_a_run_stays_as_it_began(tmp_path):
    experiment = disturb.tiny_experiment(tmp_path / "tiny.py", "resident", "group", steps=1200)
    run = disturb.Watched(experiment, tmp_path / "run")
    samples = long_run.watch(run, 1200, every_s=0.05)
    early = [x for x in samples if 120 <= x.step <= 400]
    late = [x for x in samples if x.step >= 1000]
    assert early and late
    # While a checkpoint is written there are a few more of both, and a library may open one late;
    # one that each checkpoint left open would be 30 more.
    checkpoints = (1000 - 400) // disturb.CHECKPOINT_EVERY
    allowed = checkpoints // 6
    assert min(x.descriptors for x in late) <= min(x.descriptors for x in early) + allowed
    assert min(x.files for x in late) <= min(x.files for x in early) + allowed
    assert min(x.memory_mb for x in late) < 1.2 * max(x.memory_mb for x in early)
    assert "at the end" in long_run.table(samples, 1200)


def test_newest_whole_of_nothing(tmp_path):
    found = newest_valid(tmp_path / "none")
    assert found.step == 0 and not found.damaged
