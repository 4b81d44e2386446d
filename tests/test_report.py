"""`fm-distill report`: the figures are those of the run, and the file stands alone."""

import base64
import dataclasses
import json
import re
import shutil
import sys
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_command
from test_cli import refused
from tiny import tiny_config

from fm_distill import evaluate, report
from fm_distill.config import FourierConfig, MeshConfig, ViewConfig
from fm_distill.config.regime import regime_of
from fm_distill.data.feeding import Reader, TrainingStream
from fm_distill.data.sources import open_source
from fm_distill.evaluation.inference import open_split
from fm_distill.evaluation.predictions import (
    SplitPredictions,
    confusions,
    most_disagreeing,
    predict_split,
)
from fm_distill.reports import plots
from fm_distill.reports.report import rates_of
from fm_distill.reports.view_samples import EXAMPLES, STEPS, sample_views, views_of_step
from fm_distill.runs.history import History, read_history
from fm_distill.runs.open_run import open_run
from fm_distill.runs.workdir import Workdir
from fm_distill.system.sharding import make_layout
from fm_distill.training.setup import keys_on_devices
from fm_distill.views.draws import step_draws
from fm_distill.views.rendering import CentralCrop, InputSpec, as_pixels, render, render_central

IMAGE = re.compile(r"<img alt='([^']*)' src='data:image/svg\+xml;base64,([^']*)'>")


def drawn(svg: bytes) -> ElementTree.Element:
    """The root of a picture that is upon something."""
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and len(list(root.iter())) > 50
    assert size_of(root)[0] > 100
    return root


def size_of(root: ElementTree.Element) -> tuple[float, float]:
    return float(root.get("width").removesuffix("pt")), float(root.get("height").removesuffix("pt"))


def images_of(page: str) -> list[tuple[str, ElementTree.Element]]:
    """Name and picture of each figure."""
    return [(name, drawn(base64.b64decode(data))) for name, data in IMAGE.findall(page)]


