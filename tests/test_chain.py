"""Chains of teachers: an experiment whose teacher has a teacher, and so on."""

import pytest
from conftest import write_experiment

from fm_distill import load_experiment
from fm_distill.errors import UserError
from fm_distill.runs.open_run import open_run
from fm_distill.runs.workdir import Workdir
from fm_distill.training.train import train

TAUGHT = (
    'teacher=TeacherConfig(experiment="{}"), objective=ObjectiveConfig(), '
    "schedule=ScheduleConfig(total_steps={}), log=LogConfig(every_steps=1, evaluate_every_steps=0, "
    "tensorboard=False)"
)


def test_an_assistant_is_taught_before_it_teaches(tmp_path):
    write_experiment(tmp_path / "large.py")
    write_experiment(tmp_path / "assistant.py", TAUGHT.format("large.py", 3))
    write_experiment(tmp_path / "small.py", TAUGHT.format("assistant.py", 2))
    result = train(load_experiment(tmp_path / "small.py"), tmp_path / "run")
    assert result.complete and result.evaluation is not None
    steps = {"run": 2, "run/teacher": 3, "run/teacher/teacher": 6}
    for place, count in steps.items():
        status = Workdir(tmp_path / place).read_status()
        assert status is not None and (status.state, status.step) == ("complete", count)
    top1 = result.evaluation["teacher"]["top1"]
    assert top1 == Workdir(tmp_path / "run/teacher").read_evaluation()["student"]["top1"]
    assert open_run(tmp_path / "run/teacher").config.teacher.experiment.endswith("large.py")


def test_a_chain_that_leads_back_is_refused(tmp_path):
    for name, teacher in (("a", "b"), ("b", "c"), ("c", "b")):
        write_experiment(tmp_path / f"{name}.py", TAUGHT.format(f"{teacher}.py", 2))
    config = load_experiment(tmp_path / "a.py")
    with pytest.raises(
        UserError, match=r"b.py -> \S*c.py -> \S*b.py; a chain of teachers must end"
    ):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
