"""Runs `fm-distill` in processes that need not import JAX and its libraries once more.

A command is a fork of a process that has imported them and has not started JAX: it has arguments,
an environment, a folder, output files and an exit code of its own, as if it were started anew.
"""

import dataclasses
import gc
import json
import os
import pathlib
import runpy
import selectors
import signal
import subprocess
import sys
import tempfile

READY = "import command_server; command_server.serve()"


@dataclasses.dataclass
class CommandServer:
    """The process that is forked, started with the first command."""

    environment: dict[str, str]
    process: subprocess.Popen | None = None

    def run(
        self,
        arguments: list[str],
        folder: os.PathLike,
        environment: dict[str, str],
        timeout_s: float,
    ) -> subprocess.CompletedProcess:
        # Those were read when JAX was imported.
        for name in environment | self.environment:
            if name.startswith("JAX_"):
                assert environment.get(name) == self.environment.get(name), name
        if self.process is None:
            path = os.pathsep.join(
                [str(pathlib.Path(__file__).parent), self.environment["PYTHONPATH"]]
            )
            self.process = subprocess.Popen(
                [sys.executable, "-c", READY],
                env=self.environment | {"PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # A buffer would hold the exit code back from `select`.
                bufsize=0,
            )
        with tempfile.TemporaryDirectory() as kept:
            out, err = pathlib.Path(kept, "out"), pathlib.Path(kept, "err")
            request = [arguments, str(folder), environment, str(out), str(err)]
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            child = int(self.process.stdout.readline())
            with selectors.DefaultSelector() as ready:
                ready.register(self.process.stdout, selectors.EVENT_READ)
                timed_out = not ready.select(timeout_s)
            if timed_out:
                os.kill(child, signal.SIGKILL)
            code = int(self.process.stdout.readline())
            done = subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())
        if timed_out:
            raise subprocess.TimeoutExpired(arguments, timeout_s, done.stdout, done.stderr)
        return done


def serve() -> None:
    """Reads one request a line; answers with the child's process number, then its exit code."""
    import fm_distill.cli.main
    import fm_distill.evaluation.evaluate
    import fm_distill.training.train  # noqa: F401

    rare_collections()
    for line in sys.stdin:
        arguments, folder, environment, out, err = json.loads(line)
        child = os.fork()
        if child == 0:
            return command(arguments, folder, environment, out, err)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def rare_collections() -> None:
    """Else an eighth of the time goes into looking for garbage among what libraries hold."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def command(arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str):
    """What the child is: it ends as a process of `python -m fm_distill` does."""
    for descriptor, path, mode in ((0, os.devnull, "r"), (1, out, "w"), (2, err, "w")):
        with open(path, mode) as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder
    sys.argv = ["fm_distill", *arguments]
    runpy.run_module("fm_distill", run_name="__main__", alter_sys=True)