@pytest.fixture(scope="module")
def two(trained, tmp_path_factory):
    """The page of a student and of the teacher that it learned from, by the real command."""
    out = tmp_path_factory.mktemp("report") / "two.html"
    done = run_command("report", trained / "run", trained / "run" / "teacher", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    return out.read_text()


def test_two_runs_side_by_side(two, trained):
    of_student = ["views", "confusions", "disagreements"]
    of_teacher = ["views", "confusions"]  # a run on labels has no teacher to disagree with
    names = [name for name, _ in images_of(two)]
    assert names == ["curves", "learning rate", *of_student, *of_teacher]
    assert "<th>run</th><th>teacher</th><th>meaning</th>" in two and "class='missing'" not in two
    stored = json.loads((trained / "run" / "evaluation.json").read_text())
    assert f"<td>{100 * stored['student']['top1']:.2f} %</td>" in two
    assert f"<td>{stored['kl']['one']:.4f} nats</td><td></td>" in two
    assert f"<td>{100 * stored['student']['ece']:.2f} %</td>" in two
    config = json.loads((trained / "run" / "config.json").read_text())
    student = sum(
        x.size for x in jax.tree.leaves(open_run(trained / "run").student.variables.params)
    )
    for name, cells in {
        "student parameters": (f"{student:,}", f"{student:,}"),
        "compression": ("1.0 x", ""),
        "temperature": ("2", "1"),
        "commit": ((config["commit"] or "not known")[:12],) * 2,
    }.items():
        found = "".join(f"<td>{x}</td>" for x in cells)
        assert f"<tr><th>{name}</th>{found}<td>" in two, name
    updated = json.loads((trained / "run" / "status.json").read_text())["updated"]
    assert f"<td>{updated}</td>" in two


def test_what_differs_between_the_configs(two, trained):
    section = two[two.index("What differs between the configs") :]
    section = section[: section.index("</table>")]
    assert "<tr><th>objective.temperature</th><td>2.0</td><td>1.0</td></tr>" in section
    assert "<tr><th>ema_decay</th><td>0.5</td><td>None</td></tr>" in section
    assert "batch_size" not in section and "data.canvas.size" not in section


def test_each_picture_is_explained(two):
    assert two.count("<figcaption>") == len(IMAGE.findall(two))
    assert "<figcaption></figcaption>" not in two


def test_runs_of_different_length_share_an_axis(monkeypatch):
    """Over the share of the run: the short one does not shrink to a corner."""
    figures = []
    monkeypatch.setattr(plots, "_svg", lambda figure: figures.append(figure) or b"")

    def history(steps):
        lines = [
            {"step": x, "epoch": x / 10, "split": "train", "loss": 1 / x}
            for x in range(1, steps + 1)
        ]
        return History(tuple(lines))

    runs = {"short": history(10), "long": history(50)}
    plots.curves(runs, {"short": 10, "long": 100})
    plots.curves(runs, {"short": 50, "long": 50})
    plots.curves(runs)
    rates = {
        x: plots.Rates(([0.0, n], [1.0, 0.0]), ([], [])) for x, n in (("a", 10.0), ("b", 100.0))
    }
    plots.schedules(rates)
    shares, same, unknown, schedule = (x.axes[0] for x in figures)
    assert [line.get_xdata()[-1] for line in shares.lines] == [100, 50]
    assert "share" in shares.get_xlabel() and "share" in schedule.get_xlabel()
    assert [line.get_xdata()[-1] for line in schedule.lines] == [100, 100]
    for axes in (same, unknown):
        assert [line.get_xdata()[-1] for line in axes.lines] == [1, 5]
        assert axes.get_xlabel() == "epochs"


def test_the_page_stands_alone(two):
    rest = IMAGE.sub("", two)
    assert two.count("<img") == len(IMAGE.findall(two))
    for outside in ("http:", "https:", "//", "<script", "<link", "@import", "url(", "src="):
        assert outside not in rest, outside


@pytest.mark.parametrize(
    ("teaching", "target", "views"),
    [
        ("function_matching", "teacher", {}),
        ("function_matching", "teacher", {"mixup": "example", "mixup_partner": "permutation"}),
        ("consistent", "teacher", {}),
        ("independent", "teacher", {}),
        ("fixed", "teacher", {}),
        ("function_matching", "teacher", {"fourier": FourierConfig(folder="not read", beta=0.1)}),
        ("independent", "labels", {}),  # whatever the teaching is, labels see the mixed view
    ],
)
def test_views_are_those_of_the_step(teaching, target, views):
    """Bit for bit what rendering the whole batch gives, at both resolutions and input ranges."""
    config = tiny_config(seed=3, teaching=teaching, views=ViewConfig(**views))
    config = dataclasses.replace(
        config, objective=dataclasses.replace(config.objective, target=target)
    )
    # The key of the run itself.
    layout = make_layout(MeshConfig(data=1))
    rng = np.random.default_rng(0)
    low = {side: 1e4 * rng.random((5, 3, 3, 3), np.float32) for side in (16, 24)}
    root = keys_on_devices(config, layout, low).draws
    reader = Reader(open_source(config.data, "train"), config.data, 10)
    size = config.batch_size
    stream = TrainingStream(reader, config.seed, 3, size, 0, size)
    branches = [InputSpec(16, "minus_one_one"), InputSpec(24, "imagenet")]
    _, shown = views_of_step(config, stream, root, 2, 3, branches)

    read = [stream[2 * size + row] for row in range(size)]
    canvases = jnp.stack([x["canvas"] for x in read])
    sizes = jnp.stack([x["size"] for x in read])
    regime = regime_of(config)
    drawn, seen, _ = step_draws(regime.views, root, 2, sizes, config.views)
    student = render(drawn, canvases, branches[0], low)
    teacher = (
        render_central(canvases, sizes, CentralCrop.of(config.views), branches[1])
        if regime.targets == "table"
        else render(seen, canvases, branches[1], low)
    )
    for got, picture, whole in zip(shown, branches, (student, teacher), strict=True):
        assert got.dtype == np.uint8 and got.shape == (3, picture.resolution, picture.resolution, 3)
        np.testing.assert_array_equal(got, as_pixels(whole, picture)[:3])
    assert shown[0].std() > 10


def test_views_of_a_run(trained):
    place = Workdir(trained / "run")
    shown = sample_views(place.stored().config, place)
    assert [x.name for x in shown.seen] == ["student, 16 px", "teacher, 16 px"]
    assert len(shown.titles) == STEPS * EXAMPLES == len(shown.seen[0].pictures)
    first, second = (float(x) for x in shown.titles[0].split(": ")[1].split(" and "))
    assert first + second == pytest.approx(1) and first >= 0.5
    np.testing.assert_array_equal(shown.seen[0].pictures, shown.seen[1].pictures)


def test_answers_are_those_of_the_evaluation(trained):
    opened = open_split(trained / "run", "validation")
    found, stored = predict_split(opened), evaluate(trained / "run", "validation")
    assert len(found.label) == 179 and found.example.tolist() == list(range(179))
    assert found.kl.mean() == pytest.approx(stored["kl"]["one"], rel=1e-5, abs=1e-7)
    assert (found.student == found.teacher).mean() == pytest.approx(stored["agreement"]["top1"])
    counts = confusions(found, 10)
    assert counts.sum() == 179
    assert np.trace(counts) / 179 == pytest.approx(stored["student"]["top1"])
    np.testing.assert_array_equal(counts.sum(axis=1), np.bincount(found.label, minlength=10))
    rows = most_disagreeing(found, 5)
    assert found.kl[rows].tolist() == sorted(found.kl, reverse=True)[:5]


def test_without_labels_the_teacher_is_what_is_expected():
    two = np.array([0, 1])
    found = SplitPredictions(two, np.full(2, -1), np.array([1, 1]), two / 2, two, two / 2, two / 2)
    assert found.expected[0] == "teacher"
    assert confusions(found, 2).tolist() == [[0, 1], [0, 1]]
    alone = dataclasses.replace(found, teacher=None, kl=None)
    assert confusions(alone, 2).sum() == 0 and most_disagreeing(alone, 3) == []


def test_of_many_classes_the_most_confused_pairs_are_drawn():
    counts = np.diag(np.full(40, 9))
    counts[3, 7], counts[7, 3], counts[0, 39] = 5, 2, 8
    assert plots.confused_pairs(counts) == [(0, 39, 8), (3, 7, 5), (7, 3, 2)]
    # Neither a formula, nor half of one, nor a letter that the font has not.
    names = [f"${i}_{{$ 花" for i in range(40)]
    width, height = size_of(drawn(plots.confusion(counts, names, "label")))
    assert width > height
    width, height = size_of(drawn(plots.confusion(counts[:8, :8], names[:8], "label")))
    assert abs(width - height) < 5


def test_the_schedule_is_planned_to_the_end_and_logged_so_far(trained):
    run = trained / "run"
    plan = rates_of(Workdir(run).stored().config, 6, read_history(run))
    assert plan.planned[0] == [0, 1, 2, 3, 4, 5] == plan.logged[0]
    assert plan.planned[1] == pytest.approx(plan.logged[1], rel=1e-6)
    assert max(plan.planned[1]) == pytest.approx(3e-3)


def test_a_run_on_the_way_is_shown_as_far_as_it_is(trained, tmp_path):
    """Cut in the middle of a line; its data gone, its teacher too; its name is no HTML."""
    run = shutil.copytree(trained / "run", tmp_path / "a<b>&'c")
    (run / "evaluation.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:4], lines[4][:30]]))
    assert [x["step"] for x in read_history(run).lines] == [1, 2, 3, 3]
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["data"] |= {"source": "class_folders", "data_dir": str(tmp_path / "gone")}
    (run / "config.json").write_text(json.dumps(stored))
    page = report([run], tmp_path / "page.html").read_text()
    assert [name for name, _ in images_of(page)] == ["curves", "learning rate"]
    assert page.count("class='missing'") == 2 == page.count("--data-dir PATH")
    assert "gone" in page and "validation, at step 3" in page
    assert "<b>" not in page and "a&lt;b&gt;&amp;&#x27;c" in page


def test_where_the_data_are_now(trained, tmp_path, monkeypatch):
    """`data_dir` and `teacher_weights` reach the run; without its teacher the views are there."""
    run = shutil.copytree(trained / "run", tmp_path / "run")
    shutil.move(run / "teacher", tmp_path / "teacher")
    page = report([run], tmp_path / "page.html").read_text()
    assert [name for name, _ in images_of(page)] == ["curves", "learning rate", "views"]
    assert page.count("class='missing'") == 1 and "teacher is not the workdir of a run" in page
    page = report(
        [run], tmp_path / "page.html", overwrite=True, teacher_weights=str(tmp_path / "teacher"),
        data_dir="unused by the digits",
    ).read_text()  # fmt: skip
    assert "class='missing'" not in page and len(images_of(page)) == 5


def test_wrong_input(capsys, trained, tmp_path, monkeypatch):
    run, out = trained / "run", tmp_path / "x.html"
    assert "none is not the workdir of a run" in refused(capsys, "report", "none", "--out", out)
    error = refused(capsys, "report", run, tmp_path, "--out", out)
    assert f"{tmp_path} is not the workdir of a run" in error
    assert "expected fm-distill report DIR" in refused(capsys, "report")
    assert "given twice" in refused(capsys, "report", run, run, "--out", out)
    assert "there is no folder" in refused(capsys, "report", run, "--out", tmp_path / "no" / "x")
    assert "already exists" in refused(capsys, "report", run, "--out", tmp_path, "--overwrite")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'fm-distill[plots]'" in refused(capsys, "report", run, "--out", out)
    assert not out.exists()
    out.write_text("precious")
    assert "already exists" in refused(capsys, "report", run, "--out", out)
    assert out.read_text() == "precious"


@pytest.mark.parametrize(
    "damaged",
    ['{"step": "2", "epoch": 1, "split": "train"}', '{"step": 2, "epoch": null, "split": "train"}',
     '{"step": 2, "epoch": 1, "split": 7}', '{"step": 2, "epoch": 1, "split": "train", "loss": []}',
     '[2]', '{"epoch": 1, "split": "train"}'],
)  # fmt: skip
def test_a_damaged_line_of_the_log_is_left_out(tmp_path, damaged):
    whole = [f'{{"step": {i}, "epoch": 0.5, "split": "train", "loss": null}}' for i in (1, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([whole[0], damaged, whole[1], ""]))
    assert [x["step"] for x in read_history(tmp_path).lines] == [1, 3]
