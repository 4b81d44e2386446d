"""Whether a long run stays as it began: memory, time a step, files and open descriptors.

    python tools/long_run.py [--steps 200000]

Trains a tiny student in a process of its own and compares the end with the tenth of the way. The
time of a step is of the processor, since the clock's depends on what else the machine does.
"""

import argparse
import dataclasses
import os
import pathlib
import tempfile
import time

from disturb import Watched, tiny_experiment

from fm_distill.config import CheckpointConfig
from fm_distill.errors import EXIT_COMPLETE


@dataclasses.dataclass(frozen=True)
class Sample:
    """A process and its workdir at one moment."""

    step: int
    memory_mb: float
    descriptors: int
    files: int
    processor_s: float


def sample(run: Watched) -> Sample:
    """Reads Linux's /proc. The files are all of the workdir but one line-wise growing one."""
    process = pathlib.Path("/proc") / str(run.process.pid)
    pages = int((process / "statm").read_text().split()[1])
    ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
    return Sample(
        step=run.step(),
        memory_mb=pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        descriptors=len(list((process / "fd").iterdir())),
        files=sum(1 for x in run.workdir.rglob("*") if x.is_file()),
        processor_s=sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
    )


def watch(run: Watched, steps: int, every_s: float) -> list[Sample]:
    """Samples until the run's last checkpoint is there."""
    samples = []
    while run.process.poll() is None:
        if run.step():
            try:
                samples.append(sample(run))
            except (OSError, IndexError):  # it ended, or a file left meanwhile
                continue
        if run.step() >= steps:
            break
        time.sleep(every_s)
    if run.finish() != EXIT_COMPLETE:
        raise SystemExit(run.text())
    return samples


def table(samples: list[Sample], steps: int) -> str:
    """The tenth of the way against the end; medians over a twentieth of the run each."""

    def around(low: float, high: float) -> list[Sample]:
        return [x for x in samples if low * steps <= x.step <= high * steps]

    def median(values: list[float]) -> float:
        return sorted(values)[len(values) // 2]

    early, late = around(0.10, 0.15), around(0.95, 1.0)

    def step_ms(part: list[Sample]) -> float:
        first, last = part[0], part[-1]
        return 1000 * (last.processor_s - first.processor_s) / max(1, last.step - first.step)

    rows = [
        (name, median([value(x) for x in early]), median([value(x) for x in late]))
        for name, value in (
            ("resident memory, MB", lambda x: x.memory_mb),
            ("open descriptors", lambda x: float(x.descriptors)),
            ("files in the workdir", lambda x: float(x.files)),
        )
    ]
    rows.append(("processor time a step, ms", step_ms(early), step_ms(late)))
    lines = ["| | at 10 % | at the end | ratio |", "|---|---|---|---|"]
    lines += [f"| {name} | {a:.2f} | {b:.2f} | {b / a:.3f} |" for name, a, b in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        experiment = tiny_experiment(folder / "tiny.py", "resident", "group", asked.steps)
        every = CheckpointConfig().every_steps
        options = {"checkpoint.every": every, "log.every": 500, "log.evaluate-every": 10_000}
        words = [x for k, v in options.items() for x in (f"--{k}-steps", str(v))]
        run = Watched(experiment, folder / "run", *words)
        samples = watch(run, asked.steps, every_s=0.5)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        lines = [x for x in run.text().splitlines() if "blocked training" in x]
    print(table(samples, asked.steps))
    mean_bytes = sum(map(len, lines)) / len(lines)
    print(f"\n{len(lines):,} lines of metrics.jsonl, {mean_bytes:.0f} bytes each")
    print(lines[-1].strip())


if __name__ == "__main__":
    main()
