"""One function of `bench`, in a process of its own: opened first, then timed whenever it is asked.

Each line that comes in is a number of seconds; each that goes out is JSON.
"""

import dataclasses
import os
import pathlib
import re
import resource
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Float, UInt8

from fm_distill.errors import UserError
from fm_distill.evaluation.inference import teachers_of_run
from fm_distill.exporting.load_exported import load_exported
from fm_distill.networks.branch import Branch, make_branch
from fm_distill.networks.cost import WARM_UP, call_ms
from fm_distill.runs.open_run import open_run
from fm_distill.system.device import device_name
from fm_distill.system.foreign_code import trusted_code
from fm_distill.views.rendering import normalise

Pixels = UInt8[Array, "batch resolution resolution 3"]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a process times."""

    path: str
    of: Literal["file", "student", "teacher"]
    number: int  # of a teacher, from 0
    batch_size: int
    threads: int
    trust_code: bool


@dataclasses.dataclass(frozen=True)
class Opened:
    """The first message of a process."""

    network: str
    resolution: int
    runtime: str
    device: str
    started_bytes: int  # resident before it was opened, Python and JAX with it
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Burst:
    """The message of a process about the calls of some seconds."""

    calls_ms: list[float]
    peak_bytes: int


def main() -> None:
    """The process; its one argument is a `Subject` as JSON."""
    # Runtimes print what they like to standard output.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: Opened | Burst) -> None:
        print(msgspec.json.encode(message).decode(), file=output, flush=True)

    subject = msgspec.json.decode(sys.argv[1], type=Subject)
    started_bytes = _memory("VmRSS")
    try:
        with trusted_code(subject.trust_code):
            network, resolution, runtime, call = _open(subject)
        shape = (subject.batch_size, resolution, resolution, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        for _ in range(WARM_UP):
            call(pixels)
    except UserError as error:
        answer(Opened("", 0, "", "", 0, str(error)))
        return
    answer(Opened(network, resolution, runtime, device_name(), started_bytes))
    for line in sys.stdin:
        calls: list[float] = []
        while not calls or sum(calls) < 1e3 * float(line):
            calls.append(call_ms(lambda: call(pixels)))
        answer(Burst(calls, _memory("VmHWM")))


def _open(subject: Subject) -> tuple[str, int, str, Callable[[np.ndarray], Any]]:
    """Network, resolution and runtime of what is timed, and itself. Raises `UserError`."""
    if subject.of == "file":
        exported = load_exported(subject.path, subject.threads)
        batch = exported.facts.batch
        if batch not in ("dynamic", subject.batch_size):
            raise UserError(
                f"{subject.path} takes batches of {batch} images and --batch-size is "
                f"{subject.batch_size}; export it with --batch {subject.batch_size}"
            )
        runtime = exported.runtime
        return exported.card.model, exported.card.resolution, runtime.name, runtime.call
    run = open_run(subject.path)
    network, variables = run.network, run.student.variables
    if subject.of == "teacher":
        teachers = teachers_of_run(run, run.config)
        if not teachers:
            raise UserError("only its recorded outputs are available")
        teacher = teachers[subject.number]
        if teacher.variables is None:
            raise UserError("it is a custom function")
        if not teacher.has_head:
            raise UserError("it has no head, and so no probabilities to compute")
        network, variables = teacher.network, teacher.variables
    precision = run.resolved.precision
    branch = make_branch(network, run.classes, jnp.dtype(precision))
    runtime_name = f"XLA of jax {jax.__version__}, {precision}"
    return network.model, network.resolution, runtime_name, _whole_function(branch, variables)


def _whole_function(branch: Branch, variables: Any) -> Callable[[np.ndarray], np.ndarray]:
    """From uint8 pixels to probabilities, as a file has it, in the form that `predict` runs."""
    frozen = jax.jit(branch.network.freeze)(variables)

    @jax.jit
    def program(frozen: Any, pixels: Pixels) -> Float[Array, "batch classes"]:
        images = normalise(pixels.astype(jnp.float32), branch.input_spec)
        return jax.nn.softmax(branch.network.apply_frozen(frozen, images).logits, axis=-1)

    return lambda pixels: np.asarray(program(frozen, pixels))


def _memory(name: str) -> int:
    """Bytes: `VmRSS`, resident now, or `VmHWM`, the most so far."""
    status = pathlib.Path("/proc/self/status")
    if not status.is_file():  # then the most so far stands for both
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    match = re.search(rf"^{name}:\s*(\d+) kB", status.read_text(), flags=re.MULTILINE)
    assert match is not None
    return int(match.group(1)) * 1024


if __name__ == "__main__":
    main()
