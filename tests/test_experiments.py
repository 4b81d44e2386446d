"""Every experiment file resolves to its recorded text and runs two shrunk steps."""

import dataclasses
import os
import pathlib
import shutil

import pytest
from conftest import ROOT
from tiny import NETWORK, tiny_config

from fm_distill.config import Config, MeshConfig, ScheduleConfig, TeacherConfig
from fm_distill.config.serialization import from_json, to_json
from fm_distill.errors import UserError
from fm_distill.preparation.experiment import describe, load_experiment
from fm_distill.training.train import train

FILES = sorted((ROOT / "experiments").glob("*.py"))
GOLDEN = ROOT / "tests" / "golden"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_resolves_to_its_recorded_text(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = describe(load_experiment(path.relative_to(ROOT))) + "\n"
    golden = GOLDEN / f"{path.stem}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(found)
    assert golden.exists(), "a new experiment: record it with `UPDATE_GOLDEN=1 pytest`"
    assert found == golden.read_text(), (
        "the resolved config changed; if you meant it, record it with `UPDATE_GOLDEN=1 pytest "
        "tests/test_experiments.py` and let the review see the difference"
    )


def test_no_recorded_text_is_left_over():
    assert {p.stem for p in GOLDEN.glob("*.txt")} == {p.stem for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_docstring_says_command_and_source(path):
    text = path.read_text()
    assert f"fm-distill train experiments/{path.name}" in text and "Source:" in text


DERIVED = """
import dataclasses
from fm_distill import load_experiment
config = dataclasses.replace(load_experiment({base!r}), name="derived")
"""


@pytest.mark.parametrize("folder", ["experiments", "elsewhere"])
def test_an_experiment_derives_from_one_in_any_folder(tmp_path, monkeypatch, folder):
    """Its teacher stays the one beside the file that it derives from."""
    for name in ("digits.py", "digits_teacher.py"):
        (tmp_path / "experiments").mkdir(exist_ok=True)
        shutil.copy(ROOT / "experiments" / name, tmp_path / "experiments")
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "mine.py").write_text(DERIVED.format(base="experiments/digits.py"))
    monkeypatch.chdir(tmp_path)
    found = load_experiment(f"{folder}/mine.py")
    assert found.teacher.experiment == "experiments/digits_teacher.py"
    assert "teacher.experiment = experiments/digits_teacher.py" in describe(found)


def shrink(config: Config, teacher: pathlib.Path) -> Config:
    """The experiment's recipe on tiny data and networks, two steps long."""
    tiny, shrunk = tiny_config(), TeacherConfig(workdir=str(teacher))
    return dataclasses.replace(
        config,
        batch_size=16,
        data=tiny.data,
        student=NETWORK,
        teacher=shrunk if config.teacher else None,
        more_teachers=(shrunk,) * len(config.more_teachers),
        schedule=ScheduleConfig(total_steps=2),
        checkpoint=tiny.checkpoint,
        log=tiny.log,
        mesh=MeshConfig(data=1),
    )


def distinct() -> list:
    """One of the files whose shrunk runs are the same; named by all of them."""
    names: dict[Config, list[str]] = {}
    for path in FILES:
        config = shrink(load_experiment(path), pathlib.Path("teacher"))
        names.setdefault(dataclasses.replace(config, name=""), []).append(path.stem)
    return [pytest.param(x[0], id=" ".join(x)) for x in names.values()]


@pytest.mark.parametrize("name", distinct())
def test_runs_two_shrunk_steps(name, trained, tmp_path):
    config = load_experiment(ROOT / "experiments" / f"{name}.py")
    result = train(shrink(config, trained / "run" / "teacher"), tmp_path)
    assert result.complete and result.step == 2
    assert result.evaluation["examples"] == 359


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_config_survives_its_workdir(path):
    config = load_experiment(path)
    assert from_json(to_json(config)) == config


def test_a_stored_config_of_another_version_is_refused():
    tree = to_json(tiny_config())
    tree["optimizer"]["learning_rate"] = "fast"
    with pytest.raises(UserError, match=r"not a config of this version.*learning_rate"):
        from_json(tree)
