"""What a run wrote while it ran, read again: the lines of `metrics.jsonl` as curves."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

Curve = tuple[list[float], list[float]]  # x and y


@dataclasses.dataclass(frozen=True)
class History:
    """The lines of one run so far."""

    lines: tuple[dict[str, Any], ...]

    def curve(self, split: str, name: str, over: str = "epoch") -> Curve:
        """A quantity of `train` or `validation` over epochs or steps, where it is a number."""
        points = [
            (float(x[over]), float(x[name]))
            for x in self.lines
            if x["split"] == split and x.get(name) is not None
        ]
        return [x for x, _ in points], [y for _, y in points]

    def last(self, split: str) -> dict[str, Any]:
        """The newest line of a split; empty where there is none."""
        return next((x for x in reversed(self.lines) if x["split"] == split), {})


def read_history(workdir: str | os.PathLike[str]) -> History:
    """Of a run that may still be writing: a line that is cut short or damaged is left out."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.is_file():
        return History(())
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and _is_intact(line):
            lines.append(line)
    return History(tuple(lines))


def _is_intact(line: dict[str, Any]) -> bool:
    """Whether it has a step and a split, and all else in it are numbers or null."""
    positions = (line.get("step"), line.get("epoch"))
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in positions):
        return False
    numbers = (x for name, x in line.items() if name != "split")
    numeric = all(x is None or isinstance(x, int | float) for x in numbers)
    return numeric and isinstance(line.get("split"), str)
