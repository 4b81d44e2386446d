"""Progress and log lines on standard error; standard output is kept for results."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
# Where standard error is no terminal, but for instance a file, a line of progress this often.
LINE_EVERY_S = 30.0
COMPILING = "compiling, usually a minute"


def log(text: str) -> None:
    """Logs a line on standard error; standard output is kept for results."""
    tqdm.write(text, file=sys.stderr)


class Progress:
    """Progress of a run of many steps; this one shows nothing."""

    def update(self, steps: int, text: str = "") -> None:
        """So many `steps` more are done; `text` is shown from now on, unless it is empty."""

    def close(self) -> None:
        """Nothing more comes."""


class ProgressBar(Progress):
    """For a terminal."""

    def __init__(self, name: str, total: int, done: int):
        self.bar = tqdm(total=total, initial=done, unit="step", desc=name, dynamic_ncols=True)

    def update(self, steps: int, text: str = "") -> None:
        if text:
            self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(steps)

    def close(self) -> None:
        self.bar.close()


class ProgressLines(Progress):
    """For a file."""

    def __init__(
        self,
        name: str,
        unit: str,
        total: int,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name, self.unit, self.total, self.done, self.clock = name, unit, total, done, clock
        self.text = ""
        self.first = self.done, clock()
        self.written = self.first
        # The first update compiles: the pace is that of what follows it.
        self.paced: tuple[int, float] | None = None

    def update(self, steps: int, text: str = "") -> None:
        self.done += steps
        self.text = text or self.text
        self.paced = self.paced or (self.done, self.clock())
        if self.clock() - self.written[1] >= LINE_EVERY_S:
            self._write()

    def close(self) -> None:
        # Something short needs no line.
        if self.written != self.first and self.written[0] != self.done:
            self._write()

    def _write(self) -> None:
        self.written = self.done, self.clock()
        start, start_time = self.paced or self.first
        left = ""
        if self.done > start:
            pace_s = (self.written[1] - start_time) / (self.done - start)
            left = f", about {hours_text((self.total - self.done) * pace_s / 3600)} left"
        share = f" ({self.done / self.total:.0%})" if self.total else ""
        text = f", {self.text}" if self.text else ""
        log(f"{self.name}: {self.done:,} of {self.total:,} {self.unit}{share}{text}{left}")


def steps_progress(name: str, total: int, done: int, show: bool) -> Progress:
    """Of a training run, on standard error."""
    if not show:
        return Progress()
    if sys.stderr.isatty():
        return ProgressBar(name, total, done)
    return ProgressLines(name, "steps", total, done)


def progress(items: Iterable[Item], name: str, unit: str, total: int) -> Iterator[Item]:
    """`items`, with a bar that goes when it is done, or in a file with a line now and then."""
    if sys.stderr.isatty():
        yield from tqdm(items, name, total, unit=f" {unit}", leave=False)
        return
    lines = ProgressLines(name, unit, total)
    for item in items:
        yield item
        lines.update(1)
    lines.close()


def sessions_left(hours_left: float | None, hours: float) -> str:
    """`3.4 hours are left, 2 sessions of 2 hours`."""
    if hours_left == 0:
        return "the final evaluation is left"
    if hours_left is None:
        return "the time left is not known yet"
    count = math.ceil(hours_left / hours) if hours > 0 else 1
    sessions = f"{count:,} session{'s' if count != 1 else ''} of {hours_text(hours)}"
    return f"about {hours_text(hours_left)} left, {sessions} like this one"


def hours_text(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
