"""Seconds from the command to its first new step: cold, and when it comes back.

    python tools/bench_startup.py experiments/digits_teacher.py [--any.config.field VALUE ...]

Cold begins a run in a new workdir; warm continues it, and copied continues a copy of it elsewhere,
with the compiled programs that came along. One run each, in this order.
"""

import pathlib
import signal
import sys
import tempfile
import time

from disturb import TIMEOUT_S, Watched

SAID = "the first new step ended"


def seconds_to_first_step(experiment: pathlib.Path, workdir: pathlib.Path, *options: str) -> float:
    """Starts the run, or continues it, and stops it politely after its first step."""
    run = Watched(experiment, workdir, *options)
    if not run.until(lambda x: SAID in x.text()):
        raise SystemExit(run.text())
    seconds = time.monotonic() - run.started
    run.process.send_signal(signal.SIGTERM)
    run.process.wait(timeout=TIMEOUT_S)
    return seconds


def main(arguments: list[str]) -> None:
    if not arguments:
        raise SystemExit(__doc__)
    experiment, options = pathlib.Path(arguments[0]).absolute(), arguments[1:]
    with tempfile.TemporaryDirectory() as name:
        first, second = pathlib.Path(name) / "run", pathlib.Path(name) / "copy"
        cold = seconds_to_first_step(experiment, first, *options)
        warm = seconds_to_first_step(experiment, first, *options)
        copied = seconds_to_first_step(experiment, second, "--resume-from", str(first), *options)
    print("| start | seconds to the first new step |\n|---|---|")
    for what, seconds in (("cold", cold), ("warm", warm), ("a copy elsewhere", copied)):
        print(f"| {what} | {seconds:.1f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
