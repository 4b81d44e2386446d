"""The tables of a sweep: as Markdown, as CSV, and as a page with links to its runs."""

import csv
import dataclasses
import html
import io
import pathlib
import statistics
import urllib.parse
from collections.abc import Sequence
from typing import Any

from fm_distill.errors import UserError
from fm_distill.reports.pareto import Pareto, pareto
from fm_distill.runs.cost_metrics import FLOPS_CONVENTION
from fm_distill.runs.metric import Metric, at_path
from fm_distill.runs.metric_table import at
from fm_distill.system.console import log
from fm_distill.system.files import replacing

PICTURE = "pareto.svg"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
table { border-collapse: collapse } td, th { border: 1px solid #ccc; padding: .2em .7em }
th { text-align: left } td { text-align: right }
"""


@dataclasses.dataclass(frozen=True)
class SweptRun:
    """One complete run of a sweep."""

    group: str  # the values of all options but the seed
    folder: str  # in the sweep's
    figures: dict[str, Any]  # of its last evaluation


def save(runs: Sequence[SweptRun], folder: pathlib.Path) -> None:
    """Writes the tables and the picture into the sweep's folder, each completely or not at all."""
    files = {"sweep.csv": as_csv(runs).encode()}
    pareto_front = _pareto(runs)
    if pareto_front is not None:
        files["pareto.csv"] = _pareto_csv(pareto_front).encode()
        try:
            files[PICTURE] = pareto_front.picture()
        except UserError as error:
            log(f"WARNING: the Pareto front is not drawn: {error}")
    files["sweep.html"] = as_page(runs, PICTURE in files).encode()
    for name in {"pareto.csv", PICTURE} - files.keys():  # of another sweep in this folder
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        with replacing(folder / name) as temporary_path:
            temporary_path.write_bytes(content)


def as_markdown(runs: Sequence[SweptRun]) -> str:
    """A line a group, mean ± sample standard deviation over its runs; then the Pareto table."""
    metrics = _columns(runs)
    lines = markdown_lines(
        ["runs", "seeds", *(head for metric in metrics for head in _heads(metric))],
        [
            [
                group,
                str(len(group_runs)),
                *(cell for metric in metrics for cell in _cells(metric, group_runs)),
            ]
            for group, group_runs in _grouped(runs).items()
        ],
    )
    pareto_front = _pareto(runs)
    if pareto_front is not None:
        lines += ["", *markdown_lines(pareto_front.heads, _pareto_cells(pareto_front))]
    device = _device(runs)
    if pareto_front is not None or device:
        lines += ["", FLOPS_CONVENTION, *([f"measured on {device}"] if device else [])]
    return "\n".join(lines)


def as_csv(runs: Sequence[SweptRun]) -> str:
    """A line a group; of each metric the mean and the sample standard deviation."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    metrics = _columns(runs)
    heads = ["runs", "seeds"]
    for metric in metrics:
        heads += [metric.column, f"{metric.column}, standard deviation"]
        if metric.interval_path:
            heads += [f"{metric.column}, 95 % interval, {end}" for end in ("low", "high")]
    device = _device(runs)
    writer.writerow([*heads, *(["measured on"] if device else [])])
    for group, group_runs in _grouped(runs).items():
        row: list[object] = [group, len(group_runs)]
        for metric in metrics:
            values = _values(metric, group_runs)
            row += [
                statistics.mean(values) if values else "",
                statistics.stdev(values) if len(values) > 1 else "",
            ]
            if metric.interval_path:
                row += _interval(metric, group_runs) or ("", "")
        writer.writerow([*row, *([device] if device else [])])
    return buffer.getvalue()


def _pareto_csv(found: Pareto) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(found.heads)
    for group, values, optimal in found.rows():
        writer.writerow([group, *values, optimal])
    return buffer.getvalue()


def as_page(runs: Sequence[SweptRun], picture: bool = False) -> str:
    """The tables, each run with a link to its folder, and a link to `PICTURE` if it is there."""
    metrics = _columns(runs)
    heads = [
        f"<abbr title='{html.escape(metric.meaning)}'>{html.escape(head)}</abbr>"
        for metric in metrics
        for head in _heads(metric)
    ]
    groups = [
        [
            html.escape(group),
            str(len(group_runs)),
            *(cell for metric in metrics for cell in _cells(metric, group_runs)),
        ]
        for group, group_runs in _grouped(runs).items()
    ]
    run_rows = [
        [
            f"<a href='{urllib.parse.quote(run.folder)}/'>{html.escape(run.folder)}</a>",
            *(cell for metric in metrics for cell in _cells(metric, [run])),
        ]
        for run in runs
    ]
    pareto_front = _pareto(runs)
    front_html = _front(pareto_front, picture) if pareto_front is not None else ""
    device = _device(runs)
    measured = f" Latency and activations: measured on {html.escape(device)}." if device else ""
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>Sweep</title>"
        f"<style>{STYLE}</style></head><body>\n<h1>Sweep</h1>\n"
        "<p>Mean ± sample standard deviation over the seeds. "
        f"{FLOPS_CONVENTION}.{measured}</p>\n"
        f"{_table(['runs', 'seeds', *heads], groups)}\n{front_html}<h2>Runs</h2>\n"
        f"{_table(['run', *heads], run_rows)}\n</body></html>\n"
    )


def _front(best: Pareto, picture: bool) -> str:
    cells = [[html.escape(cell) for cell in row] for row in _pareto_cells(best)]
    image = f"<p><a href='{PICTURE}'><img src='{PICTURE}' alt='Pareto front'></a></p>\n"
    return (
        "<h2>Accuracy against cost</h2>\n<p>Pareto-optimal: no other student is at least as "
        "accurate and as cheap, and better in one of the two.</p>\n"
        f"{_table([html.escape(head) for head in best.heads], cells)}\n{image if picture else ''}"
    )


def _device(runs: Sequence[SweptRun]) -> str:
    """Where the costs were measured; empty where they were not."""
    devices = (at_path(run.figures, ("cost", "device")) for run in runs)
    return ", ".join(dict.fromkeys(device for device in devices if device))


def _pareto(runs: Sequence[SweptRun]) -> Pareto | None:
    return pareto(
        {group: [run.figures for run in group_runs] for group, group_runs in _grouped(runs).items()}
    )


def _pareto_cells(best: Pareto) -> list[list[str]]:
    return [
        [group, *(_cell([value]) for value in values), optimal or "-"]
        for group, values, optimal in best.rows()
    ]


def _columns(runs: Sequence[SweptRun]) -> tuple[Metric, ...]:
    """What is measured on request is a column where it was."""
    return tuple(
        metric for metric in at("sweep") if "measured" not in metric.places or _values(metric, runs)
    )  # fmt: skip


def _heads(metric: Metric) -> list[str]:
    return [metric.column, *(["95 % interval"] if metric.interval_path else [])]


def _cells(metric: Metric, runs: Sequence[SweptRun]) -> list[str]:
    """Under `_heads`."""
    values = _values(metric, runs)
    # The same numbers in each run have no spread to show.
    cell = _cell(values[:1] if "cost" in metric.places and len(set(values)) == 1 else values)
    if not metric.interval_path:
        return [cell]
    interval = _interval(metric, runs)
    return [cell, "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"]


def _interval(metric: Metric, runs: Sequence[SweptRun]) -> tuple[float, float] | None:
    """Means of the ends: rather too wide for a mean over seeds, whose images are the same."""
    intervals = [
        interval for run in runs if (interval := metric.interval_of(run.figures)) is not None
    ]
    if not intervals:
        return None
    low, high = (
        statistics.mean(metric.number(interval[end]) for interval in intervals) for end in (0, 1)
    )
    return low, high


def markdown_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table."""
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:]]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in heads)
    lines = [
        f"<tr><th>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for first, *cells in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _grouped(runs: Sequence[SweptRun]) -> dict[str, list[SweptRun]]:
    groups: dict[str, list[SweptRun]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups


def _values(metric: Metric, runs: Sequence[SweptRun]) -> list[float]:
    raw_values = [metric.of(run.figures) for run in runs]
    return [metric.number(value) for value in raw_values if value is not None]


def _cell(known: Sequence[float]) -> str:
    if not known:
        return "-"
    digits = 2 if max(known) > 2 else 4
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"
