"""A sweep: every combination once, means and spreads, stopped and continued; what it refuses."""

import csv
import dataclasses
import json
import re
import statistics
import sys
import types
import urllib.parse
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import run_command, write_experiment
from tiny import tiny_config

from fm_distill.cli.command import guarded
from fm_distill.config import LogConfig, ObjectiveConfig, ScheduleConfig, TeacherConfig
from fm_distill.config.serialization import changed
from fm_distill.config.teachers import teachers_of
from fm_distill.errors import EXIT_WRONG_INPUT, Diverged, TrainingFailed, UserError
from fm_distill.reports import plots
from fm_distill.reports.pareto import front, pareto
from fm_distill.reports.sweep import parse_over, sweep
from fm_distill.reports.sweep_table import SweptRun, as_csv, as_markdown, as_page, save
from fm_distill.runs.open_run import open_run


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
    # On a full disk the old table stays.
    before = (tmp_path / "sweep.csv").read_bytes()
    (tmp_path / "sweep.csv.tmp").symlink_to("/dev/full")

    def again(arguments: list[str]) -> int:
        return len(sweep(quick_config(), over, tmp_path))

    assert guarded(again, []) == EXIT_WRONG_INPUT
    assert "the disk or its quota is full; free some space" in capsys.readouterr().err
    assert (tmp_path / "sweep.csv").read_bytes() == before
    # What is measured on request stands in columns of its own; equal networks are measured once.
    assert "latency" not in table and "Pareto" not in table
    assert "latency at full batch, ms | " in sweep(quick_config(), over, tmp_path, cost=True)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        measured = [x["student latency at batch 1, ms"] for x in csv.DictReader(file)]
    assert len(set(measured)) == 1 and float(measured[0]) > 0


def test_values_are_put_in_their_place():
    config = changed(
        quick_config(), {"student.options.width": 0.5, "seed": 3, "views.mixup": "none"}
    )
    assert (config.student.options["width"], config.seed, config.views.mixup) == (0.5, 3, "none")
    assert changed(quick_config(), {"objective.temperature": 2}).objective.temperature == 2.0
    assert changed(quick_config(), {"student.options.depths": [1, 2]}).student.options[
        "depths"
    ] == (1, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=0,1", ("seed", (0, 1))),
        ("objective.temperature=1,2.5", ("objective.temperature", (1, 2.5))),
        ("teaching=fixed,consistent", ("teaching", ("fixed", "consistent"))),
        ("optimizer.clip-norm=null,1.0", ("optimizer.clip_norm", (None, 1.0))),
        ("memory.overlap=True,false", ("memory.overlap", (True, False))),
        ("student.options.depths=[1,1],[2]", ("student.options.depths", ([1, 1], [2]))),
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
    with pytest.raises(UserError, match=r"seed=many: a value has the wrong type: Expected `int`"):
        sweep(quick_config(), {"seed": ("many",)}, tmp_path)
    with pytest.raises(UserError, match=r"log.final_evaluation is False, but a sweep"):
        sweep(quick_config(), {"log.final_evaluation": (False,)}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"seed": (0, 1, 0)}, "seed=0 is given twice"),
        ({"optimizer.learning_rate": (1e-3, 0.001)}, "learning_rate=0.001 is given twice"),
        ({"seed": ()}, "seed has no values to sweep over"),
        ({"data.name": ("a/b", "a_b")}, "would share the folder data.name=a_b"),
    ],
)
def test_each_combination_is_there_once(tmp_path, over, said):
    with pytest.raises(UserError, match=said):
        sweep(quick_config(), over, tmp_path)
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


def figures(top1, millions, ms=None, teacher=0.9):
    """Of a student of so many million FLOPs and a tenth of it of parameters."""
    calls = ms and {"batch_size": 8, "median_ms": ms, "p95_ms": 2 * ms, "activation_bytes": 9}
    cost = {
        "parameters": int(1e5 * millions), "flops": int(1e6 * millions),
        "one": calls, "batch": calls,
    }  # fmt: skip
    return {
        "student": {"top1": top1},
        "teacher": {"top1": teacher},
        "agreement": {"top1": top1 and 0.5},
        "retention": top1 / teacher,
        "retention_interval": [top1 / teacher - 0.1, top1 / teacher + 0.05],
        "cost": {"student": cost, "teacher": None, "device": "a clock" if ms else None},
    }


@pytest.fixture
def swept(monkeypatch):
    """The runs of a sweep, by their folders, as they would be trained."""
    found = {}

    def train(config, folder, stop):
        found[folder.name] = config
        return types.SimpleNamespace(complete=True, evaluation=figures(0.5, 10))

    monkeypatch.setattr("fm_distill.reports.sweep.train_until", train)
    return found


