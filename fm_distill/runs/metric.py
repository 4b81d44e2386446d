"""One reported number: what it is called, how it is written, and where it stands in the figures."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Unit = Literal["fraction", "nats", "images/s", "1", "parameters", "FLOP", "ms", "bytes"]
# `log`: in `metrics.jsonl` of the validation split. `best`: `checkpoint.keep_best` may name it.
# `line`: in the progress line. `table`: what `evaluate` prints. `sweep`: a column of a sweep.
# `report`: a row of a report. `cost`: of each network of a run; `measured`: the same, on request.
Place = Literal["log", "best", "line", "table", "sweep", "report", "cost", "measured"]
# Heads of columns, in place of the unit.
COLUMN_UNITS: dict[Unit, str] = {
    "fraction": "%", "parameters": "millions", "FLOP": "millions", "bytes": "MB"
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Curve:
    """Where a metric is drawn."""

    panel: str  # a title, of one picture
    label: str
    style: str  # matplotlib's


@dataclasses.dataclass(frozen=True)
class Metric:
    """One reported number."""

    # In `metrics.jsonl`, TensorBoard and `checkpoint.keep_best`.
    name: str
    # In the figures of an evaluation; empty for a number of the training alone.
    path: tuple[str, ...]
    label: str
    unit: Unit
    higher_is_better: bool | None  # None: neither
    meaning: str
    places: frozenset[Place]
    curve: Curve | None = None
    # In the figures of an evaluation: low and high end of the 95 % interval.
    interval_path: tuple[str, ...] = ()

    @property
    def split(self) -> str:
        """In `metrics.jsonl`."""
        return "validation" if self.path else "train"

    @property
    def column(self) -> str:
        """Label and unit, as the head of a column of numbers."""
        return f"{self.label}, {COLUMN_UNITS.get(self.unit, self.unit)}"

    def of(self, figures: Mapping[str, Any]) -> float | None:
        """The value in the figures of an evaluation; None where there is none."""
        value = at_path(figures, self.path)
        return None if value is None else float(value)

    def interval_of(self, figures: Mapping[str, Any]) -> tuple[float, float] | None:
        """Its 95 % interval; None where there is none."""
        interval = at_path(figures, self.interval_path) if self.interval_path else None
        return None if interval is None else (float(interval[0]), float(interval[1]))

    def interval_text(self, figures: Mapping[str, Any]) -> str:
        """What stands behind the value; empty where there is no interval."""
        interval = self.interval_of(figures)
        return (
            ""
            if interval is None
            else f" (95 %: {self.text(interval[0])} to {self.text(interval[1])})"
        )

    def number(self, value: float) -> float:
        """`value` in the unit of `column`."""
        if self.unit == "fraction":
            return 100 * value
        return value / 1e6 if self.unit in ("parameters", "FLOP", "bytes") else value

    def text(self, value: float) -> str:
        """`value` with its unit, for people."""
        if self.unit == "fraction":
            return f"{100 * value:.2f} %"
        if self.unit == "parameters":
            return f"{value:,.0f}"
        if self.unit in ("FLOP", "bytes"):
            return f"{_prefixed(value)}{'B' if self.unit == 'bytes' else self.unit}"
        if self.unit == "ms":
            return f"{value:.2f} ms"
        if self.unit == "images/s":
            return f"{value:,.0f} {self.unit}"
        return f"{value:.4f} nats" if self.unit == "nats" else f"{value:.4f}"


def at_path(figures: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = figures
    for key in path:
        value = None if value is None else value.get(key)
    return value


def _prefixed(value: float) -> str:
    """Two decimals and an SI prefix."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}"
    return f"{value:.0f} "
