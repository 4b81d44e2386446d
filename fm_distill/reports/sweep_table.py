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
    found = _pareto(runs)
    if found is not None:
        files["pareto.csv"] = _pareto_csv(found).encode()
        try:
            files[PICTURE] = found.picture()
        except UserError as error:
            log(f"WARNING: the Pareto front is not drawn: {error}")
    files["sweep.html"] = as_page(runs, PICTURE in files).encode()
    for name in {"pareto.csv", PICTURE} - files.keys():  # of another sweep in this folder
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        with replacing(folder / name) as temporary:
            temporary.write_bytes(content)


def as_markdown(runs: Sequence[SweptRun]) -> str:
    """A line a group, mean ± sample standard deviation over its runs; then the Pareto table."""
    metrics = _columns(runs)
    lines = markdown_lines(
        ["runs", "seeds", *(head for metric in metrics for head in _heads(metric))],
        [
            [group, str(len(found)), *(x for metric in metrics for x in _cells(metric, found))]
            for group, found in _grouped(runs).items()
        ],
    )
    best = _pareto(runs)
    if best is not None:
        lines += ["", *markdown_lines(best.heads, _pareto_cells(best))]
    device = _device(runs)
    if best is not None or device:
        lines += ["", FLOPS_CONVENTION, *([f"measured on {device}"] if device else [])]
    return "\n".join(lines)


def as_csv(runs: Sequence[SweptRun]) -> str:
    """A line a group; of each metric the mean and the sample standard deviation."""
    out = io.StringIO()
    writer = csv.writer(out)
    metrics = _columns(runs)
    heads = ["runs", "seeds"]
    for metric in metrics:
        heads += [metric.column, f"{metric.column}, standard deviation"]
        if metric.interval_path:
            heads += [f"{metric.column}, 95 % interval, {end}" for end in ("low", "high")]
    device = _device(runs)
    writer.writerow([*heads, *(["measured on"] if device else [])])
    for group, found in _grouped(runs).items():
        row: list[object] = [group, len(found)]
        for metric in metrics:
            values = _values(metric, found)
            row += [
                statistics.mean(values) if values else "",
                statistics.stdev(values) if len(values) > 1 else "",
            ]
            if metric.interval_path:
                row += _interval(metric, found) or ("", "")
        writer.writerow([*row, *([device] if device else [])])
    return out.getvalue()


def _pareto_csv(found: Pareto) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(found.heads)
    for group, values, optimal in found.rows():
        writer.writerow([group, *values, optimal])
    return out.getvalue()


def as_page(runs: Sequence[SweptRun], picture: bool = False) -> str:
    """The tables, each run with a link to its folder, and a link to `PICTURE` if it is there."""
    metrics = _columns(runs)
    heads = [
        f"<abbr title='{html.escape(x.meaning)}'>{html.escape(head)}</abbr>"
        for x in metrics
        for head in _heads(x)
    ]
    groups = [
        [html.escape(group), str(len(found)), *(y for x in metrics for y in _cells(x, found))]
        for group, found in _grouped(runs).items()
    ]
    each = [
        [
            f"<a href='{urllib.parse.quote(x.folder)}/'>{html.escape(x.folder)}</a>",
            *(y for metric in metrics for y in _cells(metric, [x])),
        ]
        for x in runs
    ]
    best = _pareto(runs)
    front = _front(best, picture) if best is not None else ""
    device = _device(runs)
    measured = f" Latency and activations: measured on {html.escape(device)}." if device else ""
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>Sweep</title>"
        f"<style>{STYLE}</style></head><body>\n<h1>Sweep</h1>\n"
        "<p>Mean ± sample standard deviation over the seeds. "
        f"{FLOPS_CONVENTION}.{measured}</p>\n"
        f"{_table(['runs', 'seeds', *heads], groups)}\n{front}<h2>Runs</h2>\n"
        f"{_table(['run', *heads], each)}\n</body></html>\n"
    )


def _front(best: Pareto, picture: bool) -> str:
    cells = [[html.escape(x) for x in row] for row in _pareto_cells(best)]
    shown = f"<p><a href='{PICTURE}'><img src='{PICTURE}' alt='Pareto front'></a></p>\n"
    return (
        "<h2>Accuracy against cost</h2>\n<p>Pareto-optimal: no other student is at least as "
        "accurate and as cheap, and better in one of the two.</p>\n"
        f"{_table([html.escape(x) for x in best.heads], cells)}\n{shown if picture else ''}"
    )


def _device(runs: Sequence[SweptRun]) -> str:
    """Where the costs were measured; empty where they were not."""
    found = (at_path(x.figures, ("cost", "device")) for x in runs)
    return ", ".join(dict.fromkeys(x for x in found if x))


def _pareto(runs: Sequence[SweptRun]) -> Pareto | None:
    return pareto({group: [x.figures for x in found] for group, found in _grouped(runs).items()})


def _pareto_cells(best: Pareto) -> list[list[str]]:
    return [
        [group, *(_cell([x]) for x in values), optimal or "-"]
        for group, values, optimal in best.rows()
    ]


def _columns(runs: Sequence[SweptRun]) -> tuple[Metric, ...]:
    """What is measured on request is a column where it was."""
    return tuple(
        x for x in at("sweep") if "measured" not in x.places or _values(x, runs)
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
    found = _interval(metric, runs)
    return [cell, "-" if found is None else f"{found[0]:.2f} to {found[1]:.2f}"]


def _interval(metric: Metric, runs: Sequence[SweptRun]) -> tuple[float, float] | None:
    """Means of the ends: rather too wide for a mean over seeds, whose images are the same."""
    found = [x for run in runs if (x := metric.interval_of(run.figures)) is not None]
    if not found:
        return None
    low, high = (statistics.mean(metric.number(x[end]) for x in found) for end in (0, 1))
    return low, high


def markdown_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table."""
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:]]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{x}</th>" for x in heads)
    lines = [
        f"<tr><th>{first}</th>" + "".join(f"<td>{x}</td>" for x in rest) + "</tr>"
        for first, *rest in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _grouped(runs: Sequence[SweptRun]) -> dict[str, list[SweptRun]]:
    groups: dict[str, list[SweptRun]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return groups


def _values(metric: Metric, runs: Sequence[SweptRun]) -> list[float]:
    found = [metric.of(run.figures) for run in runs]
    return [metric.number(x) for x in found if x is not None]


def _cell(known: Sequence[float]) -> str:
    if not known:
        return "-"
    digits = 2 if max(known) > 2 else 4
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"
