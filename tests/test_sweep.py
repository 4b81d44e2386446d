"""A sweep: every combination once, means and spreads, stopped and continued; what it refuses."""

import csv
import json
import re
import statistics
import urllib.parse

import pytest
from conftest import run_command, write_experiment
from tiny import tiny_config

from fm_distill.config import LogConfig, ScheduleConfig
from fm_distill.config.serialization import changed
from fm_distill.errors import UserError
from fm_distill.training.sweep import parse_over, sweep
from fm_distill.training.sweep_table import SweptRun, as_csv, as_markdown, as_page


def quick_config():
    return tiny_config(
        schedule=ScheduleConfig(total_steps=2),
        log=LogConfig(every_steps=1, evaluate_every_steps=0, tensorboard=False),
    )


def test_every_combination_runs_once_and_the_table_has_mean_and_spread(tmp_path, capsys):
    over = {"optimizer.learning_rate": (0.001, 0.01), "seed": (0, 1)}
    table = sweep(quick_config(), over, tmp_path)
    runs = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert runs == sorted(
        f"optimizer.learning_rate={rate}__seed={seed}" for rate in (0.001, 0.01) for seed in (0, 1)
    )
    lines = table.splitlines()
    assert len(lines) == 4
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for line, rate in zip(lines[2:], (0.001, 0.01), strict=True):
        accuracies = [
            100
            * json.loads(
                (tmp_path / f"optimizer.learning_rate={rate}__seed={s}/evaluation.json").read_text()
            )["student"]["top1"]
            for s in (0, 1)
        ]
        expected = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"
        cells = [cell.strip() for cell in line.split("|")]
        at = [head.strip() for head in lines[0].split("|")].index("student accuracy, %")
        assert [*cells[1:3], cells[at]] == [f"optimizer.learning_rate={rate}", "2", expected]
        (row,) = (x for x in rows if x["runs"] == cells[1])
        assert row["seeds"] == "2"
        assert float(row["student accuracy, %"]) == pytest.approx(statistics.mean(accuracies))
        spread = float(row["student accuracy, %, standard deviation"])
        assert spread == pytest.approx(statistics.stdev(accuracies))
    page = (tmp_path / "sweep.html").read_text()
    links = [urllib.parse.unquote(x) for x in re.findall(r"<a href='([^']*)'", page)]
    assert sorted(x.rstrip("/") for x in links) == runs
    # Again: nothing is trained, the table is the same.
    capsys.readouterr()
    assert sweep(quick_config(), over, tmp_path) == table
    assert capsys.readouterr().err.count("is complete") == 4


def test_values_are_put_in_their_place():
    config = changed(quick_config(), {"student.width": 0.5, "seed": 3, "views.mixup": "none"})
    assert (config.student.width, config.seed, config.views.mixup) == (0.5, 3, "none")
    assert changed(quick_config(), {"objective.temperature": 2}).objective.temperature == 2.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=0,1", ("seed", (0, 1))),
        ("objective.temperature=1,2.5", ("objective.temperature", (1, 2.5))),
        ("teaching=fixed,consistent", ("teaching", ("fixed", "consistent"))),
        ("optimizer.clip-norm=null,1.0", ("optimizer.clip_norm", (None, 1.0))),
    ],
)
def test_what_to_sweep_over_is_read(text, expected):
    assert parse_over(text) == expected


@pytest.mark.parametrize("text", ["seed", "=1", "seed="])
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(UserError, match=r"expected OPTION=VALUE"):
        parse_over(text)


def test_unknown_option_and_wrong_value_are_refused_before_the_first_run(tmp_path):
    with pytest.raises(UserError, match=r"no option 'temprature'"):
        sweep(quick_config(), {"temprature": (1,)}, tmp_path)
    with pytest.raises(UserError, match=r"learning_rate is -1"):
        sweep(quick_config(), {"seed": (0,), "optimizer.learning_rate": (0.1, -1)}, tmp_path)
    with pytest.raises(
        UserError, match=r"seed=many: a value is not of its field's type: Expected `int`"
    ):
        sweep(quick_config(), {"seed": ("many",)}, tmp_path)
    with pytest.raises(UserError, match=r"log.final_evaluation is False, but a sweep"):
        sweep(quick_config(), {"log.final_evaluation": (False,)}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_figure_is_a_dash_and_names_are_no_html():
    none = {"top1": None}
    figures = {
        "student": {"top1": 0.5},
        "teacher": none,
        "retention": None,
        "agreement": none,
        "kl": {"one": None},
        "training_view": {"agreement": none, "kl": {"train_temperature": None}},
    }
    run = SweptRun("a<b>", "a<b>'", figures)
    table = as_markdown([run]).splitlines()
    cells = dict(zip(*([x.strip() for x in table[i].split("|")] for i in (0, 2)), strict=True))
    assert cells.pop("runs") == "a<b>" and cells.pop("seeds") == "1"
    assert cells.pop("student accuracy, %") == "50.00"
    assert {x for head, x in cells.items() if head} == {"-"}
    (row,) = csv.DictReader(as_csv([run]).splitlines())
    assert row["teacher accuracy, %"] == "" and row["student accuracy, %"] == "50.0"
    page = as_page([run])
    assert "<b>" not in page and "href='a%3Cb%3E%27/'" in page


def test_the_command_shares_the_teacher_between_runs(tmp_path):
    write_experiment(tmp_path / "teacher.py", "schedule=ScheduleConfig(total_steps=2)")
    student = write_experiment(
        tmp_path / "student.py",
        'teacher=TeacherConfig(experiment="teacher.py"), objective=ObjectiveConfig(), '
        "schedule=ScheduleConfig(total_steps=2)",
    )
    teachings = "teaching=function_matching,consistent,independent,fixed"
    done = run_command("sweep", student, "--over", teachings, "--workdir", tmp_path / "sweep")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 + 4
    assert (tmp_path / "sweep" / "teacher" / "evaluation.json").is_file()
    assert (tmp_path / "sweep" / "teaching=fixed" / "fixed_targets.npz").is_file()
    wrong = run_command("sweep", student, "--over", "seed:1")
    assert wrong.returncode == 2 and "expected OPTION=VALUE" in wrong.stderr
    nothing = run_command("sweep", student)
    assert nothing.returncode == 2 and "--over" in nothing.stderr
