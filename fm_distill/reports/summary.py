"""The tables at the head of a report: the runs side by side, and what differs between them."""

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

from fm_distill.config import ExampleWeightsConfig
from fm_distill.config.objective import terms_of
from fm_distill.config.serialization import flatten
from fm_distill.runs.history import History
from fm_distill.runs.metric import Place
from fm_distill.runs.metric_table import METRICS, at, shown
from fm_distill.runs.stored_progress import StoredStatus
from fm_distill.runs.stored_run import StoredRun
from fm_distill.runs.workdir import Workdir

MEANINGS = {
    "compression": "The teacher's parameters over the student's.",
    "recording": "Where the teacher's outputs were read from; the teacher itself did not run.",
    "views repeat": "Order and views repeat after this: each image has so many different views.",
    "example weights": "What the terms of each example are multiplied by; the mean is one.",
    "long tail": "Examples of the largest training class over those of the smallest.",
    "temperature": "Divides the logits of both networks before they are compared.",
    "updated": "When the run last wrote its state.",
    "commit": "The commit of the code with which the run was last started or continued.",
    **{metric.label: metric.meaning for metric in METRICS},
}


@dataclasses.dataclass(frozen=True)
class ReportedRun:
    """One run as a report needs it."""

    name: str
    place: Workdir
    stored: StoredRun
    history: History
    status: StoredStatus | None
    figures: dict[str, Any] | None  # of the complete run
    cost: dict[str, Any]  # of `networks.cost.run_cost`

    @property
    def total_steps(self) -> int:
        """Zero where the run has not begun."""
        return self.status.total_steps if self.status else 0


def summary(runs: Sequence[ReportedRun]) -> str:
    """The figures that people look at first, a column a run, with what each means."""
    columns = [_column(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [
        [name, *(column.get(name, "") for column in columns), MEANINGS.get(name, "")]
        for name in names
    ]
    return table_of(["", *(run.name for run in runs), "meaning"], rows)


def config_differences(runs: Sequence[ReportedRun]) -> str:
    """Each option whose value is not the same in all runs; empty for one run."""
    options = [flatten(run.stored.config) for run in runs]
    names = list(dict.fromkeys(name for run_options in options for name in run_options))
    rows = [
        [name, *(str(run_options.get(name, "(not set)")) for run_options in options)]
        for name in names
        if len({str(run_options.get(name, "(not set)")) for run_options in options}) > 1
    ]
    if not rows:
        return ""
    return (
        "<h2>What differs between the configs</h2>\n"
        + table_of(["option", *(run.name for run in runs)], rows)
    )  # fmt: skip


def table_of(heads: list[str], rows: list[list[str]]) -> str:
    """HTML; the first column is a head, too."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in heads)
    lines = [
        f"<tr><th>{html.escape(first)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _column(run: ReportedRun) -> dict[str, str]:
    config, resolved, status = run.stored.config, run.stored.resolved, run.status
    teacher = config.teacher
    source = None
    if teacher:
        sources = (teacher.weights, teacher.experiment, teacher.workdir, teacher.function)
        source = next((candidate for candidate in sources if candidate), teacher.recording)
    cells = {
        "state": status.state if status else "not begun",
        "steps": f"{status.step if status else 0:,} of {run.total_steps:,}",
        "student": f"{resolved.student.model}, {resolved.student.resolution} px",
        "teacher": str(source or "none"),
    }
    if teacher and teacher.recording:
        cells["recording"] = teacher.recording
    if resolved.period_steps:
        passes = run.total_steps / resolved.period_steps
        cells["views repeat"] = f"after {resolved.period_steps:,} steps, {passes:.3g} passes"
    cells |= _costs(run)
    if config.data.long_tail:
        cells["long tail"] = f"{config.data.long_tail:g}"
    cells |= {
        "learns from": config.teaching if config.objective.target == "teacher" else "labels",
        "terms": ", ".join(f"{term.weight:g} {term.kind}" for term in terms_of(config.objective)),
        **_example_weights(config.objective.example_weights),
        "temperature": f"{config.objective.temperature:g}",
        "batch size": f"{config.batch_size:,}",
        "seed": str(config.seed),
        "updated": (status and status.updated) or "",
        "commit": (run.stored.commit or "not known")[:12],
    }
    if run.figures:
        split = f"{run.figures['split']}, {run.figures['examples']:,} examples"
        values = {
            metric.label: f"{metric.text(value)}{metric.interval_text(run.figures)}"
            for metric, value in shown(run.figures, "report")
        }
        return cells | {"evaluated on": split} | values
    last = run.history.last("validation")
    if not last:
        return cells
    validation_values = {
        metric.label: metric.text(last[metric.name])
        for metric in at("log")
        if last.get(metric.name) is not None
    }
    return cells | {"evaluated on": f"validation, at step {last['step']:,}"} | validation_values


def _example_weights(weights: ExampleWeightsConfig) -> dict[str, str]:
    if weights.kind == "none":
        return {}
    beta = f", beta {weights.beta:g}" if weights.kind == "effective_number" else ""
    return {"example weights": weights.kind + beta}


def _costs(run: ReportedRun) -> dict[str, str]:
    """What the networks cost; `-` for a teacher that is a function."""
    cost = run.cost
    places: tuple[Place, ...] = ("cost", "measured") if cost["device"] else ("cost",)
    cells = {}
    for metric in (x for place in places for x in at(place)):
        if cost[metric.path[1]] is not None:
            value = metric.of({"cost": cost})
            cells[metric.label] = "-" if value is None else metric.text(value)
    teacher, student = (
        (cost[network] or {}).get("parameters") for network in ("teacher", "student")
    )
    if teacher and student:
        cells["compression"] = f"{teacher / student:.1f} x"
    if cost["device"]:
        batch_size = cost["student"]["batch"]["batch_size"]
        cells["measured on"] = f"{cost['device']}; full batch: {batch_size:,} images"
    return cells
