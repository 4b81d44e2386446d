"""The figures of finished runs as one JSON file, and the table and the picture made from it.

    python tools/patience.py collect experiments/results/flowers102_patience.json runs/a runs/b ...
    python tools/patience.py table experiments/results/flowers102_patience.json
    python tools/patience.py ahead experiments/results/flowers102_patience.json
    python tools/patience.py plot experiments/results/flowers102_patience.json patience.png

`collect` reads `config.json` and `evaluation.json` of each workdir and adds to what the file has; a
run of the same name is replaced. `plot` needs matplotlib: pip install -e '.[plots]'.
"""

import json
import pathlib
import statistics
import sys
from typing import Any, NamedTuple

from fm_distill.config import ViewConfig
from fm_distill.errors import UserError
from fm_distill.recordings.header import drawn_views
from fm_distill.runs.stored_run import StoredRun
from fm_distill.runs.workdir import Workdir

# Teaching -> what a reader is told.
NAMES = {
    "function_matching": "function matching",
    "consistent": "the same view, no mixup",
    "independent": "each its own view",
    "fixed": "the teacher's central view",
    "labels": "labels, their own crops",
    "labels_same_views": "labels, the same views",
}


SMALL = "bit at 64"  # the student of `experiments/flowers102_patience.py`
SHORTEST = 100.0  # epochs of a recording whose runs are in the picture over epochs
OF_VIEWS = 300.0  # epochs of the runs in the picture over views


def teaching_of(stored: StoredRun) -> str:
    """A key of `NAMES`."""
    config = stored.config
    if config.objective.target != "labels":
        return config.teaching
    same = drawn_views(config.views) == drawn_views(ViewConfig())
    return "labels_same_views" if same else "labels"


def student_of(stored: StoredRun) -> str:
    """Model, resolution, and the weights that it started from."""
    student = stored.resolved.student
    name = f"{student.model} at {student.resolution}"
    weights = stored.config.student.weights
    return f"{name}, from {pathlib.Path(weights).stem}" if weights else name


def row_of(path: str) -> dict[str, Any]:
    """The figures of the complete run in a workdir. Raises `UserError`."""
    workdir = Workdir(path)
    stored, figures = workdir.stored(), workdir.read_evaluation()
    if figures is None:
        raise UserError(f"{path} has no evaluation.json: the run is not complete")
    config, resolved = stored.config, stored.resolved

    def epochs(steps: int) -> float:
        return round(steps * config.batch_size / resolved.examples, 1)

    recorded = None
    if resolved.recording is not None or resolved.period_steps is not None:
        recorded = epochs(resolved.period_steps or resolved.total_steps)
    seed = config.seed if config.student.seed is None else config.student.seed
    return {
        "name": pathlib.Path(path).resolve().name,
        "teaching": teaching_of(stored),
        "epochs": epochs(resolved.total_steps),
        "seed": seed,
        "split": figures["split"],
        "student_top1": figures["student"]["top1"],
        "teacher_top1": figures["teacher"]["top1"],
        "agreement": figures["agreement"]["top1"],
        "kl": figures["kl"]["one"],
        "recorded_epochs": recorded,
        "student": student_of(stored),
        "temperature": config.objective.temperature,
        "learning_rate": config.optimizer.learning_rate,
        "crop_area": config.views.crop_area,
        "final_statistics": config.student.final_statistics,
        "commit": stored.commit,
    }


def collect(out: str, workdirs: list[str]) -> None:
    path = pathlib.Path(out)
    rows = {x["name"]: x for x in read(out)} if path.exists() else {}
    rows |= {x["name"]: x for x in map(row_of, workdirs)}
    ordered = sorted(rows.values(), key=lambda x: (x["teaching"], x["epochs"], x["name"]))
    path.write_text("[\n" + ",\n".join(json.dumps(x) for x in ordered) + "\n]\n")


