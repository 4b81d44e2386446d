"""The command `fm-distill plan`."""

import dataclasses
import json

from fm_distill.cli.command import first_experiment
from fm_distill.errors import EXIT_COMPLETE, EXIT_DOES_NOT_FIT, UserError
from fm_distill.preparation.parse_options import OverConfig, parse_over


@dataclasses.dataclass(frozen=True)
class _Plan(OverConfig):
    """Whether the run compiles and fits on a topology, and how long it would take."""

    topology: str = ""
    """What to plan for: v3-8, v5e-8, cpu:8, ...; a wrong one lists all."""
    max_hours: float = 9.0
    """How long a session may be."""
    weekly_hours: float = 20.0
    """Hours on the accelerator available per week."""
    num_examples: int | None = None
    """Training examples, where the experiment does not give them."""
    by_operation: bool = False
    """Print the lines of code whose operations move the most memory too."""
    json: bool = False
    """Print one JSON object."""


def plan_command(arguments: list[str]) -> int:
    experiment, experiment_config, remaining = first_experiment(
        arguments, "plan EXPERIMENT.py --topology v3-8"
    )
    options = parse_over(_Plan, experiment_config, remaining, f"plan {experiment}")
    if not options.topology:
        raise UserError("plan needs --topology: v3-8, v5e-8, cpu:8, ...")
    for option, value in {
        "max-hours": options.max_hours,
        "weekly-hours": options.weekly_hours,
        "num-examples": options.num_examples,
    }.items():
        if value is not None and not value > 0:
            raise UserError(f"--{option} is {value}; expected a number above zero")
    from fm_distill.planning.plan import plan
    from fm_distill.planning.plan_text import movers_text, text

    run_plan = plan(
        options.config,
        options.topology,
        max_hours=options.max_hours,
        weekly_hours=options.weekly_hours,
        num_examples=options.num_examples,
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(run_plan)))
    else:
        print(text(run_plan, options.max_hours, options.weekly_hours))
        if options.by_operation:
            print(movers_text(run_plan))
    return EXIT_COMPLETE if run_plan.fits else EXIT_DOES_NOT_FIT
