"""Pictures of runs, as SVG: curves, schedule, views, confusions, disagreements.

Data in, bytes out; the only file that knows matplotlib, which the extra `plots` brings.
"""

import dataclasses
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
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
PHOTO_DPI = 200  # of the photos inside of a picture
# Lengths of runs beyond which one would hide the other on a common axis.
SIMILAR = 1.25
SHARE = "share of the run, %"
LABEL_LETTERS = 32


@dataclasses.dataclass(frozen=True)
class Rates:
    """A learning rate, or a weight, over steps: as planned, and as it was logged so far."""

    planned: Curve
    logged: Curve


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """One picture and its caption, a line each."""

    pixels: np.ndarray  # uint8 (height, width, 3)
    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Tradeoff:
    """A cost of each student, and whether no other student is better at it and as accurate."""

    cost: tuple[float, ...]
    optimal: tuple[bool, ...]


def curves(runs: Mapping[str, History], lengths: Mapping[str, int] | None = None) -> bytes:
    """Loss, agreement, accuracy and KL over epochs, of one run or of several in one picture.

    Where `lengths`, the planned steps of each run, differ much, it is over the share of the run.
    """
    figure = _figure(11.0, 7.5)
    shares = lengths if lengths is not None and _differ(map(float, lengths.values())) else None
    panels = figure.subplots(2, 2)
    for axes, (title, metrics) in zip(panels.flat, metric_table.panels().items(), strict=True):
        for number, (run, history) in enumerate(runs.items()):
            for metric in metrics:
                assert metric.curve is not None
                x, y = history.curve(metric.split, metric.name, "step" if shares else "epoch")
                if shares:
                    x = [100 * step / shares[run] for step in x]
                if not x:
                    continue
                curve_style = metric.curve
                label = curve_style.label if len(runs) == 1 else f"{run}: {curve_style.label}"
                marker = "." if len(x) < 50 else ""
                axes.plot(
                    x, y, curve_style.style, color=f"C{number}", marker=marker, label=_plain(label),
                    lw=1.2,
                )  # fmt: skip
        _finish(axes, title, SHARE if shares else "epochs")
    return _svg(figure)


def schedules(runs: Mapping[str, Rates], title: str = "Learning rate") -> bytes:
    """A rate or weight over steps: the plan as a line, what was logged as dots."""
    figure = _figure(7.0, 3.2)
    axes = figure.subplots()
    lengths = {run: max(rates.planned[0], default=0.0) for run, rates in runs.items()}
    shares = _differ(lengths.values())
    for number, (run, rates) in enumerate(runs.items()):
        prefix = "" if len(runs) == 1 else f"{run}: "
        for (x, y), style, kind in ((rates.planned, "-", "planned"), (rates.logged, ".", "logged")):
            if x:
                positions = [100 * step / lengths[run] for step in x] if shares else x
                label = _plain(f"{prefix}{kind}")
                axes.plot(positions, y, style, color=f"C{number}", label=label, ms=4)
    _finish(axes, title, SHARE if shares else "steps")
    return _svg(figure)


def tradeoffs(
    names: Sequence[str],
    accuracy: Sequence[float],
    spread: Sequence[float],
    panels: Mapping[str, Tradeoff],
    quality: str,
    teacher: float | None,
) -> bytes:
    """Accuracy of the students against each cost; the Pareto front as a line, with names.

    `spread` is a standard deviation, `teacher` the teacher's accuracy.
    """
    rows = -(-len(panels) // 2)
    figure = _figure(11.0, 4.2 * rows)
    for i, (cost, tradeoff) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, 2, i)
        axes.errorbar(tradeoff.cost, accuracy, spread, fmt="o", color="C0", ms=4, capsize=2, lw=0.8)
        front_points = sorted(
            (x, y, name)
            for x, y, name, is_optimal in zip(
                tradeoff.cost, accuracy, names, tradeoff.optimal, strict=True
            )
            if is_optimal
        )
        axes.plot(
            [x for x, *_ in front_points], [y for _, y, _ in front_points], "o-", color="C1",
            label="Pareto-optimal", drawstyle="steps-post",
        )  # fmt: skip
        for index, (x, y, name) in enumerate(front_points):
            on_right = 2 * index >= len(front_points)  # of the picture: the name stands to the left
            axes.annotate(
                _short(_without_sections(name)), (x, y), xytext=(-6, 3) if on_right else (4, -10),
                ha="right" if on_right else "left", textcoords="offset points", fontsize=8,
            )  # fmt: skip
        if teacher is not None:
            axes.axhline(teacher, color="grey", ls=":", label="teacher")
        axes.set_xscale("log")
        axes.tick_params(axis="x", which="both", rotation=30, labelsize=8)
        axes.set_ylabel(quality)
        _finish(axes, "", cost)
    return _svg(figure)


