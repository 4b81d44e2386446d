"""Several processes that train one run, and the parent that reports when one of them is lost."""

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from fm_distill.errors import EXIT_TRAINING_FAILED, UserError

# JAX takes a process that did not respond for this long as lost, and ends the others.
HEARTBEAT_TIMEOUT_S = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distributed:
    """Where the processes of one run find each other."""

    coordinator_address: str | None = None
    """`HOST:PORT` of the first process."""
    process_id: int | None = None
    """0 for the first process, which writes the workdir."""
    process_count: int | None = None
    """How many processes there are."""
    detect: bool = False
    """Let JAX find the others; done by itself where TPU_WORKER_HOSTNAMES names several hosts."""


def is_distributed(distributed: Distributed) -> bool:
    """Whether this is one of several processes. Raises `UserError` for incomplete options."""
    given = (distributed.coordinator_address, distributed.process_id, distributed.process_count)
    if any(x is not None for x in given):
        if any(x is None for x in given) or distributed.detect:
            raise UserError(
                "several processes need --distributed.coordinator-address HOST:PORT, "
                ".process-id and .process-count, all three and no .detect"
            )
        address, process_id, count = given
        assert isinstance(process_id, int) and isinstance(count, int)
        host, _, port = str(address).rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"distributed.coordinator_address is {address!r}; expected HOST:PORT")
        if count < 1 or not 0 <= process_id < count:
            raise UserError(
                f"distributed.process_id is {process_id} of {count} processes; expected 0 to "
                f"{max(count - 1, 0)}"
            )
        return True
    return distributed.detect or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def join(distributed: Distributed) -> None:
    """Makes this one of the processes; call it before anything asks for a device."""
    import jax

    if distributed.coordinator_address is None:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S)
        return
    jax.distributed.initialize(
        distributed.coordinator_address,
        distributed.process_count,
        distributed.process_id,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
    )


def only_process() -> bool:
    """Whether this process trains alone."""
    import jax

    return jax.process_count() == 1


def first_process() -> bool:
    """Whether this process is the one that writes."""
    import jax

    return jax.process_index() == 0


def agreed(reason: str | None) -> str | None:
    """A reason to stop, where any process has one; all processes have to ask at the same step."""
    import jax.experimental.multihost_utils as multihost
    import numpy as np

    votes = multihost.process_allgather(np.array([reason is not None]))
    return (reason or "stopped by another process") if votes.any() else None


def broadcast_from_first(number: int) -> int:
    """The number of the first process, once all processes are here."""
    if only_process():
        return number
    import jax.experimental.multihost_utils as multihost
    import numpy as np

    return int(multihost.broadcast_one_to_all(np.int64(number)))


def gathered(own: bytes) -> list[bytes]:
    """The bytes of all processes, the first one first; all send equally many and wait."""
    if only_process():
        return [own]
    import jax.experimental.multihost_utils as multihost
    import numpy as np

    rows = multihost.process_allgather(np.frombuffer(own, np.uint8))
    return [np.asarray(row).tobytes() for row in rows]


def supervised(main: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Runs `main(arguments)` in a child and returns its exit code.

    A process that loses a peer is aborted by JAX in C++, without a word of ours: the parent sees
    it and reports it.
    """
    child = multiprocessing.get_context("spawn").Process(target=_child, args=(main, arguments))

    def forward(number: int, frame: Any) -> None:
        if child.pid is not None:
            os.kill(child.pid, number)

    child.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    child.join()
    code = child.exitcode
    assert code is not None
    if code >= 0:
        return code
    print(
        "fm-distill: the training failed: this process was ended by "
        f"{signal.Signals(-code).name}, as JAX does when another process of the run no longer "
        "responds; find out what ended that one, then start all of them again: the run continues "
        "from its newest checkpoint",
        file=sys.stderr,
    )
    return EXIT_TRAINING_FAILED


def _child(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    # A terminal's interrupt goes to the whole group; the parent passes it on, once.
    os.setpgrp()
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(EXIT_TRAINING_FAILED)  # killed: an orphan would hold up its peers

    threading.Thread(target=watch, daemon=True).start()
    main(arguments)