def read(path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(pathlib.Path(path).read_text())
    return rows


class Group(NamedTuple):
    """What rows share that differ by their seed alone."""

    student: str
    teaching: str
    statistics: str
    epochs: float
    recorded_epochs: float | None
    smallest_crop: float

    def named(self) -> str:
        if self.teaching == "labels":
            return f"{NAMES['labels']} of {100 * self.smallest_crop:.0f} % and more"
        return NAMES[self.teaching]


def groups(rows: list[dict[str, Any]]) -> dict[Group, list[dict[str, Any]]]:
    found: dict[Group, list[dict[str, Any]]] = {}
    for row in rows:
        key = Group(
            row["student"],
            row["teaching"],
            row["final_statistics"],
            row["epochs"],
            row["recorded_epochs"],
            row["crop_area"][0],
        )
        found.setdefault(key, []).append(row)
    order = list(NAMES)

    def place(key: Group) -> tuple[Any, ...]:
        small, teaching = key.student != SMALL, order.index(key.teaching)
        views = key.recorded_epochs or 0
        return small, teaching, key.statistics, key.epochs, views, key.smallest_crop

    return dict(sorted(found.items(), key=lambda x: place(x[0])))


def table(path: str) -> str:
    """Markdown: mean, and the range over the seeds where there are several."""
    lines = [
        "| student | learns from | BatchNorm's statistics | epochs | different views of an image | "
        "seeds | test top-1, % | of the teacher's, % | agreement, % | KL at T=1, nats |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group, rows in groups(read(path)).items():
        views = group.epochs if group.recorded_epochs is None else group.recorded_epochs
        kept = [x["student_top1"] / x["teacher_top1"] for x in rows if x["teacher_top1"]]
        cells = [
            group.student,
            group.named(),
            group.statistics,
            f"{group.epochs:,.0f}",
            f"{views:,.0f}",
            str(len(rows)),
            _cell([100 * x["student_top1"] for x in rows], 1),
            _cell([100 * x for x in kept], 1),
            _cell([100 * x["agreement"] for x in rows if x["agreement"] is not None], 1),
            _cell([x["kl"] for x in rows if x["kl"] is not None], 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ahead(path: str) -> str:
    """Markdown: for each initial seed, how far function matching is above labels."""
    lines = [
        "| student | BatchNorm's statistics | epochs | seed | function matching, % | labels, % | "
        "ahead, points |",
        "|---|---|---|---|---|---|---|",
    ]
    found = groups(read(path))
    matched = [(x, row) for x, y in found.items() if x.teaching == "function_matching" for row in y]
    labelled = [(x, row) for x, y in found.items() if x.teaching == "labels" for row in y]
    for x, one in matched:
        for y, other in labelled:
            same = (x.student, x.statistics, x.epochs, one["seed"])
            enough = (x.recorded_epochs or SHORTEST) >= SHORTEST
            if enough and same == (y.student, y.statistics, y.epochs, other["seed"]):
                top1 = [100 * row["student_top1"] for row in (one, other)]
                cells = [f"{x.epochs:,.0f}", str(one["seed"]), *(f"{z:.2f}" for z in top1)]
                cells = [x.student, x.statistics, *cells, f"{top1[0] - top1[1]:.1f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def plot(path: str, out: str) -> None:
    """Test accuracy over epochs, one line a teaching, and over the views of an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read(path)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 6), sharey=True, layout="constrained"
    )
    _over_epochs(left, rows)
    _over_views(right, rows)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(out, dpi=130, metadata={"Date": None} if out.endswith(".svg") else None)


def _over_epochs(axes: Any, rows: list[dict[str, Any]]) -> None:
    """With the range over the seeds."""
    found = groups(rows)
    # How many views are enough is another question: see the table.
    shown = {x: y for x, y in found.items() if (x.recorded_epochs or SHORTEST) >= SHORTEST}
    for line_of in dict.fromkeys((x.student, x.named(), x.statistics) for x in shown):
        of_epochs: dict[float, list[dict[str, Any]]] = {}
        for x, y in shown.items():
            if (x.student, x.named(), x.statistics) == line_of:
                # Of recordings of different length, the one with more seeds.
                of_epochs[x.epochs] = max(y, of_epochs.get(x.epochs, []), key=len)
        own = [(x, [100 * row["student_top1"] for row in y]) for x, y in of_epochs.items()]
        student, named, moments = line_of
        epochs = [x for x, _ in own]
        (line,) = axes.plot(
            epochs, [statistics.mean(x) for _, x in own], marker="o",
            linestyle="-" if moments == "central" else ":",
            label=f"{named} ({moments if student == SMALL else student})",
        )  # fmt: skip
        axes.fill_between(
            epochs, [min(x) for _, x in own], [max(x) for _, x in own],
            alpha=0.2, color=line.get_color(), linewidth=0,
        )  # fmt: skip
    if teachers := [100 * x["teacher_top1"] for x in rows if x["teacher_top1"]]:
        axes.axhline(statistics.mean(teachers), linestyle="--", color="grey", label="the teacher")
    _log_axis(axes, sorted({x["epochs"] for x in rows}), "epochs")
    axes.set_ylabel("test top-1, %")


def _over_views(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Function matching for as many epochs, from recordings of which the views repeat."""
    points = sorted(
        (x.recorded_epochs, statistics.mean(100 * row["student_top1"] for row in y))
        for x, y in groups(rows).items()
        if (x.student, x.teaching, x.statistics) == (SMALL, "function_matching", "central")
        and x.epochs == OF_VIEWS
        and x.recorded_epochs
    )
    if points:
        axes.plot(*zip(*points, strict=True), marker="o")
    label = f"different views of an image in {OF_VIEWS:,.0f} epochs"
    _log_axis(axes, [x for x, _ in points], label)


def _log_axis(axes: Any, ticks: list[float], label: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["collect", out, *workdirs] if workdirs:
            collect(out, workdirs)
        case ["table", path]:
            print(table(path))
        case ["ahead", path]:
            print(ahead(path))
        case ["plot", path, out]:
            plot(path, out)
        case _:
            raise SystemExit(f"{__doc__}\ngot {arguments}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        raise SystemExit(str(error)) from None
