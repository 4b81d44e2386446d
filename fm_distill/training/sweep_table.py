"""The table of a sweep: as Markdown, as CSV, and as a page with links to its runs."""

import csv
import dataclasses
import html
import io
import pathlib
import statistics
import urllib.parse
from collections.abc import Sequence
from typing import Any

from fm_distill.runs.metric_table import Metric, at
from fm_distill.system.files import replacing

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
    """Writes `sweep.csv` and `sweep.html` into the sweep's folder, completely or not at all."""
    for name, text in (("sweep.csv", as_csv(runs)), ("sweep.html", as_page(runs))):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, newline="")


def as_markdown(runs: Sequence[SweptRun]) -> str:
    """A line a group, mean ± sample standard deviation over its runs."""
    lines = [
        "| runs | seeds | " + " | ".join(x.column for x in at("sweep")) + " |",
        "|---" * (len(at("sweep")) + 2) + "|",
    ]
    for group, found in _grouped(runs).items():
        cells = [_cell(_values(metric, found)) for metric in at("sweep")]
        lines.append(f"| {group} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_csv(runs: Sequence[SweptRun]) -> str:
    """A line a group; of each metric the mean and the sample standard deviation."""
    out = io.StringIO()
    writer = csv.writer(out)
    heads = [(f"{x.column}", f"{x.column}, standard deviation") for x in at("sweep")]
    writer.writerow(["runs", "seeds", *(head for pair in heads for head in pair)])
    for group, found in _grouped(runs).items():
        row: list[object] = [group, len(found)]
        for metric in at("sweep"):
            values = _values(metric, found)
            row += [
                statistics.mean(values) if values else "",
                statistics.stdev(values) if len(values) > 1 else "",
            ]
        writer.writerow(row)
    return out.getvalue()


def as_page(runs: Sequence[SweptRun]) -> str:
    """The table, and each run with its figures and a link to its folder."""
    metrics = at("sweep")
    heads = [
        f"<abbr title='{html.escape(x.meaning)}'>{html.escape(x.column)}</abbr>" for x in metrics
    ]
    groups = [
        [html.escape(group), str(len(found)), *(_cell(_values(x, found)) for x in metrics)]
        for group, found in _grouped(runs).items()
    ]
    each = [
        [
            f"<a href='{urllib.parse.quote(x.folder)}/'>{html.escape(x.folder)}</a>",
            *(_cell(_values(metric, [x])) for metric in metrics),
        ]
        for x in runs
    ]
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>Sweep</title>"
        f"<style>{STYLE}</style></head><body>\n<h1>Sweep</h1>\n"
        "<p>Mean ± sample standard deviation over the seeds.</p>\n"
        f"{_table(['runs', 'seeds', *heads], groups)}\n<h2>Runs</h2>\n"
        f"{_table(['run', *heads], each)}\n</body></html>\n"
    )


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
