"""A training command inside a notebook: its output, and its run's figures while it runs.

The command is a process of its own, which has the accelerator for itself and can be stopped
politely. Needs IPython, as every notebook has it, and the extra `plots`.
"""

import base64
import os
import pathlib
import queue
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from fm_distill.config.code import IMAGES
from fm_distill.errors import UserError
from fm_distill.reports import plots
from fm_distill.reports.report import rates_of
from fm_distill.reports.view_samples import sample_views
from fm_distill.runs.history import read_history
from fm_distill.runs.run_code import refuse_code_of_run
from fm_distill.runs.workdir import Workdir


def run_and_show(command: Sequence[str], run: str | os.PathLike[str], every_s: float = 60.0) -> int:
    """Runs `command`, which trains in the workdir `run`, and returns its exit code.

    Curves are drawn anew every `every_s` seconds, views and schedule once. An interrupt of the
    cell stops the command politely.
    """
    # The accelerator belongs to the command.
    jax.config.update("jax_platforms", "cpu")
    print(shlex.join(command), flush=True)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
    screen = Screen(pathlib.Path(run))
    while True:
        try:
            _follow(lines, screen, every_s)
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()


def report_and_show(run: str | os.PathLike[str], page: str | os.PathLike[str]) -> bool:
    """`fm-distill report` on `run` as `page`, and that in the notebook; whether there is one.

    In a process of its own, which may have the accelerator now.
    """
    command = [sys.executable, "-m", "fm_distill", "report", os.fspath(run)]
    completed = subprocess.run(
        [*command, "--out", os.fspath(page), "--overwrite"], capture_output=True, text=True
    )
    if completed.returncode:
        print(completed.stderr[-3000:])
        return False
    show_report(page)
    return True


def show_report(page: str | os.PathLike[str]) -> None:
    """The figures of a page of `fm-distill report`, with their headings, in the notebook."""
    from IPython.display import HTML, SVG, display

    text = pathlib.Path(page).read_text()
    body = text[text.index("<body>") + len("<body>") : text.index("</body>")]
    parts = re.split(r"<img alt='[^']*' src='data:image/svg\+xml;base64,([^']*)'>", body)
    for i, part in enumerate(parts):
        if i % 2:
            display(SVG(base64.b64decode(part)))
        elif part.strip():
            display(HTML(part))


def _pump(pipe: Iterable[str], lines: queue.SimpleQueue[str | None]) -> None:
    try:
        for line in pipe:
            lines.put(line)
    finally:
        lines.put(None)  # or a reader of the last line would wait forever


def _follow(lines: queue.SimpleQueue[str | None], screen: "Screen", every_s: float) -> None:
    """Until the last line."""
    next_draw = time.monotonic()
    while True:
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            line = ""
        if line:
            print(line, end="", flush=True)
        if line is None or time.monotonic() >= next_draw:
            try:
                screen.draw()
            except Exception as error:  # the training goes on without pictures
                print(f"no picture of the run: {type(error).__name__}: {error}", flush=True)
            next_draw = time.monotonic() + every_s
        if line is None:
            return


class Screen:
    """The pictures of one run in a notebook's output, each in a place of its own."""

    def __init__(self, run: pathlib.Path):
        self.run = run
        self._curves: Any = None
        self._introduced = False

    def draw(self) -> None:
        """What there is to see by now."""
        if not self._introduced and (self.run / "config.json").is_file():
            self._introduced = True
            self._introduce()
        paths = [*sorted(self.run.glob("teacher*")), self.run]
        histories = {path.name: read_history(path) for path in paths}
        if not any(history.lines for history in histories.values()):
            return
        from IPython.display import SVG, display

        logged = {name: history for name, history in histories.items() if history.lines}
        image = SVG(plots.curves(logged))
        if self._curves is None:
            self._curves = display(image, display_id=True)
        else:
            self._curves.update(image)

    def _introduce(self) -> None:
        """The views of the first steps, and the schedule."""
        from IPython.display import SVG, display

        workdir = Workdir(self.run)
        try:
            stored = workdir.stored()
            refuse_code_of_run(stored, workdir.path, IMAGES)
            config = stored.config
            print("what each network sees in the first steps, and the learning rate:")
            display(SVG(plots.views(sample_views(config, workdir))))
        except UserError as error:
            print(f"the views cannot be shown: {error}")
            return
        status = workdir.read_status()
        total_steps = status.total_steps if status else 0
        rates = rates_of(config, total_steps, read_history(self.run))
        display(SVG(plots.schedules({config.name: rates})))
