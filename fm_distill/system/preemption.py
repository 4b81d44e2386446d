"""When a run has to stop: signals, and hours that are used."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from fm_distill.errors import EXIT_INTERRUPTED_TWICE, EXIT_PAUSED
from fm_distill.system.console import log

Item = TypeVar("Item")


class Stopped(Exception):
    """Leaves work that is done anew the next time, with the reason."""


class Stop:
    """Whether a run is to stop and why: a signal came, or its hours are over.

    The hours count from here, but end nothing before `progressed`: a start that takes them all
    would repeat for ever. With `leave`, a signal ends the process at once wherever nothing can be
    lost, even while the main thread waits for the compiler: `leave(reason)` records why first.
    """

    def __init__(self, max_hours: float | None = None, leave: Callable[[str], None] | None = None):
        self.started = time.monotonic()
        self.max_hours = max_hours
        self._leave = leave
        self._signals: list[int] = []
        self._interrupts = 0
        self._lock = threading.RLock()
        self._idle = True
        self._progressed = False
        self._records: list[Callable[[str], None]] = []

    def hours(self) -> float:
        """Since the start."""
        return (time.monotonic() - self.started) / 3600

    def reason(self, reserve_s: float = 0.0) -> str | None:
        """Why to stop now, with `reserve_s` seconds left for what is still to be done; or None."""
        if self._signals:
            return f"stopped by {signal.Signals(self._signals[0]).name}"
        hours = self.hours() + reserve_s / 3600
        if self._progressed and self.max_hours is not None and hours >= self.max_hours:
            return f"the {self.max_hours:g} hours are used up"
        return None

    def progressed(self) -> None:
        """A step was done since the start."""
        self._progressed = True

    def checked(self, items: Iterable[Item], reserve_s: float = 0.0) -> Iterator[Item]:
        """`items`; raises `Stopped` before the next one where it is time to stop."""
        for item in items:
            if reason := self.reason(reserve_s):
                raise Stopped(reason)
            yield item

    def busy(self) -> None:
        """From here on there is something to lose."""
        with self._lock:
            self._idle = False

    def idle(self) -> None:
        """From here on there is nothing to lose: all that was done is on disk."""
        with self._lock:
            self._idle = True
            if self._signals:
                self._exit()

    @contextlib.contextmanager
    def recorded(self, record: Callable[[str], None]) -> Iterator[None]:
        """Inside, `record(reason)` is called before the process ends at once."""
        with self._lock:
            self._records.append(record)
        try:
            yield
        finally:
            with self._lock:
                self._records.remove(record)

    def signalled(self, number: int) -> None:
        """Called in a thread of its own as soon as a signal is there."""
        if self._signals and number == signal.SIGINT and self._leave:
            os._exit(EXIT_INTERRUPTED_TWICE)
        if not self._signals:
            log("stopping after a checkpoint; interrupt again to stop at once")
        self._signals.append(number)
        with self._lock:
            if self._idle:
                self._exit()

    def interrupted(self, number: int, frame: Any) -> None:
        """Called in the main thread when Python comes to it: later than `signalled`, if at all."""
        self._interrupts += number == signal.SIGINT
        if self._leave is None and self._interrupts > 1:
            raise KeyboardInterrupt

    def _exit(self) -> None:
        if self._leave is None:
            return
        reason = self.reason() or ""
        for record in self._records:
            with contextlib.suppress(OSError):
                record(reason)
        self._leave(reason)
        sys.stderr.flush()
        os._exit(EXIT_PAUSED)


@contextlib.contextmanager
def stop_signals(stop: Stop) -> Iterator[Stop]:
    """Turns SIGINT and SIGTERM into a request to stop. A second SIGINT ends everything at once.

    The numbers come through a socket that Python's C code writes to: a handler in Python would
    wait for the compiler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may install handlers
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def listen() -> None:
        while (received := receiver.recv(1)) != b"":
            if received[0] in (signal.SIGINT, signal.SIGTERM):
                stop.signalled(received[0])

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    handlers = {n: signal.signal(n, stop.interrupted) for n in (signal.SIGINT, signal.SIGTERM)}
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sender.close()
        thread.join()
        receiver.close()
