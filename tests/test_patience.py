"""Hours, other places, longer schedules, what is kept, divergence, status; and what is refused."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from conftest import run_command, write_experiment
from disturb import arrays_of
from test_train import lines_of, same_bits
from tiny import tiny_config

from fm_distill.config import (
    CheckpointConfig,
    DivergenceConfig,
    LogConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    TeacherConfig,
)
from fm_distill.errors import Diverged, UserError
from fm_distill.runs.checkpoint import CheckpointWriter
from fm_distill.runs.integrity import integrity_errors, steps_in, write_manifest
from fm_distill.runs.metrics import MetricsWriter
from fm_distill.runs.resume_from import copy_run
from fm_distill.runs.status import status, status_text
from fm_distill.system.compilation_cache import _drop_half_written
from fm_distill.system.console import sessions_left
from fm_distill.system.preemption import Stop, Stopped, stop_signals
from fm_distill.system.processes import Distributed, is_distributed
from fm_distill.training.loop import Loop
from fm_distill.training.reporter import disk_use
from fm_distill.training.rollback import Rollback, skipped_steps, slowness
from fm_distill.training.train import train, train_until


def small(**changes):
    """On one of the simulated devices, for which programs are compiled sooner."""
    return tiny_config(mesh=MeshConfig(data=1), **changes)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A complete run of six steps, with checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("complete") / "run"
    assert train(small(), folder).complete
    return folder


def test_hours_stop_a_run_before_they_are_over():
    stop = Stop(max_hours=1.0)
    # At least one step, however late it is: else a start that takes all hours repeats for ever.
    assert stop.reason(reserve_s=3600.0) is None
    stop.progressed()
    assert stop.reason() is None and stop.reason(reserve_s=3590.0) is None
    assert stop.reason(reserve_s=3600.0) == "the 1 hours are used up"
    assert Stop().reason(1e9) is None
    assert list(stop.checked([1, 2], 3590.0)) == [1, 2]
    with pytest.raises(Stopped, match="are used"):
        next(stop.checked([1, 2], 3600.0))


def test_the_loop_keeps_time_for_its_checkpoint(tmp_path, monkeypatch):
    reserves = []

    def reason(self, reserve_s=0.0):
        reserves.append(reserve_s)
        return None

    monkeypatch.setattr(Stop, "reason", reason)
    save = CheckpointWriter.save

    def slow(self, state, said):
        save(self, state, said)
        self.slowest_s = 100.0

    monkeypatch.setattr(CheckpointWriter, "save", slow)
    assert train(small(), tmp_path, max_hours=1.0).complete
    assert reserves[0] < 10.0 and max(reserves) >= 150.0


def test_an_evaluation_that_was_left_is_done_by_the_next_session(tmp_path):
    """Asked to stop while the validation split is evaluated at step 3."""
    config = small()
    whole = train(config, tmp_path / "whole")

    class InEvaluation(Stop):
        def checked(self, items, reserve_s=0.0):
            yield next(iter(items))
            raise Stopped("stopped by the test")

    paused = train_until(config, tmp_path / "pieces", InEvaluation())
    assert not paused.complete and paused.step == 3 and "by the test" in paused.reason
    assert [x["step"] for x in lines_of(tmp_path / "pieces") if x["split"] == "validation"] == []
    assert train(config, tmp_path / "pieces").evaluation == whole.evaluation
    same_bits(tmp_path / "whole", tmp_path / "pieces")
    key = lambda x: (x["step"], x["split"])  # noqa: E731
    assert sorted(lines_of(tmp_path / "whole"), key=key) == sorted(
        lines_of(tmp_path / "pieces"), key=key
    )


def test_a_stop_in_the_last_evaluation_leaves_only_that(tmp_path):
    config = small(log=LogConfig(every_steps=1, evaluate_every_steps=0, tensorboard=False))

    class AtTheEnd(Stop):
        def checked(self, items, reserve_s=0.0):
            raise Stopped("stopped by the test")
            yield

    paused = train_until(config, tmp_path, AtTheEnd())
    assert not paused.complete and paused.step == 6 and "last evaluation" in paused.reason
    assert status(tmp_path).state == "paused"
    assert train(config, tmp_path).complete


def test_a_signal_ends_an_idle_process_at_once_and_a_busy_one_not(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", lambda code: left.append(code))
    stop = Stop(leave=lambda reason: left.append(reason))
    with stop_signals(stop), stop.recorded(lambda reason: left.append(f"recorded {reason}")):
        stop.busy()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 20
        while not stop.reason() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.reason() == "stopped by SIGTERM" and left == []
        stop.idle()
    assert left == ["recorded stopped by SIGTERM", "stopped by SIGTERM", 75]
    assert threading.active_count() < 50 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sessions_left_are_logged():
    assert sessions_left(None, 9.0) == "the time left is not known yet"
    assert (
        sessions_left(20.0, 9.0) == "about 20.0 hours left, 3 sessions of 9.0 hours like this one"
    )
    assert "1 session of" in sessions_left(0.5, 9.0)
    assert sessions_left(0.0, 9.0) == "the final evaluation is left"


def test_status_of_a_complete_and_of_a_killed_run(complete, tmp_path):
    found = status(complete)
    assert (found.state, found.step, found.total_steps, found.hours_left) == ("complete", 6, 6, 0.0)
    assert [(x.step, x.whole) for x in found.checkpoints] == [(6, True), (4, True)]
    killed = tmp_path / "killed"
    shutil.copytree(complete, killed)
    said = json.loads((killed / "status.json").read_text()) | {"state": "running", "step": 5}
    (killed / "status.json").write_text(json.dumps(said))
    (killed / "checkpoints" / "6" / "digests.json").unlink()
    found = status(killed)
    assert found.state == "paused" and "process ended without" in found.reason
    assert [x.whole for x in found.checkpoints] == [False, True]
    assert "DAMAGED: digests.json is missing" in status_text(found)


def test_status_command(complete, tmp_path):
    done = run_command("status", complete, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"state", "step", "total_steps", "hours_left", "checkpoints"} <= found.keys()
    assert found["checkpoints"][0] == {"step": 6, "whole": True, "wrong": []}
    refused = run_command("status", tmp_path)
    assert refused.returncode == 2 and "no config.json" in refused.stderr


def test_a_read_only_copy_continues_elsewhere_with_the_same_bits(complete, tmp_path):
    """As a Kaggle input: the run of one session, stopped after step 4, in a folder of its own."""
    source = tmp_path / "input"
    shutil.copytree(complete, source)
    for name in ("status.json", "evaluation.json"):
        (source / name).unlink()
    shutil.rmtree(source / "checkpoints" / "6")
    (source / "checkpoints" / "unfinished" / "6").mkdir(parents=True)
    before = {x: x.read_bytes() for x in source.rglob("*") if x.is_file()}
    for path in [*source.rglob("*"), source]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    copy_run(str(source), tmp_path / "run")
    assert steps_in(tmp_path / "run" / "checkpoints") == [4]
    assert train(small(), tmp_path / "run").complete
    same_bits(complete, tmp_path / "run")
    assert lines_of(complete) == lines_of(tmp_path / "run")
    assert {x: x.read_bytes() for x in source.rglob("*") if x.is_file()} == before
    copy_run(str(source), tmp_path / "run")  # the same line again: its own run is further
    assert steps_in(tmp_path / "run" / "checkpoints") == [6, 4]


def test_what_cannot_be_brought_is_refused(complete, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        copy_run(str(tmp_path), tmp_path / "new")
    with pytest.raises(UserError, match="same folder"):
        copy_run(str(complete), complete)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        copy_run(str(complete), tmp_path / "full")
    shutil.copytree(complete, tmp_path / "behind")
    shutil.rmtree(tmp_path / "behind" / "checkpoints" / "6")
    with pytest.raises(UserError, match=r"has a run of 4 steps, and the one in .* has 6"):
        copy_run(str(complete), tmp_path / "behind")
    shutil.copytree(complete, tmp_path / "broken")
    for step in (4, 6):
        (tmp_path / "broken" / "checkpoints" / str(step) / "digests.json").unlink()
    with pytest.raises(UserError, match="is intact"):
        copy_run(str(tmp_path / "broken"), tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


def test_a_finished_schedule_is_lengthened_only_knowingly(complete, tmp_path):
    shutil.copytree(complete, tmp_path / "run")
    longer = small(schedule=ScheduleConfig(total_steps=10, warmup_steps=1))
    with pytest.raises(UserError, match=r"total_steps: 6 in the workdir, 10 now(.|\n)*--extend"):
        train(longer, tmp_path / "run")
    other = dataclasses.replace(longer, seed=1)
    with pytest.raises(UserError, match="seed: 0 in the workdir, 1 now"):
        train(other, tmp_path / "run", extend=True)
    result = train(longer, tmp_path / "run", extend=True)
    assert result.complete and result.step == 10
    # The finished student stays, and so do its figures.
    assert steps_in(tmp_path / "run" / "checkpoints") == [10, 8, 6]
    assert (tmp_path / "run" / "evaluation_6.json").exists()
    assert train(longer, tmp_path / "run").complete
    with pytest.raises(UserError, match="more than the 8"):
        shorter = small(schedule=ScheduleConfig(total_steps=8, warmup_steps=1))
        train(shorter, tmp_path / "run", extend=True)


def test_kept_are_the_newest_each_nth_and_the_best(tmp_path):
    config = small(
        schedule=ScheduleConfig(total_steps=12, warmup_steps=1),
        checkpoint=CheckpointConfig(
            every_steps=1, keep=1, keep_every_steps=5, keep_best="student_cross_entropy"
        ),
        log=LogConfig(every_steps=1, evaluate_every_steps=1, tensorboard=False),
    )
    assert train(config, tmp_path).complete
    lines = [x for x in lines_of(tmp_path) if x["split"] == "validation"]
    best = min(lines, key=lambda x: (x["student_cross_entropy"], -x["step"]))["step"]
    assert steps_in(tmp_path / "checkpoints") == sorted({12, 10, 5, best}, reverse=True)
    text = disk_use(config, 12, 10**6)
    assert "up to 5 checkpoints of 1.0 MB" in text and "24 lines" in text


def test_best_without_an_evaluation_is_refused():
    from fm_distill.preparation.check import check

    with pytest.raises(UserError, match="keep_best is 'accuracy'; expected one of agreement_top1"):
        check(small(checkpoint=CheckpointConfig(keep_best="accuracy")))
    with pytest.raises(UserError, match="needs figures"):
        check(
            small(
                checkpoint=CheckpointConfig(keep_best="student_top1"),
                log=LogConfig(evaluate_every_steps=0),
            )
        )


def poisoned(trained, workdir, **changes):
    """A run with fixed targets of which those of the examples of step 4 are not numbers."""
    from fm_distill.data.order import example_ids

    config = small(
        teaching="fixed",
        objective=ObjectiveConfig(),
        teacher=TeacherConfig(workdir=str(trained / "run" / "teacher")),
        schedule=ScheduleConfig(total_steps=10, warmup_steps=1),
        log=LogConfig(every_steps=1, evaluate_every_steps=0, tensorboard=False),
        **changes,
    )
    targets = np.zeros((1259, 1, 10), np.float32)
    ids = example_ids(config.seed, np.arange(3 * 16, 4 * 16), 1259)
    targets[ids] = np.nan
    with pytest.MonkeyPatch.context() as patch:  # before the first step
        patch.setattr(Loop, "_asked", lambda *_: "stopped")
        assert train(config, workdir).step == 0
    with np.load(workdir / "fixed_targets.npz") as made:
        identity = made["identity"]
    np.savez(workdir / "fixed_targets.npz", targets=targets, identity=identity)
    return config


@pytest.mark.parametrize("feeding", ["resident", "streaming"])
def test_a_planted_nan_stops_the_run_and_may_be_skipped(trained, tmp_path, feeding):
    data = dataclasses.replace(tiny_config().data, feeding=feeding)
    config = poisoned(trained, tmp_path / "run", data=data)
    with pytest.raises(Diverged, match=r"not finite at step 4(.|\n)*divergence\.action skip"):
        train(config, tmp_path / "run")
    found = status(tmp_path / "run")
    assert found.state == "failed" and [x.step for x in found.checkpoints] == [2]
    assert all(x.whole for x in found.checkpoints)
    skipping = dataclasses.replace(config, divergence=DivergenceConfig(action="skip"))
    assert train(skipping, tmp_path / "run").complete
    rollbacks = json.loads((tmp_path / "run" / "rollbacks.json").read_text())
    assert rollbacks == [{"at_step": 4, "to_step": 2, "action": "skip", "factor": 1.0}]
    steps = [x["step"] for x in lines_of(tmp_path / "run")]
    assert steps == list(range(1, 11))
    assert all(np.isfinite(x).all() for x in arrays_of(tmp_path / "run").values())


def test_a_run_that_went_back_continues_with_the_same_bits(trained, tmp_path, monkeypatch):
    skipping = DivergenceConfig(action="skip")
    config = poisoned(trained, tmp_path / "whole", divergence=skipping)
    assert train(config, tmp_path / "whole").complete
    poisoned(trained, tmp_path / "pieces")
    for stop in (5, 7):
        with monkeypatch.context() as patch:
            patch.setattr(
                Loop, "_asked", lambda self, step, n, reserve, at=stop: "x" if step == at else None
            )
            assert train(config, tmp_path / "pieces").step == stop
    assert train(config, tmp_path / "pieces").complete
    same_bits(tmp_path / "whole", tmp_path / "pieces")
    (tmp_path / "pieces" / "rollbacks.json").unlink()
    (tmp_path / "pieces" / "status.json").unlink()
    with pytest.raises(UserError, match=r"rollbacks\.json does not agree with checkpoint 10"):
        train(config, tmp_path / "pieces")


def test_a_run_may_go_back_and_slow_down(tmp_path):
    config = small(
        optimizer=OptimizerConfig(learning_rate=3e38, clip_norm=1e30),
        divergence=DivergenceConfig(action="slow", factor=1e-41, most=1),
        log=LogConfig(every_steps=1, evaluate_every_steps=0, tensorboard=False),
    )
    assert train(config, tmp_path).complete
    rates = [x["learning_rate"] for x in lines_of(tmp_path)]
    assert max(rates[-3:]) < 1e-2
    (rollback,) = json.loads((tmp_path / "rollbacks.json").read_text())
    assert rollback["action"] == "slow" and rollback["factor"] == 1e-41


def test_no_run_goes_back_more_often_than_it_may(tmp_path):
    config = small(
        optimizer=OptimizerConfig(learning_rate=3e38, clip_norm=1e30),
        divergence=DivergenceConfig(action="slow", factor=0.999, most=2),
    )
    with pytest.raises(Diverged):
        train(config, tmp_path)
    assert len(json.loads((tmp_path / "rollbacks.json").read_text())) == 2


def test_rollbacks_add_up():
    went = (Rollback(7, 4, "skip", 1.0), Rollback(9, 8, "slow", 0.5), Rollback(11, 10, "skip", 1.0))
    assert skipped_steps(went) == 4 and slowness(went) == 0.5
    assert skipped_steps(()) == 0 and slowness(()) == 1.0


def test_a_digest_file_with_a_changed_word_is_noticed(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    write_manifest(tmp_path, {"teacher": "abc"})
    assert integrity_errors(tmp_path) == ()
    path = tmp_path / "digests.json"
    path.write_text(path.read_text().replace("abc", "abd"))
    assert integrity_errors(tmp_path) == ("digests.json does not have the SHA-256 that it records",)


def test_a_checkpoint_of_another_teacher_is_refused(complete, tmp_path):
    shutil.copytree(complete, tmp_path / "run")
    (tmp_path / "run" / "status.json").unlink()
    for step in (4, 6):
        folder = tmp_path / "run" / "checkpoints" / str(step)
        said = json.loads((folder / "digests.json").read_text())["about"]
        (folder / "digests.json").unlink()
        write_manifest(folder, said | {"teacher": "f" * 64})
    with pytest.raises(UserError, match="belongs to another teacher: ffff"):
        train(small(), tmp_path / "run")


def test_what_the_cache_of_programs_needs_comes_with_every_install():
    needed = importlib.metadata.requires("fm-distill")
    assert any(x.startswith("filelock") and "extra ==" not in x for x in needed)


def test_half_written_programs_are_dropped(tmp_path):
    for name in ("a-cache", "b-cache", "b-atime", "c-cache", "c-atime"):
        (tmp_path / name).write_bytes(bytes(8))
    (tmp_path / "c-atime").write_bytes(b"")
    _drop_half_written(tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["b-atime", "b-cache"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"process_id": 0}, "all three"),
        ({"coordinator_address": "here", "process_id": 0, "process_count": 2}, "HOST:PORT"),
        ({"coordinator_address": "a:1", "process_id": 2, "process_count": 2}, "expected 0 to 1"),
    ],
)
def test_half_a_distribution_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        is_distributed(Distributed(**given))


def test_several_processes_are_found_by_the_slice_s_own_variable(monkeypatch):
    assert not is_distributed(Distributed())
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one")
    assert not is_distributed(Distributed())
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one,two")
    assert is_distributed(Distributed())


def test_the_command_stops_within_its_hours_and_says_how_to_go_on(tmp_path):
    experiment = write_experiment(
        tmp_path / "long.py", "schedule=ScheduleConfig(total_steps=1000000)"
    )
    done = run_command("train", experiment, "--workdir", tmp_path / "run", "--max-hours", "0.01")
    assert done.returncode == 75, done.stderr
    assert "the 0.01 hours are used up" in done.stderr and "--max-hours 0.01" in done.stderr
    found = status(tmp_path / "run")
    assert found.state == "paused" and found.step == found.checkpoints[0].step
    refused = run_command("train", experiment, "--workdir", tmp_path / "x", "--max-hours", "-1")
    assert refused.returncode == 2 and "--max-hours is -1" in refused.stderr
    assert not (tmp_path / "x").exists()


def test_the_best_checkpoint_is_not_deleted(tmp_path):
    writer = CheckpointWriter(tmp_path, CheckpointConfig(keep=1, keep_best="kl_one"), ())
    for step, value in ((1, 0.5), (2, 0.1), (3, 0.3)):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / "a").write_bytes(b"x")
        write_manifest(tmp_path / str(step), {"validation": {"kl_one": value}})
    assert writer.best() == (2, 0.1)
    assert writer.is_best({"kl_one": 0.05}) and not writer.is_best({"kl_one": 0.2})
    writer._delete_old()
    assert steps_in(tmp_path) == [3, 2]


def test_an_owed_evaluation_is_not_logged_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, 0, tensorboard=False) as writer:
        writer.write(3, 0.3, "train", {"loss": 1.0})
        writer.write(3, 0.3, "validation", {"student_top1": 0.5})
    with MetricsWriter(path, 3, tensorboard=False):
        assert len(path.read_text().splitlines()) == 2
    with MetricsWriter(path, 3, tensorboard=False, evaluation_pending=True):
        (line,) = path.read_text().splitlines()
        assert json.loads(line)["split"] == "train"
