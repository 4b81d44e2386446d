"""`fm-distill bench`: who is timed, in which order, and what is made of the times."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_command
from test_cli import command
from test_export_functions import workdir

from fm_distill.errors import UserError
from fm_distill.evaluation import bench as benching
from fm_distill.evaluation.bench import BURST_S, FEWEST_CALLS, bench
from fm_distill.evaluation.bench_process import Burst, Opened, Subject
from fm_distill.exporting.export import export

__all__ = ["workdir"]  # a fixture


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "student.stablehlo"
    export(workdir, path, batch="dynamic")
    return path


def fake(name: str, ms: float, heard: list[str]):
    """A process whose calls take `ms` each, by a clock of its own."""

    def burst(seconds: float) -> Burst:
        heard.append(name)
        return Burst([ms] * max(1, round(1e3 * seconds / ms)), 5)

    return burst


def test_all_take_turns_until_each_had_its_time():
    heard = []
    quick, slow = fake("quick", 2.0, heard), fake("slow", 400.0, heard)
    found = benching._in_turn([quick, slow], 1.0)
    assert heard[:20] == ["quick", "slow"] * 10  # ten bursts are the quick one's second
    assert heard[20:] == ["slow"] * (FEWEST_CALLS - 10)  # 400 ms each, and no fewer calls
    assert sum(len(x.calls_ms) for x in found[0]) == 500
    assert found[0][0].calls_ms == [2.0] * round(1e3 * BURST_S / 2)


def test_what_is_made_of_the_times(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"1234567")
    calls = np.random.default_rng(0).uniform(1, 9, 101)
    bursts = [Burst(calls[:40].tolist(), 900), Burst(calls[40:].tolist(), 800)]
    opened = Opened("bit", 16, "ONNX", "a CPU", 600)
    row = benching._row(Subject(str(path), "file", 0, 8, 2, False), opened, bursts)
    in_order = np.sort(calls)
    assert row.median_ms == in_order[50] and row.p95_ms == in_order[95] and row.calls == 101
    assert row.images_per_second == pytest.approx(8 * 101 / (calls.sum() / 1e3))
    assert (row.peak_bytes, row.added_bytes, row.file_bytes) == (900, 300, 7)
    teacher = benching._row(Subject("run", "teacher", 1, 8, 2, False), opened, bursts)
    assert teacher.of == "teacher 2" and teacher.file_bytes is None


def test_a_file_and_a_run_with_its_teacher_side_by_side(workdir, exported):
    done = run_command(
        "bench", exported, workdir, "--batch-size", 4, "--threads", 1, "--seconds", 0.05, "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["threads"] == 1 and found["batch_size"] == 4 and "CPU" in found["device"]
    assert [(x["name"], x["of"]) for x in found["rows"]] == [
        (str(exported), "file"), (str(workdir), "student"), (str(workdir), "teacher")
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["network"] == "bit" and row["resolution"] == 16
        assert 0 < row["median_ms"] <= row["p95_ms"] and row["calls"] >= FEWEST_CALLS
        assert 50e6 < row["added_bytes"] + 50e6 < row["peak_bytes"] < 4e9
    assert found["rows"][0]["file_bytes"] == exported.stat().st_size


def test_a_teacher_that_is_not_here_is_said_and_the_rest_is_timed(workdir, capsys, tmp_path):
    copied = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(copied / "teacher")
    code, out, said = command(capsys, "bench", copied, "--seconds", 0.01)
    assert code == 0 and f"teacher of {copied} is not timed: {copied}/teacher is not the" in said
    title, heads, student = out.splitlines()
    assert title.endswith("batches of 1 image") and "p50" in heads
    assert student.startswith(f"{copied} (student)  XLA of jax") and student.endswith(" -")


def test_what_is_refused(workdir, exported, tmp_path, capsys, monkeypatch):
    damaged = tmp_path / "x.stablehlo"
    damaged.write_bytes(exported.read_bytes()[:-50])
    other = tmp_path / "x.tar"
    other.write_text("x")
    for said, *arguments in (
        ("--batch-size is 0; expected 1 or more", workdir, "--batch-size", 0),
        ("--threads is 0; expected 1 or more", workdir, "--threads", 0),
        ("--seconds is 0; expected more than 0", workdir, "--seconds", 0),
        ("cannot be timed; expected a workdir, or ", other),
        ("is not the workdir of a run", tmp_path),
        ("or was damaged", damaged),
    ):
        code, out, error = command(capsys, "bench", *arguments)
        assert code == 2 and said in error and not out, error
        assert len(error.strip().splitlines()) == 1, error


def test_a_missing_runtime_is_named_with_its_extra(workdir, exported, tmp_path, monkeypatch):
    """In the process that would run it; and one that dies is said, with what it said last."""
    (tmp_path / "onnx.py").write_text("raise ImportError")
    (tmp_path / "mine.onnx").write_bytes(b"")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with pytest.raises(UserError, match=r"not installed: pip install -e '.\[onnx\]'"):
        bench([tmp_path / "mine.onnx"], seconds=0.01)
    (tmp_path / "onnx.py").write_text("import os, sys\nsys.stderr.write('oh')\nos._exit(7)")
    with pytest.raises(UserError, match=r"the process of file ended with code 7 \(oh\)"):
        bench([tmp_path / "mine.onnx"], seconds=0.01)


def test_a_file_of_another_batch_is_refused(workdir, tmp_path):
    path = pathlib.Path(tmp_path / "two.stablehlo")
    export(workdir, path, batch=2)
    with pytest.raises(
        UserError, match="takes batches of 2 images and --batch-size is 3; export it"
    ):
        bench([path], batch_size=3, seconds=0.01)
