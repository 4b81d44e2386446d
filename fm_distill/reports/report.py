"""One self-contained HTML file about runs: figures side by side, curves, views, disagreements.

It reads workdirs and runs no code from them. What cannot be shown, because the data or the teacher
are no longer there, is named with the option that gives it.
"""

import base64
import contextlib
import dataclasses
import html
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Array

from fm_distill.config import Config
from fm_distill.config.code import IMAGES, NETWORKS
from fm_distill.errors import UserError
from fm_distill.evaluation.inference import Opened, open_split
from fm_distill.evaluation.predictions import (
    SplitPredictions,
    confusions,
    most_disagreeing,
    predict_split,
)
from fm_distill.networks.cost import run_cost
from fm_distill.objectives.curves import progress_of
from fm_distill.objectives.terms import Term, make_terms
from fm_distill.reports import plots
from fm_distill.reports.compression_table import (
    FOLDER,
    caption,
    heads,
    load,
    picture,
    table_rows,
)
from fm_distill.reports.summary import ReportedRun, config_differences, summary, table_of
from fm_distill.reports.view_samples import sample_views
from fm_distill.runs.history import History, read_history
from fm_distill.runs.run_code import refuse_code_of_run
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import COMPILING, log
from fm_distill.system.files import replacing
from fm_distill.train_step.optim import make_schedule