def places(config) -> list[tuple[str | None, str | None]]:
    """Experiment and workdir of each teacher."""
    return [(x.config.experiment, x.config.workdir) for x in teachers_of(config)]


def taught(*teachers: TeacherConfig):
    config = dataclasses.replace(quick_config(), objective=ObjectiveConfig(), teacher=teachers[0])
    return dataclasses.replace(config, more_teachers=teachers[1:])


def test_a_run_that_fails_does_not_hold_up_the_others(tmp_path, monkeypatch, capsys):
    done = []

    def train(config, workdir, stop):
        done.append(config.optimizer.learning_rate)
        if config.optimizer.learning_rate == 2:
            raise Diverged(3)
        return types.SimpleNamespace(complete=True, evaluation=figures(0.5, 10))

    monkeypatch.setattr("fm_distill.reports.sweep.train_until", train)
    over = {"optimizer.learning_rate": (1.0, 2.0, 3.0)}
    with pytest.raises(TrainingFailed, match=r"1 of 3 runs \(optimizer.learning_rate=2.0\)"):
        sweep(quick_config(), over, tmp_path)
    assert done == [1, 2, 3] and "is not finite at step 3" in capsys.readouterr().err
    table = (tmp_path / "sweep.csv").read_text()
    assert "learning_rate=1.0" in table and "learning_rate=2.0" not in table


def test_each_experiment_of_a_teacher_has_a_folder_beside_the_runs(tmp_path, swept):
    over = {"teacher.experiment": ("a.py", "x/b.py"), "seed": (0, 1)}
    sweep(
        taught(TeacherConfig(experiment="a.py"), TeacherConfig(experiment="c.py")), over, tmp_path
    )
    assert {name: places(config) for name, config in swept.items()} == {
        f"teacher.experiment={of_run}__seed={seed}": [
            (experiment, str(tmp_path / folder)),
            ("c.py", str(tmp_path / "teacher_2")),
        ]
        for seed in (0, 1)
        for of_run, experiment, folder in (
            ("a.py", "a.py", "teacher=a.py"),
            ("x_b.py", "x/b.py", "teacher=x_b.py"),
        )
    }


