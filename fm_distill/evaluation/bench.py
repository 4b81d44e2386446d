"""Latency, throughput and memory of exported files and of runs, side by side, on the CPU.

Each function is opened in a process of its own, so that its peak memory is its own.
They are timed in turn, a short burst each, so that other load on the machine affects all alike.
"""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TypeVar

import msgspec
import numpy as np

from fm_distill.config.code import STUDENT
from fm_distill.errors import UserError
from fm_distill.evaluation.bench_process import Burst, Opened, Subject
from fm_distill.exporting.formats import FORMATS
from fm_distill.runs.run_code import refuse_code_of_run
from fm_distill.runs.workdir import Workdir
from fm_distill.system.console import log
from fm_distill.system.foreign_code import is_trusted

BURST_S = 0.1
# Calls on which a 95th percentile may rest; more seconds are taken for them.
FEWEST_CALLS = 20
Answer = TypeVar("Answer", Opened, Burst)


@dataclasses.dataclass(frozen=True)
class Row:
    """A function from uint8 pixels to probabilities or logits, timed on random pixels."""

    name: str  # the file or the workdir
    of: str  # file, student, teacher, or teacher 2
    network: str
    resolution: int
    runtime: str
    calls: int
    median_ms: float  # of a batch
    p95_ms: float  # 95th percentile
    images_per_second: float
    # The most that its process ever held, and how much of it came after Python, JAX and this
    # package: the file, its runtime, and what it computes with.
    peak_bytes: int
    added_bytes: int
    file_bytes: int | None  # None of a run


@dataclasses.dataclass(frozen=True)
class Bench:
    """What was measured in one go."""

    device: str
    threads: int
    batch_size: int
    rows: tuple[Row, ...]


def check_seconds(seconds: float) -> None:
    """Raises `UserError` where no function can be called for so long."""
    if not 0 < seconds < 3600:
        raise UserError(f"--seconds is {seconds:g}; expected more than 0 and less than 3600")


def bench(
    paths: Sequence[str | os.PathLike[str]],
    *,
    batch_size: int = 1,
    threads: int | None = None,
    seconds: float = 2.0,
) -> Bench:
    """Times files of `export` and runs; of a run its student, and its teachers that are available.

    `threads` are those of each runtime (None: a thread for each core), `seconds` the time for which
    each function is called, beside its warm-up. Raises `UserError`.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}; expected 1 or more")
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}; expected 1 or more")
    check_seconds(seconds)
    thread_count = threads or _cores()
    subjects = [x for path in paths for x in _subjects(str(path), batch_size, thread_count)]
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_process(x)) for x in subjects]
        available = [(x, opened) for x in processes if (opened := x.opened()) is not None]
        bursts = _in_turn([x.burst for x, _ in available], seconds)
    rows = tuple(
        _row(x.subject, opened, y) for (x, opened), y in zip(available, bursts, strict=True)
    )
    return Bench(available[0][1].device, thread_count, batch_size, rows)


def _cores() -> int:
    """Those that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _subjects(path: str, batch_size: int, threads: int) -> list[Subject]:
    if pathlib.Path(path).suffix in FORMATS:
        return [Subject(path, "file", 0, batch_size, threads, is_trusted())]
    if pathlib.Path(path).is_file():
        raise UserError(f"{path} cannot be timed; expected a workdir, or {', '.join(FORMATS)}")
    stored = Workdir(path).stored()
    refuse_code_of_run(stored, pathlib.Path(path), STUDENT)  # before a process is started
    teachers = stored.resolved.teachers
    return [
        Subject(path, "student", 0, batch_size, threads, is_trusted()),
        *(
            Subject(path, "teacher", i, batch_size, threads, is_trusted())
            for i in range(len(teachers))
        ),
    ]