DISAGREEMENTS = 12
PLAN_POINTS = 500
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
table { border-collapse: collapse } td, th { border: 1px solid #ccc; padding: .2em .7em }
th { text-align: left } td { text-align: right } td:last-child { text-align: left }
figure { margin: 1em 0 } img { max-width: 100% } figcaption { max-width: 50em }
.missing { background: #fff3cd; padding: .5em 1em }
"""


def report(
    workdirs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    data_dir: str | None = None,
    teacher_weights: str | None = None,
    cost: bool = False,
) -> pathlib.Path:
    """Writes the report of one run, or of several side by side, and returns its path.

    Runs that are not complete are shown as far as they are. `data_dir` and `teacher_weights` say
    where data and teacher lie now. With `cost`, latency and memory of the networks are measured
    too. Raises `UserError`.
    """
    if isinstance(workdirs, str | os.PathLike):
        workdirs = [workdirs]
    out = pathlib.Path(out)
    if out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f"{out} already exists; choose another --out, or give --overwrite")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent} for {out.name}; create it first")
    if not workdirs:
        raise UserError("a report needs the workdir of at least one run")
    runs = _read(workdirs, cost)
    lengths = {run.name: run.total_steps for run in runs}
    figures = "\n".join(
        [
            _image(
                "curves",
                plots.curves({run.name: run.history for run in runs}, lengths),
                "What the training logged. Agreement and KL compare the student with its "
                "teacher; on the training view both see images cropped, flipped and mixed as in "
                "training. Runs of different length are drawn over the completed share of the "
                "run.",
            ),
            _image(
                "learning rate",
                plots.schedules({run.name: _rates(run) for run in runs}),
                "The line is the schedule, the dots are what was logged.",
            ),
            *_weights(runs),
            *(_of_run(run, data_dir, teacher_weights) for run in runs),
        ]
    )
    title = html.escape(", ".join(run.name for run in runs))
    page = (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n{summary(runs)}\n"
        f"{config_differences(runs)}\n{figures}\n</body></html>\n"
    )
    try:
        with replacing(out) as temporary_path:
            temporary_path.write_text(page)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    return out


def _weights(runs: Sequence[ReportedRun]) -> Iterator[str]:
    """The weights of the terms of those runs whose loss has several."""
    rates: dict[str, plots.Rates] = {}
    for run in runs:
        terms = make_terms(run.stored.config.objective)
        for term in terms if len(terms) > 1 else ():
            rates[f"{run.name}, {term.name}"] = weight_of(term, run.total_steps, run.history)
    if rates:
        yield _image(
            "weights",
            plots.schedules(rates, "Weights of the terms"),
            "What each term of the loss is multiplied by, the square of the temperature included. "
            "The line is the schedule, the dots are what was logged.",
        )


def weight_of(term: Term, total_steps: int, history: History) -> plots.Rates:
    """The weight of a term in a run of `total_steps`, planned and logged."""

    def weight(step: int) -> Array:
        return term.weight_at(progress_of(step, total_steps))

    return _planned_and_logged(weight, f"weight_{term.name}", total_steps, history)


def rates_of(config: Config, total_steps: int, history: History) -> plots.Rates:
    """The learning rate of a run of `total_steps`, planned and logged."""

    def rate(step: int) -> Array:
        return config.optimizer.learning_rate * make_schedule(config.schedule, total_steps)(step)

    return _planned_and_logged(rate, "learning_rate", total_steps, history)


def _planned_and_logged(
    value: Callable[[int], Array], metric: str, total_steps: int, history: History
) -> plots.Rates:
    """`value(step)` over the run, nothing where its length is not known; and the `metric`."""
    points = np.linspace(0, total_steps - 1, PLAN_POINTS if total_steps else 0)
    steps = np.unique(points.astype(int))
    planned = steps.astype(float).tolist(), [float(value(int(step))) for step in steps]
    # A line is written after its step, which is one less where steps are counted from zero.
    steps_done, logged = history.curve("train", metric, over="step")
    return plots.Rates(planned, ([step - 1 for step in steps_done], logged))


def _read(workdirs: Sequence[str | os.PathLike[str]], measure: bool) -> list[ReportedRun]:
    paths = [pathlib.Path(workdir) for workdir in workdirs]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a workdir is given twice; give each once")
    basenames = [path.resolve().name for path in paths]
    names = basenames if len(set(basenames)) == len(basenames) else [str(path) for path in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        run_workdir = Workdir(path)
        stored = run_workdir.stored()
        refuse_code_of_run(stored, path, (*NETWORKS, *IMAGES, "objective"))
        status = run_workdir.read_status()
        history = read_history(path)
        cost = run_cost(stored.resolved, stored.config.batch_size if measure else None)
        figures = run_workdir.read_evaluation()
        runs.append(ReportedRun(name, run_workdir, stored, history, status, figures, cost))
    return runs


def _rates(run: ReportedRun) -> plots.Rates:
    return rates_of(run.stored.config, run.total_steps, run.history)


def _of_run(run: ReportedRun, data_dir: str | None, teacher_weights: str | None) -> str:
    config = _elsewhere(run.stored.config, data_dir, teacher_weights)
    parts = [f"<h2>{html.escape(run.name)}</h2>", *_compressed(run)]
    parts.append(_or_missing("The views of the first steps", lambda: _views(run, config)))
    split = "test" if config.data.test else "validation" if config.data.validation else "train"
    parts.append(
        _or_missing(
            f"Confusions and disagreements on {split}",
            lambda: _judged(open_split(run.place.path, split, config)),
        )
    )
    return "\n".join(parts)


def _compressed(run: ReportedRun) -> Iterator[str]:
    """What `fm-distill compress` measured, if it did."""
    try:
        compression = load(run.place.path / FOLDER)
    except UserError as error:
        yield f"<p class='missing'>{html.escape(str(error))}</p>"
        return
    if compression is None:
        return
    yield f"<h3>Compressed</h3>\n{table_of(heads(compression), table_rows(compression))}"
    with contextlib.suppress(UserError):
        yield _image("compressed", picture(compression), caption(compression))


def _elsewhere(config: Config, data_dir: str | None, teacher_weights: str | None) -> Config:
    if data_dir is not None:
        transfer = tuple(
            dataclasses.replace(part, data_dir=data_dir) if part.data_dir else part
            for part in config.data.transfer
        )
        data = dataclasses.replace(config.data, data_dir=data_dir, transfer=transfer)
        config = dataclasses.replace(config, data=data)
    if teacher_weights is not None and config.teacher is not None:
        teacher = dataclasses.replace(
            config.teacher, weights=teacher_weights, experiment=None, workdir=None
        )
        config = dataclasses.replace(config, teacher=teacher)
    return config


def _or_missing(title: str, make: Callable[[], str]) -> str:
    """What `make` returns; or why there is none, and what would give it."""
    heading = f"<h3>{html.escape(title)}</h3>\n"
    try:
        return heading + make()
    except UserError as error:
        return (
            f"{heading}<p class='missing'>Missing: {html.escape(str(error))}<br>If the data or "
            "the teacher have moved, give --data-dir PATH or --teacher-weights FILE; the target "
            "images of views.fourier have to be where they were.</p>"
        )


def _views(run: ReportedRun, config: Config) -> str:
    samples = sample_views(config, run.place)
    text = (
        "What each network was given, at its own resolution, cropped, flipped and mixed as in "
        f"the step. {samples.note}"
    )
    return _image("views", plots.views(samples), text)


def _judged(opened: Opened) -> str:
    log(COMPILING)
    predictions = predict_split(opened)
    names = opened.run.class_names
    expected, classes = predictions.expected
    parts = [f"<p>The student after {opened.run.step:,} steps.</p>"]
    if classes is not None:
        image = plots.confusion(confusions(predictions, opened.run.classes), names, expected)
        explanation = (
            f"Rows: the {expected}'s class; columns: the student's. The darker, the larger the "
            "share of the row. Of many classes, the most frequent confusions are listed instead."
        )
        parts.append(_image("confusions", image, explanation))
    rows = most_disagreeing(predictions, DISAGREEMENTS)
    if disagreements := [_disagreement(opened, predictions, names, row) for row in rows]:
        explanation = (
            "The examples on which the student is furthest from its teacher: those with the "
            "largest KL(teacher || student) at temperature 1, each class with its probability."
        )
        parts.append(_image("disagreements", plots.disagreements(disagreements), explanation))
    return "\n".join(parts)


def _disagreement(
    opened: Opened, found: SplitPredictions, names: Sequence[str], row: int
) -> plots.Disagreement:
    assert found.teacher is not None and found.teacher_probability is not None
    assert found.kl is not None
    example = opened.reader[int(found.example[row])]
    height, width = example["size"]
    label = int(found.label[row])
    lines = (
        f"teacher: {names[found.teacher[row]]}, {found.teacher_probability[row]:.0%}",
        f"student: {names[found.student[row]]}, {found.student_probability[row]:.0%}",
        f"label: {names[label]}" if label >= 0 else "no label",
        f"KL {found.kl[row]:.2f} nats, example {found.example[row]}",
    )
    return plots.Disagreement(example["canvas"][:height, :width], lines)


def _image(name: str, svg: bytes, caption: str) -> str:
    return (
        f"<figure><img alt='{name}' src='data:image/svg+xml;base64,"
        f"{base64.b64encode(svg).decode()}'><figcaption>{html.escape(caption)}</figcaption></figure>"
    )