@pytest.mark.parametrize(
    ("option", "values", "expected"),
    [
        ("teacher.classes", (["a"], ["b"]), [("a.py", "teacher"), ("a.py", "teacher")]),
        (
            "more_teachers.0.experiment",
            ("b.py", "c.py"),
            [
                ("a.py", "teacher"),
                ("b.py", "teacher_2=b.py"),
                ("a.py", "teacher"),
                ("c.py", "teacher_2=c.py"),
            ],
        ),
        ("teacher.workdir", ("t", "u"), [("a.py", "t"), ("a.py", "u")]),
        ("teacher.recording", (None, "r"), [("a.py", "teacher"), ("a.py", None)]),
    ],
)
def test_any_field_of_a_teacher_may_be_swept(
    swept, tmp_path, monkeypatch, option, values, expected
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fm_distill.reports.sweep.check", lambda run: None)
    sweep(taught(TeacherConfig(experiment="a.py")), {option: values}, "")
    assert [x for config in swept.values() for x in places(config)] == expected


def test_a_workdir_for_two_teachers_is_refused_before_the_first_run(tmp_path, swept):
    own = taught(TeacherConfig(experiment="a.py", workdir="mine"))
    with pytest.raises(
        UserError, match=r"teacher.workdir is mine for the teachers of a.py and b.py; leave it out"
    ):
        sweep(own, {"teacher.experiment": ("a.py", "b.py")}, tmp_path)
    assert swept == {}


def test_the_front_is_what_no_other_beats_in_both():
    rng = np.random.default_rng(0)
    accuracy, cost = rng.integers(0, 6, (2, 30)).astype(float).tolist()
    for i, on in enumerate(front(accuracy, cost)):
        beaten = [
            (accuracy[j] > accuracy[i] and cost[j] <= cost[i])
            or (accuracy[j] >= accuracy[i] and cost[j] < cost[i])
            for j in range(30)
        ]  # fmt: skip
        assert on is not any(beaten)
    assert front([1.0, 1.0], [2.0, 2.0]) == [True, True]


def test_a_sweep_over_cost_ends_with_the_pareto_front(tmp_path):
    runs = [
        SweptRun("width=2", "c", figures(0.80, 30, ms=5.0)),
        SweptRun("width=1", "a", figures(0.70, 10, ms=2.0)),
        SweptRun("width=1", "b", figures(0.60, 10, ms=2.0)),
        SweptRun("width=1.5", "d", figures(0.64, 20, ms=1.0)),
    ]
    save(runs, tmp_path)
    with (tmp_path / "pareto.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [x["runs"] for x in rows] == ["width=1", "width=1.5", "width=2"]
    assert [float(x["student accuracy, %"]) for x in rows] == pytest.approx([65, 64, 80])
    assert [float(x["student FLOPs, millions"]) for x in rows] == [10, 20, 30]
    assert [float(x["student latency at batch 1, ms"]) for x in rows] == [2, 1, 5]
    latency = "latency at batch 1, latency at full batch"
    everything = f"parameters, FLOPs, {latency}"
    assert [x["Pareto-optimal in"] for x in rows] == [everything, latency, everything]
    first, second, notes = as_markdown(runs).split("\n\n")
    assert "2 per multiply-add" in notes and notes.endswith("measured on a clock")
    assert "| width=1.5 | 64.00 | 2.0000 | 20.00 | 1.0000 | 1.0000 | latency at" in second
    cells = dict(zip(*(x.split(" | ") for x in first.splitlines()[::3][:2]), strict=True))
    assert cells["student FLOPs, millions"] == "10.00" and cells["seeds"] == "2"
    assert (
        cells["95 % interval"]
        == f"{100 * (0.65 / 0.9 - 0.1):.2f} to {100 * (0.65 / 0.9 + 0.05):.2f}"
    )
    page = (tmp_path / "sweep.html").read_text()
    assert "<img src='pareto.svg'" in page and page.count("<td>width=1.5</td>") == 0
    assert "<tr><th>width=1.5</th><td>64.00</td>" in page and "measured on a clock." in page
    with (tmp_path / "sweep.csv").open(newline="") as file:
        assert {x["measured on"] for x in csv.DictReader(file)} == {"a clock"}
    assert ElementTree.fromstring((tmp_path / "pareto.svg").read_bytes()).tag.endswith("svg")
    # In the same folder, runs of one network, whose times differ by chance: nothing is left of it.
    once, again = figures(0.7, 10, ms=1.0), figures(0.6, 10, ms=1.1)
    save([SweptRun("t=1", "a", once), SweptRun("t=2", "b", again)], tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["sweep.csv", "sweep.html"]
    page = (tmp_path / "sweep.html").read_text()
    assert "pareto" not in page.lower() and "latency at batch 1" in page


def test_the_front_is_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_svg", lambda figure: drawn.append(figure) or b"")
    groups = {"a": [figures(0.7, 10)], "b": [figures(0.6, 20)], "c": [figures(0.8, 30)]}
    pareto(groups).picture()
    parameters, flops = drawn[0].axes
    assert flops.get_xlabel() == "student FLOPs, millions" and flops.get_xscale() == "log"
    best = next(x for x in flops.lines if x.get_label() == "Pareto-optimal")
    np.testing.assert_allclose(best.get_xydata(), [[10, 70], [30, 80]])
    assert [x.get_text() for x in flops.texts] == ["a", "c"]
    (teacher,) = (x for x in parameters.lines if x.get_label() == "teacher")
    assert teacher.get_ydata()[0] == pytest.approx(90)


def test_without_labels_the_front_is_of_the_agreement():
    unlabelled = [figures(0.7, x) | {"student": {"top1": None}} for x in (10, 20)]
    found = pareto({"a": unlabelled[:1], "b": unlabelled[1:]})
    assert found.quality.name == "agreement_top1" and found.teacher is None
    assert found.accuracy == (50, 50)
    assert [x for *_, x in found.rows()] == ["parameters, FLOPs", ""]


def test_without_matplotlib_the_tables_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    save([SweptRun("a", "a", figures(0.7, 10)), SweptRun("b", "b", figures(0.8, 20))], tmp_path)
    assert "not drawn: figures need matplotlib: pip install" in capsys.readouterr().err
    assert sorted(x.name for x in tmp_path.iterdir()) == ["pareto.csv", "sweep.csv", "sweep.html"]
    assert "<img" not in (tmp_path / "sweep.html").read_text()


def test_a_sweep_over_the_student_ends_with_its_own_costs(tmp_path):
    over = {"student.resolution": (16, 8), "student.options.depths": ([1],)}
    table = sweep(quick_config(), over, tmp_path)
    with (tmp_path / "pareto.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [x["runs"] for x in rows] == [
        f"student.resolution={side}, student.options.depths=[1]" for side in (8, 16)
    ]
    for row, side in zip(rows, (8, 16), strict=True):
        # A folder whose checkpoints can be read again.
        run = open_run(tmp_path / f"student.resolution={side}__student.options.depths=1")
        flops = run.workdir.read_evaluation()["cost"]["student"]["flops"]
        assert float(row["student FLOPs, millions"]) == pytest.approx(flops / 1e6)
    assert rows[0]["Pareto-optimal in"] == "FLOPs"
    assert "student parameters, millions" not in rows[0]  # the same in both runs
    assert (tmp_path / "pareto.svg").is_file() and table.endswith("padding left out")
