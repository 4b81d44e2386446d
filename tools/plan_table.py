"""What runs would need, and take, on devices that are not here: a table in Markdown.

    python tools/plan_table.py experiments/flowers102.py --topology v3-8 v5e-8
    python tools/plan_table.py published

The second form prints the times that big_vision's configs (configs/proj/distill) say their runs
took, beside what the plan expects: it was calibrated on the row of v3-8, and the others test it.
Each line takes the TPU compiler one to several minutes.
"""

import argparse
import dataclasses
import pathlib
import sys

from fm_distill.cli.command import guarded
from fm_distill.config import Config
from fm_distill.errors import EXIT_COMPLETE
from fm_distill.planning.plan import TIME_OVER_BOUND, Plan, plan
from fm_distill.preparation.experiment import load_experiment

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"

HEAD = (
    "| experiment | on | fits | arguments + temporaries + data, GB | HBM a step, GB "
    "| FLOPs a step, T (teacher, student, views) | collectives a step | step at least / expected, "
    "ms | images/s | hours | sessions |\n|" + "---|" * 11
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A run of the released trainer, evaluations included."""

    experiment: str
    topology: str
    epochs: float
    hours: float


# Source: the headers of big_vision's configs/proj/distill.
PUBLISHED = (
    Published("food101", "v3-8", 3000, 14),
    Published("food101", "v2-8", 100, 45 / 60),
    Published("flowers102", "v2-8", 10_000, 70 / 60),
    Published("pets", "v2-8", 1000, 28 / 60),
    Published("pets", "v2-8", 30_000, 11),
    Published("flowers102", "v3-32", 1_000_000, 25),
    Published("pets", "v3-32", 30_000, 8),
    Published("imagenet", "v3-32", 300, 15),
)


def line(name: str, found: Plan) -> str:
    """One row of the table."""
    memory, seconds, flops = found.memory_bytes, found.step_seconds, found.flops
    parts = [memory.arguments, memory.temporaries, memory.resident_data]
    split = ", ".join(f"{flops[x] / flops['total']:.1%}" for x in ("teacher", "student", "views"))
    times = ["" if x is None else f"{1e3 * x:.1f}" for x in (seconds.lower_bound, seconds.expected)]
    cells = [
        name,
        found.topology,
        "yes" if found.fits else f"no; {found.compiler_said or ''}",
        " + ".join("?" if x is None else f"{x / 1e9:.2f}" for x in parts),
        "" if found.hbm_bytes is None else f"{found.hbm_bytes / 1e9:.1f}",
        f"{flops['total'] / 1e12:.2f} ({split})",
        ", ".join(f"{v:g} {k}" for k, v in sorted(found.collectives.items())),
        " / ".join(times),
        "" if found.images_per_second is None else f"{found.images_per_second:,.0f}",
        "" if found.hours is None else f"{found.hours:,.1f}",
        "" if found.sessions is None else f"{found.sessions:,}",
    ]
    return "| " + " | ".join(cells) + " |"


def as_released(row: Published) -> Config:
    """The row's config in the released trainer's float32, read as it is needed."""
    config = load_experiment(EXPERIMENTS / f"{row.experiment}.py")
    schedule = dataclasses.replace(config.schedule, total_epochs=float(row.epochs))
    data = dataclasses.replace(config.data, feeding="streaming")
    return dataclasses.replace(config, schedule=schedule, data=data, precision="float32")


def published() -> None:
    print("| run | on | published, h | bound, h | expected, h | error | published over bound |")
    print("|" + "---|" * 7)
    bounds: dict[tuple[str, str], float] = {}
    for row in PUBLISHED:
        # Runs of 128 pixels differ in their number of classes only.
        key = (row.topology, "imagenet" if row.experiment == "imagenet" else "small")
        config = as_released(row)
        if key not in bounds:
            bound = plan(config, row.topology, search=False).step_seconds.lower_bound
            assert bound is not None
            bounds[key] = bound
        examples = config.data.train.examples
        assert examples is not None
        steps = round(examples * row.epochs / config.batch_size)
        bound_h = steps * bounds[key] / 3600
        expected_h = TIME_OVER_BOUND * bound_h
        print(
            f"| {row.experiment}, {row.epochs:,g} epochs | {row.topology} | {row.hours:.2f} "
            f"| {bound_h:.2f} | {expected_h:.2f} | {expected_h / row.hours - 1:+.0%} "
            f"| {row.hours / bound_h:.2f} |",
            flush=True,
        )


def main(own: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("experiments", nargs="+", help="experiment files, or `published`")
    parser.add_argument("--topology", nargs="+", default=["v3-8"])
    asked = parser.parse_args(own)
    if asked.experiments == ["published"]:
        published()
        return EXIT_COMPLETE
    print(HEAD)
    for path in asked.experiments:
        for name in asked.topology:
            found = plan(load_experiment(path), name, search=False)
            print(line(pathlib.Path(path).stem, found), flush=True)
    return EXIT_COMPLETE


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
