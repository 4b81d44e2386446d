"""Stop and resume is never having stopped, bit for bit; what a run leaves behind; divergence."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, command_environment, run_command, write_experiment
from disturb import arrays_of
from PIL import Image
from tiny import NETWORK, tiny_config

from fm_distill.config import (
    CanvasConfig,
    DataConfig,
    LogConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    SplitConfig,
    TeacherConfig,
    with_options,
)
from fm_distill.errors import TrainingFailed
from fm_distill.evaluation.inference import evaluate
from fm_distill.evaluation.teacher_check import teacher_warnings
from fm_distill.runs.integrity import newest_valid
from fm_distill.runs.metrics import MetricsWriter
from fm_distill.runs.open_run import open_run
from fm_distill.training.dispatch import dispatch_sizes
from fm_distill.training.loop import Loop
from fm_distill.training.train import train
from fm_distill.weights.card import only_network
from fm_distill.weights.names import in_naming


def same_bits(a, b):
    left, right = arrays_of(a), arrays_of(b)
    assert left.keys() == right.keys() and len(left) > 20
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def lines_of(workdir) -> list[dict]:
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second", None)
        line.pop("data_wait", None)
    return lines


def resumable(feeding: str, norm: str):
    config = tiny_config(ema_decay=0.9, student=with_options(NETWORK, {"norm": norm}))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, feeding=feeding))


def stop_at(monkeypatch, step: int):
    """Makes the loop believe at `step` that somebody asked it to stop."""
    calls = []

    def asked(self, done, steps, reserve_s):
        calls.append(0)
        return "stopped by the test" if len(calls) > step + 1 else None

    monkeypatch.setattr(Loop, "_asked", asked)


def check_resume(config, folder, monkeypatch, stops: tuple[int, ...]) -> None:
    """The run in `folder / "pieces"`, which stops so often, ends as the one in `folder / "whole"`.

    Each stop is that of `stop_at`, counted from where the session began.
    """
    whole = train(config, folder / "whole")
    assert whole.complete
    for step in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            paused = train(config, folder / "pieces")
        assert not paused.complete
        status = json.loads((folder / "pieces" / "status.json").read_text())
        assert status["state"] == "paused" and status["step"] == paused.step
    pieces = train(config, folder / "pieces")
    assert pieces.complete and pieces.evaluation == whole.evaluation
    same_bits(folder / "whole", folder / "pieces")
    assert lines_of(folder / "whole") == lines_of(folder / "pieces")


@pytest.mark.parametrize(("feeding", "norm"), [("resident", "group"), ("streaming", "batch")])
def test_stop_and_resume_is_bit_equal_to_never_stopping(tmp_path, monkeypatch, feeding, norm):
    # Stops after 1, 3 and 4 of 6 steps.
    check_resume(resumable(feeding, norm), tmp_path, monkeypatch, (0, 1, 0))
    steps = [x["step"] for x in lines_of(tmp_path / "whole") if x["split"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_killed_and_interrupted_command_continues(tmp_path):
    """The real command: SIGKILL, then SIGINT, then to the end; equal to an undisturbed one."""
    changes = (
        "schedule=ScheduleConfig(total_steps=400, warmup_steps=5), "
        "checkpoint=CheckpointConfig(every_steps=20), log=LogConfig(every_steps=10, "
        "evaluate_every_steps=0, tensorboard=True)"
    )
    experiment = write_experiment(tmp_path / "long.py", changes)
    done = run_command("train", experiment, "--workdir", tmp_path / "whole")
    assert done.returncode == 0, done.stderr

    def interrupted(number: int, after: int) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "fm_distill", "train", experiment, "--workdir", tmp_path / "b"],
            cwd=ROOT,
            env=command_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 200
        metrics = tmp_path / "b" / "checkpoints"
        while not any(p.name.isdigit() and int(p.name) >= after for p in metrics.glob("*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        process.stderr_text = process.communicate(timeout=200)[1]
        return process

    killed = interrupted(signal.SIGKILL, 40)
    assert killed.returncode == -signal.SIGKILL
    stopped = interrupted(signal.SIGINT, 100)
    assert stopped.returncode == 75, stopped.stderr_text
    assert "paused" in stopped.stderr_text and "fm-distill train" in stopped.stderr_text
    last = run_command("train", experiment, "--workdir", tmp_path / "b")
    assert last.returncode == 0 and "continuing after step" in last.stderr
    same_bits(tmp_path / "whole", tmp_path / "b")
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "b")
    assert last.stdout == done.stdout
    assert list((tmp_path / "b" / "tensorboard").iterdir())
    # Once complete, the line only prints the table again.
    again = run_command("train", experiment, "--workdir", tmp_path / "b")
    assert again.returncode == 0 and "is complete" in again.stderr
    assert again.stdout == done.stdout


def test_a_run_continues_after_workdir_and_teacher_moved(trained, tmp_path):
    """Its last two steps, evaluation included, are done anew elsewhere, to the same bits."""
    moved, aside = tmp_path / "elsewhere", tmp_path / "aside"
    shutil.copytree(trained / "run", moved)
    shutil.rmtree(moved / "checkpoints" / "6")
    for name in ("status.json", "evaluation.json"):
        (moved / name).unlink()
    os.rename(trained / "run", aside)
    try:
        done = run_command("train", trained / "student.py", "--workdir", moved)
        assert done.returncode == 0 and "continuing after step 4" in done.stderr, done.stderr
        same_bits(aside, moved)
        assert lines_of(aside) == lines_of(moved)
        figures = run_command("evaluate", moved, "--json", devices=3)
        assert figures.returncode == 0, figures.stderr
        assert "moving average" in figures.stderr
        stored = json.loads((aside / "evaluation.json").read_text())
        assert json.loads((moved / "evaluation.json").read_text()) == stored
        found = json.loads(figures.stdout)
        assert found["examples"] == 359
        assert found["kl"]["one"] == pytest.approx(stored["kl"]["one"], rel=1e-3)
        assert found["student"]["top1"] == stored["student"]["top1"]
    finally:
        os.rename(aside, trained / "run")


def test_what_a_run_leaves_behind(trained):
    run = trained / "run"
    stored = json.loads((run / "config.json").read_text())
    assert stored["resolved"]["classes"] == 10
    assert [len(x) for x in stored["resolved"]["teacher_weights"]] == [64]
    assert stored["versions"]["jax"] == jax.__version__ and stored["devices"] == ["cpu:cpu"]
    assert json.loads((run / "status.json").read_text())["state"] == "complete"
    assert json.loads((run / "teacher" / "status.json").read_text())["state"] == "complete"
    kept = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [4, 6]


def test_another_teacher_is_refused(trained, tmp_path):
    experiment = write_experiment(tmp_path / "teacher.py", "seed=5")
    other = run_command("train", experiment, "--workdir", tmp_path / "other")
    assert other.returncode == 0, other.stderr
    before = (trained / "run" / "config.json").read_bytes()
    swap = ("--teacher.experiment", "None", "--teacher.workdir", tmp_path / "other")
    refused = run_command("evaluate", trained / "run", *swap)
    assert refused.returncode == 2 and "not the teacher of the run" in refused.stderr
    assert (trained / "run" / "config.json").read_bytes() == before


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny_config(
        schedule=ScheduleConfig(total_steps=40, warmup_steps=1),
        optimizer=OptimizerConfig(learning_rate=3e38, clip_norm=1e30),
        log=LogConfig(every_steps=1, evaluate_every_steps=0, tensorboard=False),
    )
    with pytest.raises(TrainingFailed, match=r"not finite at step \d+.*learning_rate"):
        train(config, tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and "not finite" in status["reason"]
    if newest_valid(tmp_path / "checkpoints").step:
        for name, array in arrays_of(tmp_path).items():
            if "params" in name:
                assert np.isfinite(array).all(), name


def test_labels_may_be_the_target_where_a_teacher_is_only_compared_with(trained, tmp_path):
    done = run_command(
        "train", trained / "student.py", "--workdir", tmp_path / "labels",
        "--objective.target", "labels",
        "--teacher.experiment", "None", "--teacher.workdir", trained / "run" / "teacher",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "top-1 agreement" in done.stdout
    line = lines_of(tmp_path / "labels")[0]
    assert "agreement" not in line and line["loss"] > 1


def test_a_weight_file_teaches_as_the_run_that_it_was_written_from(trained, tmp_path):
    teacher = open_run(trained / "run" / "teacher")
    tensors = in_naming("bit_original", NETWORK, teacher.student.variables)
    np.savez(tmp_path / "teacher.npz", **tensors)
    config = tiny_config(
        objective=ObjectiveConfig(temperature=2.0),
        teacher=TeacherConfig(weights=str(tmp_path / "teacher.npz"), network=only_network(NETWORK)),
    )
    by_file = train(config, tmp_path / "file")
    other = dataclasses.replace(
        config, teacher=TeacherConfig(workdir=str(trained / "run" / "teacher"))
    )
    assert train(other, tmp_path / "run").evaluation == by_file.evaluation
    # The file moved: its path is not the run's identity, its contents are.
    os.rename(tmp_path / "teacher.npz", tmp_path / "moved.npz")
    found = evaluate(
        tmp_path / "file",
        "test",
        dataclasses.replace(
            config,
            teacher=TeacherConfig(
                weights=str(tmp_path / "moved.npz"), network=only_network(NETWORK)
            ),
        ),
    )
    assert found["teacher"] == by_file.evaluation["teacher"]


def test_an_unlabelled_folder_is_a_transfer_set(trained, tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / ("deep" if i % 2 else "") / f"{i}.png")
    config = tiny_config(
        objective=ObjectiveConfig(temperature=2.0),
        teacher=TeacherConfig(workdir=str(trained / "run" / "teacher")),
        data=DataConfig(
            source="images",
            data_dir=str(tmp_path),
            train=SplitConfig(name="images"),
            canvas=CanvasConfig(size=24),
        ),
    )
    result = train(config, tmp_path / "run")
    assert result.complete and result.evaluation["examples"] == 20
    assert result.evaluation["student"]["top1"] is None and result.evaluation["gap"] is None
    assert result.evaluation["agreement"]["top1"] is not None
    assert open_run(tmp_path / "run").class_names == tuple("0123456789")


def test_reading_a_run_leaves_alone_what_another_process_writes(trained):
    checkpoints = trained / "run" / "checkpoints"
    half_written = checkpoints / "9.orbax-checkpoint-tmp"
    half_written.mkdir()
    try:
        assert open_run(trained / "run").step == 6
        assert half_written.is_dir()
    finally:
        half_written.rmdir()


def test_public_api(trained):
    import fm_distill

    assert len(fm_distill.__all__) == 15
    assert all(callable(fm_distill.__getattr__(name)) for name in fm_distill.__all__)
    config = fm_distill.load_experiment(trained / "student.py")
    assert isinstance(config, fm_distill.Config) and isinstance(config.data, DataConfig)
    run = fm_distill.open_run(trained / "run")
    assert run.complete and run.averaged and run.step == 6 and run.classes == 10
    figures = fm_distill.evaluate(trained / "run", "validation")
    assert figures["examples"] == 179
    assert fm_distill.train(config, trained / "run").complete


@pytest.mark.parametrize(
    ("start", "total", "size", "expected"),
    [(0, 10, 4, [4, 4, 1, 1]), (4, 10, 4, [4, 1, 1]), (9, 10, 4, [1]), (10, 10, 4, []),
     (0, 3, 1, [1, 1, 1])],
)  # fmt: skip
def test_dispatches_are_the_same_from_any_dispatch_end(start, total, size, expected):
    assert list(dispatch_sizes(start, total, size)) == expected


def test_lines_beyond_the_checkpoint_and_cut_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, 0, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write(step, step / 10, "train", {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 1, "los')
    with MetricsWriter(path, 2, tensorboard=False) as writer:
        writer.write(3, 0.3, "train", {"loss": float("nan")})
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3] and lines[-1]["loss"] is None


def test_a_teacher_that_cannot_teach_is_warned_of():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 500)
    good = np.full((500, 10), 0.01)
    good[np.arange(500), labels] = 0.91
    assert teacher_warnings(good, labels) == []
    assert "no better than chance" in teacher_warnings(rng.permutation(good), labels)[0]
    constant = np.tile(good[:1], (500, 1))
    assert "hardly differ" in teacher_warnings(constant, np.full(500, -1))[0]
    assert "not finite" in teacher_warnings(good * np.nan, labels)[0]
    assert teacher_warnings(good, np.full(500, -1)) == []


def test_the_last_evaluation_can_be_left_out_and_made_up_for(tmp_path):
    whole = train(tiny_config(), tmp_path / "whole")
    log = dataclasses.replace(tiny_config().log, final_evaluation=False)
    config = tiny_config(log=log)
    for _ in range(2):  # trained, and then found complete
        result = train(config, tmp_path / "run")
        assert result.complete and result.step == 6 and result.evaluation is None
    assert not (tmp_path / "run" / "evaluation.json").exists()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    # The same run with the evaluation: it is made up for, and nothing is trained again.
    later = train(tiny_config(), tmp_path / "run")
    assert later.complete and later.evaluation == whole.evaluation
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines
