"""The command `fm-distill plan`."""

import dataclasses
import json

from fm_distill.cli.options import Settings, first, parse
from fm_distill.errors import EXIT_COMPLETE, EXIT_DOES_NOT_FIT, UserError


@dataclasses.dataclass(frozen=True)
class _Plan:
    config: Settings
    # What to plan for: v3-8, v5e-8, cpu:8, ...; a wrong one lists all.
    topology: str
    # How long a session may be.
    max_hours: float = 9.0
    # Hours that there are in a week.
    weekly_hours: float = 20.0
    # Training examples, where the experiment does not say them.
    num_examples: int | None = None
    # Print one JSON object.
    json: bool = False


def plan_command(arguments: list[str]) -> int:
    from fm_distill.planning.plan import plan
    from fm_distill.planning.plan_text import text
    from fm_distill.training.experiment import load_experiment, resolve_length

    experiment, rest = first(arguments, "plan EXPERIMENT.py --topology v3-8")
    default = load_experiment(experiment)
    asked = parse(_Plan, _Plan(default, ""), rest, f"plan {experiment}")
    if not asked.topology:
        raise UserError("plan needs --topology: v3-8, v5e-8, cpu:8, ...")
    for option, value in {
        "max-hours": asked.max_hours,
        "weekly-hours": asked.weekly_hours,
        "num-examples": asked.num_examples,
    }.items():
        if value is not None and not value > 0:
            raise UserError(f"--{option} is {value}; expected a number above zero")
    config = resolve_length(default, asked.config)
    found = plan(
        config,
        asked.topology,
        max_hours=asked.max_hours,
        weekly_hours=asked.weekly_hours,
        num_examples=asked.num_examples,
    )
    if asked.json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        print(text(found, asked.max_hours, asked.weekly_hours))
    return EXIT_COMPLETE if found.fits else EXIT_DOES_NOT_FIT
