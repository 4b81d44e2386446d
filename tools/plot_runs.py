"""Curves of runs as one PNG: validation accuracy, agreement and KL over epochs.

    python tools/plot_runs.py curves.png "matched=runs/a,runs/b" labels=runs/c

Reads each run's `metrics.jsonl`, of unfinished runs too. Several runs of one name are drawn as
their mean, with the range between the lowest and the highest. Needs matplotlib:
pip install -e '.[plots]'.
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from fm_distill.runs.metric_table import BY_NAME

PANELS = ("student_top1", "agreement_top1", "training_view_agreement_top1", "training_view_kl")
Curve = dict[float, float]  # epoch -> value


def curve(workdir: str, name: str) -> Curve:
    """One quantity of a run on the validation split."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path} is not there: not the workdir of a run")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {x["epoch"]: x[name] for x in lines if x["split"] == "validation" and name in x}


def draw(axes: Axes, label: str, curves: list[Curve]) -> None:
    """The mean of several curves where all of them have a value, and their range."""
    epochs = sorted(set.intersection(*map(set, curves)))
    if not epochs:
        return
    values = [[c[epoch] for c in curves] for epoch in epochs]
    (line,) = axes.plot(epochs, [sum(x) / len(x) for x in values], marker=".", label=label)
    axes.fill_between(
        epochs, [min(x) for x in values], [max(x) for x in values],
        alpha=0.2, color=line.get_color(), linewidth=0,
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    if len(arguments) < 2 or any("=" not in x for x in arguments[1:]):
        raise SystemExit(f"expected OUT.png NAME=WORKDIR[,WORKDIR...] ..., got {arguments}")
    out, *groups = arguments
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for axes, name in zip(panels.flat, PANELS, strict=True):
        for group in groups:
            label, folders = group.split("=", 1)
            draw(axes, label, [curve(folder, name) for folder in folders.split(",")])
        axes.set_title(f"{BY_NAME[name].label}, validation")
        axes.set_xlabel("epochs")
        axes.grid(alpha=0.3)
    panels.flat[0].legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