def views(shown: ViewSamples) -> bytes:
    """A row for each network, a column for each example; each picture at its own resolution."""
    rows, columns = len(shown.seen), len(shown.titles)
    figure = _figure(1.8 * columns + 0.5, 1.9 * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, network_view in zip(grid, shown.seen, strict=True):
        row[0].set_ylabel(_plain(network_view.name), fontsize=10)
        for axes, pixels in zip(row, network_view.pictures, strict=True):
            _picture(axes, pixels)
    for axes, title in zip(grid[0], shown.titles, strict=True):
        axes.set_title(_plain(title), fontsize=10)
    return _svg(figure)


def confusion(
    counts: Int[np.ndarray, "classes classes"], names: Sequence[str], expected: str
) -> bytes:
    """The matrix of counts, or of many classes the most confused pairs.

    Rows of `counts` are what was expected (`label` or `teacher`), columns the student's answers.
    """
    if len(names) > MATRIX_CLASSES:
        return _pairs(counts, names, expected)
    size_inches = 2.5 + 0.28 * len(names)
    figure = _figure(size_inches, size_inches)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    labels = [_short(name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=9)
    axes.set_yticks(range(len(names)), labels, fontsize=9)
    axes.set_xlabel("class by the student")
    axes.set_ylabel(f"class by the {expected}")
    return _svg(figure)


def confused_pairs(counts: Int[np.ndarray, "classes classes"]) -> list[tuple[int, int, int]]:
    """Expected class, the student's class and how often, the most frequent `PAIRS` first."""
    misclassified = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(-misclassified, axis=None, kind="stable")[:PAIRS]
    index_pairs = [
        (int(flat_index // len(counts)), int(flat_index % len(counts))) for flat_index in order
    ]
    return [
        (expected_class, student_class, int(misclassified[expected_class, student_class]))
        for expected_class, student_class in index_pairs
        if misclassified[expected_class, student_class]
    ]


def disagreements(found: Sequence[Disagreement]) -> bytes:
    """The pictures with their lines, six in a row."""
    columns = min(6, len(found))
    rows = -(-len(found) // columns)
    figure = _figure(2.5 * columns, 3.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, disagreement in zip(grid.flat, found, strict=False):
        axes.axis("on")
        _picture(axes, disagreement.pixels)
        axes.set_title("\n".join(map(_short, disagreement.lines)), fontsize=8.5, loc="left")
    return _svg(figure)


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
        f"class by the {expected} \N{RIGHTWARDS ARROW} class by the student", fontsize=11
    )
    return _svg(figure)


def _figure(width: float, height: float) -> Any:
    """Inches. Not pyplot's, which keeps every figure until it is closed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'fm-distill[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _differ(lengths: Iterable[float]) -> bool:
    """Whether all lengths are known, and one of them is much longer than another."""
    all_lengths = list(lengths)
    return min(all_lengths, default=0) > 0 and max(all_lengths) > SIMILAR * min(all_lengths)


def _finish(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(below)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=9)
    else:
        axes.text(0.5, 0.5, "nothing was logged", ha="center", transform=axes.transAxes)


def _picture(axes: Any, pixels: np.ndarray) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _without_sections(name: str) -> str:
    """`student.options.width=1, seed=2` as `width=1, seed=2`."""
    return re.sub(r"\b[\w.]+\.(?=\w+=)", "", name)


def _short(name: str) -> str:
    return _plain(
        name
        if len(name) <= LABEL_LETTERS
        else name[: LABEL_LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
    )


def _plain(text: str) -> str:
    """Matplotlib reads what stands between two dollars as a formula."""
    return text.replace("$", r"\$")


def _svg(figure: Any) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "fm-distill"}):
        # A character that the font lacks is drawn as a box; a warning of it helps nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", dpi=PHOTO_DPI, metadata={"Date": None})
    return buffer.getvalue()
