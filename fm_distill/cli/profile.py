"""The command `fm-distill profile`."""

import dataclasses
import json
import pathlib

from fm_distill.cli.command import first_experiment, first_run
from fm_distill.errors import EXIT_COMPLETE
from fm_distill.preparation.parse_options import OverConfig, parse_over

ADVICE = {
    "input": "input-bound: the device waits for its batches. Keep the data in device memory "
    "(--data.feeding resident), raise --data.workers, or store smaller images",
    "compute": "compute-bound: the device is busy, and its batches are ready in time",
}


@dataclasses.dataclass(frozen=True)
class _Profile(OverConfig):
    """Where the time of a step and the memory of a run go."""

    measured_steps: int = 20
    """Steps that are measured."""
    trace: str | None = None
    """Record the steps into this folder, for Perfetto and TensorBoard's profiler."""
    json: bool = False
    """Print one JSON object."""


def profile_command(arguments: list[str]) -> int:
    usage = "profile EXPERIMENT.py|DIR"
    is_run = bool(arguments) and pathlib.Path(arguments[0]).is_dir()
    target, base_config, remaining = (first_run if is_run else first_experiment)(arguments, usage)
    options = parse_over(_Profile, base_config, remaining, f"profile {target}")

    from fm_distill.runs.run_code import refuse_code_of_run
    from fm_distill.runs.workdir import Workdir
    from fm_distill.training.profile import Profile, profile

    if is_run:
        refuse_code_of_run(Workdir(target).stored(), pathlib.Path(target), config=options.config)
    workdir = target if is_run else str(pathlib.Path("runs", options.config.name))
    run_profile: Profile = profile(options.config, workdir, options.measured_steps, options.trace)
    if options.json:
        print(json.dumps(dataclasses.asdict(run_profile)))
        return EXIT_COMPLETE
    print("\n".join(_lines(dataclasses.asdict(run_profile))))
    if options.trace:
        print(
            f"the trace is in {options.trace}: open perfetto_trace.json.gz at ui.perfetto.dev, or"
        )
        print(f"tensorboard --logdir {options.trace}")
    return EXIT_COMPLETE


def _lines(found: dict) -> list[str]:
    step_ms = found["step_ms"]

    def row(label: str, milliseconds: float) -> str:
        return f"  {label:<34}{milliseconds:>10.2f} ms{milliseconds / step_ms:>8.0%}"

    title = (
        f"{found['name']}: {found['steps']} steps on {found['devices']} x {found['device']}, "
        f"{found['feeding']}; {found['images_per_second']:,.0f} images/s"
    )
    lines = [
        title,
        row("one step, end to end", step_ms),
        row("of that, waiting for the batch", found["wait_ms"]),
        "as separate programs:",
        *(row(name, found[f"{name}_ms"]) for name in ("views", "targets", "student", "update")),
        "on the host, per batch, in one thread:",
        *(row(name, found[f"{name}_ms"]) for name in ("reading", "decoding", "logging")),
        row("all readers together", found["feeding_ms"]),
        "memory over all devices:",
        *(f"  {name:<34}{count / 1e6:>10,.1f} MB" for name, count in found["memory_bytes"].items()),
    ]
    if found["temporary_bytes"] is not None:
        lines.append(f"  {'temporary, per device':<34}{found['temporary_bytes'] / 1e6:>10,.1f} MB")
    return [*lines, f"compiled in {found['compile_s']:.1f} s", ADVICE[found["bound"]]]
