"""Between a run and the person who watches it: lines to read, and the wish to stop."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

Stopping = Callable[[], bool]


def say(text: str) -> None:
    """A line for the person who watches; standard output is kept for results."""
    tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stopping]:
    """Turns the first SIGINT or SIGTERM into a wish to stop; a second SIGINT raises at once."""
    asked: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        say("stopping after a checkpoint; interrupt again to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may install handlers
        return
    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
