"""`--resume-from` a bucket: fsspec's in-memory one, and a URL for the real command."""

import json
import shutil
import sys

import fsspec
import pytest
from conftest import run_command, write_experiment

from fm_distill.errors import UserError
from fm_distill.runs.integrity import steps_in
from fm_distill.runs.remote import is_remote
from fm_distill.runs.resume_from import copy_run

URL = "memory://bucket/runs/mine"


@pytest.fixture
def bucket(trained):
    """A bucket with a copy of a finished run, and the run."""
    system = fsspec.filesystem("memory")
    system.put(f"{trained / 'run'}/", "/bucket/runs/mine/", recursive=True)
    yield trained / "run"
    system.rm("/bucket", recursive=True)


def contents(folder):
    return {
        str(x.relative_to(folder)): x.read_bytes()
        for x in folder.rglob("*")
        if x.is_file() and x.name != "lock"
    }


def test_a_run_comes_from_a_bucket_whole(bucket, tmp_path, capsys):
    copy_run(URL, tmp_path / "run")
    assert contents(tmp_path / "run") == contents(bucket)
    assert f"is a copy of the run in {URL}" in capsys.readouterr().err
    assert [x.name for x in tmp_path.iterdir()] == ["run"]
    copy_run(URL, tmp_path / "run")  # the same line again
    assert "already has its run" in capsys.readouterr().err


def test_a_damaged_checkpoint_stays_in_the_bucket(bucket, tmp_path):
    system = fsspec.filesystem("memory")
    newest = steps_in(bucket / "checkpoints")[0]
    folder = f"/bucket/runs/mine/checkpoints/{newest}"
    damaged = next(x for x in sorted(system.find(folder)) if "digests" not in x)
    content = system.cat(damaged)
    system.pipe(damaged, bytes([content[0] ^ 1]) + content[1:])
    copy_run(URL, tmp_path / "run")
    assert newest not in steps_in(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match=f"and the one in {URL} has {newest}"):
        copy_run(URL, tmp_path / "run")


def test_what_a_bucket_has_not_is_refused(bucket, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no folder memory://bucket/nothing"):
        copy_run("memory://bucket/nothing", tmp_path / "run")
    with pytest.raises(UserError, match=r"memory://bucket/runs is not the workdir of a run"):
        copy_run("memory://bucket/runs", tmp_path / "run")
    with pytest.raises(UserError, match=r"nonsense://x cannot be read: .*nonsense"):
        copy_run("nonsense://x", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install 'fm-distill\[bucket\]'"):
        copy_run("gs://bucket/run", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_command_continues_from_a_url(trained, tmp_path):
    """A run whose last checkpoint is missing there is finished here."""
    source = tmp_path / "elsewhere"
    shutil.copytree(trained / "run", source)
    newest = steps_in(source / "checkpoints")[0]
    shutil.rmtree(source / "checkpoints" / str(newest))
    (source / "status.json").unlink()
    (source / "evaluation.json").unlink()
    write_experiment(tmp_path / "teacher.py")
    text = (trained / "student.py").read_text()
    (tmp_path / "student.py").write_text(text)
    done = run_command(
        "train", tmp_path / "student.py", "--workdir", tmp_path / "run",
        "--resume-from", f"file://{source}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "continuing after step" in done.stderr
    expected = json.loads((trained / "run" / "evaluation.json").read_text())
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == expected


def test_a_run_that_has_only_its_teacher_comes_too(trained, tmp_path, capsys):
    """It was stopped before the student's first step; the same line again continues it."""
    system = fsspec.filesystem("memory")
    for place in (str(tmp_path / "copy"), "memory://early/run"):
        teacher = f"{place.removeprefix('memory://')}/teacher"
        if is_remote(place):
            system.put(f"{trained / 'run' / 'teacher'}/", f"/{teacher}/", recursive=True)
        else:
            shutil.copytree(trained / "run" / "teacher", teacher)
        run = tmp_path / ("fetched" if is_remote(place) else "copied")
        copy_run(place, run)
        assert contents(run / "teacher") == contents(trained / "run" / "teacher")
        copy_run(place, run)
        assert "already has its run, with 6 steps of its teacher" in capsys.readouterr().err
        shutil.rmtree(run / "teacher" / "checkpoints" / "6")
        with pytest.raises(UserError, match=f"and the one in {place} has 6 steps of its teacher"):
            copy_run(place, run)
    system.rm("/early", recursive=True)
