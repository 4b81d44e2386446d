"""Pictures of runs, as PNG: curves, schedule, views, confusions, disagreements.

Data in, bytes out; the only file that knows matplotlib, which the extra `plots` brings.
"""

import dataclasses
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from fm_distill.errors import UserError
from fm_distill.reports.view_samples import ViewSamples
from fm_distill.runs import metric_table
from fm_distill.runs.history import Curve, History

# Above so many classes a matrix cannot be read, and the most confused pairs are listed.
MATRIX_CLASSES = 30
PAIRS = 20
DPI = 100
LABEL_LETTERS = 32


@dataclasses.dataclass(frozen=True)
class Rates:
    """A learning rate over steps: as planned, and as it was logged so far."""

    planned: Curve
    logged: Curve


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """One picture, and what is said of it, a line each."""

    pixels: np.ndarray  # uint8 (height, width, 3)
    lines: tuple[str, ...]


def curves(runs: Mapping[str, History]) -> bytes:
    """Loss, agreement, accuracy and KL over epochs, of one run or of several in one picture."""
    figure = _figure(11.0, 7.5)
    panels = figure.subplots(2, 2)
    for axes, (title, metrics) in zip(panels.flat, metric_table.panels().items(), strict=True):
        for number, (run, history) in enumerate(runs.items()):
            for metric in metrics:
                assert metric.curve is not None
                x, y = history.curve(metric.split, metric.name)
                if not x:
                    continue
                drawn = metric.curve
                label = drawn.label if len(runs) == 1 else f"{run}: {drawn.label}"
                marker = "." if len(x) < 50 else ""
                axes.plot(
                    x, y, drawn.style, color=f"C{number}", marker=marker, label=_plain(label),
                    lw=1.2,
                )  # fmt: skip
        _finish(axes, title, "epochs")
    return _png(figure)


def schedules(runs: Mapping[str, Rates]) -> bytes:
    """The learning rate over steps: the plan as a line, what was logged as dots."""
    figure = _figure(7.0, 3.2)
    axes = figure.subplots()
    for number, (run, rates) in enumerate(runs.items()):
        of_run = "" if len(runs) == 1 else f"{run}: "
        axes.plot(*rates.planned, color=f"C{number}", label=_plain(f"{of_run}planned"))
        if rates.logged[0]:
            axes.plot(*rates.logged, ".", color=f"C{number}", label=_plain(f"{of_run}logged"), ms=4)
    _finish(axes, "learning rate", "steps")
    return _png(figure)


def views(shown: ViewSamples) -> bytes:
    """A row for each network, a column for each example; each picture at its own resolution."""
    rows, columns = len(shown.seen), len(shown.titles)
    figure = _figure(1.5 * columns + 0.5, 1.6 * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, seen in zip(grid, shown.seen, strict=True):
        row[0].set_ylabel(_plain(seen.name), fontsize=8)
        for axes, pixels in zip(row, seen.pictures, strict=True):
            _picture(axes, pixels)
    for axes, title in zip(grid[0], shown.titles, strict=True):
        axes.set_title(_plain(title), fontsize=8)
    return _png(figure)


def confusion(
    counts: Int[np.ndarray, "classes classes"], names: Sequence[str], expected: str
) -> bytes:
    """The matrix of counts, or of many classes the most confused pairs.

    Rows of `counts` are what was expected (`label` or `teacher`), columns the student's answers.
    """
    if len(names) > MATRIX_CLASSES:
        return _pairs(counts, names, expected)
    side = 2.5 + 0.28 * len(names)
    figure = _figure(side, side)
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7)
    labels = [_short(name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), labels, fontsize=7)
    axes.set_xlabel("the student says")
    axes.set_ylabel(f"the {expected} says")
    return _png(figure)


def confused_pairs(counts: Int[np.ndarray, "classes classes"]) -> list[tuple[int, int, int]]:
    """Expected class, the student's class and how often, the most frequent `PAIRS` first."""
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    found = [(int(i // len(counts)), int(i % len(counts))) for i in order]
    return [(a, b, int(wrong[a, b])) for a, b in found if wrong[a, b]]


def disagreements(found: Sequence[Disagreement]) -> bytes:
    """The pictures with their lines, six in a row."""
    columns = min(6, len(found))
    rows = -(-len(found) // columns)
    figure = _figure(2.1 * columns, 2.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, one in zip(grid.flat, found, strict=False):
        axes.axis("on")
        _picture(axes, one.pixels)
        axes.set_title("\n".join(map(_short, one.lines)), fontsize=7, loc="left")
    return _png(figure)


def _pairs(counts: np.ndarray, names: Sequence[str], expected: str) -> bytes:
    pairs = confused_pairs(counts)
    figure = _figure(8.0, 1.2 + 0.25 * max(len(pairs), 1))
    axes = figure.subplots()
    labels = [f"{_short(names[a])} \N{RIGHTWARDS ARROW} {_short(names[b])}" for a, b, _ in pairs]
    axes.barh(range(len(pairs)), [count for *_, count in pairs])
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("examples")
    axes.set_title(
        f"what the {expected} says \N{RIGHTWARDS ARROW} what the student says", fontsize=9
    )
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    """Inches. Not pyplot's, which keeps every figure until it is closed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'fm-distill[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _finish(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(below)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=7)
    else:
        axes.text(0.5, 0.5, "nothing was logged", ha="center", transform=axes.transAxes)


def _picture(axes: Any, pixels: np.ndarray) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _short(name: str) -> str:
    return _plain(
        name
        if len(name) <= LABEL_LETTERS
        else name[: LABEL_LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
    )


def _plain(text: str) -> str:
    """Matplotlib reads what stands between two dollars as a formula."""
    return text.replace("$", r"\$")


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings():
        # A letter that the font has not is drawn as a box, and nobody here can help it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()