@dataclasses.dataclass(frozen=True)
class _Process:
    """One function, and the process that runs it."""

    subject: Subject
    child: subprocess.Popen[str]
    stderr: IO[str]  # with what the runtime prints

    def opened(self) -> Opened | None:
        """None, with a message, for a teacher that is not available."""
        answer = self._answer(Opened)
        if answer.error is None:
            return answer
        if self.subject.of != "teacher":
            raise UserError(answer.error)
        log(f"{_of(self.subject)} of {self.subject.path} is not timed: {answer.error}")
        return None

    def burst(self, seconds: float) -> Burst:
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended, which `_answer` says
            print(seconds, file=self.child.stdin, flush=True)
        return self._answer(Burst)

    def _answer(self, kind: type[Answer]) -> Answer:
        assert self.child.stdout is not None
        if line := self.child.stdout.readline():
            return msgspec.json.decode(line, type=kind)
        code = self.child.wait()
        self.stderr.seek(0)
        last_line = (self.stderr.read().strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(
            f"{self.subject.path} cannot be timed: the process of {_of(self.subject)} ended with "
            f"code {code} ({last_line})"
        )


@contextlib.contextmanager
def _process(subject: Subject) -> Iterator[_Process]:
    # XLA, on the CPU as the other runtimes are, takes its threads from NPROC.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": str(subject.threads)}
    command = [sys.executable, "-m", "fm_distill.evaluation.bench_process"]
    with tempfile.TemporaryFile("w+") as stderr:
        child = subprocess.Popen(
            [*command, msgspec.json.encode(subject).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        )
        try:
            yield _Process(subject, child, stderr)
        finally:
            child.kill()
            child.communicate()


def _in_turn(processes: Sequence[Callable[[float], Burst]], seconds: float) -> list[list[Burst]]:
    """The bursts of each process, all of which take turns until they had their time."""
    all_bursts: list[list[Burst]] = [[] for _ in processes]
    unfinished = True
    while unfinished:
        unfinished = False
        for process, bursts in zip(processes, all_bursts, strict=True):
            calls = [x for burst in bursts for x in burst.calls_ms]
            if sum(calls) < 1e3 * seconds or len(calls) < FEWEST_CALLS:
                bursts.append(process(min(BURST_S, seconds)))
                unfinished = True
    return all_bursts


def _of(subject: Subject) -> str:
    return f"teacher {subject.number + 1}" if subject.number else subject.of


def _row(subject: Subject, opened: Opened, bursts: list[Burst]) -> Row:
    calls = np.array([x for burst in bursts for x in burst.calls_ms])
    peak = max(x.peak_bytes for x in bursts)
    return Row(
        name=subject.path,
        of=_of(subject),
        network=opened.network,
        resolution=opened.resolution,
        runtime=opened.runtime,
        calls=len(calls),
        median_ms=float(np.median(calls)),
        p95_ms=float(np.quantile(calls, 0.95)),
        images_per_second=1e3 * subject.batch_size * len(calls) / float(calls.sum()),
        peak_bytes=peak,
        added_bytes=peak - opened.started_bytes,
        file_bytes=pathlib.Path(subject.path).stat().st_size if subject.of == "file" else None,
    )


def bench_text(found: Bench) -> str:
    """A table."""
    heads = ["", "runtime", "p50", "p95", "images/s", "peak memory", "of that, added", "file"]
    lines = [heads]
    for row in found.rows:
        name = row.name if row.of == "file" else f"{row.name} ({row.of})"
        memory = [f"{x / 1e6:,.0f} MB" for x in (row.peak_bytes, row.added_bytes)]
        size = "-" if row.file_bytes is None else f"{row.file_bytes / 1e6:,.2f} MB"
        times = [f"{row.median_ms:.2f} ms", f"{row.p95_ms:.2f} ms", f"{row.images_per_second:,.0f}"]
        lines.append([name, row.runtime, *times, *memory, size])
    widths = [max(len(x) for x in column) for column in zip(*lines, strict=True)]
    title = (
        f"{found.device}; {_counted(found.threads, 'thread')}; batches of "
        f"{_counted(found.batch_size, 'image')}"
    )
    texts = []
    for line in lines:
        cells = [x.rjust(width) for x, width in zip(line, widths, strict=True)]
        cells[:2] = [x.ljust(width) for x, width in zip(line[:2], widths, strict=False)]
        texts.append("  ".join(cells).rstrip())
    return "\n".join([title, *texts])


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
